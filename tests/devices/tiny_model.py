"""Data and a tiny model, the same in every process."""

import keras
import numpy as np

_rng = np.random.default_rng(0)
x = _rng.normal(size=(16, 8)).astype("float32")
y = _rng.normal(size=(16, 4)).astype("float32")


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="tanh", name="up"),
            keras.layers.Dense(4, name="down"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model
