"""Embeddings and convolutions, adapted."""

import keras
import numpy as np
import pytest
from gradients import outputs_and_gradients
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
from keras_vera.layers._base_layer import stored_kernel

pytestmark = pytest.mark.in_turn

RANK = 4


def convolution(dims, filters=6, size=3, **kwargs):
    layer = getattr(keras.layers, f"Conv{dims}D")
    shape = (7,) + (5,) * (dims - 1)
    channels = (4,)
    first = kwargs.get("data_format") == "channels_first"
    shape = channels + shape if first else shape + channels
    return lambda: layer(
        filters, size, bias_initializer="normal", **kwargs
    ), shape


CASES = {
    "embedding": (lambda: keras.layers.Embedding(7, 6), (3,)),
    "strides": convolution(1, strides=2),
    "causal": convolution(1, padding="causal", dilation_rate=2),
    "valid": convolution(2),
    "same": convolution(2, padding="same", activation="softplus"),
    "dilation": convolution(2, size=2, dilation_rate=2),
    "pointwise": convolution(2, size=1, use_bias=False),
    "groups": convolution(2, groups=2),
    "channels first": convolution(2, data_format="channels_first"),
    "3D": convolution(3, size=2),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=["folded", "additive"])
def plan(request):
    return request.param


@pytest.fixture(params=["dense", "blocks2"])
def structure(request):
    return request.param


def make_model(case):
    """Returns a model of one layer, and inputs for it."""
    if case == "channels first" and backend() == "tensorflow":
        pytest.skip("TensorFlow has no such convolution on CPU")
    keras.utils.set_random_seed(0)
    make, shape = CASES[case]
    rng = np.random.default_rng(0)
    if case == "embedding":
        inputs, x = (
            keras.Input(shape, dtype="int32"),
            rng.integers(7, size=shape),
        )
        x = np.stack([x, x[::-1]]).astype("int32")
    else:
        inputs = keras.Input(shape)
        x = rng.normal(size=(2, *shape)).astype("float32")
    return keras.Sequential([inputs, make()]), x


def matrices(layer):
    """Returns A (with both Kaiming factors), B, d and b in float64."""
    projection = layer.projection
    a, b_matrix, d, b = (
        ops.convert_to_numpy(v).astype("float64")
        for v in (
            projection.vera_kernel_a,
            projection.vera_kernel_b,
            layer.vera_lambda_d,
            layer.vera_lambda_b,
        )
    )
    *dims, n = stored_kernel(layer).shape
    m = int(np.prod(dims))
    blocks = projection.blocks
    a, b_matrix = full_pair(a, b_matrix, m, n, len(d), blocks)
    # Of an embedding one row is read: its fan-in is 1.
    fan_in = 1 if isinstance(layer, keras.layers.Embedding) else m / blocks
    return (
        a * np.sqrt(2 / fan_in) * np.sqrt(2 * blocks / len(d)),
        b_matrix,
        d,
        b,
    )


def make_merged(case, layer):
    """Returns the plain model with the kernel that the formula gives."""
    plain, _ = make_model(case)
    a, b_matrix, d, b = matrices(layer)
    kernel = stored_kernel(plain.layers[0])
    delta = ((a * d) @ b_matrix * b).reshape(kernel.shape)
    kernel.assign(ops.convert_to_numpy(kernel) + delta)
    return plain


@pytest.mark.members_in_turn
@every_case
def test_output_is_that_of_the_merged_kernel(case, plan, structure):
    model, x = make_model(case)
    base = predict(model, x)
    keras_vera.enable_vera(
        model,
        rank=RANK,
        targets=["embedding" if case == "embedding" else "conv"],
        plan=plan,
        structure=structure,
    )
    np.testing.assert_array_equal(predict(model, x), base)
    spoil(model)
    (layer,) = adapted(model)
    expected = predict(make_merged(case, layer), x)
    assert largest_difference(base, expected) > 0.1
    np.testing.assert_allclose(predict(model, x), expected, atol=2e-5)
    # Also for those who read the kernel without calling the layer.
    shown = layer.embeddings if case == "embedding" else layer.kernel
    keras_vera.merge(model)
    np.testing.assert_allclose(
        ops.convert_to_numpy(shown),
        ops.convert_to_numpy(stored_kernel(layer)),
        atol=1e-6,
    )
    assert type(layer) is type(CASES[case][0]())
    np.testing.assert_allclose(predict(model, x), expected, atol=2e-5)


