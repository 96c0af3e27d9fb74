"""A tiny classifier, its adapters, and what each gives alone."""

import keras
import numpy as np
from helpers import backend
from helpers import predict
from keras import ops

import keras_vera

INPUTS = 6
CLASSES = 4
# Outputs are of size 1.
ROUNDING = 2e-5
DIFFERENT = 1e-2


def make_classifier(classes=CLASSES, vera=True, dtype=None, **kwargs):
    """Returns a model with a head; the same weights whenever it is made."""
    keras.utils.set_random_seed(0)
    x = keras.Input((3, INPUTS))
    y = keras.layers.Dense(8, activation="tanh", name="up", dtype=dtype)(x)
    y = keras.layers.EinsumDense(
        "abc,cde->abde",
        output_shape=(None, 2, 5),
        activation="tanh",
        name="split",
        dtype=dtype,
    )(y)
    y = keras.layers.Reshape((30,), dtype=dtype)(y)
    backbone = keras.Model(x, y)
    head = keras.layers.Dense(CLASSES, name="head", dtype=dtype)
    model = keras.Model(x, head(backbone(x)))
    rng = np.random.default_rng(5)
    for v in model.weights:
        v.assign(rng.normal(0, 0.4, v.shape))
    if classes != CLASSES:
        kernel, bias = (ops.convert_to_numpy(v) for v in head.weights)
        head = keras.layers.Dense(classes, name="head", dtype=dtype)
        model = keras.Model(x, head(backbone(x)))
        head.kernel.assign(kernel[:, :classes])
        head.bias.assign(bias[:classes])
    if vera:
        kwargs = {"rank": 4, "targets": "all-linear", **kwargs}
        keras_vera.enable_vera(backbone, **kwargs)
    return model


def randomize(model, seed):
    """Gives the vectors and the head of a model random values."""
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        v.assign(rng.normal(0, 0.6, v.shape))


def make_files(folder, names, model=None, **kwargs):
    """Writes a random adapter for each name; returns the files."""
    if model is None:
        model = make_classifier(**kwargs)
    files = {}
    for seed, name in enumerate(names):
        randomize(model, seed + 1)
        files[name] = folder / f"{name}.vera.safetensors"
        keras_vera.save_adapter(model, files[name])
    return files


def make_bank(files, capacity=None, model=None, **kwargs):
    if model is None:
        model = make_classifier(**kwargs)
    bank = keras_vera.AdapterBank(model, capacity or len(files))
    for name, file in files.items():
        bank.load(name, file)
    return bank


def alone(files, x, **kwargs):
    """Returns what each adapter gives by itself; the base under `None`."""
    model = make_classifier(**kwargs)
    outputs = {None: predict(model, x)}
    for name, file in files.items():
        keras_vera.load_adapter(model, file)
        outputs[name] = predict(model, x)
    return outputs


def expected_rows(outputs, adapters):
    return np.stack([outputs[name][i] for i, name in enumerate(adapters)])


def stacks(bank):
    """Returns copies of all that the bank holds, by path."""
    return {
        v.path: np.array(ops.convert_to_numpy(v))
        for v in [*bank.model.trainable_variables, bank.model._classes]
    }


def compile_bank(bank, optimizer, reduction="sum"):
    bank.model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=reduction
        ),
        jit_compile=backend() != "torch",
    )
