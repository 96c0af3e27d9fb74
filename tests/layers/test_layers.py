"""VeRADense and VeRAEinsumDense on their own, in models that hold them."""

import gc
import json

import keras
import numpy as np
import plans
import pytest
from gradients import outputs_and_gradients
from gradients import to_float64
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

import keras_vera
from keras_vera import SharedProjection
from keras_vera.layers import VeRADense
from keras_vera.layers import VeRAEinsumDense

pytestmark = pytest.mark.members_in_turn

DENSE = "...x,xy->...y"


def make_layer(equation, shape, dims, bias=True, **kwargs):
    """Returns a built layer with random weights, an einsum layer or a dense.

    Args:
        equation: String, an einsum equation, or "dense".
        shape: Tuple, the shape of the input.
        dims: Dict, the sizes of the new axes.
        bias: Boolean, whether there is a bias, over the last new axis.
    """
    if equation == "dense":
        layer = VeRADense(dims["y"], use_bias=bias, **kwargs)
    else:
        inputs, outputs = equation.split(",")[0], equation.split("->")[1]
        known = {**dict(zip(inputs.replace("...", ""), shape)), **dims}
        axes = [x for x in outputs if x != "."]
        new = [x for x in axes if x in dims]
        if not equation.startswith("..."):
            axes = axes[1:]
        layer = VeRAEinsumDense(
            equation,
            [known[x] for x in axes],
            bias_axes=new[-1] if bias else None,
            **kwargs,
        )
    layer.build(shape)
    randomize(layer)
    return layer


def randomize(layer, seed=3):
    rng = np.random.default_rng(seed)
    for v in (layer.bias, layer.vera_lambda_d, layer.vera_lambda_b):
        if v is not None:
            v.assign(rng.normal(0, 0.5, v.shape).astype("float32"))


def reference(equation, layer, x, upstream=None):
    """Returns what the paper's formula and its derivatives say, in float64.

    `y = x W + bias + b * ((x A * d) B) * sqrt(2 / m) * sqrt(2 / r)`. A and B
    take the place of the kernel in the equation, with the axis "R" for rank:
    for "btd,dnh->btnh", A has the axes "dR" and B has "Rnh".
    """
    equation = DENSE if equation == "dense" else equation
    letters = equation.split(",")[0].replace("...", "")
    elided = "STU"[: x.ndim - len(letters)]
    inputs, rest = equation.replace("...", elided).split(",")
    kernel, outputs = rest.split("->")
    contracted = "".join(axis for axis in kernel if axis not in outputs)
    new = "".join(axis for axis in kernel if axis in outputs)
    kept = "".join(axis for axis in outputs if axis not in new) + "R"

    x, w = to_float64(x), to_float64(layer._kernel)
    d, b = to_float64(layer.vera_lambda_d), to_float64(layer.vera_lambda_b)
    size = dict(zip(kernel, w.shape))
    m = int(np.prod([size[axis] for axis in contracted]))
    n = int(np.prod([size[axis] for axis in new]))
    r = len(d)
    blocks = layer.projection.blocks
    a, b_matrix = plans.full_pair(
        to_float64(layer.projection.vera_kernel_a),
        to_float64(layer.projection.vera_kernel_b),
        *(m, n, r, blocks),
    )
    a = a.reshape([size[axis] for axis in contracted] + [r])
    b_matrix = b_matrix.reshape([r] + [size[axis] for axis in new])
    b = b.reshape([size[axis] for axis in new])
    # The fan-in of a block is that of the whole by the number of blocks.
    scale = np.sqrt(2 * blocks / m) * np.sqrt(2 * blocks / r)

    h = np.einsum(f"{inputs},{contracted}R->{kept}", x, a)
    z = scale * np.einsum(f"{kept},R{new}->{outputs}", h * d, b_matrix)
    y = np.einsum(f"{inputs},{kernel}->{outputs}", x, w)
    y = y + np.einsum(f"{outputs},{new}->{outputs}", z, b)
    if layer.bias is not None:
        y = y + to_float64(layer.bias)
    if upstream is None:
        return y
    # The gradients of sum(y * upstream), by hand.
    g = upstream.astype("float64")
    g_z = scale * np.einsum(f"{outputs},{new}->{outputs}", g, b)
    g_h = np.einsum(f"{outputs},R{new}->{kept}", g_z, b_matrix)
    # An axis that is only summed has the same gradient at every index.
    left = "".join(axis for axis in inputs if axis in kept + contracted)
    g_x = np.einsum(f"{outputs},{kernel}->{left}", g, w)
    g_x = g_x + np.einsum(f"{kept},{contracted}R->{left}", g_h * d, a)
    ones = np.ones_like(x)
    g_x = np.einsum(f"{left},{inputs}->{inputs}", g_x, ones)
    return y, {
        "x": g_x,
        "vera_lambda_d": np.einsum(f"{kept},{kept}->R", h, g_h),
        "vera_lambda_b": np.einsum(f"{outputs},{outputs}->{new}", z, g).ravel(),
    }


