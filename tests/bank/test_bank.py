"""Slots of an `AdapterBank`, and prediction with an adapter for each row."""

import banks
import hub_text
import keras
import numpy as np
import pytest
from banks import ROUNDING
from banks import alone
from banks import compile_bank
from banks import expected_rows
from banks import make_bank
from banks import make_classifier
from banks import make_files
from banks import randomize
from banks import stacks
from helpers import backend
from helpers import largest_difference
from helpers import predict
from hub_models import make_inputs
from hub_models import make_task
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from safetensors.numpy import load_file

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

NAMES = ["ann", "bob", "eve"]
MIXED = ["bob", None, "ann", "eve", "bob", "ann"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(3)
    return rng.normal(size=(len(MIXED), 3, banks.INPUTS)).astype("float32")


@pytest.fixture(scope="module")
def outputs(files, x):
    return alone(files, x)


@pytest.fixture(scope="module")
def full_bank(files):
    """A bank that tests must not change."""
    return make_bank(files)


def test_rows_are_those_of_each_adapter_alone(full_bank, outputs, x):
    found = full_bank.predict(x, MIXED, batch_size=4)
    expected = expected_rows(outputs, MIXED)
    assert largest_difference(found, expected) < ROUNDING
    base = expected_rows(outputs, [None] * len(MIXED))
    moved = np.abs(expected - base).max(axis=1)
    assert (moved > banks.DIFFERENT).tolist() == [n is not None for n in MIXED]


def test_rows_are_those_of_the_formula(full_bank, files, x):
    """Against NumPy in float64, from the files' own numbers."""
    base = make_classifier(vera=False)
    weights = [ops.convert_to_numpy(v).astype("f8") for v in base.weights]
    up, up_bias, split, _, _ = weights
    adapted = make_classifier()
    layer = adapted.get_layer(index=1).get_layer("up")
    a = ops.convert_to_numpy(layer.vera_kernel_a).astype("f8")
    b_matrix = ops.convert_to_numpy(layer.vera_kernel_b).astype("f8")

    def dense(x, kernel, d, b):
        m, n = kernel.shape
        pair = a[:m] * np.sqrt(2 / m), b_matrix[:, :n] * np.sqrt(2 / 4)
        return x @ kernel + b * ((x @ pair[0] * d) @ pair[1])

    expected = []
    for row, name in zip(x.astype("f8"), MIXED):
        if name is None:
            continue
        entry = load_file(files[name])
        by_layer = {}
        for key, value in entry.items():
            path, _, kind = key.rpartition("/")
            by_layer.setdefault(path, {})[kind] = value
        # By the length of b: 8 units, and 2 x 5 units.
        adapters = {
            len(v["vera_lambda_b"]): (v["vera_lambda_d"], v["vera_lambda_b"])
            for v in by_layer.values()
            if "vera_lambda_b" in v
        }
        (head,) = (v for v in by_layer.values() if "kernel" in v)
        y = np.tanh(dense(row, up, *adapters[8]) + up_bias)
        y = dense(y, split.reshape(8, 10), *adapters[10]).reshape(3, 2, 5)
        y = np.tanh(y).reshape(30)
        expected.append(y @ head["kernel"] + head["bias"])
    found = full_bank.predict(x, MIXED)
    rows = [i for i, name in enumerate(MIXED) if name is not None]
    assert largest_difference(found[rows], np.stack(expected)) < ROUNDING


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=6, max_size=6))
def test_any_mix_in_any_place(full_bank, outputs, x, ids):
    found = ops.convert_to_numpy(full_bank.model([x, np.array(ids, "int32")]))
    expected = expected_rows(outputs, [[None, *NAMES][i] for i in ids])
    assert largest_difference(found, expected) < ROUNDING


@pytest.mark.parametrize(
    "kwargs",
    [{"structure": "blocks2", "rank": 6}, {"plan": "folded", "dropout": 0.5}],
    ids=str,
)
def test_structures_and_settings(tmp_path, x, kwargs):
    files = make_files(tmp_path, NAMES, **kwargs)
    bank = make_bank(files, **kwargs)
    expected = expected_rows(alone(files, x, **kwargs), MIXED)
    assert largest_difference(bank.predict(x, MIXED), expected) < ROUNDING


