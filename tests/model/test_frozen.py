"""The base stays bit for bit what it was, its state included."""

import copy
import functools

import keras
import numpy as np
import pytest
from backbones import ENTRIES
from backbones import make_backbone
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from helpers import state
from keras import ops

import keras_vera

pytestmark = pytest.mark.members_in_turn


@keras.saving.register_keras_serializable(package="test_frozen")
class RunningMean(keras.layers.Layer):
    """Centers by a mean that moves in training calls."""

    def build(self, input_shape):
        self.mean = self.add_weight(
            name="mean",
            shape=input_shape[-1:],
            initializer="zeros",
            trainable=False,
        )

    def call(self, x, training=None):
        if training:
            mean = ops.mean(x, axis=tuple(range(len(x.shape) - 1)))
            self.mean.assign(0.9 * self.mean + 0.1 * mean)
            return x - mean
        return x - self.mean


class Careless(RunningMean):
    """One that asks for no `training`, and moves in every call."""

    def call(self, x):
        mean = ops.mean(x, axis=tuple(range(len(x.shape) - 1)))
        self.mean.assign_add(0.1 * (mean - self.mean))
        return x - self.mean


class Composite(RunningMean):
    """One with layers below that adapt, and that drop out."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4, name="inner")
        self.dropout = keras.layers.Dropout(0.5)

    def build(self, input_shape):
        super().build(input_shape)
        self.dense.build(input_shape)

    def call(self, x, training=None):
        if training:
            self.mean.assign_sub(0.1 * (self.mean - ops.mean(x, axis=0)))
        return self.dropout(self.dense(x - self.mean))


def convolution():
    return [
        keras.Input((8, 8, 2)),
        keras.layers.Conv2D(6, 3),
        keras.layers.BatchNormalization(),
        keras.layers.GlobalAveragePooling2D(),
    ]


def with_layer(make):
    return [keras.Input((4,)), keras.layers.Dense(4, name="dense"), make()]


def spectral():
    return keras.layers.SpectralNormalization(
        keras.layers.Dense(3, name="wrapped")
    )


def nested():
    inner = keras.Sequential(with_layer(keras.layers.BatchNormalization))
    return [keras.Input((4,)), inner, keras.layers.Dense(2, name="last")]


MODELS = {
    "convolution": (convolution, "conv"),
    "nested": (nested, "all-linear"),
    "spectral": (functools.partial(with_layer, spectral), "dense"),
    "spectral_adapted": (functools.partial(with_layer, spectral), "wrapped"),
    "running_mean": (functools.partial(with_layer, RunningMean), "all-linear"),
    "careless": (functools.partial(with_layer, Careless), "all-linear"),
    "composite": (functools.partial(with_layer, Composite), "all-linear"),
}


def build(layers):
    keras.utils.set_random_seed(3)
    return keras.Sequential(layers(), name="model")


def data(model, rows=12):
    rng = np.random.default_rng(5)
    shape = [size or 8 for size in model.input_shape[1:]]
    x = rng.normal(2, 1, (rows, *shape)).astype("float32")
    return x, rng.normal(size=(rows, *model.output_shape[1:]))


def bits(model):
    """What the base is made of, by path: values, classes and flags."""
    return (
        {
            v.path: ops.convert_to_numpy(v).tobytes()
            for v in model.weights
            if "vera" not in v.path and "projection" not in v.path
        },
        [(type(x), x.trainable) for x in model._flatten_layers()],
        [(type(v), v.trainable) for v in model.weights if "vera" not in v.path],
    )


def outputs_of(model, x, training=False):
    return ops.convert_to_numpy(model(x, training=training))


def toggle(model):
    for layer in (model, *model._flatten_layers()):
        layer.trainable = False
        layer.trainable = True


@pytest.mark.filterwarnings("ignore:A layer assigns")
@pytest.mark.parametrize("name", MODELS)
def test_training_moves_nothing_but_the_vectors(name, tmp_path):
    layers, targets = MODELS[name]
    model, fresh = build(layers), build(layers)
    before = bits(model)
    fresh.set_weights(model.get_weights())
    keras_vera.enable_vera(model, rank=3, targets=targets)
    toggle(model)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    toggle(model)
    x, y = data(model)
    model.fit(
        x, y, batch_size=4, epochs=2, validation_data=(x[:4], y[:4]), verbose=0
    )
    model.train_on_batch(x, y)
    model(x, training=True)
    spoil(model)
    outputs = predict(model, x)
    assert bits(model)[0] == before[0]
    path = tmp_path / "a.vera.safetensors"
    keras_vera.save_adapter(model, path)
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), outputs)
    keras_vera.disable_vera(model)
    assert bits(model) == before


@pytest.mark.parametrize("name", ["convolution", "spectral", "running_mean"])
def test_layers_with_state_compute_the_same_in_training(name):
    layers, targets = MODELS[name]
    model = build(layers)
    x, _ = data(model)
    inference = outputs_of(model, x)
    assert largest_difference(outputs_of(model, x, True), inference) > 1e-2
    keras_vera.enable_vera(model, rank=3, targets=targets)
    toggle(model)
    spoil(model)
    np.testing.assert_array_equal(
        outputs_of(model, x, True), outputs_of(model, x)
    )


def test_dropout_of_the_base_works_on():
    model = build(MODELS["composite"][0])
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    x, _ = data(model)
    inference = outputs_of(model, x)
    assert largest_difference(outputs_of(model, x, True), inference) > 1e-2


@pytest.mark.in_turn
def test_state_in_a_backbone_of_kerashub(tmp_path):
    backbone = make_backbone(ENTRIES["ResNetBackbone"])
    before = bits(backbone)
    inputs = backbone.input
    outputs = keras.layers.GlobalAveragePooling2D()(backbone.output)
    outputs = keras.layers.BatchNormalization(name="head_norm")(outputs)
    outputs = keras.layers.Dense(2, name="head")(outputs)
    model = keras.Model(inputs, outputs)
    keras_vera.enable_vera(backbone, rank=3, targets="conv")
    toggle(model)
    model.compile("adam", "mse")
    x, y = data(model, 4)
    mean = ops.convert_to_numpy(model.get_layer("head_norm").moving_mean)
    model.fit(x, y, verbose=0)
    assert bits(backbone)[0] == before[0]
    # Outside the base, statistics move and are in the file.
    norm = model.get_layer("head_norm")
    assert largest_difference(norm.moving_mean, mean) > 1e-4
    path = tmp_path / "a.vera.safetensors"
    keras_vera.save_adapter(model, path)
    moved = ops.convert_to_numpy(norm.moving_mean).copy()
    norm.moving_mean.assign(mean)
    keras_vera.load_adapter(model, path)
    np.testing.assert_array_equal(ops.convert_to_numpy(norm.moving_mean), moved)
    keras_vera.disable_vera(backbone)
    assert bits(backbone)[0] == before[0]


def stateful():
    return [
        keras.Input(batch_shape=(4, 3, 2)),
        keras.layers.LSTM(3, stateful=True),
        keras.layers.Dense(2),
    ]


def test_the_memory_of_a_stateful_layer_works_on(tmp_path):
    model, plain = build(stateful), build(stateful)
    plain.set_weights(model.get_weights())
    before = bits(model)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    x = np.ones((4, 3, 2), "float32")
    outputs = []
    for training in (False, True, False):
        outputs.append(outputs_of(model, x, training))
        np.testing.assert_array_equal(
            outputs[-1], outputs_of(plain, x, training)
        )
    assert largest_difference(outputs[0], outputs[-1]) > 1e-4
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    keras_vera.disable_vera(model)
    assert bits(model) == before


def normalized():
    return build(functools.partial(with_layer, keras.layers.BatchNormalization))


def test_state_that_moved_by_hand_is_not_saved(tmp_path):
    model = normalized()
    before = bits(model)
    norm = model.layers[1]
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    norm.moving_mean.assign(norm.moving_mean + 1)
    path = tmp_path / "a.vera.safetensors"
    with pytest.raises(ValueError, match=f"state of .*{norm.name}.* moved"):
        keras_vera.save_adapter(model, path)
    assert not path.exists()
    keras_vera.disable_vera(model)
    assert bits(model) == before


def test_statistics_that_a_layer_adapts_to_are_given_back(tmp_path):
    model = build(functools.partial(with_layer, keras.layers.Normalization))
    x, _ = data(model)
    model.layers[1].adapt(x)
    outputs = predict(model, x)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    model.layers[1].adapt(3 * x)
    assert largest_difference(predict(model, x), outputs) > 0.1
    with pytest.raises(ValueError, match="state of .* moved"):
        keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(model, x), outputs)


@pytest.mark.parametrize("how", ["file", "arrays"])
def test_loaded_state_is_the_base(how, tmp_path):
    model, other = normalized(), normalized()
    x, y = data(other)
    for variable in other.weights:
        variable.assign(variable + 0.5)
    weights = tmp_path / "other.weights.h5"
    other.save_weights(weights)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    if how == "file":
        model.load_weights(weights)
    else:
        model.layers[1].set_weights(other.layers[1].get_weights())
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    keras_vera.disable_vera(model)
    for received, wanted in zip(
        model.layers[1].weights, other.layers[1].weights, strict=True
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(received), ops.convert_to_numpy(wanted)
        )


def test_a_layer_that_writes_while_predicting_is_named():
    model = build(MODELS["careless"][0])
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    with pytest.warns(UserWarning, match="assigns to '.*mean'.*frozen base"):
        model(data(model)[0])


def test_copies_and_files_are_plain(tmp_path):
    model = build(MODELS["running_mean"][0])
    x, _ = data(model)
    model.layers[1].mean.assign(np.arange(4))
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    spoil(model)
    outputs = predict(model, x)
    model.save(tmp_path / "model.keras")
    copies = [
        copy.deepcopy(model),
        keras.models.load_model(tmp_path / "model.keras"),
    ]
    for other in copies:
        assert not adapted(other)
        assert type(other.layers[1]) is RunningMean
        assert largest_difference(predict(other, x), outputs) < 1e-5
    clone = keras.models.clone_model(model)
    assert type(clone.layers[1]) is RunningMean
    keras_vera.merge(model)
    assert type(model.layers[1]) is RunningMean
    x, y = data(model)
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    mean = ops.convert_to_numpy(model.layers[1].mean)
    assert largest_difference(mean, np.arange(4)) > 1e-2


def test_stateless_calls_return_the_state_as_it_was():
    model = build(MODELS["composite"][0])
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    x, _ = data(model)
    before = bits(model)[0]
    if backend() == "torch":
        pytest.skip("Only JAX trains so.")
    _, state = model.stateless_call(
        model.trainable_variables,
        model.non_trainable_variables,
        x,
        training=True,
    )
    for variable, value in zip(model.non_trainable_variables, state):
        if "seed" not in variable.path:
            variable.assign(value)
    assert bits(model)[0] == before


def two_heads():
    """Two models on one trunk, which neither of them adapts."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    trunk = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, name="shared"),
            keras.layers.BatchNormalization(),
            Careless(),
        ],
        name="trunk",
    )
    features = trunk(inputs)
    return [
        keras.Model(
            inputs, keras.layers.Dense(3, name=name)(features), name=name
        )
        for name in ("first", "second")
    ]


