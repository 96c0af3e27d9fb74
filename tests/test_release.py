"""What a release needs, and what refuses one that is not ready."""

import pathlib
import re
import runpy
import shutil

import pytest

pytestmark = pytest.mark.in_turn

ROOT = pathlib.Path(__file__).parent.parent
ADDRESS = "https://github.com/somebody/keras_vera"


def run(name):
    return runpy.run_path(str(ROOT / ".ci" / f"{name}.py"))


problems = run("check_release")["problems"]


@pytest.fixture
def ready(tmp_path):
    """Sources that are ready to be released as 1.2.3."""
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    edit(tmp_path / "pyproject.toml", r'^version = ".*"', 'version = "1.2.3"')
    edit(tmp_path / "CITATION.cff", "^version: .*", "version: 1.2.3")
    for path in ("pyproject.toml", "CITATION.cff", "examples/*.ipynb"):
        for file in tmp_path.glob(path):
            edit(file, r"https://github\.com/OWNER/keras_vera", ADDRESS)
    edit(
        tmp_path / "CHANGELOG.md",
        r"^## \[Unreleased\]",
        "## [Unreleased]\n\n## [1.2.3] - 2026-12-01",
    )
    return tmp_path


def edit(file, pattern, new):
    text, count = re.subn(pattern, new, file.read_text(), flags=re.MULTILINE)
    assert count
    file.write_text(text)


def test_ready_sources_are_released(ready):
    assert problems("v1.2.3", ready) == []


def test_these_sources_are_not_while_they_have_no_address():
    found = " ".join(problems("v0.1.0.dev0"))
    assert "placeholder" in found
    assert "one of a release" in found


@pytest.mark.parametrize(
    "file, pattern, new, problem",
    [
        ("pyproject.toml", "1.2.3", "1.2.3.dev0", "one of a release"),
        ("pyproject.toml", "somebody", "OWNER", "placeholder"),
        ("pyproject.toml", "somebody", "other", "another address"),
        ("CHANGELOG.md", r"\[1.2.3\]", "[1.2.2]", "CHANGELOG.md"),
        ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff"),
    ],
)
def test_what_is_not_ready_is_refused(ready, file, pattern, new, problem):
    edit(ready / file, pattern, new)
    assert problem in " ".join(problems("v1.2.3", ready))


def test_tag_of_another_version_is_refused(ready):
    (problem,) = problems("v1.2.4", ready)
    assert "v1.2.3" in problem and "v1.2.4" in problem


def test_lowest_versions_are_those_that_pyproject_promises():
    found = run("lowest")["lowest"]()
    assert {"keras", "numpy", "safetensors", "keras-hub", "jax"} <= {
        line.partition("==")[0] for line in found
    }
    text = (ROOT / "pyproject.toml").read_text()
    for line in found:
        assert f'"{line.replace("==", ">=")}"' in text


def test_actions_are_pinned_by_hash():
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = re.findall(
        r"uses: (\S+)(.*)", "\n".join(file.read_text() for file in files)
    )
    assert used
    for action, comment in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v[\d.]+", comment), action