@pytest.mark.parametrize(
    "dtype",
    # JAX has no float64 unless asked to.
    ["mixed_bfloat16", "bfloat16"] + ["float64"] * (backend() != "jax"),
)
def test_dtypes(tmp_path, x, dtype):
    files = make_files(tmp_path, NAMES, dtype=dtype)
    found = make_bank(files, dtype=dtype).predict(x, MIXED)
    expected = expected_rows(alone(files, x, dtype=dtype), MIXED)
    assert found.dtype == expected.dtype
    tolerance = ROUNDING if dtype == "float64" else 0.06
    found, expected = (y.astype("float64") for y in (found, expected))
    assert largest_difference(found, expected) < tolerance


@pytest.mark.eager(False)
@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "gemma"])
def test_kerashub(tmp_path, family):
    task = make_task(family)
    keras_vera.enable_vera(task, rank=4, targets="attention")
    x, _ = make_inputs(family, rows=4)
    bank = keras_vera.AdapterBank(task, capacity=2)
    base, expected = predict(task, x), {}
    for seed, name in enumerate("ab"):
        randomize(task, seed)
        file = tmp_path / f"{name}.vera.safetensors"
        keras_vera.save_adapter(task, file)
        bank.load(name, file)
        expected[name] = predict(task, x)
    # The vectors of the task itself are no adapter of the bank.
    randomize(task, 7)
    adapters = ["b", "a", None, "b"]
    expected = expected_rows({**expected, None: base}, adapters)
    assert largest_difference(bank.predict(x, adapters), expected) < 1e-4


# ---- Slots.


def test_names(files, x, outputs):
    bank = make_bank(files, capacity=5)
    assert (len(bank), bank.names, bank.capacity) == (3, NAMES, 5)
    assert "ann" in bank and "zoe" not in bank and None not in bank
    bank.rename("ann", "zoe")
    assert list(bank) == ["zoe", "bob", "eve"]
    bank.remove("bob")
    assert bank.names == ["zoe", "eve"]
    bank.add("new")
    bank.load("bob", files["bob"])
    assert bank.names == ["zoe", "eve", "new", "bob"]
    renamed = {"zoe": outputs["ann"], "new": outputs[None], **outputs}
    adapters = ["zoe", "new", "bob", "eve", None, "new"]
    found = bank.predict(x, adapters)
    assert largest_difference(found, expected_rows(renamed, adapters)) < (
        ROUNDING
    )


def test_files_are_those_of_save_adapter(tmp_path, files):
    bank = make_bank(files)
    for name in NAMES:
        bank.save(name, tmp_path / "again.vera.safetensors")
        again = (tmp_path / "again.vera.safetensors").read_bytes()
        assert again == files[name].read_bytes()


def test_half_floats(tmp_path, full_bank):
    path = tmp_path / "half.vera.safetensors"
    full_bank.save("ann", path, dtype="float16")
    assert {v.dtype for v in load_file(path).values()} == {np.dtype("float16")}


@pytest.mark.eager(False)
def test_growing_keeps_adapters(files, x, outputs):
    bank = make_bank(files)
    with pytest.raises(ValueError, match="full, with 3 adapters"):
        bank.add("new")
    bank.grow(5)
    bank.add("new")
    assert bank.capacity == 5
    found = bank.predict(x, MIXED)
    assert largest_difference(found, expected_rows(outputs, MIXED)) < ROUNDING
    with pytest.raises(ValueError, match="`capacity` must be an integer"):
        bank.grow(5)


def other_base(model):
    for v in model.non_trainable_variables:
        if v.name == "kernel":
            v.assign(v + 1.0)


@pytest.mark.parametrize(
    "kwargs, change, match",
    [
        ({"rank": 3}, None, "rank=3"),
        ({"seed": 1}, None, "seed=1"),
        ({"targets": "up"}, None, "adapted layers"),
        ({"classes": 9}, None, "has shape"),
        ({}, other_base, "belongs to another base"),
    ],
    ids=["rank", "seed", "layers", "classes", "base"],
)
def test_adapters_that_do_not_fit(tmp_path, files, kwargs, change, match):
    if "classes" in kwargs:
        model = make_wide_classifier(kwargs["classes"])
    else:
        model = make_classifier(**kwargs)
    if change is not None:
        change(model)
    path = tmp_path / "other.vera.safetensors"
    keras_vera.save_adapter(model, path)
    bank = make_bank(files, capacity=4)
    before = stacks(bank)
    with pytest.raises(keras_vera.AdapterFileError, match=match):
        bank.load("other", path)
    assert bank.names == NAMES
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    bank.add("other")  # The slot is still free.