@pytest.mark.members_in_turn
@every_case
def test_gradients(case, plan, structure, rng):
    model, x = make_model(case)
    keras_vera.enable_vera(
        model, rank=RANK, targets=".*", plan=plan, structure=structure
    )
    spoil(model)
    (layer,) = adapted(model)
    a, b_matrix, d, b = matrices(layer)
    plain = make_merged(case, layer).layers[0]
    upstream = rng.normal(size=plain(x).shape).astype("float32")
    if case == "embedding":
        # Indices have no gradient; that of the table has to be summed.
        g = np.zeros(stored_kernel(plain).shape)
        np.add.at(g, x, upstream)
        gradients = gradients_of_embedding(layer, x, upstream)
    else:
        _, expected = outputs_and_gradients(plain, x, upstream)
        _, gradients = outputs_and_gradients(layer, x, upstream)
        np.testing.assert_allclose(gradients["x"], expected["x"], atol=2e-4)
        g = expected["kernel"].reshape(-1, 6)
    m_matrix = a.T @ g * b_matrix
    for name, wanted in (
        ("vera_lambda_d", m_matrix @ b),
        ("vera_lambda_b", d @ m_matrix),
    ):
        np.testing.assert_allclose(
            gradients[name], wanted, rtol=1e-4, atol=1e-3
        )


def gradients_of_embedding(layer, x, upstream):
    """Trains for one step of SGD, as indices cannot be differentiated."""
    inputs = keras.Input(x.shape[1:], dtype="int32")
    model = keras.Model(inputs, layer(inputs))
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.compile(
        keras.optimizers.SGD(1.0),
        loss=lambda y, z: ops.sum(y * z),
        # Where the loss is linear, no gradient waits for the forward pass, and
        # TensorFlow's graph optimizer lets updates come before it.
        run_eagerly=True,
    )
    model.train_on_batch(x, upstream)
    return {
        v.name: old - ops.convert_to_numpy(v)
        for v, old in zip(model.trainable_variables, before)
    }