def assert_close(actual, expected, tolerance):
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def check(equation, layer, x, tolerance):
    """Compares the layer's output and all gradients with the reference."""
    shape = layer.compute_output_shape(x.shape)
    g = np.random.default_rng(4).normal(size=shape).astype("float32")
    expected_y, expected = reference(equation, layer, x, g)
    y, gradients = outputs_and_gradients(layer, x, g)
    assert_close(y, expected_y, tolerance)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        # Those of the vectors are float32, as the vectors are.
        limit = tolerance if name == "x" else max(tolerance, 2.0**-20)
        assert_close(gradients[name], gradient, limit)


# Equation, shape of the input, sizes of the new axes.
CASES = [
    ("dense", (4, 3), {"y": 2}),
    ("dense", (2, 5, 3), {"y": 4}),
    ("dense", (2, 1, 1), {"y": 1}),
    (DENSE, (2, 5, 3), {"y": 4}),
    ("abc,cde->abde", (2, 3, 4), {"d": 2, "e": 5}),
    ("bsd,kdh->bskh", (2, 3, 4), {"k": 2, "h": 5}),
    ("btnh,nhd->btd", (2, 3, 4, 5), {"d": 6}),
    ("ibnd,hnd->ibh", (2, 3, 4, 5), {"h": 6}),
    ("abcd,cbe->aed", (2, 3, 4, 5), {"e": 6}),
    ("abcd,ecfb->afed", (2, 3, 4, 5), {"e": 3, "f": 2}),
    ("ab...,bc->ac...", (2, 3, 4, 5), {"c": 6}),
    # The axis b is only summed.
    ("abc,cd->ad", (2, 3, 4), {"d": 5}),
]


