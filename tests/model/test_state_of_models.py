"""What models and optimizers keep while their layers change."""

import copy
import gc
import subprocess
import sys

import keras
import numpy as np
import pytest
import scripts
from helpers import adapted
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from keras import ops

import keras_vera
from keras_vera import _keras

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

DECAY = 0.5
RATE = 0.1


def make_base():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )


def enable(model):
    keras_vera.enable_vera(model, rank=4, targets="all-linear")


@pytest.fixture
def data(rng):
    x = rng.normal(size=(8, 6)).astype("float32")
    return x, rng.normal(size=(8, 3)).astype("float32")


@pytest.fixture
def frozen_heap():
    """`gc.freeze`, as forking servers call it."""
    yield gc.freeze
    gc.unfreeze()


def train(model, data):
    model.fit(*data, batch_size=8, epochs=2, verbose=0)


# ---- Models are found.


def test_frozen_models_are_found(data, frozen_heap):
    x, _ = data
    model = make_base()
    outer = keras.Sequential([keras.Input((6,)), model])
    for each in (model, outer):
        each.compile("sgd", "mse")
        predict(each, x)
    train(model, data)
    base, values = model.weights, numpy_weights(model)
    frozen_heap()
    enable(model)
    train(model, data)
    for weight, value in zip(base, values, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)
    for layer in adapted(model):
        assert largest_difference(layer.vera_lambda_b, 0) > 1e-4
    spoil(model)
    for each in (model, outer):
        fresh = ops.convert_to_numpy(each(x))
        assert largest_difference(predict(each, x), fresh) < 1e-5


class WithNew(keras.Model):
    def __new__(cls, size):
        return super().__new__(cls)

    def __init__(self, size):
        super().__init__()
        self.dense = keras.layers.Dense(size)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {"size": self.dense.units}

    def __eq__(self, other):
        raise NotImplementedError


def test_all_kinds_of_models_are_found(tmp_path):
    model = make_base()
    inputs = keras.Input((6,))
    made = [model, WithNew(3), keras.Model(inputs, model(inputs))]
    made.append(keras.models.clone_model(model))
    made.append(copy.deepcopy(model))
    made.append(type(model).from_config(model.get_config()))
    model.save(tmp_path / "model.keras")
    made.append(keras.models.load_model(tmp_path / "model.keras"))
    found = {id(x) for x in _keras.living_models()}
    assert all(id(x) in found for x in made)
    numbers = [id(x) for x in made]
    del model, made, inputs
    gc.collect()
    assert not any(id(x) in numbers for x in _keras.living_models())


def test_instances_that_were_never_initialized_do_not_matter(data):
    classes = keras.Model, keras.Sequential, type(make_base())
    kept = [cls.__new__(cls) for cls in classes]
    model = make_base()
    enable(model)
    spoil(model)
    fresh = ops.convert_to_numpy(model(data[0]))
    assert largest_difference(predict(model, data[0]), fresh) < 1e-5
    assert len(kept) == 3


