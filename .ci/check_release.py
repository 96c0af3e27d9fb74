"""Refuses to release what is not ready for it.

    python .ci/check_release.py v1.2.3

Prints what is wrong, each on a line, and exits with 1; else prints nothing.
"""

import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def problems(tag, root=ROOT):
    """Returns what keeps the sources from being released under a tag."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version = project["version"]
    found = []
    if tag != f"v{version}":
        found.append(
            f"The tag must be v and the version of pyproject.toml, v{version}. "
            f"Received: {tag}"
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        found.append(
            "`version` in pyproject.toml must be one of a release, such as "
            f"1.2.3. Received: {version}"
        )
    for name, address in project["urls"].items():
        if "OWNER" in address:
            found.append(
                f"`{name}` of [project.urls] in pyproject.toml is a "
                f"placeholder, {address}. Write the address of the repository "
                "there, and run `python .ci/notebooks.py`."
            )
    for notebook in sorted((root / "examples").glob("*.ipynb")):
        if project["urls"]["Repository"] not in notebook.read_text():
            found.append(
                f"{notebook.name} has another address than pyproject.toml. "
                "Run `python .ci/notebooks.py`."
            )
    if f"\n## [{version}] - " not in (root / "CHANGELOG.md").read_text():
        found.append(f"CHANGELOG.md has no section `## [{version}] - DATE`.")
    citation = (root / "CITATION.cff").read_text()
    if f"\nversion: {version}\n" not in citation:
        found.append(f"CITATION.cff does not say `version: {version}`.")
    if f"\nrepository-code: {project['urls']['Repository']}\n" not in citation:
        found.append("CITATION.cff has another address than pyproject.toml.")
    return found


if __name__ == "__main__":
    found = problems(sys.argv[1])
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
