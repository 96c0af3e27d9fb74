import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from helpers import state
from keras import ops
from plans import full_pair

import keras_vera

pytestmark = pytest.mark.in_turn


def make_model():
    inputs = keras.Input((5, 8))
    x = inputs
    for i in range(2):
        x = keras.layers.MultiHeadAttention(2, 4, name=f"attention_{i}")(x, x)
        x = keras.layers.Dense(12, name=f"up_{i}")(x)
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
        ("mlp", MLP),
        (["key", lambda layer: layer.name == "up_0"], ["key", "key", "up_0"]),
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


class WithAttributes(keras.Model):
    """Holds layers under attributes that are names of others."""

    def __init__(self):
        super().__init__()
        for number in (1, 2, 3):
            name = f"dense_{number - 1}"
            layer = keras.layers.Dense(4, name=name if number > 1 else "dense")
            setattr(self, f"dense_{number}", layer)

    def call(self, x):
        return self.dense_3(self.dense_2(self.dense_1(x)))


def make_flat_model(layers=4):
    """Returns a model of layers that Keras names, as in any session."""
    return keras.Sequential(
        [keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(layers))]
    )


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("as_target", ["{}", ".*{}", "(.*/)?{}"])
def test_a_name_means_no_position(before, as_target):
    # Keras numbers names on, and its files count the layers of each list.
    keras.utils.clear_session()
    for _ in range(before):
        keras.layers.Dense(1)
    model = make_flat_model()
    names = [layer.name for layer in model.layers]
    for name in names:
        keras_vera.enable_vera(model, rank=2, targets=as_target.format(name))
        assert [x.name for x in adapted(model)] == [name]
        keras_vera.disable_vera(model)
    others = [name for name in names if name != names[1]]
    keras_vera.enable_vera(
        model,
        rank=2,
        targets="all-linear",
        exclude=as_target.format(names[1]),
    )
    assert [x.name for x in adapted(model)] == others
    keras_vera.disable_vera(model)
    keras_vera.enable_vera(
        model, rank=2, targets=others, train=as_target.format(names[1])
    )
    assert model.layers[1].kernel.trainable
    assert len(model.trainable_variables) == 2 * 3 + 2
    keras_vera.disable_vera(model)
    ranks = {as_target.format(name): i + 2 for i, name in enumerate(names)}
    keras_vera.enable_vera(model, targets=ranks)
    assert [x.vera_lambda_d.shape[0] for x in adapted(model)] == [2, 3, 4, 5]


def test_a_name_of_no_layer_is_none_of_a_position():
    keras.utils.clear_session()
    keras.layers.Dense(1)
    model = make_flat_model(2)
    with pytest.raises(ValueError, match="'dense' matches no layer"):
        keras_vera.enable_vera(model, rank=2, targets="dense")
    keras_vera.enable_vera(model, rank=2, targets="layers/dense")
    assert [x.name for x in adapted(model)] == ["dense_1"]


def test_names_go_before_attributes():
    model = WithAttributes()
    model(np.ones((1, 4)))
    for target, name in (
        ("dense_1", "dense_1"),
        ("dense_2", "dense_2"),
        ("dense_3", "dense_2"),
        (".*dense_1", "dense_1"),
        (".*dense_3", "dense_2"),
    ):
        keras_vera.enable_vera(model, rank=2, targets=target)
        assert [x.name for x in adapted(model)] == [name]
        keras_vera.disable_vera(model)


def test_attention_is_known_by_its_structure():
    # "value" alone, outside attention, is not a value projection.
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(1, name="value")(inputs)
    with pytest.raises(ValueError, match="'attention-qv' matches no layer"):
        keras_vera.enable_vera(keras.Model(inputs, outputs))


