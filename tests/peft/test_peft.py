"""PEFT's VeRA as a reference for the formula, and for the size of files."""

import keras
import numpy as np
import pytest
from helpers import largest_difference
from keras import ops

import keras_vera
from keras_vera.layers._contraction import dense_contraction
from keras_vera.product.arithmetic import Layout
from keras_vera.product.arithmetic import adapter_product
from keras_vera.product.arithmetic import folded_product
from keras_vera.product.arithmetic import merged_kernel
from keras_vera.product.plan import choose_plan
from keras_vera.product.structure import Dense

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

M, N, RANK = 24, 16, 8


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(M, N, bias=False)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def reference():
    torch.manual_seed(0)
    config = peft.VeraConfig(r=RANK, target_modules=["linear"])
    model = peft.get_peft_model(Network(), config)
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.vera_lambda_d["default"].normal_()
        layer.vera_lambda_b["default"].normal_()
    return model


def to_numpy(tensor):
    return tensor.detach().cpu().numpy().astype("float32")


def test_formula_is_that_of_peft(reference, rng):
    layer = reference.base_model.model.linear
    x = rng.normal(size=(5, M)).astype("float32")
    expected = to_numpy(reference(torch.from_numpy(x)))
    kernel = to_numpy(layer.base_layer.weight).T
    layout = Layout(dense_contraction((M, N)), Dense(M, N, RANK))
    # PEFT's matrices include the Kaiming factors, ours get them at use.
    factor_a, factor_b = layout.structure.factors
    a = to_numpy(layer.vera_A["default"])[:, :M].T / factor_a
    b_matrix = to_numpy(layer.vera_B["default"])[:N].T / factor_b
    d = to_numpy(layer.vera_lambda_d["default"])
    b = to_numpy(layer.vera_lambda_b["default"])
    a, b_matrix, d, b, inputs, weights = map(
        ops.convert_to_tensor, (a, b_matrix, d, b, x, kernel)
    )
    pair = a, b_matrix
    vectors = d, b, layout, choose_plan(len(x), layout.structure)
    folded = folded_product(inputs, weights, pair, *vectors)
    added = adapter_product(inputs, pair, *vectors)
    for ours in (folded, ops.matmul(inputs, weights) + added):
        ours = ops.convert_to_numpy(ours)
        assert largest_difference(ours, expected) < 1e-5
    merged = merged_kernel(weights, pair, d, b, layout)
    assert largest_difference(x @ np.array(merged), expected) < 1e-5
    assert largest_difference(expected, x @ kernel) > 0.1


def test_as_many_numbers_train(reference):
    trained = [p for p in reference.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == RANK + N


def test_start_has_the_variance_of_peft():
    # Kaiming's uniform entries: the same variance, from another generator.
    torch.manual_seed(0)
    config = peft.VeraConfig(r=256, target_modules=["linear"])
    layer = peft.get_peft_model(Network(), config).base_model.model.linear
    theirs = to_numpy(layer.vera_A["default"]).std()
    projection = keras_vera.SharedProjection(rank=256)
    projection.reserve(M, N)
    ours = ops.convert_to_numpy(projection.vera_kernel_a).std()
    factor, _ = Dense(M, N, 256).factors
    assert ours * factor == pytest.approx(theirs, rel=0.05)


def test_file_is_smaller_than_peft_default(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    theirs = (tmp_path / "adapter_model.safetensors").stat().st_size
    model = keras.Sequential(
        [keras.Input((M,)), keras.layers.Dense(N, use_bias=False)]
    )
    keras_vera.enable_vera(model, rank=RANK, targets="all-linear")
    path = tmp_path / "ours.vera.safetensors"
    keras_vera.save_adapter(model, path)
    # PEFT stores A and B by default, 4 bytes an entry; we never do.
    assert theirs >= 4 * RANK * (M + N)
    header = path.stat().st_size - 4 * (RANK + N)
    assert header < 1024