@given(
    case=st.sampled_from(CASES),
    rank=st.sampled_from([1, 4, 7]),
    structure=st.sampled_from(["dense", "blocks2", "blocks3"]),
    plan=st.sampled_from([None, *plans.ALL]),
    bias=st.booleans(),
    # A neighbour that makes the shared pair larger than the layer needs.
    neighbour=st.sampled_from([None, (99, 1), (70, 80)]),
)
def test_outputs_and_gradients(case, rank, structure, plan, bias, neighbour):
    equation, shape, dims = case
    projection = SharedProjection(rank=rank, seed=3, structure=structure)
    if neighbour:
        projection.reserve(*neighbour)
    layer = make_layer(*case, bias=bias, projection=projection)
    assert (layer.bias is not None) == bias
    x = np.random.default_rng(5).normal(size=shape).astype("float32")
    with plans.forced(plan):
        check(equation, layer, x, 1e-5)
    # The layer is no other without its neighbours.
    alone = SharedProjection(rank=rank, seed=3, structure=structure)
    alone = make_layer(*case, bias=bias, projection=alone)
    alone._kernel.assign(ops.convert_to_numpy(layer._kernel))
    assert_close(to_float64(alone(x)), to_float64(layer(x)), 1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {len(c[1])}D")
def test_kernel_is_the_merged_kernel(case, rng):
    equation, shape, dims = case
    layer = make_layer(*case, rank=3)
    x = rng.normal(size=shape).astype("float32")
    equation = DENSE if equation == "dense" else equation
    y = np.einsum(equation, x, to_float64(layer.kernel)) + to_float64(
        layer.bias
    )
    assert_close(y, reference(equation, layer, x), 1e-5)
    assert np.abs(to_float64(layer.kernel - layer._kernel)).max() > 0.01


EINSUM = ("btd,ndh->btnh", (2, 3, 4), {"n": 2, "h": 3})
BOTH = pytest.mark.parametrize(
    "case", [("dense", (2, 3, 4), {"y": 6}), EINSUM], ids=["dense", "einsum"]
)


def plain_twin(layer):
    """Returns the Keras layer with the same kernel and bias."""
    config = layer.vera_plain_class.get_config(layer)
    twin = layer.vera_plain_class.from_config(config)
    twin.build(layer._build_shapes_dict["input_shape"])
    # Not the arrays themselves: JAX frees those that `predict` updates.
    twin._kernel.assign(ops.convert_to_numpy(layer._kernel))
    if layer.bias is not None:
        twin.bias.assign(ops.convert_to_numpy(layer.bias))
    return twin


POLICIES = {
    # The unit roundoff that outputs are compared with.
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "mixed_float16": 2.0**-11,
    "mixed_bfloat16": 2.0**-8,
    # On the others, `ops.matmul` rounds to float32 as Keras comes.
    "float64": 2.0**-53 if backend() == "tensorflow" else 2.0**-24,
}


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plan", plans.ALL, ids=str)
def test_dtypes(case, policy, plan, rng):
    equation, shape, _ = case
    layer = make_layer(*case, rank=4, dtype=policy)
    twin = plain_twin(layer)
    # Exact in all dtypes, so that only the layer rounds.
    x = rng.integers(-8, 9, shape).astype("float32") / 8
    if policy == "float64":
        x = x.astype("float64")
    y, expected = layer(x), twin(x)
    assert y.dtype == expected.dtype
    assert layer._kernel.dtype == twin._kernel.dtype
    for v in (layer.vera_lambda_d, layer.vera_lambda_b):
        assert v.dtype == "float32"
    with plans.forced(plan):
        check(equation, layer, x, 16 * POLICIES[policy])


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plan", ["folded", "additive"])
def test_starts_exactly_as_the_base(case, policy, plan, rng):
    layer = make_layer(
        *case, rank=4, dtype=policy, activation="gelu", plan=plan
    )
    layer.reset_vectors()
    twin = plain_twin(layer)
    x = rng.normal(size=case[1]).astype("float32")
    np.testing.assert_array_equal(to_float64(layer(x)), to_float64(twin(x)))
    # Compiled, too.
    models = []
    for one in (layer, twin):
        inputs = keras.Input(batch_shape=(None, *case[1][1:]))
        models.append(keras.Model(inputs, one(inputs)))
    y, expected = (to_float64(m.predict(x, verbose=0)) for m in models)
    np.testing.assert_array_equal(y, expected)
    randomize(layer)
    assert np.abs(to_float64(layer(x)) - expected).max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_float16_does_not_overflow(dtype, rng):
    # x A without its factor has a standard deviation of 32,000 here.
    layer = make_layer("dense", (8, 1024), {"y": 4}, rank=64, dtype=dtype)
    x = rng.normal(0, 1e3, (8, 1024)).astype("float16").astype("float32")
    y = to_float64(layer(x))
    assert np.isfinite(y).all()
    assert_close(y, reference("dense", layer, x), 0.01)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("plan", plans.DIFFERENT, ids=str)
def test_vector_gradients_are_summed_in_float32(dtype, plan):
    # Two sums over 50,000 tokens, beyond the largest number of float16; and
    # counting by ones in bfloat16 ends at 256.
    layer = make_layer(
        "dense", (50_000, 1), {"y": 1}, bias=False, rank=1, dtype=dtype
    )
    layer.vera_lambda_d.assign([1.0])
    layer.vera_lambda_b.assign([4.0])
    x, g = np.ones((50_000, 1), "float32"), np.ones((50_000, 1), "float32")
    with plans.forced(plan):
        _, gradients = outputs_and_gradients(layer, x, g)
    _, expected = reference("dense", layer, x, g)
    for name in ("vera_lambda_d", "vera_lambda_b"):
        assert abs(expected[name][0]) > 65_504
        np.testing.assert_allclose(gradients[name], expected[name], rtol=0.01)


def test_integer_inputs(rng):
    # Only Dense takes them, on PyTorch; and Keras casts no integers.
    layer = make_layer("dense", (2, 3, 4), {"y": 6}, rank=4)
    x = rng.integers(-3, 4, (2, 3, 4)).astype("int32")
    expected = reference("dense", layer, x)
    assert_close(to_float64(layer(x)), expected, 1e-5)


@BOTH
def test_activation_comes_after_the_adapter(case, rng):
    layer = make_layer(*case, rank=4, activation="relu")
    x = rng.normal(size=case[1]).astype("float32")
    expected = reference(case[0], layer, x)
    base = to_float64(plain_twin(layer)(x))
    # Both orders differ where the adapter changes a sign.
    assert np.any((expected > 0) & (base == 0))
    assert_close(to_float64(layer(x)), np.maximum(expected, 0), 1e-5)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_trainable_variables(case, bias):
    layer = make_layer(*case, bias=bias, rank=3)
    vectors = [layer.vera_lambda_d, layer.vera_lambda_b]

    def trained(holder):
        return {id(v) for v in holder.trainable_variables}

    model = keras.Sequential([layer])
    model.build(case[1])
    for toggle in (
        lambda: None,
        lambda: setattr(layer, "trainable", True),
        lambda: setattr(model, "trainable", True),
    ):
        toggle()
        for holder in (layer, model):
            assert trained(holder) == {id(v) for v in vectors}
            holder.trainable = False
            assert trained(holder) == set()
            holder.trainable = True
    frozen = [v.name for v in layer.non_trainable_variables]
    assert frozen[:-2] == ["kernel", "bias"][: 1 + bias]
    assert set(frozen[-2:]) == {"vera_kernel_a", "vera_kernel_b"}


def test_frozen_from_the_start():
    layer = VeRADense(3, rank=2, trainable=False)
    layer.build((None, 4))
    assert layer.trainable_variables == []
    layer.trainable = True
    assert [v.name for v in layer.trainable_variables] == [
        "vera_lambda_d",
        "vera_lambda_b",
    ]


def test_vectors_start_as_asked():
    layer = VeRADense(3, rank=2, d_initial=-0.3)
    layer.build((None, 4))
    for _ in range(2):
        np.testing.assert_array_equal(
            to_float64(layer.vera_lambda_d), np.full(2, np.float32(-0.3))
        )
        np.testing.assert_array_equal(to_float64(layer.vera_lambda_b), 0)
        randomize(layer)
        layer.reset_vectors()


# Models of layers that share one pair.


def sequential(**kwargs):
    projection = SharedProjection(rank=3, seed=2)
    kwargs["projection"] = projection
    return keras.Sequential(
        [
            keras.Input((5, 4)),
            VeRADense(6, activation="relu", **kwargs),
            keras.layers.GlobalAveragePooling1D(),
            VeRADense(2, use_bias=False, **kwargs),
        ]
    )


def functional(**kwargs):
    projection = SharedProjection(rank=3, seed=2)
    kwargs["projection"] = projection
    inputs = keras.Input((None, 4))
    split = VeRAEinsumDense(
        "btd,ndh->btnh", (None, 2, 3), bias_axes="nh", **kwargs
    )
    join = VeRAEinsumDense(
        "btnh,nhd->btd", (None, 4), activation="tanh", **kwargs
    )
    x = join(split(inputs))
    x = join(split(x))  # Twice, with the same vectors.
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, VeRADense(2, **kwargs)(x))