def make_wide_classifier(classes):
    model = make_classifier()
    backbone = model.get_layer(index=1)
    head = keras.layers.Dense(classes, name="head")
    return keras.Model(model.input, head(backbone(model.input)))


@pytest.mark.parametrize(
    "call, match",
    [
        (
            lambda bank, x: bank.predict(x, ["zoe"] * 6),
            "no adapter named 'zoe'",
        ),
        (lambda bank, x: bank.predict(x, ["ann"]), "1 names for 6 examples"),
        (lambda bank, x: bank.predict(x, "ann"), "must be a list"),
        (lambda bank, x: bank.predict(x, []), "at least one"),
        (lambda bank, x: bank.remove("zoe"), "no adapter named 'zoe'"),
        (lambda bank, x: bank.remove(None), "no adapter named None"),
        (lambda bank, x: bank.save(None, "z.vera.safetensors"), "named None"),
        (lambda bank, x: bank.rename("ann", "bob"), "'bob' already"),
        (lambda bank, x: bank.rename("zoe", "new"), "no adapter named 'zoe'"),
        (lambda bank, x: bank.add("ann"), "'ann' already"),
        (lambda bank, x: bank.add(3), "must be a string"),
        (lambda bank, x: bank.add("new", classes=5), "between 1 and 4"),
        (lambda bank, x: bank.save("zoe", "z.vera.safetensors"), "'zoe'"),
        (lambda bank, x: bank.save("ann", "ann.h5"), "must end in"),
        (lambda bank, x: bank.generate(["x"], ["ann"]), "CausalLM"),
    ],
)
def test_bad_calls(full_bank, x, call, match):
    before = stacks(full_bank)
    with pytest.raises(ValueError, match=match):
        call(full_bank, x)
    assert full_bank.names == NAMES
    for key, value in stacks(full_bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_bad_models():
    with pytest.raises(ValueError, match="must be adapted with VeRA"):
        keras_vera.AdapterBank(make_classifier(vera=False), 3)
    with pytest.raises(ValueError, match="`capacity` must be an integer"):
        keras_vera.AdapterBank(make_classifier(), 0)
    model = make_classifier()
    y = keras.layers.LayerNormalization(name="norm")(model.output)
    model = keras.Model(model.input, y)
    with pytest.raises(ValueError, match="'norm', a LayerNormalization"):
        keras_vera.AdapterBank(model, 3)
    model.get_layer("norm").trainable = False
    keras_vera.AdapterBank(model, 3)


@pytest.mark.parametrize("equation", ["abc,cd->bad", "abc,cd->bd"])
def test_examples_that_are_not_in_order(equation):
    """Rows would have each other's adapters."""
    x = keras.Input((3, banks.INPUTS))
    shape = (None, 5) if equation.endswith("bad") else (5,)
    layer = keras.layers.EinsumDense(equation, output_shape=shape)
    model = keras.Model(x, layer(x))
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    with pytest.raises(ValueError, match=f"its equation is '{equation}'"):
        keras_vera.AdapterBank(model, 3)


def test_a_model_that_is_no_longer_adapted(files, x):
    model = make_classifier()
    bank = make_bank(files, model=model)
    bank.predict(x, MIXED)
    keras_vera.disable_vera(model)
    with pytest.raises(ValueError, match="not adapted as it was"):
        bank.predict(x, MIXED)


def test_the_model_stays_as_it_is(files, x, outputs, tmp_path):
    model = make_classifier()
    bank = make_bank(files, model=model)
    trainable = [v.path for v in model.trainable_variables]
    keras_vera.load_adapter(model, files["eve"])
    bank.predict(x, MIXED)
    np.testing.assert_array_equal(predict(model, x), outputs["eve"])
    assert [v.path for v in model.trainable_variables] == trainable
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert largest_difference(predict(loaded, x), outputs["eve"]) < ROUNDING
    assert type(loaded.layers[-1]) is keras.layers.Dense


# ---- Ids.


BAD_IDS = [1, -1, 2, 5, 3, 4]  # Out of range, or a slot without adapter.
BAD = [False, True, True, True, False, True]


@pytest.fixture
def bank_with_gaps(files):
    bank = make_bank(files, capacity=4)
    bank.remove("bob")
    np.testing.assert_array_equal(bank.ids(["eve", None, "ann"]), [3, 0, 1])
    return bank


@pytest.mark.parametrize("bad", [-1, 2, 4, 5, 2**32 + 1])
def test_ids_without_adapter_in_arrays(bank_with_gaps, x, bad):
    model = bank_with_gaps.model
    compile_bank(bank_with_gaps, "sgd")
    before = stacks(bank_with_gaps)
    ids, y = np.array([1, 3, 1, 0, 1, bad]), np.zeros(6)
    for call in (
        lambda: model.predict([x, ids], verbose=0),
        lambda: model.evaluate([x, ids], y, verbose=0),
        lambda: model.fit([x, ids], y, verbose=0),
        lambda: model.predict_on_batch([x, ids]),
        lambda: model.test_on_batch([x, ids], y),
        lambda: model.train_on_batch([x, ids], y),
    ):
        with pytest.raises(ValueError, match=f"`adapter_ids` .*\\[{bad}\\]"):
            call()
    for key, value in stacks(bank_with_gaps).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_ids_without_adapter_in_an_eager_call(bank_with_gaps, x):
    with pytest.raises(ValueError, match="\\[-1, 2, 4, 5\\]"):
        bank_with_gaps.model([x, np.array(BAD_IDS)])


@pytest.mark.eager(False)
def test_ids_without_adapter_in_data_sets(bank_with_gaps, outputs, x):
    model = bank_with_gaps.model
    compile_bank(bank_with_gaps, keras.optimizers.Adam(0.1))
    before = stacks(bank_with_gaps)
    ids, y = np.array(BAD_IDS), np.zeros(6, "int32")
    for method in ("predict", "evaluate", "fit"):
        with pytest.raises(ValueError, match="`adapter_ids`"):
            getattr(model, method)(as_tf_data(x, ids, y), verbose=0)
    # What has no adapter has trained nothing.
    for key, value in stacks(bank_with_gaps).items():
        assert np.isfinite(value).all(), key
        rows = [0, 2, 4]
        np.testing.assert_array_equal(value[rows], before[key][rows])
    ids[BAD] = 0
    found = model.predict(as_tf_data(x, ids, y), verbose=0)
    base = outputs[None][BAD]
    assert largest_difference(found[BAD], base) < ROUNDING


@pytest.mark.eager(False)
@pytest.mark.skipif(backend() == "torch", reason="ids always have a value")
def test_ids_without_adapter_in_a_function_of_the_user(
    bank_with_gaps, outputs, x
):
    """Nothing can be raised or counted there, so that the rows are NaN."""
    if backend() == "jax":
        import jax

        function = jax.jit(lambda x, ids: bank_with_gaps.model([x, ids]))
    else:
        import tensorflow as tf

        function = tf.function(lambda x, ids: bank_with_gaps.model([x, ids]))
    found = ops.convert_to_numpy(function(x, np.array(BAD_IDS, "int32")))
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), BAD)
    expected = expected_rows(outputs, ["ann", *[None] * 3, "eve", None])
    good = [0, 4]
    assert largest_difference(found[good], expected[good]) < ROUNDING


