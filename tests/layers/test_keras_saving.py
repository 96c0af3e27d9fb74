"""Keras' own files of an adapted model: merged for others, lossless for us."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import scripts
from helpers import adapted
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]


def make_model(seed=0, units=6, **kwargs):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Dense(units, activation="relu", name="hidden", **kwargs)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def make_adapted(seed=0, spoiled=1, **kwargs):
    model = make_model(seed)
    kwargs = {"rank": 4, "targets": "all-linear", **kwargs}
    keras_vera.enable_vera(model, **kwargs)
    if spoiled:
        spoil(model, spoiled)
    return model


@pytest.fixture
def x(rng):
    return rng.normal(size=(7, 5, 8)).astype("float32")


def vectors(model):
    return [
        keras.ops.convert_to_numpy(v).copy()
        for layer in adapted(model)
        for v in (layer.vera_lambda_d, layer.vera_lambda_b)
    ]


def test_keras_file_loads_as_plain_merged_model(tmp_path, x):
    model = make_adapted()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert adapted(loaded) == []
    assert type(loaded.get_layer("hidden")) is keras.layers.Dense
    assert largest_difference(predict(loaded, x), predict(model, x)) < 1e-5
    # The adapter shows: the comparison above is not of two base models.
    assert largest_difference(predict(make_model(), x), predict(model, x)) > 0.1


@pytest.mark.in_turn
def test_keras_file_loads_without_this_package(tmp_path, x):
    model = make_adapted()
    model.compile("adam", "mse")
    model.fit(x, np.ones((7, 3)), epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", predict(model, x))
    script = textwrap.dedent(
        """
        import sys
        sys.modules["keras_vera"] = None
        import keras, numpy as np
        model = keras.saving.load_model("model.keras")
        x, y = np.load("x.npy"), np.load("y.npy")
        assert abs(model.predict(x, verbose=0) - y).max() < 1e-5
        for layer in model._flatten_layers(include_self=False):
            assert type(layer).__module__.startswith("keras.src.")
        for w in model.weights:
            w.assign(keras.ops.zeros(w.shape))
        model.load_weights("model.weights.h5")
        assert abs(model.predict(x, verbose=0) - y).max() < 1e-5
        """
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        env=scripts.environment(),
    )


def test_compiled_model_with_as_many_base_variables_loads(tmp_path, rng):
    # As many vectors as kernels and biases: Keras counts optimizer variables.
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5), keras.layers.Dense(3)]
    )
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    model.compile("adam", "mse")
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 3))
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert largest_difference(predict(loaded, x), predict(model, x)) < 1e-5


def test_weights_file_gives_back_base_and_vectors(tmp_path, x):
    model = make_adapted()
    expected, y = numpy_weights(model), predict(model, x)
    model.save_weights(tmp_path / "model.weights.h5")
    spoil(model, 2)
    model.load_weights(tmp_path / "model.weights.h5")
    for weight, value in zip(model.weights, expected, strict=True):
        np.testing.assert_array_equal(weight, value)
    np.testing.assert_array_equal(predict(model, x), y)


def test_sharded_weights_give_back_vectors(tmp_path, x):
    model = make_adapted()
    expected = vectors(model)
    size_gb = 400 / 1024**3  # Several shards, also within a layer.
    path = tmp_path / "model.weights.json"
    model.save_weights(path, max_shard_size=size_gb)
    assert len(list(tmp_path.glob("*.h5"))) > 2
    spoil(model, 2)
    model.load_weights(path)
    for vector, value in zip(vectors(model), expected, strict=True):
        np.testing.assert_array_equal(vector, value)


def test_weights_of_adapted_model_load_into_plain_model(tmp_path, x):
    model = make_adapted()
    model.save_weights(tmp_path / "model.weights.h5")
    plain = make_model(seed=5)
    plain.load_weights(tmp_path / "model.weights.h5")
    assert largest_difference(predict(plain, x), predict(model, x)) < 1e-5


def test_base_weights_load_into_adapted_model(tmp_path, x):
    base = make_model(seed=7)
    base.save_weights(tmp_path / "base.weights.h5")
    model = make_adapted(seed=0)
    model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(predict(model, x), predict(base, x))
    # d is not 0, so training goes on from there.
    for layer in adapted(model):
        np.testing.assert_array_equal(layer.vera_lambda_d, np.full(4, 0.1, "f"))
    model.compile("adam", "mse")
    model.fit(x, np.ones((7, 3)), epochs=1, verbose=0)
    assert all(np.abs(b).max() > 0 for b in vectors(model)[1::2])
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    keras_vera.load_adapter(base, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(predict(model, x), predict(base, x))


@pytest.mark.parametrize("other", [{"seed": 3}, {"rank": 5}, {"vera_seed": 1}])
def test_weights_of_another_adapter_behave_as_the_file(tmp_path, x, other):
    vera_seed = other.pop("vera_seed", 0)
    rank = other.pop("rank", 4)
    model = make_model(**other)
    keras_vera.enable_vera(
        model, rank=rank, seed=vera_seed, targets="all-linear"
    )
    spoil(model)
    model.save_weights(tmp_path / "other.weights.h5")
    mine = make_adapted(spoiled=2)
    mine.load_weights(tmp_path / "other.weights.h5")
    assert largest_difference(predict(mine, x), predict(model, x)) < 1e-5
    # Its kernels hold an adapter now, so an adapter file would not fit.
    for call in (
        lambda: keras_vera.save_adapter(mine, tmp_path / "a.vera.safetensors"),
        lambda: keras_vera.disable_vera(mine),
        lambda: keras_vera.base_model(mine).__enter__(),
    ):
        with pytest.raises(ValueError, match="hold an adapter that"):
            call()
    assert not os.path.exists(tmp_path / "a.vera.safetensors")
    # The way out that the message names.
    base = make_model()
    base.save_weights(tmp_path / "base.weights.h5")
    mine.load_weights(tmp_path / "base.weights.h5")
    keras_vera.save_adapter(mine, tmp_path / "a.vera.safetensors")


def test_adapter_is_never_applied_twice(tmp_path):
    model = make_adapted()
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    model.save(tmp_path / "model.keras")
    merged = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="needs no adapter"):
        keras_vera.load_adapter(merged, tmp_path / "a.vera.safetensors")
    assert adapted(merged) == []


@pytest.mark.parametrize("kernels", ["wrong number", "wrong shape"])
def test_foreign_weights_are_refused(tmp_path, kernels):
    if kernels == "wrong number":
        other = make_model(use_bias=False)
    else:
        other = make_model(units=9)
    other.save_weights(tmp_path / "other.weights.h5")
    model = make_adapted()
    with pytest.raises(ValueError):
        model.load_weights(tmp_path / "other.weights.h5")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_merged_models(x, copied):
    model = make_adapted()
    other = copied(model)
    assert adapted(other) == []
    assert largest_difference(predict(other, x), predict(model, x)) < 1e-5


@keras.saving.register_keras_serializable(package="test_keras_saving")
class OwnsVariables(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(4, name="inner")

    def build(self, shape):
        self.scale = self.add_weight((4,), "ones", trainable=False)
        self.bias = self.add_weight((4,), "ones", name="bias")
        self.inner.build(shape)
        self.built = True

    def call(self, inputs, training=False):
        return self.inner(inputs) * self.scale + self.bias


@pytest.mark.in_turn
@pytest.mark.parametrize("train", [None, "bias"])
@pytest.mark.parametrize("part", ["model", "layer"])
def test_pickles_of_what_has_another_class(part, train, x):
    model = OwnsVariables()
    model.build((None, 5, 8))
    keras_vera.enable_vera(model, rank=4, targets="inner", train=train)
    spoil(model)
    pickled = model if part == "model" else model.inner
    plain_class = OwnsVariables if part == "model" else keras.layers.Dense
    assert type(pickled) is not plain_class
    other = pickle.loads(pickle.dumps(pickled))
    assert type(other) is plain_class
    assert adapted(model) == [model.inner] and adapted(other) == []
    y, received = (keras.ops.convert_to_numpy(m(x)) for m in (pickled, other))
    assert largest_difference(y, received) < 1e-5


def test_clone_and_config_are_those_of_the_base(x):
    model = make_adapted()
    clone = keras.models.clone_model(model)
    assert adapted(clone) == []
    config = model.get_layer("hidden").get_config()
    plain = make_model().get_layer("hidden").get_config()
    assert {**config, "trainable": True} == plain


def make_nested(seed=0):
    """A model in a model; in its order, trained variables come first."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((5, 8)),
        keras.layers.Dense(6, name="first"),
        keras.layers.BatchNormalization(name="bn"),
        keras.layers.Dense(4, name="second"),
    ]
    inner = keras.Sequential(layers)
    inner.get_layer("first").trainable = False
    inputs = keras.Input((5, 8))
    outputs = keras.layers.Dense(3, name="head")(inner(inputs))
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.uniform(0.2, 0.8, weight.shape))
    return model


