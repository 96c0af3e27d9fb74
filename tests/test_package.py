import ast
import pathlib
import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata

import keras
import pytest

import keras_vera
from keras_vera import _version


def run(script):
    script = textwrap.dedent(script)
    return subprocess.check_output([sys.executable, "-c", script], text=True)


def test_core_trains_without_kerashub_and_other_backends():
    backend = keras.backend.backend()
    absent = {"tensorflow", "torch", "jax"} - {backend}
    run(
        f"""
        import sys
        from importlib.machinery import ModuleSpec

        class Absent:
            # Finds the modules, and fails to import them.
            def find_spec(name, path=None, target=None):
                if name in {sorted(absent)} + ["keras_hub", "tensorflow_text"]:
                    return ModuleSpec(name, Absent)

            def create_module(spec):
                raise ModuleNotFoundError(spec.name, name=spec.name)

            def exec_module(module):
                pass

        sys.meta_path.insert(0, Absent)
        import numpy as np
        import keras
        import keras_vera
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        keras_vera.enable_vera(model, rank=2, targets="all-linear")
        model.compile(keras_vera.vera_optimizer(), "mse")
        model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
        assert keras.ops.max(keras.ops.abs(model.layers[0].vera_lambda_b)) > 0
        """
    )


def test_import_adds_only_our_own_to_keras():
    added = run(
        """
        import sys
        import keras
        before = set(sys.modules)
        import keras_vera
        print(*{name.partition(".")[0] for name in set(sys.modules) - before})
        """
    ).split()
    heavy = {"huggingface_hub", "keras_hub", "peft", "rich", "transformers"}
    heavy |= {"tensorflow", "torch", "jax"} - {keras.backend.backend()}
    assert "keras_vera" in added and not heavy & set(added)


PYPROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture
def not_installed(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def test_source_tree_that_is_not_installed_has_a_version(not_installed):
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert _version.version() == project["version"]


def test_folder_without_a_version_says_how_to_install(
    not_installed, monkeypatch, tmp_path
):
    file = tmp_path / "keras_vera" / "_version.py"
    monkeypatch.setattr(_version, "__file__", str(file))
    with pytest.raises(ImportError, match="pip install -e"):
        _version.version()


# Each folder imports from those before it; see CONTRIBUTING.md.
FOLDERS = ["_keras", "product", "layers", "model", "files", "peft", "bank"]


def test_folders_import_one_way():
    root = pathlib.Path(keras_vera.__file__).parent
    assert {path.parent.name for path in root.glob("*/*.py")} == {*FOLDERS}
    for path in root.glob("*/*.py"):
        allowed = FOLDERS[: FOLDERS.index(path.parent.name) + 1]
        allowed = [*allowed, "_types", "_version"]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{x.name}" for x in node.names]
            else:
                continue
            for name in names:
                package, *folders = name.split(".")
                if package == "keras_vera":
                    assert folders[0] in allowed, (path, name)
