"""Models of `tf.distribute`, in a process with two devices."""

import subprocess
import sys

import pytest
from helpers import backend

if backend() != "tensorflow":
    pytest.skip("`tf.distribute` is TensorFlow's.", allow_module_level=True)

START = """
import keras
import numpy as np
import tensorflow as tf

import keras_vera

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
# As in this process: graphs run once or twice.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
rng = np.random.default_rng(0)
x = rng.normal(size=(8, 6)).astype("float32")
y = rng.normal(size=(8, 3)).astype("float32")


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def fit(model):
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)


def vectors(model):
    return [v.numpy() for v in model.trainable_variables]
"""

FIT = """
import tempfile

one = make_model()
with strategy.scope():
    both = make_model()
fit(one)
fit(both)
for model in (one, both):
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    fit(model)
assert len(vectors(both)) == 4
for a, b in zip(vectors(one), vectors(both)):
    np.testing.assert_allclose(a, b, atol=1e-5)
assert np.abs(vectors(both)[1]).max() > 1e-3
expected = both.predict(x, verbose=0)
np.testing.assert_allclose(expected, one.predict(x, verbose=0), atol=1e-5)
with tempfile.TemporaryDirectory() as folder:
    path = folder + "/one.vera.safetensors"
    keras_vera.save_adapter(both, path)
    keras_vera.disable_vera(both)
    keras_vera.load_adapter(both, path)
np.testing.assert_allclose(
    both.predict(x, verbose=0), expected, atol=1e-6
)
keras_vera.disable_vera(both)
keras_vera.enable_vera(both, rank=4, targets="all-linear", dropout=0.5)
fit(both)
keras_vera.merge(both)
fit(both)
with strategy.scope():
    public = keras.Sequential(
        [keras.Input((6,)), keras_vera.layers.VeRADense(3, rank=4)]
    )
    public.compile("sgd", "mse")
fit(public)
"""

ELSEWHERE = """
model = make_model()
before = [(v.path, v.trainable) for v in model.variables]
with strategy.scope():
    try:
        keras_vera.enable_vera(model, rank=4, targets="all-linear")
    except ValueError as error:
        assert "must be made where it is adapted" in str(error)
    else:
        raise AssertionError
assert [(v.path, v.trainable) for v in model.variables] == before
"""


ONE_DEVICE = """
one, here = make_model(), tf.distribute.OneDeviceStrategy("CPU:0")
keras_vera.enable_vera(one, rank=4, targets="all-linear")
fit(one)
with here.scope():
    model = make_model()
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
fit(model)
for a, b in zip(vectors(one), vectors(model)):
    np.testing.assert_allclose(a, b, atol=1e-6)
"""


def test_mirrored_models():
    done = subprocess.run(
        [sys.executable, "-c", START + FIT + ELSEWHERE + ONE_DEVICE],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