def enabled_nested(train=None):
    model = make_nested()
    keras_vera.enable_vera(model, rank=2, targets="second", train=train)
    spoil(model)
    for v in model.trainable_variables:
        if not v.name.startswith("vera_lambda"):
            v.assign(v + 0.25)
    return model


LEGACY = pytest.mark.filterwarnings(
    "ignore:You are saving your model as an HDF"
)


@LEGACY
@pytest.mark.parametrize(
    "make",
    [make_adapted, enabled_nested, lambda: enabled_nested(["bias", "norm"])],
    ids=["flat", "nested", "trained"],
)
def test_hdf5_file_of_the_older_form_is_the_merged_model(tmp_path, x, make):
    model = make()
    plain = make_model if make is make_adapted else make_nested
    path = tmp_path / "model.h5"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert adapted(loaded) == []
    assert largest_difference(predict(loaded, x), predict(model, x)) < 1e-4
    base = plain()
    assert largest_difference(predict(base, x), predict(model, x)) > 0.1
    assert loaded.get_layer("head").trainable
    base.load_weights(path)
    assert largest_difference(predict(base, x), predict(model, x)) < 1e-4


def make_normalized():
    """Its wrapper lists the kernel of the layer that it holds as well."""
    keras.utils.set_random_seed(0)
    inner = keras.layers.Dense(4)
    wrapper = keras.layers.SpectralNormalization(inner)
    return keras.Sequential([keras.Input((5, 8)), wrapper])


