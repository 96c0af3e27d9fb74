"""What of the base trains in full beside the vectors: `enable_vera(train=)`."""

import h5py
import keras
import numpy as np
import pytest
from adapter_files import read
from helpers import adapted
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from helpers import state

import keras_vera
from keras_vera import AdapterFileError

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]


def make_model(seed=0):
    """A flat model with norms, a partly frozen layer kind, and a head."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((6, 6, 2)),
        keras.layers.Conv2D(4, 3, name="conv"),
        keras.layers.BatchNormalization(momentum=0.5, name="bn"),
        keras.layers.DepthwiseConv2D(2, name="depthwise"),
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(5, activation="relu", name="hidden"),
        keras.layers.LayerNormalization(name="ln"),
        keras.layers.Dense(3, name="predictions"),
    ]
    model = keras.Sequential(layers)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.uniform(0.2, 0.8, weight.shape))
    return model


TARGETS = {"rank": 2, "targets": ["conv", "hidden"]}


def enabled(train, seed=0):
    model = make_model(seed)
    keras_vera.enable_vera(model, train=train, **TARGETS)
    return model


def trained(model):
    """The names of what trains beside the vectors."""
    return [
        "/".join(v.path.split("/")[-2:])
        for v in model.trainable_variables
        if not v.name.startswith("vera_lambda")
    ]


def spoil_all(model, seed=1):
    """Gives what trains, and the state that moves with it, other values."""
    spoil(model, seed)
    rng = np.random.default_rng(seed)
    variables = model.trainable_variables
    bn = model.get_layer("bn")
    if any(v is bn.gamma for v in variables):
        variables = [*variables, bn.moving_mean, bn.moving_variance]
    for v in variables:
        if not v.name.startswith("vera_lambda"):
            v.assign(rng.uniform(0.3, 0.9, v.shape).astype("float32"))


@pytest.fixture
def x(rng):
    return rng.normal(size=(8, 6, 6, 2)).astype("float32")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.vera.safetensors"


NORMS = ["bn/gamma", "bn/beta", "ln/gamma", "ln/beta"]
BIASES = ["conv/bias", "depthwise/bias", "hidden/bias", "predictions/bias"]
HEAD = ["predictions/kernel", "predictions/bias"]


def is_norm(layer):
    return isinstance(layer, keras.layers.LayerNormalization)


@pytest.mark.parametrize("others", [[], [keras.layers.LayerNormalization]])
def test_what_wraps_a_kernel_is_no_norm(others):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.SpectralNormalization(keras.layers.Dense(4)),
            *[make() for make in others],
            keras.layers.Dense(3, name="hidden"),
        ]
    )
    options = {"targets": "hidden", "train": "norm"}
    if not others:
        with pytest.raises(ValueError, match="'norm' matches no layer"):
            keras_vera.enable_vera(model, rank=2, **options)
        return
    keras_vera.enable_vera(model, rank=2, **options)
    names = sorted(v.name for v in model.trainable_variables)
    assert names == ["beta", "gamma", "vera_lambda_b", "vera_lambda_d"]


class ScaledNormalization(keras.layers.Wrapper):
    """A norm with a scale of its own around a layer."""

    def build(self, shape):
        super().build(shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")
        self.kernel = self.layer.kernel

    def call(self, x):
        return self.scale * self.layer(x)


def test_a_norm_does_not_stand_for_what_it_wraps():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            ScaledNormalization(keras.layers.Dense(4)),
            keras.layers.Dense(3, name="hidden"),
        ]
    )
    keras_vera.enable_vera(model, rank=2, targets="hidden", train="norm")
    names = sorted(v.name for v in model.trainable_variables)
    assert names == ["scale", "vera_lambda_b", "vera_lambda_d"]


@pytest.mark.parametrize(
    "train, expected, states",
    [
        ("norm", NORMS, 2),
        ("bias", BIASES, 0),
        ("predictions", HEAD, 0),
        (["predictions", "bias"], sorted({*HEAD, *BIASES}), 0),
        (r"layers/(batch|depthwise).*", None, 2),
        pytest.param(is_norm, NORMS[2:], 0, id="a function"),
    ],
    ids=str,
)
def test_what_trains_is_what_is_saved(path, x, train, expected, states):
    model = enabled(train)
    base = make_model()
    np.testing.assert_array_equal(predict(model, x), predict(base, x))
    if expected is None:
        expected = [*NORMS[:2], "depthwise/kernel", "depthwise/bias"]
    assert sorted(trained(model)) == sorted(expected)
    before = trained(model)
    for toggled in (model, *model.layers):
        toggled.trainable = False
        toggled.trainable = True
    assert trained(model) == before
    spoil_all(model)
    keras_vera.save_adapter(model, path)
    header, tensors = read(path)
    assert len(header["trained"]) == len(expected)
    assert len(tensors) == 2 * 2 + len(expected) + states
    fresh = make_model()
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    assert trained(fresh) == before
    again = path.with_name("again.vera.safetensors")
    keras_vera.save_adapter(fresh, again)
    assert again.read_bytes() == path.read_bytes()
    with keras_vera.base_model(model):
        np.testing.assert_array_equal(predict(model, x), predict(base, x))
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    y = predict(model, x)
    keras_vera.disable_vera(model)
    assert largest_difference(predict(model, x), y) > 1e-3
    for mine, value in zip(model.weights, numpy_weights(base), strict=True):
        np.testing.assert_array_equal(mine, value)
    assert [v.trainable for v in model.variables] == [
        v.trainable for v in base.variables
    ]
    keras_vera.merge(fresh)
    assert largest_difference(predict(fresh, x), y) < 1e-4
    assert [v.trainable for v in fresh.variables] == [
        v.trainable for v in base.variables
    ]


def test_training_moves_exactly_this(path, x):
    model = enabled(["norm", "bias", "predictions"])
    names = {*NORMS, *BIASES, *HEAD, "bn/moving_mean", "bn/moving_variance"}
    before = {v.path: np.array(v) for v in model.variables}
    model.compile(keras_vera.vera_optimizer(), "mse")
    y = np.random.default_rng(3).normal(size=(8, 3))
    model.fit(x, y, epochs=2, batch_size=4, verbose=0)
    moved = {
        "/".join(v.path.split("/")[-2:])
        for v in model.variables
        if (before[v.path] != np.array(v)).any()
    }
    vectors = {f"{n}/vera_lambda_{v}" for n in ("conv", "hidden") for v in "db"}
    assert moved - vectors == names
    keras_vera.save_adapter(model, path)
    fresh = make_model()
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(model, x), predict(make_model(), x))


def test_weights_files_keep_the_values_of_the_base(tmp_path, x):
    model = enabled(["norm", "bias", "predictions"])
    spoil_all(model)
    y = predict(model, x)
    own, other = tmp_path / "own.weights.h5", tmp_path / "base.weights.h5"
    model.save_weights(own)
    plain = make_model(seed=4)
    plain.load_weights(own)
    assert largest_difference(predict(plain, x), y) < 1e-5
    spoil_all(model, 2)
    model.load_weights(own)
    np.testing.assert_array_equal(predict(model, x), y)
    with keras_vera.base_model(model):
        base = predict(model, x)
    np.testing.assert_array_equal(base, predict(make_model(), x))
    # The weights of another base make it the base.
    make_model(seed=5).save_weights(other)
    model.load_weights(other)
    spoil_all(model)
    keras_vera.disable_vera(model)
    base = predict(make_model(seed=5), x)
    np.testing.assert_array_equal(predict(model, x), base)


def test_weights_of_another_trained_set_are_another_adapter(tmp_path, x):
    model = enabled("norm")
    spoil_all(model)
    model.save_weights(tmp_path / "norm.weights.h5")
    other = enabled(None)
    other.load_weights(tmp_path / "norm.weights.h5")
    assert largest_difference(predict(other, x), predict(model, x)) < 1e-4
    # On the base, its vectors alone would give other outputs.
    with pytest.raises(ValueError, match="hold an adapter that"):
        keras_vera.save_adapter(other, tmp_path / "a.vera.safetensors")


class Linear(keras.layers.Layer):
    """Its weights have no names, and Keras numbers those of the process."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1], 3))
        self.b = self.add_weight(shape=(3,))

    def call(self, x):
        return keras.ops.matmul(x, self.w) + self.b


