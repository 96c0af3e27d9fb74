"""What public docstrings say is so, and their examples run."""

import inspect
import re

import doc_stand_ins
import keras
import pytest
from helpers import backend

import keras_vera

CLASSES_AND_FUNCTIONS = [
    getattr(module, name)
    for module in (keras_vera, keras_vera.layers, keras_vera.callbacks)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
]
METHODS = [
    method
    for name, method in vars(keras_vera.AdapterBank).items()
    if inspect.isfunction(method) and not name.startswith("_")
]
every_call = pytest.mark.parametrize(
    "symbol",
    # The error is raised, not called.
    [
        symbol
        for symbol in CLASSES_AND_FUNCTIONS + METHODS
        if symbol is not keras_vera.AdapterFileError
    ],
    ids=lambda symbol: symbol.__qualname__,
)


def examples(symbol):
    """Returns the blocks of code in a docstring."""
    docstring = inspect.getdoc(symbol)
    return re.findall("^```python\n(.*?)^```$", docstring, re.S | re.M)


def parameters(symbol):
    found = inspect.signature(symbol).parameters
    return {name: x for name, x in found.items() if name != "self"}


@every_call
def test_signatures_are_annotated(symbol):
    for parameter in parameters(symbol).values():
        assert parameter.annotation is not parameter.empty, parameter
    if inspect.isfunction(symbol):
        signature = inspect.signature(symbol)
        assert signature.return_annotation is not signature.empty


@every_call
def test_docstrings_name_every_argument(symbol):
    doc = inspect.getdoc(symbol)
    for name, parameter in parameters(symbol).items():
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        assert f"\n    {stars}{name}: " in doc, name
        default = parameter.default
        if default is not parameter.empty and default is not None:
            text = doc.split(f"\n    {name}: ")[1]
            shown = f'"{default}"' if isinstance(default, str) else default
            assert f"`{shown}`" in text.split("\n    \n")[0], name


@pytest.mark.parametrize(
    "symbol", CLASSES_AND_FUNCTIONS, ids=lambda symbol: symbol.__name__
)
def test_everything_public_has_an_example(symbol):
    assert inspect.getdoc(symbol)
    assert examples(symbol) or symbol is keras_vera.AdapterFileError


@pytest.fixture
def restored_distribution():
    before = keras.distribution.distribution()
    yield
    keras.distribution.set_distribution(before)


def in_turn(symbol):
    mark = pytest.mark.in_turn
    if symbol is keras_vera.layout_map:
        is_jax = backend() == "jax"
        mark = pytest.mark.skipif(not is_jax, reason="It is for JAX.")
    return pytest.param(symbol, marks=[mark], id=symbol.__name__)


@pytest.mark.parametrize(
    "symbol", [in_turn(x) for x in CLASSES_AND_FUNCTIONS if examples(x)]
)
def test_examples_run(symbol, tmp_path, monkeypatch, restored_distribution):
    doc_stand_ins.install(monkeypatch, tmp_path)
    names = {"keras": keras, "keras_vera": keras_vera}
    for example in examples(symbol):
        doc_stand_ins.make_files(example)
        compiled = compile(example, symbol.__qualname__, "exec")
        names = doc_stand_ins.given(compiled.co_names) | names
        exec(compiled, names)