@every_case
def test_files(case, tmp_path):
    model, x = make_model(case)
    keras_vera.enable_vera(model, rank=RANK, targets=".*")
    spoil(model)
    expected = predict(model, x)
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.keras")

    fresh, _ = make_model(case)
    keras_vera.load_adapter(fresh, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(predict(fresh, x), expected)
    again, _ = make_model(case)
    keras_vera.enable_vera(again, rank=RANK, targets=".*")
    again.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(predict(again, x), expected)
    plain = keras.models.load_model(tmp_path / "a.keras")
    assert not adapted(plain)
    np.testing.assert_allclose(predict(plain, x), expected, atol=2e-5)


PUBLIC = {
    "embedding": lambda: keras_vera.layers.VeRAEmbedding(7, 6, rank=RANK),
    "strides": lambda: keras_vera.layers.VeRAConv1D(6, 3, strides=2, rank=RANK),
    "valid": lambda: keras_vera.layers.VeRAConv2D(6, 3, rank=RANK),
    "3D": lambda: keras_vera.layers.VeRAConv3D(6, 2, rank=RANK),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_public_layers(case, tmp_path):
    plain, x = make_model(case)
    model = keras.Sequential([plain.inputs[0], PUBLIC[case]()])
    (layer,) = adapted(model)
    names = [v.name for v in model.trainable_variables]
    assert names == ["vera_lambda_d", "vera_lambda_b"]
    kernel = ops.convert_to_numpy(stored_kernel(layer))
    stored_kernel(plain.layers[0]).assign(kernel)
    if case != "embedding":
        plain.layers[0].bias.assign(ops.convert_to_numpy(layer.bias))
    np.testing.assert_array_equal(predict(model, x), predict(plain, x))
    spoil(model)
    expected = predict(model, x)
    assert largest_difference(expected, predict(plain, x)) > 0.1
    model.save(tmp_path / "a.keras")
    again = keras.models.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(predict(again, x), expected)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(stored_kernel(adapted(again)[0])), kernel
    )
    assert again.layers[0].get_config() == layer.get_config()
    keras_vera.merge(again)
    np.testing.assert_allclose(predict(again, x), expected, atol=2e-5)


@pytest.mark.parametrize("case", ["embedding", "valid", "causal"])
def test_dropout_reaches_the_adapter_alone(case):
    model, x = make_model(case)
    base = predict(model, x)
    keras_vera.enable_vera(model, rank=RANK, targets=".*", dropout=0.5)
    for v in model.trainable_variables:
        v.assign(ops.ones(v.shape))
    without = predict(model, x)
    outputs = np.stack(
        [
            ops.convert_to_numpy(model(x, training=True)) - base
            for _ in range(200)
        ]
    )
    assert largest_difference(outputs[0], outputs[1]) > 0.1
    error = np.abs(outputs.mean(0) - (without - base)).mean()
    assert error < 0.3 * np.abs(without - base).mean()
    # With b = 0 nothing drops out.
    adapted(model)[0].vera_lambda_b.assign(ops.zeros(6))
    received = ops.convert_to_numpy(model(x, training=True))
    np.testing.assert_allclose(received, base, atol=1e-6)


def test_groups_drop_out_as_well():
    model, x = make_model("groups")
    keras_vera.enable_vera(model, rank=RANK, targets="conv", dropout=0.5)
    spoil(model)
    a, b = (ops.convert_to_numpy(model(x, training=True)) for _ in range(2))
    assert largest_difference(a, b) > 0.1


@pytest.mark.parametrize("mask_zero", [True, False])
@pytest.mark.parametrize(
    "layer_class", [keras.layers.Embedding, keras.layers.ReversibleEmbedding]
)
def test_masks_pass_an_adapted_embedding(layer_class, mask_zero, plan):
    inputs = keras.Input((4,), dtype="int32")
    embedding = layer_class(5, 3, mask_zero=mask_zero)
    pooling = keras.layers.GlobalAveragePooling1D()
    model = keras.Model(inputs, pooling(embedding(inputs)))
    x = np.array([[1, 2, 0, 0], [3, 0, 0, 0]], "int32")
    keras_vera.enable_vera(model, rank=2, targets="embedding", plan=plan)
    spoil(model)
    table = ops.convert_to_numpy(embedding.embeddings)
    weights = (x != 0) if mask_zero else np.ones_like(x)
    expected = np.einsum("bt,btn->bn", weights, table[x])
    expected /= weights.sum(1, keepdims=True)
    np.testing.assert_allclose(predict(model, x), expected, atol=1e-5)


@pytest.mark.parametrize("reverse_dtype", [None, "float32"])
def test_tied_embedding_is_one_table_both_ways(plan, reverse_dtype, rng):
    layer = keras.layers.ReversibleEmbedding(
        7, 6, logit_soft_cap=2.0, reverse_dtype=reverse_dtype
    )
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    keras_vera.enable_vera(model, rank=RANK, targets="embedding", plan=plan)
    spoil(model)
    a, b_matrix, d, b = matrices(layer)
    table = ops.convert_to_numpy(layer._embeddings) + (a * d) @ b_matrix * b
    ids = np.array([[1, 6, 0], [3, 3, 2]], "int32")
    x = rng.normal(size=(2, 3, 6)).astype("float32")
    logits = 2 * np.tanh(x @ table.T / 2)
    np.testing.assert_allclose(predict(model, ids), table[ids], atol=1e-5)
    received = ops.convert_to_numpy(layer(x, reverse=True))
    np.testing.assert_allclose(received, logits, atol=2e-5)
    keras_vera.merge(model)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x, reverse=True)), logits, atol=2e-5
    )


def test_generation_with_a_tied_embedding():
    task = make_task("gemma")
    base = generate(task)
    keras_vera.enable_vera(task, rank=4, targets=["attention-qv", "embedding"])
    np.testing.assert_array_equal(generate(task), base)
    spoil(task, scale=2)
    received = generate(task)
    assert np.any(received != base)
    keras_vera.merge(task)
    np.testing.assert_array_equal(generate(task), received)