def nested(**kwargs):
    projection = SharedProjection(rank=3, seed=2)

    def block():
        # Names need to be unique within a model only.
        layer = VeRADense(4, projection=projection, name="inner", **kwargs)
        inputs = keras.Input((None, 4))
        return keras.Model(inputs, layer(inputs))

    inputs = keras.Input((5, 4))
    x = keras.layers.GlobalAveragePooling1D()(block()(block()(inputs)))
    return keras.Model(inputs, VeRADense(2, projection=projection)(x))


@keras.saving.register_keras_serializable("keras_vera_tests")
class Block(keras.layers.Layer):
    """A custom layer that is given the projection."""

    def __init__(self, projection, **kwargs):
        super().__init__(**kwargs)
        self.projection = projection
        self.dense = VeRADense(4, projection=projection, name="inner")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        projection = keras.saving.serialize_keras_object(self.projection)
        return {**super().get_config(), "projection": projection}

    @classmethod
    def from_config(cls, config):
        projection = keras.saving.deserialize_keras_object(config["projection"])
        return cls(**{**config, "projection": projection})


def custom():
    projection = SharedProjection(rank=3, seed=2)
    pool = keras.layers.GlobalAveragePooling1D()
    blocks = [Block(projection), Block(projection)]
    return keras.Sequential([keras.Input((5, 4)), *blocks, pool])


