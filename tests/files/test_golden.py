"""Adapters that were made once, and that every later version must load."""

import pathlib

import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import predict
from test_adapter_file import Classifier

import keras_vera
from keras_vera.model.adaptation import Adaptation

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


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


def adapt_with_matrices(model):
    """As `load_peft_adapter` does, with an offset and a bias."""
    attention, hidden = model.backbone.layers[1], model.backbone.layers[-2]
    Adaptation(
        projection=keras_vera.SharedProjection.from_matrices(
            exact((8, 6), 31), exact((6, 12), 33)
        ),
        targets=".*(query|value|hidden)",
        d_initial=0.1,
        dropout=0.0,
        bases=[model.backbone],
        layers=[attention.query_dense, attention.value_dense, hidden],
        output_offsets=[0, 4, 0],
    ).apply(model)
    hidden.set_adapter_bias(exact((6,), 43))


def make(structure):
    """How the files were made. They are not made again."""
    model = make_base()
    if structure == "explicit":
        adapt_with_matrices(model)
    else:
        keras_vera.enable_vera(
            model, rank=6, seed=2024, targets="all-linear", structure=structure
        )
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(exact(variable.shape, 17 + 2 * i))
    path = GOLDEN / f"{structure}.vera.safetensors"
    keras_vera.save_adapter(model, path)
    np.savetxt(GOLDEN / f"{structure}.txt", predict(model, X), "%.8e")


@pytest.mark.parametrize(
    ("structure", "layers"), [("dense", 5), ("blocks2", 5), ("explicit", 3)]
)
def test_golden_adapter(structure, layers):
    model = make_base()
    base = predict(model, X)
    keras_vera.load_adapter(model, GOLDEN / f"{structure}.vera.safetensors")
    assert len(adapted(model)) == layers
    outputs = np.loadtxt(GOLDEN / f"{structure}.txt")
    np.testing.assert_allclose(predict(model, X), outputs, rtol=0, atol=1e-5)
    assert np.abs(base - outputs).max() > 1e-2
    keras.utils.clear_session()