def test_models_from_before_the_import_are_found():
    code = """
import gc
import keras
import numpy as np

model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
x = np.ones((2, 6), "float32")
base = model.predict(x, verbose=0)
gc.freeze()
import keras_vera
keras_vera.enable_vera(model, rank=4, targets="all-linear")
model.layers[0].vera_lambda_b.assign(np.ones(3))
assert abs(model.predict(x, verbose=0) - base).max() > 1e-2
assert gc.get_freeze_count() > 0
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=scripts.environment()
    )


# ---- Optimizers start again, and are what they were.


def excluding_adamw(**kwargs):
    optimizer = keras.optimizers.AdamW(RATE, weight_decay=DECAY, **kwargs)
    optimizer.exclude_from_weight_decay(var_names=["bias", "vera_lambda"])
    return optimizer


def steps_of(model, data):
    """Returns the largest relative loss of each variable in one step."""
    for v in model.trainable_variables:
        v.assign(np.full(v.shape, 100.0))
    model.fit(*data, batch_size=8, verbose=0)
    return {
        v.name: float(np.max(100 - ops.convert_to_numpy(v)))
        for v in model.trainable_variables
    }


def assert_decays(model, data, expected):
    # A step of Adam is at most the rate, and a decay half of it times 100.
    for name, step in steps_of(model, data).items():
        assert (step > 2 * RATE) == (name in expected), (name, step)


@pytest.mark.parametrize("undo", ["disable_vera", "merge"])
def test_weight_decay_excludes_what_it_did(data, undo):
    model = make_base()
    optimizer = excluding_adamw()
    model.compile(optimizer, "mse")
    assert_decays(model, data, {"kernel"})
    enable(model)
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 0
    assert_decays(model, data, set())
    assert int(optimizer.iterations) == 1
    getattr(keras_vera, undo)(model)
    assert_decays(model, data, {"kernel"})


def test_exclusions_of_variables_stay_with_them(data):
    model = make_base()
    optimizer = keras.optimizers.AdamW(RATE, weight_decay=DECAY)
    kernel = model.layers[0].kernel
    bias = model.layers[0].bias
    optimizer.exclude_from_weight_decay(var_list=[kernel])
    model.compile(optimizer, "mse")
    train(model, data)
    enable(model)
    assert_decays(model, data, {"vera_lambda_d", "vera_lambda_b"})
    keras_vera.disable_vera(model)
    train(model, data)
    assert not optimizer._use_weight_decay(kernel)
    assert optimizer._use_weight_decay(bias)


class Custom(keras.optimizers.SGD):
    """With a variable that the constructor makes, and one of `build`."""

    def __init__(self, learning_rate=RATE, name="custom", **kwargs):
        super().__init__(learning_rate, name=name)
        self.steps = self.add_variable((), name="steps")

    def update_step(self, gradient, variable, learning_rate):
        self.assign_add(self.steps, 1.0)
        super().update_step(gradient, variable, learning_rate)


MAKE = {
    "sgd": lambda: keras.optimizers.SGD(RATE, momentum=0.9),
    "nadam": lambda: keras.optimizers.Nadam(RATE),
    "accumulation": lambda: keras.optimizers.Adam(
        RATE, gradient_accumulation_steps=2
    ),
    "average": lambda: keras.optimizers.Adam(RATE, use_ema=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(RATE)
    ),
    "multi": lambda: keras_vera.vera_optimizer(),
    "function": lambda: keras.optimizers.MultiOptimizer(
        lambda variable: keras.optimizers.Adam(RATE)
    ),
    "custom": Custom,
}


@pytest.mark.parametrize("name", MAKE)
def test_optimizers_start_again_as_if_new(data, name):
    def weights(optimizer, fit_before):
        keras.utils.set_random_seed(5)
        model = make_base()
        model.compile(optimizer, "mse")
        if fit_before:
            start = model.get_weights()
            train(model, data)
            model.set_weights(start)
        enable(model)
        spoil(model)
        train(model, data)
        assert model.optimizer is optimizer
        return numpy_weights(model), optimizer

    expected, new = weights(MAKE[name](), False)
    received, optimizer = weights(MAKE[name](), True)
    for one, other in zip(received, expected, strict=True):
        assert largest_difference(one, other) < 1e-6
    shapes = [tuple(v.shape) for v in new.variables]
    assert [tuple(v.shape) for v in optimizer.variables] == shapes
    if name == "custom":
        assert float(optimizer.steps) > float(new.steps)


def test_the_learning_rate_stays_where_it_is(data):
    model = make_base()
    optimizer = keras.optimizers.Adam(RATE)
    optimizer.note = "mine"
    model.compile(optimizer, "mse")
    train(model, data)
    optimizer.learning_rate = 0.025
    enable(model)
    train(model, data)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
    assert model.optimizer.note == "mine"


def test_an_optimizer_of_another_model_goes_on(data):
    optimizer = excluding_adamw()
    model, other = make_base(), make_base()
    for each in (other, model):
        each.compile(optimizer, "mse")
    train(other, data)
    enable(model)
    assert other.optimizer is optimizer and model.optimizer is not optimizer
    train(other, data)
    assert int(optimizer.iterations) == 4
    assert_decays(model, data, set())
    assert_decays(other, data, {"kernel"})
