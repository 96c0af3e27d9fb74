"""Adapters beside bases that Keras quantized (QVeRA)."""

import copy

import keras
import numpy as np
import pytest
from gradients import outputs_and_gradients
from gradients import squares_and_gradients
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from helpers import state
from hub_models import make_inputs
from hub_models import make_task
from keras import ops
from plans import full_pair

import keras_vera

pytestmark = pytest.mark.in_turn

RANK = 4
ROUNDING = 2e-5


def make_gptq(layer, x):
    from keras.src.quantizers.gptq import GPTQ

    config = keras.quantizers.GPTQConfig(None, None, group_size=4)
    layer.quantize("gptq", config=config)
    gptq = GPTQ(layer, config)
    gptq.update_hessian_with_batch(ops.convert_to_tensor(x))
    gptq.quantize_and_correct_layer()
    gptq.free()


def make_awq(layer, x):
    from keras.src.quantizers.awq import AWQ

    config = keras.quantizers.AWQConfig(None, None, group_size=4)
    layer.quantize("awq", config=config)
    awq = AWQ(layer, config)
    awq.update_activation_magnitudes(ops.convert_to_tensor(x))
    awq.quantize_layer()
    awq.free()


def make_int4(block_size):
    config = keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    return lambda layer, x: layer.quantize("int4", config=config)


MODES = {
    "int8": lambda layer, x: layer.quantize("int8"),
    "int4": make_int4(-1),
    "int4 in blocks": make_int4(4),
    "float8": lambda layer, x: layer.quantize("float8"),
    "gptq": make_gptq,
    "awq": make_awq,
}
MATRICES = {
    "dense": (
        lambda: keras.layers.Dense(6, bias_initializer="normal"),
        (None, 8),
    ),
    # As the attention of BERT and of Gemma.
    "einsum": (
        lambda: keras.layers.EinsumDense(
            "abc,cde->abde", (None, 2, 3), bias_axes="de"
        ),
        (None, 5, 8),
    ),
    "einsum, axis in the middle": (
        lambda: keras.layers.EinsumDense("bsd,kdh->bskh", (None, 2, 3)),
        (None, 5, 8),
    ),
}
every_mode = pytest.mark.parametrize("mode", MODES)
# Keras calibrates only kernels that have the contracted axes first, and does
# not load the weight files that it writes.
CALIBRATED = ["gptq", "awq"]


def make_model(case, mode, activation=None):
    """Returns a model of one quantized layer, and inputs for it."""
    keras.utils.set_random_seed(0)
    make, shape = MATRICES[case]
    layer = make()
    layer.activation = keras.activations.get(activation)
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    x = np.random.default_rng(0).normal(size=(32, *shape[1:]))
    x = x.astype("float32")
    MODES[mode](layer, x)
    return model, x


def added(layer, x):
    """Returns what the adapter adds, in float64, axis by axis."""
    projection = layer.projection
    a, b_matrix = (
        ops.convert_to_numpy(v).astype("float64")
        for v in (projection.vera_kernel_a, projection.vera_kernel_b)
    )
    m, n = x.shape[-1], layer.vera_lambda_b.shape[0]
    a, b_matrix = full_pair(a, b_matrix, m, n, RANK, projection.blocks)
    d = ops.convert_to_numpy(layer.vera_lambda_d).astype("float64")
    b = ops.convert_to_numpy(layer.vera_lambda_b).astype("float64")
    scaled = d * np.sqrt(2 / m) * np.sqrt(2 / RANK)
    return ((x @ a) * scaled) @ b_matrix * b, a, b_matrix, d, b


@pytest.mark.members_in_turn
@every_mode
@pytest.mark.parametrize("case", MATRICES)
def test_output_is_base_plus_adapter(case, mode):
    if mode in CALIBRATED and "middle" in case:
        pytest.skip("Keras cannot")
    model, x = make_model(case, mode)
    base = predict(model, x)
    keras_vera.enable_vera(model, rank=RANK, targets="all-linear")
    np.testing.assert_array_equal(predict(model, x), base)
    spoil(model)
    (layer,) = adapted(model)
    expected = base + added(layer, x)[0].reshape(base.shape)
    assert largest_difference(base, expected) > 0.1
    np.testing.assert_allclose(predict(model, x), expected, atol=ROUNDING)


