"""How Sphinx builds the site; CONTRIBUTING.md has the command."""

import inspect
import os
import pathlib
import re
import shutil
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
# Autodoc imports the package, for which any backend does.
os.environ.setdefault("KERAS_BACKEND", "jax")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
author = "the keras_vera authors"
release = PROJECT["version"]
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"keras_vera {release}"
html_static_path = ["_static"]

# Links to headings, `page.md#heading`, must lead somewhere.
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline", "colon_fence"]
# The tests run the examples; the site shows their text and code.
nb_execution_mode = "off"

# Docstrings name the types of arguments, so that signatures need not.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Input shape", "Output shape"]
# Single backticks are code in Keras' docstrings.
default_role = "code"


def rst_of(lines):
    """Returns a docstring in Keras' style as reStructuredText for Napoleon."""
    text = "\n".join(lines)
    text = re.sub(
        r"^(Example|Reference)s?:$", r".. rubric:: \1", text, flags=re.M
    )
    text = re.sub(r"\[([^]`]+)\]\((http[^)\s]+)\)", r"`\1 <\2>`__", text)
    return re.sub(
        r"^```(\w+)\n(.*?)^```$",
        lambda x: (
            f".. code-block:: {x[1]}\n\n"
            + re.sub("^(?=.)", "    ", x[2], flags=re.M)
        ),
        text,
        flags=re.DOTALL | re.MULTILINE,
    ).splitlines()


def process_signature(app, what, name, obj, options, signature, returns):
    """Gives classes the arguments that they take.

    Autodoc would find those of `__new__`, which takes any in Keras' layers.
    """
    if what != "class":
        return None
    _, *parameters = inspect.signature(obj.__init__).parameters.values()
    shown = [x.replace(annotation=x.empty) for x in parameters]
    return str(inspect.Signature(shown)), None


def process_docstring(app, what, name, obj, options, lines):
    lines[:] = rst_of(lines)


def copy_notebooks(app):
    """Sphinx reads what lies below its folder, and the examples do not."""
    folder = HERE / "tutorials"
    folder.mkdir(exist_ok=True)
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        shutil.copy(notebook, folder)


def setup(app):
    # Before Napoleon, which has the priority 500.
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("builder-inited", copy_notebooks)
