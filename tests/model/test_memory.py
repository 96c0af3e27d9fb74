"""What a model no longer has is freed, counted by weak references.

Everything is traced or compiled in each of the cycles, as a server or a tuner
does it for days.
"""

import gc
import weakref

import keras
import numpy as np
import pytest
from helpers import spoil

import keras_vera
from keras_vera.product import projection

SIZE = 4
CYCLES = 30


def make_base():
    return keras.Sequential([keras.Input((SIZE,)), keras.layers.Dense(SIZE)])


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
    keras_vera.enable_vera(model, rank=2, targets="all-linear", **kwargs)
    spoil(model)


def use(model, x, y, cycle):
    """Predicts and trains, by functions that are made for it.

    `predict` and `fit` take long for their loops over data, so most cycles
    call what they call.
    """
    if not model.compiled:
        # XLA takes long, and keeps nothing of a model.
        jit = keras.backend.backend() == "jax"
        optimizer = keras.optimizers.SGD(momentum=0.9)
        model.compile(optimizer, "mse", jit_compile=jit)
        if cycle % 10:
            # Else TensorFlow traces a step twice.
            optimizer.build(model.trainable_variables)
    if cycle % 10 == 0:
        model.predict(x, verbose=0)
        model.fit(x, y, verbose=0)
    else:
        model.predict_on_batch(x)
        model.train_on_batch(x, y)


def references_to(model):
    """Returns weak references to what an adapter and its training made."""
    (layer,) = model.layers
    return [
        weakref.ref(variable)
        for variable in (
            layer.vera_kernel_a,
            layer.vera_kernel_b,
            layer.vera_lambda_b,
            model.optimizer.variables[-1],
        )
    ]


def living(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_models_that_are_gone_leave_nothing(x, count):
    references = []
    for cycle in range(CYCLES):
        model = make_base()
        enable(model)
        use(model, x, x, cycle)
        references += references_to(model)
        references.append(weakref.ref(model.layers[0]._kernel))
        del model
    assert living(references) == 0
    assert count() == 0


def test_cycles_on_one_model_leave_the_base(x, count, tmp_path):
    model = make_base()
    path = tmp_path / "a.vera.safetensors"
    base = [np.array(w) for w in model.get_weights()]
    references = []
    for cycle in range(CYCLES):
        if cycle % 2 == 0:
            enable(model)
            keras_vera.save_adapter(model, path)
        else:
            keras_vera.load_adapter(model, path)
        use(model, x, x, cycle)
        references += references_to(model)
        if cycle % 10 == 0:
            # To collect garbage takes long.
            assert living(references) == 4
        if cycle % 3 == 0:
            keras_vera.merge(model)
            model.set_weights(base)
        else:
            keras_vera.disable_vera(model)
    use(model, x, x, 0)
    assert living(references) == 0
    assert count() == 0


def test_banks_that_are_gone_leave_nothing(x, count):
    references = []
    for cycle in range(CYCLES):
        model = make_base()
        enable(model)
        bank = keras_vera.AdapterBank(model, capacity=2)
        bank.add("one")
        names = ["one"] * len(x)
        use(bank.model, [x, bank.ids(names)], x, cycle)
        references += map(weakref.ref, model.variables)
        references += map(weakref.ref, bank.model.variables)
        references += map(weakref.ref, bank.model.optimizer.variables)
        del model, bank
    assert living(references) == 0
    assert count() == 0