@pytest.mark.parametrize("of", ["now", "before"])
def test_weights_files_know_weights_without_names(of, tmp_path, rng):
    def make():
        keras.utils.set_random_seed(0)
        parts = [keras.Input((6,)), keras.layers.Dense(4), Linear(name="lin")]
        model = keras.Sequential(parts)
        keras_vera.enable_vera(model, rank=2, targets="all-linear", train="lin")
        return model

    x = rng.normal(size=(8, 6)).astype("float32")
    model, path = make(), tmp_path / "m.weights.h5"
    spoil(model)
    for variable in (model.layers[1].w, model.layers[1].b):
        variable.assign(rng.normal(size=variable.shape))
    model.save_weights(path)
    if of == "before":
        with h5py.File(path, "r+") as file:
            identity = file["layers/dense/keras_vera/identity"]
            text = identity[()].decode()
            for name in ("variable_8", "variable_9"):
                assert "/unnamed" in text
                text = text.replace("/unnamed", f"/{name}", 1)
            identity[()] = text
    other = make()
    other.load_weights(path)
    np.testing.assert_array_equal(predict(other, x), predict(model, x))
    keras_vera.save_adapter(other, tmp_path / "a.vera.safetensors")
    keras_vera.disable_vera(other)
    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(other, x), predict(model, x))


