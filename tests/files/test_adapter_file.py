import os
import pathlib
import shutil
import stat
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import keras
import numpy as np
import pytest
import scripts
from adapter_files import read
from adapter_files import write
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from helpers import state
from keras import ops

import keras_vera
from keras_vera import AdapterFileError
from keras_vera import SharedProjection
from keras_vera.model.adaptation import Adaptation

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

# Where this file and the helpers of all tests are.
TESTS = pathlib.Path(__file__).parents[:2]


class Classifier(keras.Model):
    """A backbone with biases everywhere, and a head with state."""

    def __init__(self, classes=3, units=6):
        super().__init__()
        inputs = keras.Input((5, 8))
        x = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.Dense(units, activation="relu", name="hidden")(x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        self.backbone = keras.Model(inputs, x)
        self.norm = keras.layers.BatchNormalization(momentum=0.5)
        self.head = keras.layers.Dense(classes)

    def call(self, x, training=None):
        x = self.backbone(x)
        return self.head(self.norm(x, training=training))


def make_model(seed=0, **kwargs):
    """Builds the model; the backbone's weights are the same on any backend."""
    model = Classifier(**kwargs)
    model(np.zeros((2, 5, 8), "float32"))
    rng = np.random.default_rng(seed)
    for weight in model.backbone.weights:
        weight.assign(rng.normal(0, 0.4, weight.shape).astype("float32"))
    return model


# What came of training with each set of arguments: it is compiled for long.
TRAINED = {}


def make_trained(x, **kwargs):
    model = make_model()
    kwargs = {"rank": 4, "targets": "all-linear", **kwargs}
    keras_vera.enable_vera(model, **kwargs)
    model.compile(keras_vera.vera_optimizer(), "mse")
    key = x.tobytes(), repr(kwargs)
    if key not in TRAINED:
        y = np.random.default_rng(3).normal(size=(len(x), 3))
        model.fit(x, y, epochs=3, batch_size=4, verbose=0)
        TRAINED[key] = numpy_weights(model)
    for weight, value in zip(model.weights, TRAINED[key], strict=True):
        weight.assign(value)
    return model


@pytest.fixture
def x(rng):
    return rng.normal(size=(12, 5, 8)).astype("float32")


@pytest.fixture
def trained(x, request):
    return make_trained(x, **getattr(request, "param", {}))


STRUCTURES = pytest.mark.parametrize(
    "trained", [{}, {"structure": "blocks2"}], ids=str, indirect=True
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.vera.safetensors"


def test_trained_set_is_saved_set(trained, path):
    keras_vera.save_adapter(trained, path)
    _, tensors = read(path)
    arrays = [ops.convert_to_numpy(v) for v in trained.trainable_variables]
    saved = sorted(t.tobytes() for t in tensors.values())
    statistics = [
        ops.convert_to_numpy(trained.norm.moving_mean),
        ops.convert_to_numpy(trained.norm.moving_variance),
    ]
    assert saved == sorted(a.tobytes() for a in arrays + statistics)
    # 5 adapted layers, gamma and beta, kernel and bias of the head.
    assert len(arrays) == 5 * 2 + 4


@STRUCTURES
def test_reload_into_fresh_model_is_exact(trained, path, x):
    keras_vera.save_adapter(trained, path)
    fresh = make_model()
    fresh.head.kernel.assign(ops.ones(fresh.head.kernel.shape))
    assert largest_difference(predict(fresh, x), predict(trained, x)) > 1e-2
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(trained, x))
    paths = [v.path.split("/")[-1] for v in fresh.trainable_variables]
    assert paths == [v.path.split("/")[-1] for v in trained.trainable_variables]


def test_reload_into_adapted_model(trained, path, x):
    expected = predict(trained, x)
    keras_vera.save_adapter(trained, path)
    compiled = trained.predict_function
    spoil(trained)
    keras_vera.load_adapter(trained, path)
    np.testing.assert_array_equal(predict(trained, x), expected)
    # Switching adapters is assigning vectors: nothing is compiled again.
    assert trained.predict_function is compiled


def test_frozen_vectors_are_saved(trained, path, x):
    trained.backbone.trainable = False
    keras_vera.save_adapter(trained, path)
    fresh = make_model()
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(trained, x))