def generate(task):
    prompts = {
        "token_ids": np.array([[3, 5, 1, 0, 0, 0], [7, 2, 2, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0]] * 2),
    }
    task.compile(sampler="greedy")
    return task.generate(prompts, stop_token_ids=None)["token_ids"]


@pytest.mark.parametrize("case", ["embedding", "valid", "causal"])
def test_rows_of_a_bank(case, tmp_path):
    model, x = make_model(case)
    keras_vera.enable_vera(model, rank=RANK, targets=".*")
    bank = keras_vera.AdapterBank(model, capacity=2)
    expected = []
    for i, name in enumerate("ab"):
        file = tmp_path / f"{name}.vera.safetensors"
        spoil(model, seed=i + 1)
        keras_vera.save_adapter(model, file)
        bank.load(name, file)
        expected.append(predict(model, x)[i])
    received = bank.predict(x, adapters=["a", "b"])
    np.testing.assert_allclose(received, np.stack(expected), atol=2e-5)
    assert largest_difference(received[0], predict(model, x)[0]) > 0.1


def test_rows_of_a_bank_with_a_tied_embedding(tmp_path):
    task = make_task("gemma")
    keras_vera.enable_vera(task, rank=4, targets=["attention-qv", "embedding"])
    x = make_inputs("gemma", rows=2)[0]
    bank = keras_vera.AdapterBank(task, capacity=2)
    expected = []
    for i, name in enumerate("ab"):
        file = tmp_path / f"{name}.vera.safetensors"
        spoil(task, seed=i + 1)
        keras_vera.save_adapter(task, file)
        bank.load(name, file)
        expected.append(predict(task, x)[i])
    received = bank.predict(x, adapters=["a", "b"])
    np.testing.assert_allclose(received, np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["embedding", "same"])
def test_dtypes(case, dtype, plan):
    make, shape = CASES[case]
    exact, x = make_model(case)
    layer = make()
    config = layer.get_config() | {"dtype": dtype}
    model = keras.Sequential([exact.inputs[0], type(layer).from_config(config)])
    model.set_weights(exact.get_weights())
    for each in (exact, model):
        keras_vera.enable_vera(each, rank=RANK, targets=".*", plan=plan)
        spoil(each, scale=0.2)
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    expected = predict(exact, x)
    received = ops.convert_to_numpy(ops.cast(model(x), "float32"))
    precision = 1e-2 if dtype == "float16" else 6e-2
    np.testing.assert_allclose(received, expected, atol=precision)
    # Added in float32, and rounded once.
    base = ops.convert_to_numpy(
        ops.cast(stored_kernel(adapted(model)[0]), "float32")
    )
    a, b_matrix, d, b = matrices(adapted(model)[0])
    merged = base + ((a * d) @ b_matrix * b).reshape(base.shape)
    keras_vera.merge(model)
    kernel = stored_kernel(model.layers[0])
    wanted = ops.cast(merged.astype("float32"), kernel.dtype)
    difference = ops.abs(
        ops.cast(kernel, "float32") - ops.cast(wanted, "float32")
    )
    # One step of the dtype where float32 and float64 round to either side.
    step = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-22}
    bound = 2 * step[kernel.dtype] * np.abs(merged) + 1e-6
    assert np.all(ops.convert_to_numpy(difference) <= bound)
    assert np.mean(ops.convert_to_numpy(difference) == 0) > 0.9 or (
        kernel.dtype == "float32"
    )


