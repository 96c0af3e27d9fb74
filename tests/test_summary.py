import math

import keras
import pytest

import keras_vera


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
    lines = []
    keras_vera.summary(model, print_fn=lines.append)
    return "\n".join(lines)


def test_summary_counts(text):
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    }
    up = rows["layers/sequential/layers/einsum_dense"]
    wide = rows["layers/sequential/layers/dense"]
    # Kernel, rank, r + n, bytes, LoRA: 8 * (first axes + last axis).
    assert up == ["(8, 2, 3)", "16", "22", "88", str(8 * (8 * 2 + 3))]
    assert wide == ["(6, 1000)", "16", "1,016", "4,064", "8,048"]
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