def test_two_adapted_towers_in_one_file(path, x):
    def make():
        towers = [make_model(seed).backbone for seed in (1, 2)]
        inputs = keras.Input((5, 8))
        outputs = keras.layers.Add()([tower(inputs) for tower in towers])
        return towers, keras.Model(inputs, outputs)

    towers, model = make()
    keras_vera.enable_vera(towers[0], rank=4)
    keras_vera.enable_vera(towers[1], rank=4, targets="hidden")
    spoil(model)
    keras_vera.save_adapter(model, path)
    _, fresh = make()
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    keras_vera.disable_vera(model)
    assert adapted(model) == []


def make_towers(sizes=(5, 7), seeds=(0, 0), enabled=True):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    towers = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(size, "tanh")])
        for size in sizes
    ]
    outputs = keras.layers.Concatenate()([tower(inputs) for tower in towers])
    for tower, seed in zip(towers, seeds):
        if enabled:
            keras_vera.enable_vera(
                tower, rank=3, seed=seed, targets="all-linear"
            )
    return keras.Model(inputs, outputs), towers


@pytest.mark.parametrize("into", ["base", "adapted"])
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5)])
def test_two_towers_of_different_sizes(sizes, into, path, rng):
    model, _ = make_towers(sizes)
    spoil(model)
    keras_vera.save_adapter(model, path)
    fresh, _ = make_towers(sizes, enabled=into == "adapted")
    keras_vera.load_adapter(fresh, path)
    x = rng.normal(size=(6, 4)).astype("float32")
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))


@pytest.mark.parametrize("place", [0, 1])
def test_matrices_of_another_seed_are_refused_in_each_tower(place, path):
    model, towers = make_towers()
    spoil(model)
    keras_vera.save_adapter(model, path)
    content = path.read_bytes()
    _, others = make_towers(seeds=(5, 5))
    towers[place].set_weights(others[place].get_weights())
    before = state(model)
    for call in (keras_vera.save_adapter, keras_vera.load_adapter):
        # The file is as it should be.
        with pytest.raises(ValueError, match="model .* not those of seed=0"):
            call(model, path)
    assert state(model) == before
    assert path.read_bytes() == content


@pytest.mark.parametrize("same", [True, False])
def test_two_towers_with_matrices_that_no_seed_makes(same, path, rng):
    shapes = (4, 3), (3, 7)
    pairs = [
        [rng.normal(size=shape).astype("float32") for shape in shapes]
        for _ in range(2)
    ]

    def make(of):
        model, towers = make_towers(enabled=False)
        for tower, i in zip(towers, of):
            Adaptation(
                projection=SharedProjection.from_matrices(*pairs[i]),
                targets=None,
                d_initial=0.1,
                dropout=0.0,
                bases=[tower],
                layers=list(tower.layers),
            ).apply(tower)
        return model

    alike = make((0, 0))
    spoil(alike)
    keras_vera.save_adapter(alike, path)
    if same:
        fresh, _ = make_towers(enabled=False)
        keras_vera.load_adapter(fresh, path)
        x = rng.normal(size=(6, 4)).astype("float32")
        np.testing.assert_array_equal(predict(fresh, x), predict(alike, x))
        return
    content = path.read_bytes()
    model = make((0, 1))
    for call in (
        lambda: keras_vera.save_adapter(model, path),
        lambda: keras_vera.load_adapter(model, path),
        lambda: keras_vera.AdapterBank(model, capacity=1),
    ):
        with pytest.raises(ValueError, match="different random matrices"):
            call()
    assert path.read_bytes() == content