def test_bank_refuses_to_mix_groups():
    model, x = make_model("groups")
    keras_vera.enable_vera(model, rank=RANK, targets="conv")
    bank = keras_vera.AdapterBank(model, capacity=1)
    bank.add("a")
    with pytest.raises(ValueError, match="has 2 groups.*Leave this layer out"):
        bank.predict(x, adapters=["a", None])


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.DepthwiseConv2D(3),
        keras.layers.SeparableConv2D(4, 3),
        keras.layers.Conv2DTranspose(4, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_convolutions_are_refused_by_name(layer):
    model = keras.Sequential(
        [keras.Input((5, 5, 4)), layer, keras.layers.Conv2D(2, 1)]
    )
    before = state(model)
    name = type(layer).__name__
    with pytest.raises(ValueError, match=f"layers of type {name}. VeRA"):
        keras_vera.enable_vera(model, targets=[layer.name, "conv"])
    assert state(model) == before
    keras_vera.enable_vera(model, rank=2, targets="conv")
    assert len(adapted(model)) == 1
    lines = []
    keras_vera.summary(model, print_fn=lines.append)
    assert f"{layer.name.lower()}" in lines[0].lower()


UNCAST = {
    "dense": (lambda **kw: keras.layers.Dense(6, **kw), (4, 8)),
    "einsum": (
        lambda **kw: keras.layers.EinsumDense("abc,cd->abd", (4, 6), **kw),
        (4, 4, 8),
    ),
    "convolution": (lambda **kw: keras.layers.Conv1D(6, 1, **kw), (4, 4, 8)),
}


@pytest.mark.parametrize("kind", UNCAST)
@pytest.mark.parametrize("plan", ["folded", "additive"])
@pytest.mark.parametrize(
    "dtype, received",
    [
        ("bfloat16", "float32"),
        ("mixed_bfloat16", "float32"),
        ("mixed_bfloat16", "bfloat16"),
        ("float32", "float16"),
        ("float16", "float64"),
        ("bfloat16", "int32"),
    ],
)
def test_inputs_that_are_not_cast(kind, plan, dtype, received, rng):
    make, shape = UNCAST[kind]
    layer = make(dtype=dtype, autocast=False)
    layer.build(shape)
    x = ops.cast(rng.integers(-8, 9, size=shape), received)
    try:
        base = layer(x)
    except Exception as error:
        pytest.skip(f"Keras cannot: {type(error).__name__}")
    keras_vera.enable_vera(layer, rank=RANK, targets=".*", plan=plan)
    start = layer(x)
    assert start.dtype == base.dtype
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(start, "float32")),
        ops.convert_to_numpy(ops.cast(base, "float32")),
    )
    spoil(layer)
    y = layer(x)
    assert y.dtype == base.dtype
    kernel = ops.cast(layer.kernel, "float32")
    kernel = ops.reshape(kernel, kernel.shape[-2:])
    expected = ops.matmul(ops.cast(x, "float32"), kernel)
    bound = 0.1 if "16" in dtype or "16" in received else 1e-4
    scale = ops.max(ops.abs(expected))
    difference = ops.max(ops.abs(ops.cast(y, "float32") - expected))
    assert difference <= bound * scale
    if received == "int32":
        return
    # All that trains gets its gradients.
    g = rng.normal(size=y.shape).astype("float32")
    _, gradients = outputs_and_gradients(layer, x, g)
    for name in ("vera_lambda_d", "vera_lambda_b"):
        assert np.all(np.isfinite(gradients[name])) and gradients[name].any()


@pytest.mark.in_turn("tensorflow")
@pytest.mark.parametrize("kind", ["Embedding", "ReversibleEmbedding"])
def test_ragged_indices(kind, plan):
    import tensorflow as tf

    layer = getattr(keras.layers, kind)(9, 6)
    inputs = keras.Input((None,), dtype="int32", ragged=True)
    model = keras.Sequential([inputs, layer])
    ragged = tf.ragged.constant([[1, 2, 3], [], [4]], dtype="int32")
    keras_vera.enable_vera(
        model, rank=RANK, targets="embedding", plan=plan, dropout=0.5
    )
    spoil(model)
    received = model(ragged)
    assert received.row_splits.numpy().tolist() == [0, 3, 3, 4]
    expected = layer.embeddings.numpy()[[1, 2, 3, 4]]
    np.testing.assert_allclose(received.values, expected, atol=1e-5)

    def of_gradients(indices, values):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(values(model(indices)) ** 2)
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    with_ragged = of_gradients(ragged, lambda y: y.values)
    dense = of_gradients(np.array([[1, 2, 3, 4]], "int32"), lambda y: y)
    for gradient, same in zip(with_ragged, dense, strict=True):
        assert np.any(gradient)
        np.testing.assert_allclose(gradient, same, rtol=1e-4, atol=1e-5)