MODELS = [sequential, functional]
SHARING = [*MODELS, nested, custom]


@pytest.fixture
def x(rng):
    return rng.normal(size=(6, 5, 4)).astype("float32")


def spoiled(make):
    model = make()
    spoil(model)
    return model


def pair_ids(model):
    return {id(v) for v in model.variables if v.name.startswith("vera_kernel_")}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("merge", [True, False])
def test_merge_and_disable_leave_plain_layers(make, merge, x):
    model = make()
    base = predict(model, x)
    spoil(model)
    expected = predict(model, x) if merge else base
    layers = adapted(model)
    assert largest_difference(predict(model, x), base) > 0.01
    (keras_vera.merge if merge else keras_vera.disable_vera)(model)
    assert adapted(model) == []
    for layer in layers:
        assert type(layer) in (keras.layers.Dense, keras.layers.EinsumDense)
        # What was frozen for the adapter's sake is not any more.
        assert len(layer.trainable_variables) == 1 + (layer.bias is not None)
        assert layer.weights == layer.trainable_variables
    if merge:
        assert largest_difference(predict(model, x), expected) < 1e-5
    else:
        np.testing.assert_array_equal(predict(model, x), expected)


@pytest.mark.parametrize("make", MODELS)
def test_merged_model_is_saved_as_plain_keras(make, tmp_path, x):
    model = spoiled(make)
    expected = predict(model, x)
    keras_vera.merge(model)
    model.save(tmp_path / "merged.keras")
    loaded = keras.saving.load_model(tmp_path / "merged.keras")
    assert "keras_vera" not in json.dumps(loaded.get_config())
    assert largest_difference(predict(loaded, x), expected) < 1e-5


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "deleted"])
@pytest.mark.parametrize("make", SHARING)
def test_saved_model_comes_back(make, alive, tmp_path, x):
    model = spoiled(make)
    expected = predict(model, x)
    assert len(pair_ids(model)) == 2
    count = len(model.weights)
    ids = {id(v) for v in model.variables}
    model.save(tmp_path / "model.keras")
    if not alive:
        del model
        gc.collect()
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(loaded, x), expected)
    assert len(loaded.trainable_variables) == 2 * len(adapted(loaded))
    if alive:
        assert ids.isdisjoint(id(v) for v in loaded.variables)
    assert len(pair_ids(loaded)) == 2
    assert len(loaded.weights) == count


@pytest.mark.parametrize("make", SHARING)
def test_loaded_models_are_independent(make, tmp_path, x):
    model = spoiled(make)
    model.save(tmp_path / "model.keras")
    path = tmp_path / "model.keras"
    models = [model] + [keras.saving.load_model(path) for _ in range(3)]
    assert len({id(v) for m in models for v in m.variables}) == sum(
        len(m.variables) for m in models
    )
    expected = predict(model, x)
    first, second = models[2:]
    first.compile("sgd", "mse")
    first.fit(x, np.ones((6, first.output_shape[-1])), verbose=0)
    keras_vera.merge(second)
    assert largest_difference(predict(first, x), expected) > 0
    for other in models[:2]:
        np.testing.assert_array_equal(predict(other, x), expected)
    assert [len(pair_ids(m)) for m in models] == [2, 2, 2, 0]


@pytest.mark.parametrize("make", [*MODELS, nested])
def test_clone_has_one_pair_of_its_own(make, x):
    model = spoiled(make)
    clone = keras.models.clone_model(model)
    ids = {id(v) for v in model.variables}
    assert ids.isdisjoint(id(v) for v in clone.variables)
    assert largest_difference(predict(clone, x), predict(model, x)) > 0.01
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(predict(clone, x), predict(model, x))
    assert len(pair_ids(clone)) == 2


