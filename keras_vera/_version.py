"""The version, which `pyproject.toml` alone says."""

import pathlib
import tomllib
from importlib import metadata


def version() -> str:
    """Returns the version of the package, installed or in its source tree."""
    try:
        return metadata.version("keras_vera")
    except metadata.PackageNotFoundError:
        file = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    if not file.exists():
        raise ImportError(
            "keras_vera is not installed: Python knows no version of it, and "
            f"there is no {file}. Run `pip install -e .` in its source tree."
        )
    return tomllib.loads(file.read_text())["project"]["version"]
