"""The code of the README and of the site runs; the site's links lead on."""

import pathlib
import re
import shlex

import doc_stand_ins
import pytest
from helpers import backend

from keras_vera.__main__ import main

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    path
    for path in [
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "benchmarks" / "README.md",
    ]
    if "```" in path.read_text()
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The first line of a block that one backend alone runs.
FOR_BACKEND = re.compile(r"# With KERAS_BACKEND=(\w+)\n")
# The first line of a block that is compiled only, as `tests/devices` runs such.
ELSEWHERE = "# On several devices\n"
# Commands that install, download or take long; other tests run the last two.
NOT_RUN = (
    "pip install ",
    "sphinx-build ",
    'python -c "',
    "python llama.cpp/",
    "python examples/",
    "python benchmarks/",
    "KERAS_BACKEND=",
    "COVERAGE=",
    "HABITS_MINUTES=",
)


def blocks(page):
    """Returns language, code and line number of each block of a page."""
    text = page.read_text()
    return [
        (match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in FENCE.finditer(text)
    ]


def run(page, tmp_path, monkeypatch):
    doc_stand_ins.install(monkeypatch, tmp_path)
    if page.name == "peft.md":
        doc_stand_ins.make_peft_folder()
    names = {"__name__": "page", **doc_stand_ins.data()}
    for language, code, line in blocks(page):
        if language == "bash":
            run_commands(code)
        elif language == "python":
            # A traceback shows the line of the page.
            compiled = compile("\n" * line + code, page, "exec")
            only = FOR_BACKEND.match(code)
            is_ours = only is None or only[1] == backend()
            if is_ours and not code.startswith(ELSEWHERE):
                exec(compiled, names)


def run_commands(code):
    if code.startswith(NOT_RUN):
        return
    for line in code.splitlines():
        command, arguments = line[:20], shlex.split(line[20:])
        assert command == "python -m keras_vera", line
        main(arguments)


def in_turn(page):
    """A page with a block for each backend runs on each of them."""
    is_for_each = FOR_BACKEND.search(page.read_text())
    marks = [] if is_for_each else [pytest.mark.in_turn]
    return pytest.param(page, marks=marks, id=name_of(page))


def name_of(page):
    return str(page.relative_to(ROOT).with_suffix(""))


RUNNING = re.compile("^```python|^python -m keras_vera", re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [in_turn(page) for page in PAGES if RUNNING.search(page.read_text())],
)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    run(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_one_that_is_run(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert not any(fences[1::2])
    languages = {x for x in fences[::2] if not x.startswith("{")}
    assert languages <= {"bash", "python"}
    ours = [language for language, *_ in blocks(page)]
    assert len(ours) == len([x for x in fences[::2] if x in languages])


# Links of a page to files, and to headings in them; the site's own build
# checks those from `docs/`, which are often read as they are.
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))],
    ids=name_of,
)
def test_links_lead_somewhere(page):
    for file, _ in LINK.findall(page.read_text()):
        if file.startswith("tutorials/"):
            # Copied there when the site is built.
            file = f"../examples/{file.removeprefix('tutorials/')}"
        assert (page.parent / file).exists(), file