def enable(model, **kwargs):
    keras_vera.enable_vera(model, rank=3, targets=model.name, **kwargs)
    spoil(model)


@pytest.mark.filterwarnings("ignore:A layer assigns")
@pytest.mark.parametrize("undo", [keras_vera.disable_vera, keras_vera.merge])
@pytest.mark.parametrize("undone_first", [0, 1])
def test_a_part_of_two_bases_is_frozen_until_the_last_is_undone(
    undo, undone_first, tmp_path
):
    models = two_heads()
    trunk = models[0].get_layer("trunk")
    plain, flags = bits(trunk), [len(m.trainable_variables) for m in models]
    enable(models[0])
    alone = state(models[0])
    enable(models[1])
    undone, other = models[undone_first], models[1 - undone_first]
    undo(undone)
    if undone_first:
        assert state(models[0]) == alone
    head = other.layers[-1]
    assert {id(v) for v in other.trainable_variables} == {
        id(head.vera_lambda_d),
        id(head.vera_lambda_b),
    }
    toggle(undone)
    undone.trainable = True
    x, y = data(other)
    for model in (other, undone):
        model.compile("sgd", "mse")
        model.fit(x, y, verbose=0)
        assert bits(trunk)[0] == plain[0]
    # What is loaded is the base of all that are left.
    trunk.layers[1].set_weights([w + 1 for w in trunk.layers[1].get_weights()])
    loaded = bits(trunk)[0]
    keras_vera.save_adapter(other, tmp_path / "a.vera.safetensors")
    undo(other)
    assert bits(trunk) == (loaded, *plain[1:])
    assert [len(m.trainable_variables) for m in models] == flags