@every_mode
def test_adapter_comes_before_the_activation(mode):
    model, x = make_model("dense", mode, "softplus")
    base = np.log(np.expm1(predict(model, x).astype("float64")))
    keras_vera.enable_vera(model, rank=RANK, targets="all-linear")
    spoil(model)
    (layer,) = adapted(model)
    expected = np.log1p(np.exp(base + added(layer, x)[0]))
    np.testing.assert_allclose(predict(model, x), expected, atol=1e-4)


@pytest.mark.members_in_turn
@every_mode
@pytest.mark.parametrize("structure", ["dense", "blocks2"])
def test_gradients_of_the_vectors(mode, structure, rng):
    model, x = make_model("dense", mode)
    keras_vera.enable_vera(
        model, rank=RANK, targets="all-linear", structure=structure
    )
    spoil(model)
    (layer,) = adapted(model)
    g = rng.normal(size=(32, 6)).astype("float32")
    _, gradients = outputs_and_gradients(layer, x, g)
    _, a, b_matrix, d, b = added(layer, x)
    blocks = layer.projection.blocks
    factor = np.sqrt(2 * blocks / 8) * np.sqrt(2 * blocks / RANK)
    m_matrix = (x @ a).T @ g * factor * b_matrix
    np.testing.assert_allclose(
        gradients["vera_lambda_d"], m_matrix @ b, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        gradients["vera_lambda_b"], d @ m_matrix, rtol=1e-4, atol=1e-4
    )
    # What lies below can be trained as well.
    assert np.any(gradients["x"])


@every_mode
@pytest.mark.parametrize("case", ["dense", "einsum"])
def test_train_save_load_and_disable(case, mode, tmp_path):
    def outputs(model):
        # Not `predict`, which XLA compiles only where a model was compiled.
        return ops.convert_to_numpy(model(x))

    model, x = make_model(case, mode)
    base = outputs(model)
    before = state(model)[1:]
    keras_vera.enable_vera(model, rank=RANK, targets="all-linear")
    model.compile("adam", "mse", jit_compile=backend() != "torch")
    model.fit(x, base + 1, epochs=1, verbose=0)
    (layer,) = adapted(model)
    assert np.all(ops.convert_to_numpy(layer.vera_lambda_b))
    trained = outputs(model)
    assert largest_difference(trained, base) > 1e-5
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    with pytest.warns(UserWarning, match="A quantized kernel takes no adapter"):
        model.save_weights(tmp_path / "a.weights.h5")

    fresh, _ = make_model(case, mode)
    keras_vera.load_adapter(fresh, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(outputs(fresh), trained)

    if mode not in CALIBRATED:
        again, _ = make_model(case, mode)
        keras_vera.enable_vera(again, rank=RANK, targets="all-linear")
        again.load_weights(tmp_path / "a.weights.h5")
        np.testing.assert_array_equal(outputs(again), trained)

    unchanged = state(model)
    with pytest.raises(ValueError, match="quantized .* lose much of it"):
        keras_vera.merge(model)
    assert state(model) == unchanged
    keras_vera.disable_vera(model)
    assert state(model)[1:] == before
    np.testing.assert_array_equal(outputs(model), base)


@pytest.mark.parametrize("mode", ["int8", "int4 in blocks", "gptq"])
def test_adapter_of_a_float_base_loads_on_the_quantized_one(mode, tmp_path):
    make, shape = MATRICES["einsum"]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape[1:]), make()])
    keras_vera.enable_vera(model, rank=RANK, targets="all-linear")
    spoil(model)
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    quantized, x = make_model("einsum", mode)
    base = predict(quantized, x)
    keras_vera.load_adapter(quantized, tmp_path / "a.vera.safetensors")
    (layer,) = adapted(quantized)
    expected = base + added(layer, x)[0].reshape(base.shape)
    np.testing.assert_allclose(predict(quantized, x), expected, atol=ROUNDING)


EMBEDDING_MODES = ["int8", "int4", "int4 in blocks"]


@pytest.mark.parametrize("mode", EMBEDDING_MODES)
def test_embedding(mode):
    layer = keras.layers.Embedding(7, 6)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    MODES[mode](layer, None)
    x = np.array([[1, 6, 0], [3, 3, 2]], "int32")
    base = predict(model, x)
    keras_vera.enable_vera(model, rank=RANK, targets="embedding")
    np.testing.assert_array_equal(predict(model, x), base)
    spoil(model)
    a, d, b_matrix, b = vectors_and_matrices(layer)
    factor = np.sqrt(2) * np.sqrt(2 / RANK)
    expected = base + (a[x] * d * factor) @ b_matrix * b
    np.testing.assert_allclose(predict(model, x), expected, atol=ROUNDING)


