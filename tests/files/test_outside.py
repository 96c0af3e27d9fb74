"""What lies outside the base: all that trained or moved is in the file."""

import keras
import numpy as np
import pytest
from adapter_files import read
from adapter_files import write
from helpers import predict
from helpers import spoil
from keras import layers
from keras import ops

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]


@keras.saving.register_keras_serializable(package="test_outside")
class RunningMean(layers.Layer):
    def build(self, input_shape):
        self.mean = self.add_weight(
            name="mean", shape=input_shape[-1:], trainable=False
        )

    def call(self, x, training=False):
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=0))
        return x - self.mean


@keras.saving.register_keras_serializable(package="test_outside")
class Unnamed(layers.Layer):
    """Its weights have no names, and Keras numbers them over the process."""

    def build(self, input_shape):
        size = input_shape[-1]
        self.w = self.add_weight(shape=(size, size))
        self.mean = self.add_weight(shape=(size,), trainable=False)
        self.b = self.add_weight(shape=(size,), initializer="zeros")

    def call(self, x, training=False):
        y = ops.matmul(x, self.w) + self.b
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(y, axis=0))
        return ops.tanh(y - self.mean)


class Normalized(layers.Layer):
    """A layer that trains, with one below that has only state."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)
        self.norm = bare_norm()

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build((None, 4))

    def call(self, x, training=False):
        return self.norm(self.dense(x), training=training)


def bare_norm():
    return layers.BatchNormalization(center=False, scale=False, momentum=0.5)


HEADS = {
    "dense": lambda: [layers.Dense(3)],
    "norm": lambda: [layers.BatchNormalization(), layers.Dense(3)],
    "bare_norm": lambda: [bare_norm(), layers.Dense(3)],
    "only_state": lambda: [bare_norm()],
    "running_mean": lambda: [RunningMean(), layers.Dense(3)],
    "unnamed": lambda: [Unnamed(), layers.Dense(3)],
    "below": lambda: [Normalized(), layers.Dense(3)],
}


def make_backbone():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "tanh", name="dense")], name="base"
    )


def with_head(backbone, head, seed=3):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([backbone, *head()], name="outer")


def data(model):
    rng = np.random.default_rng(5)
    x = rng.normal(2, 1, (12, 4)).astype("float32")
    return x, rng.normal(size=(12, model.output_shape[-1]))


def fit(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(*data(model), batch_size=6, verbose=0)


def enable(backbone):
    keras_vera.enable_vera(backbone, rank=3, targets="dense")


def set_head(model, value):
    for layer in model.layers[1:]:
        layer.trainable = value


def check_reload(model, head, path, seed=3, flag=True):
    outputs = predict(model, data(model)[0])
    keras_vera.save_adapter(model, path)
    fresh = with_head(make_backbone(), head, seed)
    set_head(fresh, flag)
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, data(model)[0]), outputs)
    # What was loaded is saved again.
    again = path.with_name("again.vera.safetensors")
    keras_vera.save_adapter(fresh, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.vera.safetensors"


@pytest.mark.parametrize("name", HEADS)
def test_state_that_moves_is_in_the_file(name, path):
    backbone = make_backbone()
    model = with_head(backbone, HEADS[name])
    enable(backbone)
    fit(model)
    check_reload(model, HEADS[name], path, seed=4)


@pytest.mark.parametrize("flag", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("made", ["before", "later"])
@pytest.mark.parametrize("name", ["dense", "bare_norm"])
def test_what_trained_and_is_frozen_since_is_in_the_file(
    name, made, flag, path
):
    backbone = make_backbone()
    model = with_head(backbone, HEADS[name]) if made == "before" else None
    enable(backbone)
    model = model or with_head(backbone, HEADS[name])
    fit(model)
    set_head(model, False)
    fit(model)
    check_reload(model, HEADS[name], path, seed=4, flag=flag)


def test_what_a_loop_trained_and_is_frozen_since_is_in_the_file(path):
    backbone = make_backbone()
    model = with_head(backbone, HEADS["dense"])
    enable(backbone)
    kernel = model.layers[1].kernel
    kernel.assign(kernel + 1)
    set_head(model, False)
    check_reload(model, HEADS["dense"], path, flag=False)


@pytest.mark.in_turn
def test_what_was_loaded_and_is_frozen_since_is_in_the_file(path):
    backbone = make_backbone()
    model = with_head(backbone, HEADS["dense"])
    enable(backbone)
    keras_vera.save_adapter(model, path)
    other = with_head(make_backbone(), HEADS["dense"], seed=4)
    keras_vera.load_adapter(other, path)
    set_head(other, False)
    check_reload(other, HEADS["dense"], path, seed=5, flag=False)
    assert len(read(path)[1]) == 4


@pytest.mark.in_turn
def test_what_was_frozen_before_is_not_in_the_file(path):
    backbone = make_backbone()
    model = with_head(backbone, HEADS["norm"])
    set_head(model, False)
    enable(backbone)
    fit(model)
    check_reload(model, HEADS["norm"], path, flag=False)
    assert len(read(path)[1]) == 2


@pytest.mark.in_turn
def test_statistics_that_a_layer_adapted_to_are_in_the_file(path):
    backbone = make_backbone()
    head = lambda: [layers.Normalization(), layers.Dense(3)]  # noqa: E731
    model = with_head(backbone, head)
    enable(backbone)
    model.layers[1].adapt(data(model)[0] * 3)
    check_reload(model, head, path, seed=4)
    # Also into what has computed with others before.
    outputs = predict(model, data(model)[0])
    model.layers[1].adapt(data(model)[0])
    # Keras' own `adapt` leaves compiled functions as they are.
    model.compile()
    assert np.abs(predict(model, data(model)[0]) - outputs).max() > 0.1
    keras_vera.load_adapter(model, path)
    np.testing.assert_array_equal(predict(model, data(model)[0]), outputs)


@pytest.mark.in_turn
def test_bank_refuses_state_that_it_would_share(path):
    backbone = make_backbone()
    model = with_head(backbone, HEADS["bare_norm"])
    enable(backbone)
    with pytest.raises(ValueError, match="trains outside the base"):
        keras_vera.AdapterBank(model, capacity=1)


@pytest.mark.in_turn
@pytest.mark.parametrize("place", ["outside", "trained"])
def test_files_of_before_number_weights_without_names(place, path):
    def make(seed):
        backbone = make_backbone()
        backbone.add(Unnamed(name="last"))
        return with_head(backbone, HEADS["unnamed"], seed), backbone

    model, backbone = make(3)
    train = "last" if place == "trained" else None
    keras_vera.enable_vera(backbone, rank=3, targets="dense", train=train)
    spoil(model)
    layer = model.layers[1] if train is None else backbone.layers[-1]
    # Of one shape, so that nothing but the order tells them.
    layer.b.assign([1, 2, 3, 4])
    layer.mean.assign([4, 3, 2, 1])
    outputs = predict(model, data(model)[0])
    keras_vera.save_adapter(model, path)
    header, tensors = read(path)

    def before(name):
        path, _, own = name.rpartition("/")
        number = {"unnamed_0": "9", "unnamed_1": "10", "unnamed_2": "11"}
        return f"{path}/variable_{number[own]}" if own in number else name

    tensors = {before(name): array for name, array in tensors.items()}
    trained = [before(name) for name in header.get("trained", [])]
    assert sum("variable_" in name for name in tensors) == 3 + 3 * bool(train)
    write(path, {**header, "trained": trained}, tensors)
    fresh, _ = make(4)
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, data(model)[0]), outputs)