def test_keras_file_is_the_merged_model(tmp_path, x):
    model = enabled(["norm", "bias", "predictions"])
    spoil_all(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert adapted(loaded) == []
    assert type(loaded.get_layer("ln")) is keras.layers.LayerNormalization
    assert largest_difference(predict(loaded, x), predict(model, x)) < 1e-5


def test_file_of_another_trained_set_is_refused(path):
    model = enabled("norm")
    keras_vera.save_adapter(model, path)
    for other, message in (
        (enabled(None), "the model has not: .*normalization/gamma"),
        (enabled("bias"), "the file has not: .*/bias"),
        (make_model().layers[0], "another base"),
    ):
        before = state(other)
        with pytest.raises(AdapterFileError, match=message):
            keras_vera.load_adapter(other, path)
        assert state(other) == before


def test_biases_of_adapted_layers_are_checked(path):
    keras_vera.save_adapter(enabled("bias"), path)
    other = enabled(None)
    before = state(other)
    with pytest.raises(AdapterFileError, match="the model has not: .*/bias"):
        keras_vera.load_adapter(other, path)
    assert state(other) == before


def test_bank_refuses_it():
    model = enabled("norm")
    before = state(model)
    with pytest.raises(ValueError, match="trains in the base beside"):
        keras_vera.AdapterBank(model, capacity=2)
    assert state(model) == before


@pytest.mark.parametrize(
    "train, message",
    [
        ("predcitions", "matches no layer of the base. Did you mean 'predict"),
        ("hidden", "matches layers that `targets` adapts: \\['hidden'\\]"),
        ("conv", "matches layers that `targets` adapts"),
        ("flatten", "nothing with variables that can train"),
        ("(", "neither a layer's name nor a valid regular expression"),
        (lambda layer: False, "the predicate .* matches no layer"),
        ({"norm": 3}, "`train` must be a role \\('norm', 'bias', "),
        ([], "`train` must be a role"),
        (7, "`train` must be a role"),
    ],
)
def test_what_makes_no_sense_is_refused(train, message):
    model = make_model()
    model.layers[3].name  # noqa: B018 - built, with all its layers.
    before = state(model)
    with pytest.raises(ValueError, match=message):
        keras_vera.enable_vera(model, train=train, **TARGETS)
    assert state(model) == before


def test_what_lies_outside_the_base_trains_anyway():
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    inputs = keras.Input((4,))
    head = keras.layers.Dense(2, name="head")
    model = keras.Model(inputs, head(backbone(inputs)))
    model.backbone = backbone
    with pytest.raises(ValueError, match="outside the base and trains anyway"):
        keras_vera.enable_vera(
            model, rank=2, targets="all-linear", train="head"
        )
    assert adapted(model) == []


def test_quantized_kernels_are_refused(path):
    model = make_model()
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized layers, whose kernels"):
        keras_vera.enable_vera(
            model, rank=2, targets="hidden", train="predictions"
        )
    keras_vera.enable_vera(
        model, rank=2, targets="hidden", train=["bias", "norm"]
    )
    assert sorted(trained(model)) == sorted({*NORMS, *BIASES})


def test_frozen_layers_train_where_they_are_named():
    model = make_model()
    model.trainable = False
    keras_vera.enable_vera(model, train="predictions", **TARGETS)
    assert trained(model) == HEAD
    keras_vera.disable_vera(model)
    assert model.trainable_variables == []


def test_summary_shows_it():
    lines = []
    keras_vera.summary(enabled(["norm", "predictions"]), print_fn=lines.append)
    numbers = 2 * 4 + 2 * 5 + 5 * 3 + 3
    assert f"Trained in full in the base: {numbers} (" in lines[0]
    assert "Trained outside the base: 0 (" in lines[0]
    vectors = (2 + 4) + (2 + 5)
    statistics = 2 * 4
    size = 4 * (numbers + vectors + statistics)
    assert f"Adapter file: {size} B" in lines[0]
