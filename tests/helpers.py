import keras
import numpy as np
from keras import ops

from keras_vera.layers._in_place import is_adapted


def adapted(model):
    return [x for x in model._flatten_layers() if is_adapted(x)]


def spoil(model, seed=1, scale=0.5):
    """Gives d and b random values: with b = 0 most equalities hold idly."""
    rng = np.random.default_rng(seed)
    for layer in adapted(model):
        for v in (layer.vera_lambda_d, layer.vera_lambda_b):
            v.assign(rng.normal(0, scale, v.shape).astype("float32"))


def numpy_weights(model):
    return [ops.convert_to_numpy(w).copy() for w in model.weights]


def state(model):
    """All that a failed call must leave alone, in comparable form."""
    layers = model._flatten_layers()
    return (
        [(type(x), x.name, x.trainable, sorted(x.__dict__)) for x in layers],
        [(id(v), v.trainable) for v in model.variables],
        [w.tobytes() for w in numpy_weights(model)],
    )


def predict(model, x):
    return ops.convert_to_numpy(model.predict(x, verbose=0))


def largest_difference(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


def backend():
    return keras.backend.backend()