@pytest.mark.parametrize(
    "targets, exclude, expected",
    [
        ("all-linear", "attention", MLP),
        ("all-linear", ["mlp", "query"], ["key", "value", "attention_output"]),
        ("attention-qv", r".*attention_1.*", ["query", "value"]),
        ("mlp", lambda layer: layer.name[-1] == "0", ["up_1", "down_1"]),
    ],
)
def test_exclude(targets, exclude, expected):
    model = make_model()
    keras_vera.enable_vera(model, rank=2, targets=targets, exclude=exclude)
    found = {layer.name for layer in adapted(model)}
    assert found == set(expected)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"exclude": "qery"}, "`exclude`: 'qery' .* Did you mean 'query'"),
        ({"exclude": "attention"}, "`exclude` leaves nothing of `targets`"),
        ({"exclude": {"query": 2}}, "`exclude` must be a role"),
        ({"targets": {}}, "`targets` must be a role .* targets={}"),
        ({"targets": {3: 2}}, "`targets` must be a role .* targets={3: 2}"),
        ({"targets": keras.layers.Dense}, "`targets` must be a role .*Dense"),
        (
            {"targets": ["mlp", keras.layers.Dense(3)]},
            "`targets` must be a role .*Dense",
        ),
        ({"exclude": keras.layers.Dense}, "`exclude` must be a role"),
        ({"targets": {"query": 0}}, "`rank` must be .* rank=0"),
        ({"targets": {"qery": 2}}, "'qery' .* Did you mean 'query'"),
        ({"targets": "conv"}, r"'conv' matches no .*: .*'mlp' \(4\), 'all-l"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(kwargs, message):
    model = make_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        keras_vera.enable_vera(model, **kwargs)
    assert state(model) == before


@pytest.mark.parametrize("structure", ["dense", "blocks2"])
def test_rank_of_each_target(structure, tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        return make_model()

    model, x = make(), np.random.default_rng(0).normal(size=(2, 5, 8))
    base = predict(model, x)
    keras_vera.enable_vera(
        model,
        rank=5,
        # The last of those that match a layer counts.
        targets={"attention": None, "mlp": 9, "query": 2},
        structure=structure,
    )
    ranks = {x.name: x.vera_lambda_d.shape[0] for x in adapted(model)}
    assert ranks == {
        **dict.fromkeys(["key", "value", "attention_output"], 5),
        **dict.fromkeys(MLP, 9),
        "query": 2,
    }
    # There is one pair, of the highest rank; others use the first of it.
    pairs = {id(layer.projection) for layer in adapted(model)}
    assert len(pairs) == 1
    np.testing.assert_array_equal(predict(model, x), base)
    spoil(model)
    up = model.get_layer("up_0")
    query = next(x for x in adapted(model) if x.name == "query")
    for layer in (up, query):
        np.testing.assert_allclose(
            delta_of(layer), expected_delta(layer), atol=1e-6
        )
    lines = []
    keras_vera.summary(model, expand_repeated=True, print_fn=lines.append)
    assert lines[0].count("│    2 │") == 2 and lines[0].count("│    9 │") == 4

    expected = predict(model, x)
    assert largest_difference(expected, base) > 1e-2
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = make()
    keras_vera.load_adapter(loaded, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(predict(loaded, x), expected)
    kept = {x.name: x.vera_lambda_d.shape[0] for x in adapted(loaded)}
    assert kept == ranks
    keras_vera.disable_vera(loaded)
    keras_vera.enable_vera(
        loaded,
        targets={"attention": 5, "mlp": 9, "query": 2},
        structure=structure,
    )
    loaded.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(predict(loaded, x), expected)
    keras_vera.merge(model)
    np.testing.assert_allclose(predict(model, x), expected, atol=1e-5)


def delta_of(layer):
    kernel = ops.convert_to_numpy(layer.kernel - layer._kernel)
    return kernel.reshape(kernel.shape[0], -1)


def expected_delta(layer):
    """Returns `(A * d) B * b`, with the leading channels of a wider pair."""
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
    m, n, rank, s = layer._kernel.shape[0], len(b), len(d), projection.blocks
    common, all_common = -(-rank // s**2), -(-projection.rank // s**2)
    if s > 1:
        a = a.reshape(len(a), s, all_common)[:, :, :common]
        a = a.reshape(len(a), -1)
        b_matrix = b_matrix.reshape(s, all_common, -1)[:, :common]
        b_matrix = b_matrix.reshape(s * common, -1)
    else:
        a, b_matrix = a[:, :rank], b_matrix[:rank]
    a, b_matrix = full_pair(a, b_matrix, m, n, rank, s)
    return (a * d) @ b_matrix * b * np.sqrt(2 * s / m) * np.sqrt(2 * s / rank)


def test_roles_of_what_is_no_attention():
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(7, 4, name="tokens")(inputs)
    x = keras.layers.Conv1D(4, 3, name="convolution")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="linear")(x))
    for role, name in (
        ("embedding", "tokens"),
        ("conv", "convolution"),
        ("all-linear", "linear"),
    ):
        keras_vera.enable_vera(model, rank=2, targets=role)
        assert [layer.name for layer in adapted(model)] == [name]
        keras_vera.disable_vera(model)


class FusedAttention(keras.layers.Layer):
    """Attention as a family that does not exist yet may write it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(24)
        self.last = keras.layers.Dense(8)

    def build(self, shape):
        self.first.build(shape)
        self.last.build(shape)

    def call(self, x):
        q, k, v = ops.split(self.first(x), 3, axis=-1)
        scores = ops.softmax(ops.matmul(q, ops.swapaxes(k, 1, 2)))
        return self.last(ops.matmul(scores, v))


class Wrapper(keras.layers.Layer):
    """Holds one layer that stands for it, as Gemma 4 clips its layers."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def build(self, shape):
        self.layer.build(shape)

    def call(self, x):
        return self.layer(x)


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query_proj = Wrapper(keras.layers.Dense(8))
        self.value_proj = Wrapper(keras.layers.Dense(8))
        self.out_proj = Wrapper(keras.layers.Dense(8))
        self.widen = Wrapper(keras.layers.Dense(12))
        self.narrow = Wrapper(keras.layers.Dense(8))
        self.router = Wrapper(keras.layers.Dense(3))

    def build(self, shape):
        for layer in (self.query_proj, self.value_proj, self.out_proj):
            layer.build(shape)
        self.widen.build(shape)
        self.narrow.build((*shape[:-1], 12))
        self.router.build(shape)

    def call(self, x):
        x = self.out_proj(self.query_proj(x) * self.value_proj(x))
        return self.narrow(self.widen(x)) * ops.sum(self.router(x))


@pytest.mark.parametrize(
    "role, expected",
    [
        ("attention-qv", {"first", "query_proj", "value_proj"}),
        (
            "attention",
            {"first", "last", "query_proj", "value_proj", "out_proj"},
        ),
        ("mlp", {"widen", "narrow"}),
    ],
)
def test_roles_are_known_by_structure(role, expected):
    inputs = keras.Input((5, 8))
    attention, block = FusedAttention(), Block()
    model = keras.Model(inputs, block(attention(inputs)))
    keras_vera.enable_vera(model, rank=2, targets=role)
    layers = {
        **{name: getattr(attention, name) for name in ("first", "last")},
        **{
            name: wrapper.layer
            for name, wrapper in vars(block).items()
            if isinstance(wrapper, Wrapper)
        },
    }
    if not any(isinstance(x, Wrapper) for x in vars(block).values()):
        # PyTorch keeps layers elsewhere.
        layers |= {
            name: wrapper.layer
            for name, wrapper in block._modules.items()
            if isinstance(wrapper, Wrapper)
        }
    found = adapted(model)
    assert {n for n, x in layers.items() if x in found} == expected
    assert len(found) == len(expected)