@LEGACY
def test_hdf5_file_of_the_older_form_with_a_kernel_in_two_layers(tmp_path, x):
    model = make_normalized()
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    spoil(model)
    model.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5")
    assert largest_difference(predict(loaded, x), predict(model, x)) < 1e-5
    assert largest_difference(predict(make_normalized(), x), predict(model, x))


@LEGACY
def test_adapted_model_takes_hdf5_files_of_the_older_form(tmp_path, x):
    base = make_nested(seed=5)
    base.save(tmp_path / "base.h5")
    model = enabled_nested(["bias", "norm"])
    model.load_weights(tmp_path / "base.h5")
    np.testing.assert_array_equal(predict(model, x), predict(base, x))
    spoil(model)
    for v in model.trainable_variables:
        v.assign(v + 0.25)
    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(model, x), predict(base, x))


@pytest.mark.parametrize(
    "copied",
    [
        keras.models.clone_model,
        lambda model: type(model).from_config(model.get_config()),
        lambda model: keras.models.model_from_json(model.to_json()),
    ],
    ids=["clone_model", "from_config", "to_json"],
)
@pytest.mark.parametrize("make", [make_model, make_nested])
def test_clones_train_as_the_base_did(copied, make):
    model = make()
    expected = copied(model)
    keras_vera.enable_vera(model, rank=2, targets="all-linear", train="norm")
    clone = copied(model)
    assert [type(x) for x in clone._flatten_layers()] == [
        type(x) for x in expected._flatten_layers()
    ]
    assert [(v.shape, v.trainable) for v in clone.variables] == [
        (v.shape, v.trainable) for v in expected.variables
    ]
    assert len(clone.trainable_variables) == len(expected.trainable_variables)
    with pytest.raises(ValueError, match="set_weights"):
        clone.set_weights(model.get_weights())
    # As the README says.
    keras_vera.merge(model)
    clone.set_weights(model.get_weights())


