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
        *ROOT.glob("*.md"),
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "benchmarks" / "README.md",
    ]
    if "```" in path.read_text()
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The first line of a block that one backend alone runs.
FOR_BACKEND = re.compile(r"# With KERAS_BACKEND=(\w+)\n")
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
            only = FOR_BACKEND.match(code)
            if only is None or only[1] == backend():
                # A traceback shows the line of the page.
                exec(compile("\n" * line + code, page, "exec"), names)


def run_commands(code):
    if code.startswith(NOT_RUN):
        return
    for line in code.splitlines():
        command, arguments = line[:20], shlex.split(line[20:])
        assert command == "python -m keras_vera", line
        main(arguments)


@pytest.mark.in_turn
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    run(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_block_says_its_language(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[0::2]) <= {"bash", "python", "{eval-rst}"} | {
        fence for fence in fences if fence.startswith("{")
    }
    assert set(fences[1::2]) <= {""}
