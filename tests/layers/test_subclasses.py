"""Subclasses of Keras' layers: adapted right, or refused before anything."""

import keras
import numpy as np
import plans
import pytest
from helpers import adapted
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from helpers import state
from keras import ops

import keras_vera

pytestmark = pytest.mark.in_turn

L = keras.layers


def norm(kernel, axis=0):
    return kernel / ops.sqrt(ops.sum(ops.square(kernel), axis, keepdims=True))


class KernelDense(L.Dense):
    @property
    def kernel(self):
        return norm(self._kernel)


class KernelEinsum(L.EinsumDense):
    @property
    def kernel(self):
        return norm(self._kernel)


class OwnTable(L.Embedding):
    @property
    def embeddings(self):
        return norm(self._embeddings, -1)


class Standardized(L.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, norm(kernel, (0, 1, 2)))


class Twice:
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class Called(Twice, L.Dense):
    pass


class OwnCall(L.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


def patched():
    layer = L.Dense(4)
    call = layer.call
    layer.call = lambda x, training=None: 2 * call(x)
    return layer


REFUSED = {
    "kernel": (lambda: KernelDense(4), "KernelDense.* overrides `kernel`"),
    "einsum": (lambda: KernelEinsum("ab,bc->ac", 4), "overrides `kernel`"),
    "table": (lambda: OwnTable(9, 4), "overrides `embeddings`"),
    "convolution": (lambda: Standardized(4, 2), "`convolution_op`"),
    "mixin": (lambda: Called(4), "`__call__`"),
    "call": (lambda: OwnCall(4), "`call`"),
    "patched": (patched, "`call` of `keras.layers.Dense`"),
}


@keras.saving.register_keras_serializable(package="test_subclasses")
class Described(L.Dense):
    """One that has more to say, and computes the same."""

    def __init__(self, units, note="", **kwargs):
        super().__init__(units, **kwargs)
        self.note = note

    def build(self, input_shape):
        super().build(input_shape)
        self.built_for = input_shape

    def get_config(self):
        return {**super().get_config(), "note": self.note}

    def describe(self):
        return self.note


class ActivationOfClass(L.Dense):
    activation = staticmethod(ops.relu)

    def __init__(self, units):
        super().__init__(units)
        del self.activation


class ActivationProperty(L.Dense):
    @property
    def activation(self):
        return self.own_activation

    @activation.setter
    def activation(self, value):
        self.own_activation = ops.relu


KEPT = {
    "described": lambda: Described(4, "x", activation="relu"),
    "class": lambda: ActivationOfClass(4),
    "property": lambda: ActivationProperty(4),
}


def model_of(layer):
    if isinstance(layer, L.Embedding):
        inputs = keras.Input((3,), dtype="int32")
        return keras.Model(inputs, L.Dense(2, name="plain")(layer(inputs)))
    shape = (5, 5, 2) if isinstance(layer, L.Conv2D) else (3,)
    inputs = keras.Input(shape)
    return keras.Model(inputs, L.Dense(2, name="plain")(layer(inputs)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused_by_name(name):
    make, message = REFUSED[name]
    layer = make()
    model = model_of(layer)
    before = state(model)
    for targets in (layer.name, lambda x: x is layer, [layer.name, "plain"]):
        with pytest.raises(ValueError, match=message):
            keras_vera.enable_vera(model, rank=3, targets=targets)
        assert state(model) == before


@pytest.mark.parametrize("name", ["kernel", "mixin", "call", "patched"])
def test_a_role_leaves_it_out_and_says_so(name):
    make, message = REFUSED[name]
    layer = make()
    model = model_of(layer)
    x = np.ones((2, 3), "float32")
    before = predict(model, x)
    with pytest.warns(UserWarning, match=f"1 layers .* cannot be .*{message}"):
        keras_vera.enable_vera(model, rank=3, targets="all-linear")
    assert [x.name for x in adapted(model)] == ["plain"]
    np.testing.assert_array_equal(predict(model, x), before)


def test_what_is_excluded_is_not_mentioned(recwarn):
    layer = OwnCall(4, name="own")
    model = model_of(layer)
    keras_vera.enable_vera(model, rank=3, targets="all-linear", exclude="own")
    assert not [w for w in recwarn if "cannot be adapted" in str(w.message)]


@pytest.mark.parametrize("name", KEPT)
def test_what_computes_the_same_is_adapted(name):
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    layer = KEPT[name]()
    layer.build((None, 3))
    before = ops.convert_to_numpy(layer(x))
    assert before.min() == 0
    keras_vera.enable_vera(layer, rank=3, targets=layer.name)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), before)
    spoil(layer)
    outputs = []
    for plan in plans.DIFFERENT:
        with plans.forced(plan):
            outputs += [layer(x), ops.concatenate([layer(x[:1]), layer(x[1:])])]
    keras_vera.merge(layer)
    outputs.append(layer(x))
    for received in outputs:
        received = ops.convert_to_numpy(received)
        assert largest_difference(received, before) > 1e-2
        assert (
            largest_difference(received, ops.convert_to_numpy(outputs[0]))
            < 1e-5
        )


class Tagged(L.Dense):
    """Its subclasses have to say something."""

    tags: dict = {}

    def __init_subclass__(cls, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        Tagged.tags[tag] = cls


class TaggedDense(Tagged, tag="dense"):
    pass


class Noted(L.BatchNormalization):
    """It knows its subclasses."""

    noted: list = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Noted.noted.append(cls)


class NotedNorm(Noted):
    pass


class NotedAdam(keras.optimizers.Adam):
    noted: list = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        NotedAdam.noted.append(cls)


def make_noted(train):
    layers = [keras.Input((3,)), TaggedDense(4), NotedNorm(), L.Dense(2)]
    model = keras.Sequential(layers)
    keras_vera.enable_vera(model, rank=3, targets="all-linear", train=train)
    spoil(model)
    return model


@pytest.mark.parametrize("train", [None, "norm", "bias"])
def test_classes_that_know_their_subclasses_get_to_know_no_others(train):
    make_noted(train)
    assert Tagged.tags == {"dense": TaggedDense}
    assert Noted.noted == [NotedNorm]
    assert Tagged.tags["dense"](5)(np.ones((2, 3), "float32")).shape == (2, 5)


def test_nor_those_of_heads_and_optimizers_of_a_bank():
    head = TaggedDense(2)
    base = keras.Sequential([keras.Input((3,)), L.Dense(4)])
    model = keras.Model(base.inputs, head(base.outputs[0]))
    keras_vera.enable_vera(base, rank=3, targets="all-linear")
    bank = keras_vera.AdapterBank(model, capacity=2)
    bank.add("a")
    bank.model.compile(NotedAdam(1e-2), "mse")
    assert type(bank.model.optimizer) is not NotedAdam
    assert bank.predict(np.ones((1, 3)), adapters=["a"]).shape == (1, 2)
    assert Tagged.tags == {"dense": TaggedDense} and NotedAdam.noted == []


@pytest.mark.members_in_turn
@pytest.mark.parametrize("train", [None, "bias", "norm"])
def test_what_is_made_by_the_class_of_an_adapted_layer_is_plain(train):
    model = make_noted(train)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    for layer, plain_class in zip(model.layers, (TaggedDense, NotedNorm)):
        assert type(layer) is not plain_class
        made = type(layer)(**layer.get_config())
        assert type(made) is plain_class
        expected = plain_class.from_config(layer.get_config())
        for one in (made, expected):
            one.build((None, 3))
        made.set_weights(expected.get_weights())
        np.testing.assert_array_equal(
            ops.convert_to_numpy(made(x)), ops.convert_to_numpy(expected(x))
        )
    clone = keras.models.clone_model(
        model, clone_function=lambda x: x.__class__(**x.get_config())
    )
    assert adapted(clone) == []
    assert predict(clone, x).shape == (4, 2)
