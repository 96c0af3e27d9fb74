"""What a model no longer has is freed, counted by weak references."""

import gc
import weakref

import keras
import pytest
from helpers import predict
from helpers import spoil

import keras_vera
from keras_vera.product import projection

SIZE = 8
CYCLES = 30


def make_base():
    return keras.Sequential(
        [
            keras.Input((SIZE,)),
            keras.layers.Dense(SIZE, activation="tanh"),
            keras.layers.Dense(SIZE),
        ]
    )


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, SIZE)).astype("float32")


@pytest.fixture
def count():
    """Returns a function that says how many pairs of A and B are alive."""
    gc.collect()
    before = weakref.WeakSet(projection._projections)

    def count():
        gc.collect()
        return len([p for p in projection._projections if p not in before])

    return count


def enable(model, **kwargs):
    keras_vera.enable_vera(model, rank=4, targets="all-linear", **kwargs)
    spoil(model)


def fit(model, x, **kwargs):
    if not model.compiled:
        model.compile("adam", "mse", **kwargs)
    model.fit(x, x, verbose=0)


@pytest.mark.parametrize("use", [predict, fit], ids=["predict", "fit"])
def test_models_that_are_gone_leave_nothing(use, x, count):
    variables = []
    for _ in range(3):
        model = make_base()
        enable(model)
        use(model, x)
        layer = model.layers[-1]
        variables += map(weakref.ref, [layer.vera_kernel_a, layer._kernel])
        del model, layer
    assert count() == 0
    assert [v for v in variables if v() is not None] == []


def pairs_of(model):
    """Returns weak references to A and B of the first layer."""
    layer = model.layers[0]
    return [weakref.ref(layer.vera_kernel_a), weakref.ref(layer.vera_kernel_b)]


def living(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


UNDO = {"disable": keras_vera.disable_vera, "merge": keras_vera.merge}


@pytest.mark.parametrize("undo", UNDO)
def test_cycles_on_one_model_leave_the_base(undo, x, count):
    model = make_base()
    references = []
    for cycle in range(CYCLES):
        enable(model)
        references += pairs_of(model)
        # Compiling takes long, and what it leaves would be left every time.
        if cycle % 15 == 0:
            predict(model, x)
            fit(model, x)
            assert living(references) == 2
        else:
            model(x)
        UNDO[undo](model)
    assert living(references) == 0
    assert count() == 0


def test_cycles_of_loading_leave_the_last_adapter(x, count, tmp_path):
    model = make_base()
    enable(model)
    keras_vera.save_adapter(model, tmp_path / "one.vera.safetensors")
    keras_vera.disable_vera(model)
    references = []
    for cycle in range(CYCLES):
        keras_vera.load_adapter(model, tmp_path / "one.vera.safetensors")
        references += pairs_of(model)
        if cycle % 15 == 0:
            predict(model, x)
            assert living(references) == 2
        keras_vera.disable_vera(model)
    assert living(references) == 0
    assert count() == 0


def test_banks_that_are_gone_leave_nothing(x, count):
    references = []
    for cycle in range(3):
        model = make_base()
        enable(model)
        bank = keras_vera.AdapterBank(model, capacity=2)
        bank.add("one")
        if cycle % 2 == 0:
            bank.predict(x, adapters=["one"] * len(x))
        references += pairs_of(model)
        references += map(weakref.ref, bank.model.variables)
        del model, bank
    assert living(references) == 0
    assert count() == 0


def test_optimizers_leave_the_state_of_vectors(x):
    model = make_base()
    references = []
    for _ in range(3):
        enable(model)
        fit(model, x)
        references.append(weakref.ref(model.optimizer.variables[-1]))
        keras_vera.disable_vera(model)
    fit(model, x)
    assert living(references) == 0