def test_loaded_part_leaves_the_whole_alone(tmp_path):
    model = sequential()
    part = keras.Sequential([keras.Input((6,)), model.layers[-1]])
    part.save(tmp_path / "part.keras")
    model.save(tmp_path / "model.keras")
    del model, part
    gc.collect()
    part = keras.saving.load_model(tmp_path / "part.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert len(pair_ids(model)) == 2
    assert pair_ids(part).isdisjoint(pair_ids(model))


@pytest.mark.parametrize("make", MODELS)
def test_weights_round_trip(make, tmp_path, x):
    model = spoiled(make)
    model.save_weights(tmp_path / "model.weights.h5")
    keras.utils.set_random_seed(7)
    other = make()
    assert largest_difference(predict(other, x), predict(model, x)) > 0.01
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(predict(other, x), predict(model, x))
    for ours, theirs in zip(numpy_weights(other), numpy_weights(model)):
        np.testing.assert_array_equal(ours, theirs)
    # What came back trains on.
    other.compile("sgd", "mse")
    other.fit(x, np.ones((6, 2)), verbose=0)
    assert largest_difference(predict(other, x), predict(model, x)) > 0


def test_weights_do_not_depend_on_the_neighbours(tmp_path, rng):
    # Only the slices in use count: another model may have a larger pair.
    x = rng.normal(size=(2, 4)).astype("float32")
    layers = []
    for wide in (True, False):
        projection = SharedProjection(rank=3)
        if wide:
            projection.reserve(20, 30)
        layers.append(VeRADense(3, projection=projection, name="layer"))
    models = [keras.Sequential([keras.Input((4,)), y]) for y in layers]
    spoil(models[0])
    models[0].save_weights(tmp_path / "wide.weights.h5")
    models[1].load_weights(tmp_path / "wide.weights.h5")
    assert largest_difference(*[predict(m, x) for m in models]) < 1e-6


@pytest.mark.parametrize("name", ["vera_kernel_a", "vera_kernel_b"])
@pytest.mark.parametrize("make", MODELS)
def test_file_with_another_pair_is_refused(make, name, tmp_path):
    model = make()
    pair = getattr(adapted(model)[-1].projection, name)
    # One entry, in the slices of all layers.
    pair.assign(
        pair + np.eye(*pair.shape)[:1, :] * np.eye(pair.shape[0])[:, :1]
    )
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    message = "saved with other random matrices than seed=2, rank=3 make here"
    with pytest.raises(ValueError, match=message):
        keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=message):
        make().load_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("kwargs", [{"seed": 1}, {"rank": 4}])
