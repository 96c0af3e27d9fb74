import math

import keras
import numpy as np
import pytest
from helpers import spoil

import keras_vera

pytestmark = pytest.mark.in_turn


def summarize(model, **kwargs):
    lines = []
    keras_vera.summary(model, print_fn=lines.append, **kwargs)
    return "\n".join(lines)


def rows_of(text):
    """Returns the cells of each row by the name in the first column."""
    return {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    }


@pytest.fixture
def text():
    backbone = keras.Sequential(
        [
            keras.Input((5, 8)),
            keras.layers.EinsumDense("btd,dnh->btnh", (5, 2, 3), name="up"),
            keras.layers.Reshape((5, 6)),
            keras.layers.Dense(1000, name="wide"),
        ]
    )
    model = keras.Sequential(
        [keras.Input((5, 8)), backbone, keras.layers.Dense(4)], name="mine"
    )
    keras_vera.enable_vera(backbone, rank=16, seed=5, targets="all-linear")
    return summarize(model)


def test_summary_counts(text):
    rows = rows_of(text)
    up = rows["layers/sequential/layers/einsum_dense"]
    wide = rows["layers/sequential/layers/dense"]
    # Kernel, rank, r + n, bytes, LoRA: 8 * (first axes + last axis).
    assert up == ["1", "(8, 2, 3)", "16", "22", "88", str(8 * (8 * 2 + 3))]
    assert wide == ["1", "(6, 1000)", "16", "1,016", "4,064", "8,048"]
    assert "'mine': 2 adapted layers, seed 5" in text
    assert "Trained by VeRA: 1,038 (4.2 kB)" in text
    assert "Trained outside the base: 4,004 (16.0 kB)" in text
    assert "would train 8,200 (32.8 kB)" in text


def test_lora_count_is_what_keras_trains():
    layer = keras.layers.EinsumDense("btd,dnh->btnh", (5, 2, 3))
    layer.build((None, 5, 8))
    layer.enable_lora(8)
    matrices = (layer.lora_kernel_a, layer.lora_kernel_b)
    assert sum(math.prod(v.shape) for v in matrices) == 8 * (8 * 2 + 3)


def test_summary_prints_by_default(capsys):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    assert keras_vera.summary(model) is None
    assert "Adapted layer" in capsys.readouterr().out
    keras_vera.summary(model, line_length=60)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60


def test_repeated_layers_share_a_row():
    x = inputs = keras.Input((5,))
    for _ in range(12):
        x = keras.layers.Dense(5)(x)
    for _ in range(2):
        x = keras.layers.Dense(7)(x)
    model = keras.Model(inputs, x)
    ranks = {"all-linear": 4, "dense_1": 2}
    model.layers[2].name = "dense_1"
    keras_vera.enable_vera(model, targets=ranks)
    rows = rows_of(summarize(model))
    del rows["Adapted layers"]
    one = 4 + 5
    assert rows == {
        "layers/dense{,_2.._11}": [
            "11",
            "(5, 5)",
            "4",
            str(11 * one),
            str(11 * one * 4),
            str(11 * 80),
        ],
        "layers/dense_1": ["1", "(5, 5)", "2", "7", "28", "80"],
        "layers/dense_12": ["1", "(5, 7)", "4", "11", "44", "96"],
        "layers/dense_13": ["1", "(7, 7)", "4", "11", "44", "112"],
    }
    assert len(rows_of(summarize(model, expand_repeated=True))) == 15


class Experts(keras.layers.Layer):
    def build(self, input_shape):
        shape = (3, input_shape[-1], 5)
        self.kernels = self.add_weight(name="kernels", shape=shape)

    def call(self, x):
        return keras.ops.einsum("bi,eij->bj", x, self.kernels)


def test_only_what_cannot_be_adapted_is_called_so():
    x = inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(3, 2)(x)
    x = keras.layers.DepthwiseConv2D(2)(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(5)(x)
    x = keras.layers.Dense(5)(x)
    for _ in range(3):
        x = Experts()(x)
    x = keras.layers.Reshape((1, 5))(x)
    # One matrix for each index of an axis.
    x = keras.layers.EinsumDense("btd,tdn->btn", (1, 6))(x)
    model = keras.Model(inputs, x)
    keras_vera.enable_vera(model, rank=2, targets=r".*/dense")
    text = " ".join(summarize(model).split())
    assert (
        "Frozen matrices of layers that VeRA cannot adapt: 5 "
        "(layers/depthwise_conv2d/kernel (2, 2, 3, 1), "
        "layers/experts{,_1,_2}/kernels (3, 5, 5), "
        "layers/einsum_dense/kernel (1, 5, 6))"
    ) in text


def test_nothing_is_called_so_where_all_can_be_adapted(text):
    assert "cannot adapt" not in text


@pytest.mark.parametrize("trainable", [True, False])
def test_file_and_training_are_counted(tmp_path, trainable):
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(300)])
    head = [keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,)), inner, *head])
    keras_vera.enable_vera(inner, rank=4, targets="all-linear")
    spoil(model)
    inner.layers[0].set_adapter_bias(np.ones(300, "float32"))
    file = tmp_path / "a.vera.safetensors"
    keras_vera.save_adapter(model, file)
    model.trainable = trainable
    text = summarize(model)
    # d and b, its bias, four vectors of the norm, kernel and bias.
    saved = 4 * (304 + 300 + 4 * 300 + 903)
    wanted = f"{saved / 1000:.1f} kB and a header" if trainable else "none"
    assert f"Adapter file: {wanted}" in text
    assert 0 < file.stat().st_size - saved < 2500
    trained, outside = (304, 600 + 903) if trainable else (0, 0)
    assert f"Trained by VeRA: {trained:,} (" in text
    assert f"Trained outside the base: {outside:,} (" in text


def test_layers_with_matrices_of_their_own():
    layers = [
        keras_vera.layers.VeRADense(
            4, projection=keras_vera.SharedProjection(seed, 3)
        )
        for seed in (9, 2)
    ]
    text = summarize(keras.Sequential([keras.Input((4,)), *layers]))
    assert "2 adapted layers, seeds 2, 9" in text
    assert f"random matrices ({2 * 24 * 4} B in memory) are not saved" in text
