"""Prints the lowest versions that `pyproject.toml` promises, for `pip -c`.

python .ci/lowest.py > lowest.txt
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def lowest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = [*project["dependencies"], *(x for extra in extras for x in extra)]
    found = [re.fullmatch(r"([\w.-]+)>=([\w.]+)", x) for x in needed]
    return sorted(f"{x[1]}=={x[2]}" for x in found if x)


if __name__ == "__main__":
    print(*lowest(), sep="\n")
