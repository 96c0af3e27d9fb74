"""Data and a tiny model, the same in every process."""

import keras
import numpy as np

import keras_vera

_rng = np.random.default_rng(0)
x = _rng.normal(size=(16, 8)).astype("float32")
y = _rng.normal(size=(16, 4)).astype("float32")
# Its outputs are about twice as large as its inputs.
LARGE = keras.initializers.RandomNormal(stddev=0.7, seed=0)


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, "tanh", kernel_initializer=LARGE, name="up"),
            keras.layers.Dense(4, name="down"),
        ]
    )
    # Reads the kernels, wherever they are.
    model.compile(keras_vera.vera_optimizer(0.01, 0.01), "mse")
    return model