def test_loaded_model_saves_the_same_file(trained, path, tmp_path):
    keras_vera.save_adapter(trained, path)
    fresh = make_model()
    keras_vera.load_adapter(fresh, path)
    again = tmp_path / "again.vera.safetensors"
    keras_vera.save_adapter(fresh, again)
    assert again.read_bytes() == path.read_bytes()


def test_settings_come_from_the_file(x, path):
    model = make_trained(
        x, rank=5, seed=77, d_initial=0.2, dropout=0.25, targets=["hidden"]
    )
    keras_vera.save_adapter(model, path)
    fresh = make_model()
    keras_vera.load_adapter(fresh, path)
    (layer,) = adapted(fresh)
    assert layer.name == "hidden"
    assert (layer.projection.rank, layer.projection.seed) == (5, 77)
    assert layer._vera_settings == adapted(model)[0]._vera_settings
    assert layer._vera_settings.dropout == 0.25


def test_header_is_readable(trained, path):
    keras_vera.save_adapter(trained, path)
    header, tensors = read(path)
    assert header["format_version"] == 1
    assert (header["rank"], header["seed"]) == (4, 0)
    assert header["targets"] == "all-linear"
    assert header["bases"] == ["backbone"]
    # In the order of the layers' paths.
    paths = sorted(
        x.removesuffix("/vera_lambda_d")
        for x in tensors
        if x.endswith("/vera_lambda_d")
    )
    hidden = header["layers"][paths.index("backbone/layers/dense")]
    assert hidden[:2] == [[8, 6], "float32"]
    assert header["keras_version"] == keras.version()
    assert header["keras_vera_version"] == keras_vera.__version__
    assert len(header["projection_sha256"]) == 64


def test_file_is_small(trained, path):
    keras_vera.save_adapter(trained, path)
    _, tensors = read(path)
    content = sum(t.nbytes for t in tensors.values())
    # Names, and what the index and the header say of each entry.
    entries = sum(len(name) + 100 for name in tensors)
    assert path.stat().st_size < content + 1024 + entries


def test_backbone_adapter_and_inner_base(x, path):
    backbone = make_model().backbone
    keras_vera.enable_vera(backbone, rank=4)
    spoil(backbone)
    keras_vera.save_adapter(backbone, path)
    fresh = make_model().backbone
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(backbone, x))


def test_backbone_whose_graph_is_in_the_model(path, x):
    def make():
        backbone = make_model().backbone
        head = keras.layers.Dense(2, name="head")
        return backbone, keras.Model(backbone.input, head(backbone.output))

    backbone, model = make()
    keras_vera.enable_vera(backbone, rank=4)
    assert model.layers[-1].kernel.trainable
    spoil(model)
    keras_vera.save_adapter(model, path)
    _, fresh = make()
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))
    names = [v.name for v in model.trainable_variables]
    assert [v.name for v in fresh.trainable_variables] == names


def test_single_layer(path, rng):
    x = rng.normal(size=(3, 4)).astype("float32")
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    keras_vera.enable_vera(layer, rank=2, targets="all-linear")
    spoil(layer)
    y = ops.convert_to_numpy(layer(x))
    keras_vera.save_adapter(layer, path)
    keras_vera.disable_vera(layer)
    keras_vera.load_adapter(layer, path)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), y)


def test_standalone_layers_load_into_the_same_structure(x, path):
    def make():
        keras.utils.set_random_seed(4)
        projection = keras_vera.SharedProjection(seed=3, rank=4)
        return keras.Sequential(
            [
                keras.Input((5, 8)),
                keras_vera.layers.VeRADense(6, projection=projection),
                keras.layers.BatchNormalization(),
                keras_vera.layers.VeRADense(3, projection=projection),
            ]
        )

    model = make()
    spoil(model)
    model.layers[1].gamma.assign(np.arange(6, dtype="float32"))
    keras_vera.save_adapter(model, path)
    fresh = make()
    keras_vera.load_adapter(fresh, path)
    np.testing.assert_array_equal(predict(fresh, x), predict(model, x))


