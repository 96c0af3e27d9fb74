"""Every private name of Keras that the package uses is still there.

The names are read from the source of `keras_vera/_keras`, so that none can be
forgotten; a release of Keras that drops one fails here, with its name.
"""

import ast
import importlib
import importlib.util
import pathlib
import types

import keras
import pytest
from helpers import backend

from keras_vera import _keras

FOLDER = pathlib.Path(_keras.__file__).parent
MODULES = {
    path.stem: ast.parse(path.read_text())
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem != "__init__"
}
# What no object below has: the module whose source has it, and the backend
# that this is for, if it is for one.
ELSEWHERE = {
    "_getframe": ("sys", None),
    "_h5_entry_group": ("keras.src.saving.saving_lib", None),
    "_cached_spec_generate_fn": (
        "keras_hub.src.models.gemma4.gemma4_causal_lm",
        None,
    ),
    "_initialize_layout": ("keras.src.backend.jax.core", "jax"),
    "_fsdp_flattened": ("torch.distributed.fsdp._common_utils", "torch"),
    "_module_state_mapping": ("torch.distributed._composable_state", "torch"),
    "_DefaultDistributionStrategy": (
        "tensorflow.python.distribute.distribute_lib",
        "tensorflow",
    ),
    "_last_wrapped_list_snapshot": (
        "tensorflow.python.trackable.data_structures",
        "tensorflow",
    ),
    "_track_variables": ("keras.src.backend.torch.layer", "torch"),
    "_modules": ("torch.nn.modules.module", "torch"),
    "_version": ("torch._tensor", "torch"),
}


def imports():
    """Returns `(module, name)` of all imports of private parts."""
    return sorted(
        {
            (node.module, alias.name)
            for tree in MODULES.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and node.module.startswith(("keras.src", "jax._src"))
            for alias in node.names
        }
    )


def attributes_of_imports():
    """Returns `(module, name, attribute)` of what is used of them."""
    found = set()
    for tree in MODULES.values():
        by_name = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and node.module.startswith("keras.src")
            for alias in node.names
        }
        found |= {
            (*by_name[node.value.id], node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in by_name
        }
    return sorted(found)


def private_names():
    """Returns the private attributes that any code of the folder names."""
    found = set()
    for name, tree in MODULES.items():
        module = importlib.import_module(f"keras_vera._keras.{name}")
        in_strings = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.JoinedStr):
                in_strings |= {id(part) for part in node.values}
                found.add(text_of(node, vars(module)))
            elif isinstance(node, ast.Constant) and id(node) not in in_strings:
                found.add(node.value)
    return sorted(
        name
        for name in found
        if isinstance(name, str)
        and name.isidentifier()
        and name.startswith("_")
        and not name.startswith("__")
        and not name.startswith("_vera")  # Our own.
        and name != "_"
    )


def text_of(node, names):
    """Returns an f-string's text, if module constants alone make it."""
    try:
        return eval(compile(ast.Expression(node), "", "eval"), dict(names))
    except NameError:
        return None


def resolve(module, name):
    """Returns what `from module import name` would."""
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(f"{module}.{name}")


def is_for(module):
    """Says whether this backend, or all of them, use a module."""
    others = {"tensorflow", "torch", "jax"} - {backend()}
    return not any(f".{x}." in module or module.startswith(x) for x in others)


@pytest.mark.parametrize("module, name", imports())
def test_import(module, name):
    if is_for(module):
        resolve(module, name)


@pytest.mark.parametrize("module, name, attribute", attributes_of_imports())
def test_attribute_of_import(module, name, attribute):
    if is_for(module):
        assert hasattr(resolve(module, name), attribute)


@pytest.fixture(scope="module")
def objects():
    """One of each kind of Keras' objects that the folder looks into."""
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dropout(0.1)]
    )
    model.compile(keras.optimizers.AdamW(), "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.exclude_from_weight_decay(var_names=["bias"])
    parts = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(), {})
    )
    parts.build(model.trainable_variables)
    modules = [
        resolve(module, name) for module, name in imports() if is_for(module)
    ]
    return [
        model,
        *model.layers,
        *model.weights,
        model.optimizer,
        parts,
        keras.callbacks.EarlyStopping(),
        *(x for x in modules if isinstance(x, types.ModuleType)),
    ]


@pytest.mark.parametrize("name", private_names())
def test_attribute(name, objects):
    if name in ELSEWHERE:
        module, only = ELSEWHERE[name]
        if only in (None, backend()):
            origin = importlib.util.find_spec(module).origin
            assert (
                origin == "built-in" or name in pathlib.Path(origin).read_text()
            )
        return
    assert any(hasattr(x, name) for x in objects), (
        f"Keras has no {name!r} any more, which keras_vera/_keras uses"
    )


def test_the_names_are_found():
    assert ("keras.src.saving", "saving_lib") in imports()
    assert (
        "keras.src.saving",
        "saving_lib",
        "_walk_saveable",
    ) in attributes_of_imports()
    names = private_names()
    for name in (
        "_layers",  # layer._layers
        "_h5_entry_group",  # getattr(store, "_h5_entry_group", None)
        "_exclude_from_weight_decay_cache",  # f"{_EXCLUDED}_cache"
    ):
        assert name in names
    assert set(ELSEWHERE) <= set(names)
