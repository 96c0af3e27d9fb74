"""What a file does not hold and relies on: it must be the same base."""

import keras
import numpy as np
import pytest
from adapter_files import read
from adapter_files import write
from helpers import predict
from helpers import spoil
from helpers import state
from keras import layers

import keras_vera
from keras_vera import AdapterFileError
from keras_vera import __main__ as command

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]


def make_model(classes=3):
    """A backbone with all that an adapter relies on, and a frozen head."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    y = layers.Dense(5, "tanh", name="adapted")(inputs)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Dense(40, "tanh", name="plain")(y)
    backbone = keras.Model(inputs, y, name="backbone")
    head = layers.Dense(classes, name="head", trainable=False)
    return keras.Model(inputs, head(backbone(inputs))), backbone


@pytest.fixture
def x(rng):
    return rng.normal(size=(6, 4)).astype("float32")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.vera.safetensors"


@pytest.fixture
def saved(path, x):
    """Returns what a model gives whose adapter is in a file at `path`."""
    model, backbone = make_model()
    keras_vera.enable_vera(backbone, rank=3, targets="adapted")
    spoil(model)
    keras_vera.save_adapter(model, path)
    return predict(model, x)


def variable(model, name):
    (found,) = [w for w in model.weights if w.path.endswith(name)]
    return found


OF_BASE = ["norm/gamma", "norm/moving_variance", "plain/kernel", "adapted/bias"]


@pytest.mark.parametrize("into", ["base", "adapted"])
@pytest.mark.parametrize("name", [*OF_BASE, "head/kernel"])
def test_a_base_with_other_values_is_refused(name, into, saved, path, x):
    model, backbone = make_model()
    if into == "adapted":
        keras_vera.enable_vera(backbone, rank=3, targets="adapted")
    changed = variable(model, name)
    value = keras.ops.convert_to_numpy(changed).copy()
    changed.assign(value + 0.5)
    before = state(model)
    layer = name.split("/")[0]
    what = "'.*dense.*'" if layer != "norm" else "'.*batch_norm.*'"
    with pytest.raises(AdapterFileError, match=f"{what}.*other values"):
        keras_vera.load_adapter(model, path)
    assert state(model) == before
    if layer == "head":
        keras_vera.load_adapter(model, path, head=False)
    changed.assign(value)
    keras_vera.load_adapter(model, path)
    np.testing.assert_array_equal(predict(model, x), saved)


class Scale(layers.Layer):
    """Its weight has no name, and Keras numbers those of the process."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=input_shape[-1:])

    def call(self, x):
        return x * (1 + self.scale)


@pytest.mark.parametrize("into", ["base", "adapted"])
def test_weights_without_names_are_compared(into, path, x):
    def make(into):
        keras.utils.set_random_seed(3)
        parts = [keras.Input((4,)), layers.Dense(5, name="adapted"), Scale()]
        model = keras.Sequential(parts)
        if into == "adapted":
            keras_vera.enable_vera(model, rank=3, targets="adapted")
        return model

    model = make("adapted")
    spoil(model)
    keras_vera.save_adapter(model, path)
    other = make(into)
    scale = keras.ops.convert_to_numpy(other.layers[1].scale).copy()
    other.layers[1].scale.assign(scale + 0.5)
    before = state(other)
    with pytest.raises(AdapterFileError, match="another base.*'.*scale.*'"):
        keras_vera.load_adapter(other, path)
    assert state(other) == before
    other.layers[1].scale.assign(scale)
    keras_vera.load_adapter(other, path)
    np.testing.assert_array_equal(predict(other, x), predict(model, x))


@pytest.mark.in_turn
def test_what_cannot_be_compared_is_taken(saved, path):
    half = keras.config.floatx()
    keras.config.set_floatx("bfloat16")
    try:
        model, _ = make_model()
    finally:
        keras.config.set_floatx(half)
    keras_vera.load_adapter(model, path)
    # A head of another size is told of as such.
    model, _ = make_model(classes=4)
    keras_vera.load_adapter(model, path)


@pytest.mark.in_turn
def test_files_of_before_load_on_any_base(saved, path):
    header, tensors = read(path)
    del header["unsaved"]
    write(path, header, tensors)
    model, _ = make_model()
    variable(model, "plain/kernel").assign(np.ones((5, 40)))
    keras_vera.load_adapter(model, path)


@pytest.mark.parametrize(
    "value", [["", "", ""], ["0" * 11, ""], ["x" * 12] * 2]
)
def test_damaged_fingerprints_are_refused(value, saved, path):
    header, tensors = read(path)
    write(path, {**header, "unsaved": value}, tensors)
    with pytest.raises(AdapterFileError, match="unsaved="):
        keras_vera.load_adapter(make_model()[0], path)


def test_inspect_counts_the_fingerprints(saved, path, capsys):
    command.main(["inspect", str(path)])
    expected = "fingerprints of 3 more layers of the base, and 1 outside it"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("name", ["outside", "trained", "unsaved", "targets"])
def test_half_a_character_is_refused(name, saved, path):
    header, tensors = read(path)
    write(path, {**header, name: ["\ud800"]}, tensors)
    with pytest.raises(AdapterFileError, match="no Unicode"):
        keras_vera.load_adapter(make_model()[0], path)


@pytest.mark.in_turn
def test_bank_refuses_them_as_well(saved, path):
    for name in (None, "plain/bias", "head/kernel"):
        model, backbone = make_model()
        if name is not None:
            changed = variable(model, name)
            changed.assign(changed + 0.5)
        keras_vera.enable_vera(backbone, rank=3, targets="adapted")
        bank = keras_vera.AdapterBank(model, capacity=1)
        if name is None:
            bank.load("ann", path)
            bank.save("ann", path.with_name("b.vera.safetensors"))
            assert (
                read(path.with_name("b.vera.safetensors"))[0] == read(path)[0]
            )
            continue
        with pytest.raises(AdapterFileError, match="other values"):
            bank.load("ann", path)
        assert bank.names == []


@pytest.mark.in_turn
def test_combining_checks_the_whole_base(saved, path):
    model, backbone = make_model()
    variable(model, "plain/bias").assign(np.ones(40))
    keras_vera.enable_vera(backbone, rank=3, targets="adapted")
    other = path.with_name("other.vera.safetensors")
    keras_vera.save_adapter(model, other)
    both = path.with_name("both.vera.safetensors")
    with pytest.raises(AdapterFileError, match="differ in the base's weights"):
        keras_vera.combine({path: 0.5, other: 0.5}, both)
    keras_vera.combine({path: 0.5}, both)
    keras_vera.load_adapter(make_model()[0], both)
