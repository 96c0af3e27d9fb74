import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import spoil
from keras import ops

import keras_vera


def make_model():
    backbone = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])
    model = keras.Sequential(
        [keras.Input((6,)), backbone, keras.layers.Dense(3, name="head")]
    )
    keras_vera.enable_vera(backbone, rank=4, targets="all-linear")
    return model


def moves(model, optimizer, x, y):
    """Returns the largest step of every trained variable, by name."""
    model.compile(optimizer, "mse")
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    before = [np.array(v) for v in before]
    model.fit(x, y, epochs=1, batch_size=len(x), verbose=0)
    return {
        v.name: np.abs(ops.convert_to_numpy(v) - old).max()
        for v, old in zip(model.trainable_variables, before, strict=True)
    }


@pytest.fixture
def data(rng):
    return rng.normal(size=(8, 6)), rng.normal(size=(8, 3))


def test_each_group_has_its_own_rate(data):
    model = make_model()
    spoil(model)
    steps = moves(
        model,
        keras_vera.vera_optimizer(
            vectors=keras.optimizers.Adam(1e-2),
            rest=keras.optimizers.Adam(1e-4),
        ),
        *data,
    )
    # The first step of Adam has the size of the learning rate.
    for name, step in steps.items():
        rate = 1e-2 if name.startswith("vera_lambda") else 1e-4
        assert step == pytest.approx(rate, rel=0.01), name


def test_schedule_and_names(data):
    model = make_model()
    spoil(model)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [0], [2e-3, 1e-3]
    )
    steps = moves(
        model,
        keras_vera.vera_optimizer(keras.optimizers.Adam(schedule), "adam"),
        *data,
    )
    assert steps["vera_lambda_d"] == pytest.approx(2e-3, rel=0.01)
    assert steps["kernel"] == pytest.approx(1e-3, rel=0.01)


def test_default_trains_a_model_without_head(data):
    x, _ = data
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    steps = moves(model, keras_vera.vera_optimizer(), x, np.ones((8, 3)))
    assert steps["vera_lambda_b"] == pytest.approx(1e-2, rel=0.01)
    assert len(adapted(model)) == 1


def test_state_is_that_of_the_vectors(data):
    model = make_model()
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, verbose=0)
    trained = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert trained == 4 + 8 + (8 * 3 + 3)
    # Two moments in Adam; and counters, rates.
    state = [v for v in model.optimizer.variables if len(v.shape)]
    assert sum(np.prod(v.shape) for v in state) == 2 * trained


def test_state_survives_saving(tmp_path, data):
    model = make_model()
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, verbose=0)
    config = model.optimizer.get_config()
    rebuilt = keras.optimizers.MultiOptimizer.from_config(config)
    assert rebuilt.get_config() == config
    model.save_weights(tmp_path / "model.weights.h5")
    expected = [
        ops.convert_to_numpy(v).copy() for v in model.optimizer.variables
    ]
    model.fit(*data, verbose=0)
    model.load_weights(tmp_path / "model.weights.h5")
    for variable, value in zip(
        model.optimizer.variables, expected, strict=True
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_one_optimizer_for_both_is_refused():
    adam = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="must be two optimizers"):
        keras_vera.vera_optimizer(adam, adam)