def test_wrong_number_and_form_of_ids(full_bank, x):
    ids = np.ones(6, "int32")
    with pytest.raises(ValueError, match="6 rows for 4 `adapter_ids`"):
        full_bank.model([x, ids[:4]])
    with pytest.raises(ValueError, match="shape \\(batch,\\)"):
        full_bank.model([x, ids[:, None]])
    with pytest.raises(ValueError, match="inputs must be those of the base"):
        full_bank.model(x)


def as_tf_data(x, ids, y):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(((x, ids), y)).batch(4)


def as_torch_data(x, ids, y):
    import torch

    def collate(rows):
        # TensorFlow takes no lists, which PyTorch would make.
        *inputs, y = (torch.tensor(np.stack(part)) for part in zip(*rows))
        return tuple(inputs), y

    return torch.utils.data.DataLoader(
        list(zip(x, ids, y)), batch_size=4, collate_fn=collate
    )


def as_grain_data(x, ids, y):
    import grain

    rows = [((a, i), b) for a, i, b in zip(x, ids, y)]
    return grain.MapDataset.source(rows).batch(4)


@pytest.mark.eager(False)
@pytest.mark.parametrize("make", [as_tf_data, as_torch_data, as_grain_data])
def test_data_pipelines(files, outputs, x, make):
    y = np.arange(6) % banks.CLASSES
    bank, reference = make_bank(files), make_bank(files)
    data = make(x, bank.ids(MIXED), y)
    found = bank.model.predict(data, verbose=0)
    assert largest_difference(found, expected_rows(outputs, MIXED)) < ROUNDING
    for each in (bank, reference):
        compile_bank(each, keras.optimizers.SGD(0.1))
    before = stacks(bank)
    bank.model.fit(data, verbose=0)
    reference.fit(x, y, adapters=MIXED, batch_size=4, shuffle=False, verbose=0)
    expected = stacks(reference)
    for key, value in stacks(bank).items():
        assert largest_difference(value, expected[key]) < 1e-6, key
        if "classes" not in key:
            assert np.any(value != before[key]), key