def test_bfloat16_kernels_are_merged_in_float32(tmp_path, x):
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = make_adapted()
        model.save_weights(tmp_path / "model.weights.h5")
        plain = make_model()
        plain.load_weights(tmp_path / "model.weights.h5")
    finally:
        keras.config.set_dtype_policy("float32")
    layer = model.get_layer("hidden")
    a = np.asarray(layer.vera_kernel_a)[: layer._kernel.shape[0]]
    b_matrix = np.asarray(layer.vera_kernel_b)[:, : layer._kernel.shape[1]]
    d, b = np.asarray(layer.vera_lambda_d), np.asarray(layer.vera_lambda_b)
    factor = np.sqrt(2 / a.shape[0]) * np.sqrt(2 / a.shape[1])
    delta = (a * d * factor).astype("float64") @ b_matrix * b
    kernel = keras.ops.convert_to_numpy(
        keras.ops.cast(layer._kernel, "float32")
    )
    saved = plain.get_layer("hidden")._kernel
    saved = keras.ops.convert_to_numpy(keras.ops.cast(saved, "float32"))
    # One rounding: half a unit in the last of 8 bits.
    assert np.all(abs(saved - (kernel + delta)) <= abs(saved) * 2.0**-8 + 1e-6)


@pytest.mark.in_turn
@pytest.mark.parametrize(
    "theirs, mine",
    [
        (dict(targets=["first", "last"]), dict(targets="first")),
        (dict(targets="first"), dict(targets="last")),
        (dict(targets="first", train="norm"), dict(targets="first")),
        (dict(targets="first", train="last"), dict(targets=["first", "last"])),
        (dict(targets=["first", "last"]), dict(targets="first", train="last")),
    ],
    ids=str,
)
def test_weights_of_other_targets_are_no_base(theirs, mine, tmp_path):
    def make(**kwargs):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(5, name="first"),
                keras.layers.LayerNormalization(name="norm"),
                keras.layers.Dense(3, name="last"),
            ]
        )
        if kwargs:
            keras_vera.enable_vera(model, rank=2, **kwargs)
            for v in model.trainable_variables:
                v.assign(v + 0.5)
        return model

    other, model = make(**theirs), make(**mine)
    other.save_weights(tmp_path / "other.weights.h5")
    model.load_weights(tmp_path / "other.weights.h5")
    x = np.ones((2, 4), "float32")
    assert largest_difference(predict(model, x), predict(other, x)) < 1e-5
    path = tmp_path / "a.vera.safetensors"
    for call in (
        lambda: keras_vera.save_adapter(model, path),
        lambda: keras_vera.disable_vera(model),
        lambda: keras_vera.base_model(model).__enter__(),
    ):
        with pytest.raises(ValueError, match="hold an adapter that"):
            call()
    assert not path.exists()
    # Base weights make it a base again.
    make().save_weights(tmp_path / "base.weights.h5")
    model.load_weights(tmp_path / "base.weights.h5")
    keras_vera.save_adapter(model, path)
    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(model, x), predict(make(), x))


def test_random_matrices_of_another_seed(tmp_path, x):
    """`set_weights` brings them, and the seed does not say so."""
    model = make_adapted(seed=0)
    other = make_model()
    keras_vera.enable_vera(other, rank=4, seed=2, targets="all-linear")
    other.set_weights(model.get_weights())
    expected = predict(model, x)
    assert largest_difference(predict(other, x), expected) < 1e-6
    with pytest.raises(ValueError, match="are not those of seed=2"):
        keras_vera.save_adapter(other, tmp_path / "a.vera.safetensors")
    assert not list(tmp_path.iterdir())
    # A weights file holds the merged kernels as well.
    other.save_weights(tmp_path / "a.weights.h5")
    third = make_model()
    keras_vera.enable_vera(third, rank=4, seed=2, targets="all-linear")
    third.load_weights(tmp_path / "a.weights.h5")
    assert largest_difference(predict(third, x), expected) < 1e-5
    # Its own are those of its seed, however many layers use them.
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
