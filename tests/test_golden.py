"""Adapters that were made once, and that every later version must load."""

import pathlib

import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import predict
from test_adapter_file import Classifier

import keras_vera

GOLDEN = pathlib.Path(__file__).parent / "golden"


def exact(shape, step):
    """Fractions that are the same on every machine."""
    numbers = np.arange(np.prod(shape)) * step % 101 - 50
    return (numbers / 64).astype("float32").reshape(shape)


def make_base():
    model = Classifier()
    model(np.zeros((2, 5, 8), "float32"))
    for i, weight in enumerate(model.backbone.weights):
        weight.assign(exact(weight.shape, 37 + 2 * i))
    return model


X = exact((3, 5, 8), 29)


def make(structure):
    """How the files were made. They are not made again."""
    model = make_base()
    keras_vera.enable_vera(
        model, rank=6, seed=2024, targets="all-linear", structure=structure
    )
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(exact(variable.shape, 17 + 2 * i))
    path = GOLDEN / f"{structure}.vera.safetensors"
    keras_vera.save_adapter(model, path)
    np.savetxt(GOLDEN / f"{structure}.txt", predict(model, X), "%.8e")


@pytest.mark.parametrize("structure", ["dense", "blocks2"])
def test_golden_adapter(structure):
    model = make_base()
    base = predict(model, X)
    keras_vera.load_adapter(model, GOLDEN / f"{structure}.vera.safetensors")
    assert len(adapted(model)) == 5
    outputs = np.loadtxt(GOLDEN / f"{structure}.txt")
    np.testing.assert_allclose(predict(model, X), outputs, rtol=0, atol=1e-5)
    assert np.abs(base - outputs).max() > 1e-2
    keras.utils.clear_session()