def trained_by_the_first(first, second, path):
    enable(first, train="shared")
    return functools.partial(enable, second)


def trained_by_the_second(first, second, path):
    enable(first)
    return functools.partial(enable, second, train="shared")


def adapted_by_the_second(first, second, path):
    enable(first)
    return functools.partial(
        keras_vera.enable_vera, second, rank=3, targets="shared"
    )


def loaded_by_the_second(first, second, path):
    keras_vera.enable_vera(second, rank=3, targets="shared")
    keras_vera.save_adapter(second, path)
    keras_vera.disable_vera(second)
    enable(first)
    return functools.partial(keras_vera.load_adapter, second, path)


@pytest.mark.parametrize(
    "enable_first",
    [
        trained_by_the_first,
        trained_by_the_second,
        adapted_by_the_second,
        loaded_by_the_second,
    ],
)
def test_what_moves_in_one_model_is_in_no_other_base(enable_first, tmp_path):
    models = two_heads()
    enable_second = enable_first(*models, tmp_path / "a.vera.safetensors")
    before = [state(model) for model in models]
    with pytest.raises(ValueError, match="'shared' .* 'second'.* 'first'"):
        enable_second()
    assert [state(model) for model in models] == before
    keras_vera.disable_vera(models[0])
    enable_second()
    keras_vera.disable_vera(models[1])