def vectors_and_matrices(layer):
    names = ("vera_kernel_a", "vera_lambda_d", "vera_kernel_b", "vera_lambda_b")
    return [ops.convert_to_numpy(getattr(layer, name)) for name in names]


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("mode", EMBEDDING_MODES)
def test_reversible_embedding(mode, tie_weights, rng):
    layer = keras.layers.ReversibleEmbedding(
        7, 6, tie_weights=tie_weights, logit_soft_cap=3.0
    )
    layer.build()
    MODES[mode](layer, None)
    holder = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    x = rng.normal(size=(2, 3, 6)).astype("float32")
    base = ops.convert_to_numpy(layer(x, reverse=True))
    keras_vera.enable_vera(holder, rank=RANK, targets="embedding")
    spoil(holder)
    received = ops.convert_to_numpy(layer(x, reverse=True))
    if not tie_weights:
        np.testing.assert_array_equal(received, base)
        return
    a, d, b_matrix, b = vectors_and_matrices(layer)
    factor = np.sqrt(2) * np.sqrt(2 / RANK)
    delta = x @ ((a * d * factor) @ b_matrix * b).T
    expected = 3 * np.tanh(np.arctanh(base / 3) + delta / 3)
    np.testing.assert_allclose(received, expected, atol=1e-4)


def test_quantizing_an_adapted_model_leaves_adapted_layers_alone():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, name="adapted"),
            keras.layers.Dense(4, name="other"),
        ]
    )
    keras_vera.enable_vera(model, rank=RANK, targets="adapted")
    spoil(model)
    (layer,) = adapted(model)
    x = np.ones((2, 8), "float32")
    before = ops.convert_to_numpy(layer(x))
    with pytest.warns(UserWarning, match="Dense does not have a `quantize`"):
        model.quantize("int8")
    assert model.get_layer("other").quantization_mode == "int8"
    assert layer.quantization_mode is None
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), before)


@pytest.mark.parametrize("mode", ["int8", "int4 in blocks"])
def test_rows_of_a_bank(mode, tmp_path):
    model, x = make_model("einsum", mode)
    keras_vera.enable_vera(model, rank=RANK, targets="all-linear")
    bank = keras_vera.AdapterBank(model, capacity=2)
    expected = []
    for i, name in enumerate("ab"):
        spoil(model, seed=i)
        keras_vera.save_adapter(model, tmp_path / f"{name}.vera.safetensors")
        bank.load(name, tmp_path / f"{name}.vera.safetensors")
        expected.append(predict(model, x)[i])
    received = bank.predict(x[:2], adapters=["a", "b"])
    np.testing.assert_allclose(received, np.stack(expected), atol=ROUNDING)


def test_gradients_below_the_logits_of_a_language_model():
    def gradients(filters, quantize=True, part=lambda task: task):
        task, (x, _) = make_task("gemma"), make_inputs("gemma")
        if quantize:
            task.quantize("int8", filters=filters)
        keras_vera.enable_vera(part(task), rank=4)
        spoil(task)
        return np.concatenate(squares_and_gradients(task, x)[1])

    def is_no_table(layer):
        return not isinstance(layer, keras.layers.ReversibleEmbedding)

    expected = gradients(None, quantize=False)

    def cosine(received):
        norms = np.linalg.norm(received) * np.linalg.norm(expected)
        return received @ expected / norms

    assert cosine(gradients(is_no_table)) > 0.95
    # As Keras has it, for every adapter; else the warning could go.
    for part in (lambda task: task, lambda task: task.backbone):
        with pytest.warns(UserWarning, match="'token_embedding' .*filters=l"):
            assert cosine(gradients(None, part=part)) < 0.95


