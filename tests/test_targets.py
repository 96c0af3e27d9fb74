import keras
import pytest
from helpers import adapted

import keras_vera


def make_model():
    inputs = keras.Input((5, 8))
    x = inputs
    for i in range(2):
        x = keras.layers.MultiHeadAttention(2, 4, name=f"attention_{i}")(x, x)
        x = keras.layers.Dense(8, name=f"up_{i}")(x)
        x = keras.layers.Dense(8, name=f"down_{i}")(x)
    return keras.Model(inputs, x)


ATTENTION = ["query", "key", "value", "attention_output"]
MLP = ["up_0", "down_0", "up_1", "down_1"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("attention-qv", ["query", "value"] * 2),
        ("attention", ATTENTION * 2),
        ("all-linear", ATTENTION * 2 + MLP),
        ("key", ["key"] * 2),
        (["key", "up_1"], ["key", "key", "up_1"]),
        (("attention-qv", "down_0"), ["query", "value"] * 2 + ["down_0"]),
        ("query_dense", ["query"] * 2),
        (r"layers/multi_head_attention_1/.*key.*", ["key"]),
        (r"attention_0/(query|key)", ["query", "key"]),
        (r"up_.*", ["up_0", "up_1"]),
        (lambda layer: layer.name.startswith("d"), ["down_0", "down_1"]),
    ],
)
def test_targets(targets, expected):
    model = make_model()
    keras_vera.enable_vera(model, rank=2, targets=targets)
    assert sorted(x.name for x in adapted(model)) == sorted(expected)


def test_overlapping_targets_adapt_a_layer_once():
    model = make_model()
    keras_vera.enable_vera(model, rank=2, targets=["query", "attention", ".*"])
    assert len(adapted(model)) == 12
    assert len(model.trainable_variables) == 24


def test_regular_expression_matches_whole_paths():
    # "up" is in the path of two layers, but is the whole of none.
    with pytest.raises(ValueError, match="'up' matches no layer"):
        keras_vera.enable_vera(make_model(), targets="up")


def test_attention_is_known_by_its_structure():
    # "value" alone, outside attention, is not a value projection.
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(1, name="value")(inputs)
    with pytest.raises(ValueError, match="'attention-qv' matches no layer"):
        keras_vera.enable_vera(keras.Model(inputs, outputs))