# Each other one imports and compiles for half a minute.
@pytest.mark.in_turn("torch")
@pytest.mark.parametrize("other", ["jax", "tensorflow", "torch"])
def test_other_backends_give_the_same_outputs(x, tmp_path, other):
    if other == backend() or find_spec(other) is None:
        pytest.skip(f"{other} is no other backend here.")
    np.save(tmp_path / "x.npy", x)
    models = {
        structure: make_trained(x, structure=structure)
        for structure in ("dense", "blocks2")
    }
    for structure, model in models.items():
        keras_vera.save_adapter(
            model, tmp_path / f"{structure}.vera.safetensors"
        )
    script = textwrap.dedent(
        """
        import numpy as np
        import keras_vera
        from test_adapter_file import make_model
        for structure in ("dense", "blocks2"):
            model = make_model()
            keras_vera.load_adapter(model, f"{structure}.vera.safetensors")
            y = model.predict(np.load("x.npy"), verbose=0)
            np.save(f"{structure}.npy", y)
        """
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=scripts.environment(*TESTS, KERAS_BACKEND=other),
        check=True,
    )
    for structure, model in models.items():
        y = np.load(tmp_path / f"{structure}.npy")
        assert largest_difference(y, predict(model, x)) < 1e-5
        assert largest_difference(y, predict(make_model(), x)) > 1e-2


def test_another_base_is_refused(trained, path):
    keras_vera.save_adapter(trained, path)
    for other, message in (
        (make_model(seed=1), "another base: the kernels of .*backbone/layers"),
        (make_model(units=7), "another base: .*backbone/layers/dense' has a"),
        (make_model(classes=4), "'head/kernel' has shape \\(6, 3\\), not"),
        (make_model().backbone, "another base: the model has no layers"),
    ):
        before = state(other)
        with pytest.raises(AdapterFileError, match=message):
            keras_vera.load_adapter(other, path)
        assert state(other) == before


def test_adapter_of_other_settings_is_refused(trained, path, x):
    keras_vera.save_adapter(trained, path)
    for kwargs, message in (
        ({"rank": 5}, "has rank=4, seed=0, .* but .* rank=5, seed=0"),
        ({"seed": 1}, "has rank=4, seed=0, .* but .* rank=4, seed=1"),
        ({"structure": "blocks2"}, "'dense', but .* structure='blocks2'"),
        ({"targets": "hidden"}, "the model has not: .*query_dense"),
    ):
        other = make_model()
        kwargs = {"rank": 4, "targets": "all-linear", **kwargs}
        keras_vera.enable_vera(other, **kwargs)
        before = state(other)
        with pytest.raises(AdapterFileError, match=message):
            keras_vera.load_adapter(other, path)
        assert state(other) == before


def change_hash(header, tensors):
    header["projection_sha256"] = "0" * 64


def drop_vector(header, tensors):
    del tensors["backbone/layers/dense/vera_lambda_b"]


def add_entry(header, tensors):
    tensors["backbone/layers/dense/other"] = np.zeros(6, "float32")


def reshape_vector(header, tensors):
    tensors["backbone/layers/dense/vera_lambda_b"] = np.zeros((6, 1), "float32")


def drop_head(header, tensors):
    del tensors["head/kernel"]


def drop_key(header, tensors):
    del header["layers"]


def raise_version(header, tensors):
    header["format_version"] = 2