class Scaled(keras.layers.Layer):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def call(self, x):
        return x * self.scale


def test_a_variable_of_two_bases_is_frozen_until_the_last_is_undone():
    scale = keras.Variable(np.ones(4), name="scale")
    models = [
        build(functools.partial(with_layer, functools.partial(Scaled, scale)))
        for _ in range(2)
    ]
    plain = [state(model) for model in models]
    for model in models:
        keras_vera.enable_vera(model, rank=3, targets="dense")
    keras_vera.disable_vera(models[0])
    assert all("vera" in v.path for v in models[1].trainable_variables)
    keras_vera.disable_vera(models[1])
    assert [state(model) for model in models] == plain


@pytest.mark.skipif(backend() != "torch", reason="Modules are PyTorch's.")
@pytest.mark.parametrize("train", [None, lambda x: hasattr(x, "module")])
def test_buffers_of_torch_modules_stay(train):
    import torch

    def wrapped():
        linear = torch.nn.Linear(4, 4)
        return keras.layers.TorchModuleWrapper(
            torch.nn.Sequential(
                torch.nn.utils.parametrizations.spectral_norm(linear),
                torch.nn.BatchNorm1d(4),
                torch.nn.Dropout(0.5),
            ),
            output_shape=(None, 4),
        )

    def buffers():
        buffers = model.layers[1].module.named_buffers()
        return {name: buffer.numpy().copy() for name, buffer in buffers}

    def fit():
        model.compile("sgd", "mse")
        model.fit(x, y, epochs=2, verbose=0)

    model = build(functools.partial(with_layer, wrapped))
    x, y = data(model)
    outputs_of(model, x)
    plain, before = bits(model), buffers()
    keras_vera.enable_vera(model, rank=3, targets="dense", train=train)
    fit()
    dropped = outputs_of(model, x, True)
    assert largest_difference(outputs_of(model, x, True), dropped) > 1e-2
    assert len(before) == 5
    np.testing.assert_equal(buffers(), before)
    keras_vera.disable_vera(model)
    assert bits(model) == plain
    fit()
    after = buffers()
    assert all(np.any(after[name] != before[name]) for name in before)


class Bounded(Careless):
    """One whose gradient needs what comes after its state has moved."""

    def call(self, x):
        return ops.tanh(super().call(x))


class BoundedAgain(Bounded):
    def call(self, x):
        return keras.remat(super().call)(x)


@pytest.mark.parametrize("make", [Bounded, BoundedAgain])
def test_state_stays_where_layers_run_again(make):
    is_scope = make is Bounded
    with keras.RematScope(mode="full" if is_scope else None):
        layer = make()
    model = build(functools.partial(with_layer, lambda: layer))
    before = bits(model)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    model.compile("sgd", "mse")
    model.fit(*data(model), verbose=0)
    assert bits(model)[0] == before[0]
    keras_vera.disable_vera(model)
    assert bits(model) == before
    if backend() == "jax":
        return  # Keras loses state there that such a layer moves.
    model.compile("sgd", "mse")
    model.fit(*data(model), verbose=0)
    assert largest_difference(layer.mean, np.zeros(4)) > 1e-2