def make_partly_quantized():
    """Returns a quantized model with norms, and a kernel that is a float."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((8,)),
        keras.layers.Dense(16, activation="tanh", name="a"),
        keras.layers.LayerNormalization(name="n"),
        keras.layers.Dense(8, name="b"),
    ]
    model = keras.Sequential(layers)
    model.quantize("int8", filters=lambda layer: layer.name != "b")
    return model


def adapt_partly_quantized(model, train=None, targets="all-linear"):
    keras_vera.enable_vera(model, rank=RANK, targets=targets, train=train)
    spoil(model)
    for v in model.trainable_variables:
        if not v.name.startswith("vera_lambda"):
            v.assign(v + 0.25)


def saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "q.keras")
    return keras.models.load_model(tmp_path / "q.keras")


def plain_with_its_weights(model, tmp_path):
    model.save_weights(tmp_path / "q.weights.h5")
    plain = make_partly_quantized()
    plain.load_weights(tmp_path / "q.weights.h5")
    return plain


def plain_with_its_older_file(model, tmp_path):
    model.save(tmp_path / "q.h5")
    plain = make_partly_quantized()
    plain.load_weights(tmp_path / "q.h5")
    return plain


TRAINED = [None, "norm", "bias", ["norm", "bias"]]


@pytest.mark.filterwarnings("ignore:A quantized kernel takes no adapter")
@pytest.mark.parametrize("train", TRAINED, ids=str)
@pytest.mark.parametrize(
    "made",
    [
        saved_and_loaded,
        plain_with_its_weights,
        plain_with_its_older_file,
        lambda model, _: copy.deepcopy(model),
    ],
    ids=["keras file", "weights file", "older file", "deepcopy"],
)
def test_files_of_a_partly_quantized_model_hold_the_base(
    made, train, rng, tmp_path
):
    x = rng.normal(size=(4, 8)).astype("float32")
    model = make_partly_quantized()
    base = predict(model, x)
    adapt_partly_quantized(model, train)
    y = predict(model, x)
    assert largest_difference(y, base) > 0.1
    other = made(model, tmp_path)
    assert adapted(other) == []
    np.testing.assert_allclose(predict(other, x), base, atol=1e-6)
    np.testing.assert_array_equal(predict(model, x), y)


@pytest.mark.filterwarnings("ignore:A quantized kernel takes no adapter")
@pytest.mark.parametrize("train", TRAINED, ids=str)
def test_weights_of_a_partly_quantized_model_hold_its_adapter(
    train, rng, tmp_path
):
    x = rng.normal(size=(4, 8)).astype("float32")
    model = make_partly_quantized()
    base = predict(model, x)
    adapt_partly_quantized(model, train)
    model.save_weights(tmp_path / "q.weights.h5")
    again = make_partly_quantized()
    keras_vera.enable_vera(again, rank=RANK, targets="all-linear", train=train)
    again.load_weights(tmp_path / "q.weights.h5")
    np.testing.assert_array_equal(predict(again, x), predict(model, x))
    # And it still knows its base.
    keras_vera.save_adapter(again, tmp_path / "a.vera.safetensors")
    keras_vera.disable_vera(again)
    np.testing.assert_array_equal(predict(again, x), base)
    keras_vera.load_adapter(again, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(predict(again, x), predict(model, x))
    # With other targets, or other parts that train, it is the base.
    other_train = "norm" if train == "bias" else "bias"
    for kwargs in ({"targets": "a", "train": train}, {"train": other_train}):
        other = make_partly_quantized()
        adapt_partly_quantized(other, **kwargs)
        other.load_weights(tmp_path / "q.weights.h5")
        np.testing.assert_array_equal(predict(other, x), base)
        keras_vera.save_adapter(other, tmp_path / "b.vera.safetensors")


@pytest.mark.filterwarnings("ignore:A quantized kernel takes no adapter")
def test_bias_of_an_adapter_beside_a_quantized_base(rng, tmp_path):
    x = rng.normal(size=(4, 8)).astype("float32")
    model = make_partly_quantized()
    base = predict(model, x)
    adapt_partly_quantized(model)
    for layer in adapted(model):
        layer.set_adapter_bias(rng.normal(size=layer.bias.shape))
    for made in (plain_with_its_weights, plain_with_its_older_file):
        plain = made(model, tmp_path)
        np.testing.assert_array_equal(predict(plain, x), base)
    again = make_partly_quantized()
    keras_vera.enable_vera(again, rank=RANK, targets="all-linear")
    again.load_weights(tmp_path / "q.weights.h5")
    np.testing.assert_array_equal(predict(again, x), predict(model, x))
    keras_vera.disable_vera(again)
    np.testing.assert_array_equal(predict(again, x), base)