@pytest.mark.parametrize(
    "damage, message",
    [
        (change_hash, "other random matrices than rank=4, seed=0"),
        (drop_vector, "the file has not: .*dense/vera_lambda_b"),
        (add_entry, "the model has not: .*dense/other"),
        (reshape_vector, "vera_lambda_b' has shape \\(6, 1\\), not \\(6,\\)"),
        (drop_head, "the file has not: .*head/kernel"),
        (drop_key, "lacks 'layers'"),
        (raise_version, "format version 2"),
    ],
)
@pytest.mark.parametrize("into", ["fresh", "adapted"])
def test_changed_files_are_refused(trained, path, damage, message, into):
    keras_vera.save_adapter(trained, path)
    header, tensors = read(path)
    damage(header, tensors)
    write(path, header, tensors)
    model = make_model() if into == "fresh" else trained
    before = state(model)
    with pytest.raises(AdapterFileError, match=message):
        keras_vera.load_adapter(model, path)
    assert state(model) == before


def test_failed_save_keeps_the_old_file(trained, path, monkeypatch):
    keras_vera.save_adapter(trained, path)
    content = path.read_bytes()
    spoil(trained)

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(AdapterFileError, match="no space"):
        keras_vera.save_adapter(trained, path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_file_has_usual_permissions(trained, path):
    keras_vera.save_adapter(trained, path)
    other = path.parent / "other"
    other.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    assert mode == stat.S_IMODE(other.stat().st_mode)


def test_bad_calls_are_refused(trained, tmp_path, path):
    with pytest.raises(ValueError, match="must end in `.vera.safetensors`"):
        keras_vera.save_adapter(trained, tmp_path / "adapter.h5")
    with pytest.raises(ValueError, match="must be adapted"):
        keras_vera.save_adapter(make_model(), path)
    trained.trainable = False
    with pytest.raises(ValueError, match="`model.trainable` is False"):
        keras_vera.save_adapter(trained, path)
    assert not path.exists()
    trained.trainable = True
    keras_vera.save_adapter(trained, path)
    with pytest.raises(ValueError, match="`model` must be a Keras model"):
        keras_vera.load_adapter("model", path)
    with pytest.raises(ValueError, match="a part of it"):
        attention = trained.backbone.layers[1]
        keras_vera.save_adapter(attention, path)
    with pytest.raises(ValueError, match="`dtype` must be one of .*int8"):
        keras_vera.save_adapter(trained, path, dtype="int8")
    shutil.rmtree(tmp_path)
    with pytest.raises(AdapterFileError, match="No such file"):
        keras_vera.save_adapter(trained, path)


def test_16_bit_base_and_head(path, x):
    keras.config.set_dtype_policy("bfloat16")
    try:
        model, fresh = make_model(), make_model()
        keras_vera.enable_vera(model, rank=4)
        spoil(model)
        model.head.kernel.assign(ops.ones(model.head.kernel.shape) / 3)
        keras_vera.save_adapter(model, path)
        keras_vera.load_adapter(fresh, path)
    finally:
        keras.config.set_dtype_policy("float32")
    assert fresh.trainable_variables[0].dtype == "float32"
    y = [
        ops.convert_to_numpy(ops.cast(m(x), "float32")) for m in (model, fresh)
    ]
    np.testing.assert_array_equal(*y)


def test_base_of_another_precision_takes_the_adapter(trained, path, x):
    keras_vera.save_adapter(trained, path)
    keras.config.set_dtype_policy("bfloat16")
    try:
        fresh = make_model()
    finally:
        keras.config.set_dtype_policy("float32")
    keras_vera.load_adapter(fresh, path)
    y = ops.convert_to_numpy(ops.cast(fresh(x), "float32"))
    assert largest_difference(y, predict(trained, x)) < 0.2


@pytest.mark.parametrize(
    "dtype, error", [("float16", 2.0**-11), ("bfloat16", 2.0**-8)]
)
def test_half_floats_halve_the_file(trained, path, dtype, error):
    spoil(trained)
    keras_vera.save_adapter(trained, path)
    _, exact = read(path)
    size = path.stat().st_size
    keras_vera.save_adapter(trained, path, dtype=dtype)
    saved = sum(array.nbytes for array in exact.values()) // 2
    assert abs(size - path.stat().st_size - saved) < 3 * len(exact)
    model = make_model()
    keras_vera.load_adapter(model, path)
    keras_vera.save_adapter(model, path)
    _, loaded = read(path)
    for name, array in exact.items():
        # The smallest numbers of float16 are farther apart.
        np.testing.assert_allclose(
            loaded[name], array, rtol=error, atol=2.0**-25
        )
    differences = [np.abs(loaded[x] - exact[x]).max() for x in exact]
    assert max(differences) > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_what_no_file_can_hold_is_refused(trained, path, value):
    keras_vera.save_adapter(trained, path)
    content = path.read_bytes()
    layer = adapted(trained)[0]
    layer.vera_lambda_d.assign(np.full(4, value, "float32"))
    with pytest.raises(ValueError, match="vera_lambda_d' holds NaN or inf"):
        keras_vera.save_adapter(trained, path, dtype="float16")
    assert path.read_bytes() == content


def dense_model(dtype):
    """A base, and a head of another dtype."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    head = keras.layers.Dense(2, name="head", dtype=dtype)
    return keras.Model(base.inputs, head(base.outputs[0])), base, head


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_no_file_can_hold_is_refused_in_64_bits(path, value):
    model, base, head = dense_model("float64")
    keras_vera.enable_vera(base, rank=4, targets="all-linear")
    # No float32 can hold it, nor can JAX without `jax_enable_x64`.
    head.bias.assign([1.0 if backend() == "jax" else 1e300, 1.0])
    keras_vera.save_adapter(model, path)
    content = path.read_bytes()
    head.bias.assign([value, 1.0])
    with pytest.raises(ValueError, match="bias' holds NaN or inf"):
        keras_vera.save_adapter(model, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("into", ["base", "adapted", "bank"])
def test_what_float16_cannot_hold_is_refused(path, into):
    model, base, head = dense_model("float32")
    keras_vera.enable_vera(base, rank=4, targets="all-linear")
    head.bias.assign([7e4, 1.0])
    keras_vera.save_adapter(model, path)
    other, base, head = dense_model("float16")
    if into != "base":
        keras_vera.enable_vera(base, rank=4, targets="all-linear")
    before = numpy_weights(other)
    load = keras_vera.load_adapter
    if into == "bank":
        bank = keras_vera.AdapterBank(other, 1)

        def load(_, path):
            bank.load("ann", path)

    with pytest.raises(AdapterFileError, match="up to 70000, and is of float1"):
        load(other, path)
    for value, expected in zip(numpy_weights(other), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert into != "base" or not adapted(other)


@pytest.mark.parametrize("into", ["base", "adapted"])
def test_biases_that_float16_cannot_hold_are_refused(path, into):
    """Those of an adapter, as adapters from PEFT have."""

    def make_base(dtype):
        dense = keras.layers.Dense(3, dtype=dtype, name="dense")
        return keras.Sequential([keras.Input((4,)), dense])

    base = make_base("float32")
    keras_vera.enable_vera(base, rank=4, targets="all-linear")
    base.layers[0].set_adapter_bias(np.array([7e4, 1.0, 1.0], "float32"))
    keras_vera.save_adapter(base, path)
    other = make_base("float16")
    if into == "adapted":
        keras_vera.enable_vera(other, rank=4, targets="all-linear")
    before = numpy_weights(other)
    with pytest.raises(AdapterFileError, match="bias' holds numbers up to 7"):
        keras_vera.load_adapter(other, path)
    for value, expected in zip(numpy_weights(other), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert into != "base" or not adapted(other)


def test_paths_of_bytes(trained, path):
    keras_vera.save_adapter(trained, os.fsencode(path))
    keras_vera.load_adapter(make_model(), os.fsencode(path))