def test_weights_of_another_projection_are_refused(kwargs, tmp_path):
    models = []
    for projection in (SharedProjection(rank=3), SharedProjection(**kwargs)):
        layer = VeRADense(2, projection=projection)
        models.append(keras.Sequential([keras.Input((4,)), layer]))
    models[0].save_weights(tmp_path / "model.weights.h5")
    before = numpy_weights(models[1])
    with pytest.raises(ValueError, match="other random matrices"):
        models[1].load_weights(tmp_path / "model.weights.h5")
    for weight, value in zip(numpy_weights(models[1]), before, strict=True):
        np.testing.assert_array_equal(weight, value)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_variables_are_checked_both_ways(case, bias):
    layer = make_layer(*case, rank=3, bias=bias)
    whole = {}
    layer.save_own_variables(whole)
    whole = {k: ops.convert_to_numpy(v).copy() for k, v in whole.items()}
    layer.load_own_variables(whole)
    before = numpy_weights(layer)
    for key in whole:
        part = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(ValueError, match="expected the variables"):
            layer.load_own_variables(part)
    with pytest.raises(ValueError, match="expected the variables"):
        layer.load_own_variables({**whole, "2": np.zeros(1)})
    for weight, value in zip(numpy_weights(layer), before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_weights_of_a_plain_model_are_refused(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = keras.Sequential([keras.Input((4,)), VeRADense(2, rank=3)])
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load_weights(tmp_path / "plain.weights.h5")


@BOTH
def test_config_round_trip(case):
    layer = make_layer(
        *case, rank=3, d_initial=0.2, dropout=0.25, activation="relu"
    )
    text = json.dumps(keras.layers.serialize(layer))
    again = keras.layers.deserialize(json.loads(text))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    assert (again.projection.rank, again.d_initial, again.dropout) == (
        3,
        0.2,
        0.25,
    )
    # Keras builds it, as the original was.
    assert again.vera_lambda_d.shape == (3,)
    assert again.vera_kernel_a is not layer.vera_kernel_a


def test_config_has_every_argument():
    config = VeRADense(4, rank=3).get_config()
    for name in ("units", "rank", "projection", "d_initial", "dropout", "plan"):
        assert name in config
    config = VeRAEinsumDense("ab,bc->ac", 3, rank=3).get_config()
    for name in ("equation", "output_shape", "rank", "projection"):
        assert name in config


def test_rank_defaults():
    def rank(**kwargs):
        return VeRADense(4, **kwargs).get_config()["rank"]

    assert rank() == 256
    assert rank(projection=SharedProjection(rank=5)) == 5
    assert rank(rank=5, projection=SharedProjection(rank=5)) == 5
    # Without a projection every layer has its own.
    a, b = VeRADense(4, rank=2), VeRADense(4, rank=2)
    a.build((None, 3))
    b.build((None, 3))
    assert a.vera_kernel_a is not b.vera_kernel_a


@BOTH
def test_dropout(case, rng):
    layer = make_layer(*case, rank=4, dropout=0.25)
    rows = 4000
    x = rng.normal(size=case[1])[:1].astype("float32")
    expected = reference(case[0], layer, x)[0]
    x = np.repeat(x, rows, axis=0)
    for _ in range(2):
        y = to_float64(layer(x, training=False))
        assert_close(y, np.repeat(expected[None], rows, 0), 1e-5)
    first = to_float64(layer(x, training=True))
    second = to_float64(layer(x, training=True))
    assert np.abs(first - second).max() > 0.01
    # Rescaled so that the mean stays: to five standard errors.
    error = first.std(axis=0) / np.sqrt(rows)
    assert np.all(error > 0)
    assert np.all(np.abs(first.mean(axis=0) - expected) < 5 * error)
    # Entries of x drop out, not those of a product: with one entry left of
    # zero, a quarter of the rows has no adapter at all.
    single = np.zeros_like(x)
    single[..., 0] = x[..., :1].mean() or 1.0
    layer.bias.assign(ops.zeros(layer.bias.shape))
    base = to_float64(plain_twin(layer)(single))
    difference = to_float64(layer(single, training=True)) - base
    difference = difference.reshape(rows * case[1][1], -1)
    dropped = np.all(np.abs(difference) < 1e-6, axis=1)
    assert abs(dropped.mean() - 0.25) < 5 * np.sqrt(0.19 / len(dropped))


@BOTH
def test_dropout_spares_the_base(case, rng):
    layer = make_layer(*case, rank=4, dropout=0.5)
    layer.reset_vectors()
    x = rng.normal(size=case[1]).astype("float32")
    np.testing.assert_array_equal(
        to_float64(layer(x, training=True)), to_float64(plain_twin(layer)(x))
    )


def test_dropout_trains_and_reloads(tmp_path, x):
    model = spoiled(lambda: functional(dropout=0.5))
    model.compile("sgd", "mse")
    model.fit(x, np.ones((6, 2)), epochs=2, verbose=0)
    expected = predict(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(loaded, x), expected)
    training = ops.convert_to_numpy(loaded(x, training=True))
    assert largest_difference(training, expected) > 1e-3
    keras_vera.merge(loaded)
    assert largest_difference(predict(loaded, x), expected) < 1e-5


def test_no_dropout_has_no_random_state():
    layer = make_layer("dense", (2, 3), {"y": 4}, rank=2)
    assert len(layer.variables) == len(layer.weights) == 6


def test_masks_pass(rng):
    layer = VeRADense(3, rank=2)
    inputs = keras.Input((4, 2))
    y = layer(keras.layers.Masking()(inputs))
    pooled = keras.layers.GlobalAveragePooling1D()(y)
    model = keras.Model(inputs, [y, pooled])
    spoil(model)
    x = rng.normal(size=(2, 4, 2)).astype("float32")
    x[0, 2:] = 0
    y, pooled = model.predict(x, verbose=0)
    expected = [y[0, :2].mean(0), y[1].mean(0)]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


@BOTH
def test_masking_is_that_of_the_base(case):
    layer = make_layer(*case, rank=2)
    inputs = keras.Input(case[1][1:])
    masks = [
        getattr(one(keras.layers.Masking()(inputs)), "_keras_mask", None)
        for one in (layer, plain_twin(layer))
    ]
    assert (masks[0] is None) == (masks[1] is None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {len(c[1])}D")
def test_shapes_and_unknown_batch(case, rng, plan):
    equation, shape, dims = case
    layer = make_layer(*case, rank=2)
    x = rng.normal(size=shape).astype("float32")
    expected = to_float64(layer(x))
    assert layer.compute_output_shape(shape) == expected.shape
    symbolic = layer(keras.KerasTensor(shape, "float32"))
    assert symbolic.shape == expected.shape
    assert symbolic.dtype == "float32"
    # A batch of unknown size: the same layer takes another one.
    inputs = keras.Input(shape[1:])
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, *expected.shape[1:])
    np.testing.assert_allclose(predict(model, x), expected, atol=1e-5)
    once = predict(model, x[:1])
    np.testing.assert_allclose(once, expected[:1], atol=1e-5)


def test_unknown_length(rng, plan):
    model = spoiled(functional)
    assert model.input_shape == (None, None, 4)
    for length in (1, 3):
        x = rng.normal(size=(2, length, 4)).astype("float32")
        eager = ops.convert_to_numpy(model(x))
        np.testing.assert_allclose(predict(model, x), eager, atol=1e-5)


@pytest.mark.parametrize(
    "case, structure",
    [*((case, "dense") for case in CASES), (CASES[1], "blocks2")],
    ids=lambda c: c if isinstance(c, str) else f"{c[0]} {len(c[1])}D",
)
def test_batch_of_length_zero(case, structure, plan):
    _, shape, dims = case
    projection = SharedProjection(rank=2, structure=structure)
    layer = make_layer(*case, projection=projection)
    x = np.zeros((0, *shape[1:]), "float32")
    g = np.zeros(layer.compute_output_shape(x.shape), "float32")
    y, gradients = outputs_and_gradients(layer, x, g)
    assert y.shape == g.shape
    assert y.size == 0
    for name in ("vera_lambda_d", "vera_lambda_b"):
        np.testing.assert_array_equal(gradients[name], 0)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("jit", [True, False])
def test_one_step_moves_the_vectors_and_nothing_else(make, jit, x):
    if jit and backend() == "torch":
        pytest.skip("torch.compile takes minutes here")
    model = spoiled(make)
    vectors = {
        id(v)
        for layer in adapted(model)
        for v in (layer.vera_lambda_d, layer.vera_lambda_b)
    }
    before = numpy_weights(model)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    model.fit(x, np.full((6, 2), 5.0), epochs=1, batch_size=6, verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        moved = not np.array_equal(ops.convert_to_numpy(weight), value)
        assert moved == (id(weight) in vectors), weight.path


@pytest.mark.parametrize("cls", [VeRADense, VeRAEinsumDense])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"rank": 0}, "`rank` must be .*Received: rank=0"),
        ({"rank": 2.5}, "`rank` must be .*Received: rank=2.5"),
        ({"d_initial": 0}, "`d_initial` must be .*Received: d_initial=0"),
        ({"d_initial": float("nan")}, "`d_initial` must be .*d_initial=nan"),
        ({"d_initial": "0.1"}, "`d_initial` must be .*d_initial='0.1'"),
        ({"dropout": 1}, "`dropout` must be .*Received: dropout=1"),
        ({"dropout": -0.1}, "`dropout` must be .*dropout=-0.1"),
        ({"dropout": None}, "`dropout` must be .*dropout=None"),
        ({"projection": 7}, r"`projection` must be .*=7 \(of type int\)"),
        (
            {"rank": 4, "projection": SharedProjection(rank=5)},
            "`rank` must be .*Received: rank=4, projection.rank=5",
        ),
        ({"plan": "fast"}, "`plan` must be .*Received: plan='fast'"),
        ({"lora_rank": 2}, "`lora_rank` cannot .*Received: lora_rank=2"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments_are_named(cls, kwargs, message):
    args = (3,) if cls is VeRADense else ("ab,bc->ac", 3)
    with pytest.raises(ValueError, match=message):
        cls(*args, **kwargs)


@BOTH
def test_lora_is_refused(case):
    layer = make_layer(*case, rank=2)
    before = [id(v) for v in layer.variables]
    with pytest.raises(ValueError, match=r"VeRA and cannot take LoRA"):
        layer.enable_lora(2)
    assert [id(v) for v in layer.variables] == before


def test_equation_that_is_no_matrix_product_is_refused():
    layer = VeRAEinsumDense("abc,bcd->abd", (3, 5), rank=2)
    with pytest.raises(ValueError, match=r"'abc,bcd->abd': the axes \['b'\]"):
        layer.build((2, 3, 4))


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_public_layers_are_not_made_quantized(mode):
    with pytest.raises(ValueError, match=f"`dtype` must not .*{mode}"):
        VeRADense(3, rank=4, dtype=f"{mode}_from_float32")
