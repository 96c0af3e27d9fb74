"""Heads: left as the model has them, or put on an adapted model later."""

import keras
import numpy as np
import pytest
from adapter_files import read
from helpers import adapted
from helpers import predict
from helpers import spoil
from helpers import state
from test_adapter_file import make_model

import keras_vera
from keras_vera import AdapterFileError

pytestmark = pytest.mark.in_turn


@pytest.fixture
def x(rng):
    return rng.normal(size=(6, 5, 8)).astype("float32")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.vera.safetensors"


def make_adapted(**kwargs):
    model = make_model(**kwargs)
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    spoil(model)
    return model


def vectors(model):
    return [
        keras.ops.convert_to_numpy(v)
        for layer in adapted(model)
        for v in (layer.vera_lambda_d, layer.vera_lambda_b)
    ]


@pytest.mark.parametrize("into", ["base", "adapted"])
def test_vectors_load_beside_a_head_of_another_size(path, x, into):
    model = make_adapted()
    keras_vera.save_adapter(model, path)
    other = make_model(classes=7)
    if into == "adapted":
        keras_vera.enable_vera(other, rank=4, targets="all-linear")
    before = state(other)
    with pytest.raises(AdapterFileError, match="Pass `head=False` to load"):
        keras_vera.load_adapter(other, path)
    assert state(other) == before
    outside = [v for x in (other.norm, other.head) for v in x.weights]
    expected = [keras.ops.convert_to_numpy(v).copy() for v in outside]
    keras_vera.load_adapter(other, path, head=False)
    for mine, theirs in zip(vectors(other), vectors(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for variable, value in zip(outside, expected, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert other.head.kernel.trainable
    np.testing.assert_array_equal(
        predict(other.backbone, x), predict(model.backbone, x)
    )


def test_base_is_checked_without_the_head(path):
    keras_vera.save_adapter(make_adapted(), path)
    for other, message in (
        (make_model(seed=1, classes=7), "another base: the kernels of"),
        (make_model(units=7), "another base: .*has a kernel of shape"),
    ):
        before = state(other)
        with pytest.raises(AdapterFileError, match=message):
            keras_vera.load_adapter(other, path, head=False)
        assert state(other) == before


def test_what_is_wrong_in_the_base_gets_no_hint(path):
    model = make_adapted()
    keras_vera.save_adapter(model, path)
    other = make_model(classes=7)
    keras_vera.enable_vera(other, rank=4, targets="hidden")
    with pytest.raises(AdapterFileError) as error:
        keras_vera.load_adapter(other, path)
    assert "head=False" not in str(error.value)


def test_bank_loads_vectors_beside_its_own_head(path, x):
    def make(classes):
        model = make_model(classes=classes)
        model.norm.trainable = False
        keras_vera.enable_vera(model, rank=4, targets="all-linear")
        return model

    theirs = make(7)
    spoil(theirs)
    keras_vera.save_adapter(theirs, path)
    model = make(3)
    bank = keras_vera.AdapterBank(model, capacity=2)
    with pytest.raises(AdapterFileError, match="Pass `head=False`"):
        bank.load("ann", path)
    assert bank.names == []
    bank.load("ann", path, head=False)
    y = bank.predict(x, ["ann"] * len(x))
    keras_vera.load_adapter(model, path, head=False)
    np.testing.assert_allclose(y, predict(model, x), atol=1e-5)
    assert np.abs(y - bank.predict(x, [None] * len(x))).max() > 0.1


def make_sequential(head=None):
    keras.utils.set_random_seed(3)
    layers = [
        keras.Input((8,)),
        keras.layers.Dense(6, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(5),
    ]
    model = keras.Sequential(layers)
    if head:
        model.add(keras.layers.BatchNormalization(momentum=0.5))
        model.add(keras.layers.Dense(head, name="head"))
    return model


def grown_and_trained():
    """A head on an adapted `Sequential`; both are trained."""
    model = make_sequential()
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    model.add(keras.layers.BatchNormalization(momentum=0.5))
    model.add(keras.layers.Dense(3, name="head"))
    names = [v.path.split("/", 1)[1] for v in model.trainable_variables]
    assert len(names) == 2 * 2 + 4
    model.compile(keras_vera.vera_optimizer(), "mse")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(16, 8))
    model.fit(x, rng.normal(size=(16, 3)), epochs=2, verbose=0)
    return model, x.astype("float32")


def test_head_that_was_added_later_is_saved(path):
    model, x = grown_and_trained()
    keras_vera.save_adapter(model, path)
    header, tensors = read(path)
    assert header["outside"] == [
        "layers/batch_normalization_1",
        "layers/dense_2",
    ]
    assert len(tensors) == 2 * 2 + 4 + 2
    fresh = make_sequential(head=3)
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    assert [v.trainable for v in fresh.weights] == [
        v.trainable for v in model.weights
    ]
    # What is loaded is saved as it was.
    again = path.with_name("again.vera.safetensors")
    keras_vera.save_adapter(fresh, again)
    assert again.read_bytes() == path.read_bytes()
    other = make_sequential(head=4)
    with pytest.raises(AdapterFileError, match="Pass `head=False`"):
        keras_vera.load_adapter(other, path)
    keras_vera.load_adapter(other, path, head=False)
    assert other.get_layer("head").kernel.trainable
    base = make_sequential()
    with pytest.raises(AdapterFileError, match="no layers .*dense_2"):
        keras_vera.load_adapter(base, path)
    keras_vera.load_adapter(base, path, head=False)
    for mine, theirs in zip(vectors(base), vectors(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_head_that_was_replaced_is_saved(path):
    model = make_sequential(head=9)
    keras_vera.enable_vera(model, rank=4, targets=r"layers/dense(_1)?")
    spoil(model)
    model.pop()
    model.add(keras.layers.Dense(3, name="head"))
    keras_vera.save_adapter(model, path)
    header, _ = read(path)
    assert header["outside"] == ["layers/dense_2"]
    fresh = make_sequential(head=3)
    keras_vera.load_adapter(fresh, path)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))


def test_disabling_leaves_a_head_that_was_added_later(path):
    model, x = grown_and_trained()
    keras_vera.disable_vera(model)
    plain = make_sequential(head=3)
    for mine, theirs in zip(plain.layers[-2:], model.layers[-2:]):
        mine.set_weights(theirs.get_weights())
    np.testing.assert_array_equal(predict(plain, x), predict(model, x))


def with_lora(layer):
    layer.enable_lora(2)
    rng = np.random.default_rng(2)
    for v in (layer.lora_kernel_a, layer.lora_kernel_b):
        v.assign(rng.normal(size=v.shape))


def test_head_with_lora_is_a_head(path, x):
    model = make_model()
    with_lora(model.head)
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    assert [v.trainable for v in model.head.weights] == [False] + [True] * 3
    spoil(model)
    keras_vera.save_adapter(model, path)
    fresh = make_model()
    with_lora(fresh.head)
    for v in fresh.head.weights:
        v.assign(v + 1)
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    # In the base, VeRA would freeze it.
    other = make_model()
    with_lora(other.backbone.layers[-2])
    before = state(other)
    with pytest.raises(ValueError, match="has LoRA enabled, in the layers"):
        keras_vera.load_adapter(other, path)
    assert state(other) == before