def test_dict_inputs_of_texts(tmp_path):
    """With a preprocessor, the bank takes what the model itself takes."""
    task = hub_text.make_classifier()
    keras_vera.enable_vera(task, rank=4)
    bank = keras_vera.AdapterBank(task, capacity=2)
    bank.add("none")
    texts = ["a b c", "b", "d h", "g"]
    expected = {None: predict(task, texts)}
    randomize(task, 1)
    keras_vera.save_adapter(task, tmp_path / "a.vera.safetensors")
    bank.load("a", tmp_path / "a.vera.safetensors")
    expected["a"] = predict(task, texts)
    adapters = ["a", None, "a", None]
    found = bank.predict(texts, adapters)
    assert (
        largest_difference(found, expected_rows(expected, adapters)) < ROUNDING
    )


def test_texts_that_are_none_fail_alone(tmp_path):
    task = hub_text.make_classifier()
    keras_vera.enable_vera(task, rank=4)
    bank = keras_vera.AdapterBank(task, capacity=2)
    randomize(task, 1)
    keras_vera.save_adapter(task, tmp_path / "a.vera.safetensors")
    bank.load("a", tmp_path / "a.vera.safetensors")
    texts = [7, "a b c", "b", "\ud800", None, "d h"]
    names = ["a", "a", "nobody", "a", None, None]
    answers = bank.predict(texts, names, return_exceptions=True)
    expected = bank.predict(["a b c", "d h"], ["a", None])
    for row, error in ((0, "a string"), (3, "Unicode"), (4, "a string")):
        assert isinstance(answers[row], ValueError)
        assert error in str(answers[row])
    assert "no adapter named 'nobody'" in str(answers[2])
    for row, right in zip((1, 5), expected):
        assert largest_difference(answers[row], right) < ROUNDING
    # Where none is left.
    answers = bank.predict([7, ["b"]], ["a", None], return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError] * 2
    with pytest.raises(ValueError, match="1 names for 2 examples"):
        bank.predict(["a", 7], ["a"], return_exceptions=True)


# ---- Heads of different size.


def test_fewer_classes(tmp_path, files, x, outputs):
    narrow = make_classifier(classes=2)
    narrow_files = make_files(tmp_path, ["two"], model=narrow)
    expected = predict(narrow, x)
    bank = make_bank({**files, **narrow_files})
    adapters = ["two", "ann", "two", None, "two", "two"]
    found = bank.predict(x, adapters)
    rows = [0, 2, 4, 5]
    assert largest_difference(found[rows, :2], expected[rows]) < ROUNDING
    np.testing.assert_array_equal(found[rows, 2:], -1e9)
    full = expected_rows({**outputs, "two": outputs["ann"]}, adapters)
    assert largest_difference(found[[1, 3]], full[[1, 3]]) < ROUNDING
    bank.save("two", tmp_path / "again.vera.safetensors")
    again = (tmp_path / "again.vera.safetensors").read_bytes()
    assert again == narrow_files["two"].read_bytes()
    bank.remove("ann")
    bank.add("three", classes=3)
    found = bank.predict(x, ["three"] * 6)
    assert (found[:, 3] == -1e9).all() and (np.abs(found[:, :3]) < 100).all()


def test_a_kernel_that_is_read_cannot_be_mixed(full_bank, x):
    """A layer whose kernel others read would lose the adapter silently."""

    class Reader(keras.layers.Layer):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def call(self, x):
            return ops.matmul(x, self.layer.kernel)

    inner = keras.layers.Dense(3, use_bias=False)
    inner.build((None, 5))
    x = keras.Input((5,))
    model = keras.Model(x, Reader(inner)(x))
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    bank = keras_vera.AdapterBank(model, 1)
    with pytest.raises(ValueError, match="read without calling"):
        bank.predict(np.ones((2, 5), "float32"), [None, None])


@pytest.mark.skipif(backend() != "torch", reason="others recompute in place")
def test_rematerialization_on_torch_is_refused():
    with keras.RematScope(mode="full"):
        model = make_classifier()
    with pytest.raises(ValueError, match="RematScope"):
        keras_vera.AdapterBank(model, 1)
