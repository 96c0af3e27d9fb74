"""Banks that take names wherever examples come from."""

import enum

import banks
import hub_text
import keras
import numpy as np
import pytest
from banks import ROUNDING
from banks import compile_bank
from banks import make_bank
from banks import make_classifier
from banks import make_files
from banks import stacks
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict

import keras_vera

pytestmark = pytest.mark.in_turn

NAMES = ["ann", "bob", "eve"]
MIXED = ["bob", "ann", None, "bob", "eve", "ann", "ann", "bob"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(len(MIXED), 3, banks.INPUTS)).astype("float32")
    return x, rng.integers(banks.CLASSES, size=len(MIXED))


def open_bank(files, folder, capacity=3):
    if folder is None:
        bank = make_bank(files)
    else:
        bank = keras_vera.AdapterBank(make_classifier(), capacity, folder)
        for name, file in files.items():
            bank.load(name, file)
    compile_bank(bank, keras.optimizers.SGD(0.1), "sum_over_batch_size")
    return bank


def without_none(part):
    """Tensors of strings hold no `None`."""
    return [x or "" for x in part] if isinstance(part, list) else part


def as_tf_data(*parts):
    import tensorflow as tf

    parts = tuple(map(without_none, parts))
    return tf.data.Dataset.from_tensor_slices(parts).batch(4)


def as_torch_data(*parts):
    import torch

    rows = [
        tuple(name or "" for name in p) if type(p) is list else p for p in parts
    ]
    return torch.utils.data.DataLoader(list(zip(*rows)), batch_size=4)


def as_grain_data(*parts):
    import grain

    rows = list(zip(*map(without_none, parts)))
    return grain.MapDataset.source(rows).batch(4)


class PyData(keras.utils.PyDataset):
    def __init__(self, *parts):
        super().__init__(workers=2)
        self.parts = parts

    def __len__(self):
        return len(self.parts[0]) // 4

    def __getitem__(self, i):
        return tuple(part[4 * i : 4 * i + 4] for part in self.parts)


def as_generator(*parts):
    data = PyData(*parts)
    return (data[i % 2] for i in range(20))


MAKERS = [as_tf_data, as_torch_data, as_grain_data, PyData, as_generator]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize("make", MAKERS)
def test_datasets_with_names(files, data, tmp_path, make, on_disk):
    x, y = data
    folder = tmp_path / "bank" if on_disk else None
    bank, reference = open_bank(files, folder), open_bank(files, None)
    expected = reference.predict(x, MIXED)
    steps = {"steps": 2} if make is as_generator else {}
    found = bank.predict(make(x, MIXED), **steps)
    assert largest_difference(found, expected) < ROUNDING
    weights = np.linspace(0, 1, len(MIXED)).astype("float32")
    kwargs = {"verbose": 0, "batch_size": 4}
    loss = reference.evaluate(x, y, MIXED, sample_weight=weights, **kwargs)
    found = bank.evaluate(make(x, y, weights, MIXED), verbose=0, **steps)
    assert found == pytest.approx(loss, abs=1e-5)
    reference.fit(x, y, adapters=MIXED, shuffle=False, **kwargs)
    loss = reference.evaluate(x, y, MIXED, **kwargs)
    steps = {
        {"steps": "steps_per_epoch"}[key]: value for key, value in steps.items()
    }
    if steps:
        steps["validation_steps"] = 2
    history = bank.fit(
        make(x, y, MIXED),
        validation_data=make(x, y, MIXED),
        verbose=0,
        **steps,
    )
    (found,) = history.history["val_loss"]
    assert found == pytest.approx(loss, abs=1e-5)
    trained = stacks(bank)
    for key, value in stacks(reference).items():
        if "classes" not in key:
            mine = trained[key][bank.model.adapters.ids(NAMES)["eve"]]
            theirs = value[reference.ids(["eve"])[0]]
            assert largest_difference(mine, theirs) < 1e-5, key


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "folder"])
def test_validation_data_with_names(files, data, tmp_path, on_disk):
    x, y = data
    bank = open_bank(files, tmp_path / "bank" if on_disk else None)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("bank/*")}
    adapters = ["ann"] * len(x)
    weights = np.linspace(0, 1, len(x)).astype("float32")
    kwargs = {"adapters": adapters, "verbose": 0}
    for validation in ((x, y, MIXED), (x, y, weights, np.array(MIXED))):
        history = bank.fit(x, y, validation_data=validation, **kwargs)
        *_, names = validation
        weight = weights if len(validation) == 4 else None
        expected = bank.evaluate(x, y, names, sample_weight=weight, verbose=0)
        (found,) = history.history["val_loss"]
        assert found == pytest.approx(expected, abs=1e-5)
    # Adapters that were only validated are only read.
    changed = {
        p.name
        for p in tmp_path.glob("bank/*")
        if p.read_bytes() != before[p.name]
    }
    assert changed == ({"ann.vera.safetensors"} if on_disk else set())


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "folder"])
def test_a_callback_evaluates_and_predicts(files, data, tmp_path, on_disk):
    x, y = data
    bank = open_bank(files, tmp_path / "bank" if on_disk else None)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            loss = bank.evaluate(x, y, MIXED, verbose=0)
            seen.append((loss, bank.predict(x, MIXED)))

    bank.fit(x, y, adapters=MIXED, callbacks=[Look()], verbose=0)
    ((loss, outputs),) = seen
    assert loss == pytest.approx(bank.evaluate(x, y, MIXED, verbose=0))
    assert largest_difference(outputs, bank.predict(x, MIXED)) < ROUNDING


def test_more_adapters_than_slots_are_evaluated(files, data, tmp_path):
    x, y = data
    expected = open_bank(files, None).evaluate(x, y, MIXED, verbose=0)
    bank = open_bank(files, tmp_path / "bank", capacity=2)
    found = bank.evaluate(x, y, MIXED, verbose=0)
    assert found == pytest.approx(expected, abs=1e-5)
    pairs = PyData(x[::2], y[::2], ["bob", "eve", "eve", "ann"])
    with pytest.raises(ValueError, match="do not fit"):
        bank.evaluate(pairs)  # Its one batch has three.
    with pytest.raises(ValueError, match="without `callbacks`"):
        bank.evaluate(x, y, MIXED, callbacks=[])
    with pytest.raises(ValueError, match="as `adapters`"):
        bank.fit(PyData(x, y, MIXED))


@pytest.mark.parametrize(
    "reduction", ["sum", "sum_over_batch_size", "mean_with_sample_weight"]
)
def test_batches_are_scored_whole(files, data, tmp_path, reduction):
    """However few adapters fit at a time."""
    x, y = data
    weights = np.linspace(0.5, 3, len(x))
    found = []
    for folder, capacity in ((None, 3), (tmp_path / "bank", 2)):
        bank = open_bank(files, folder, capacity)
        bank.model.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction=reduction
            ),
            metrics=["accuracy"],
            weighted_metrics=["accuracy", "sparse_categorical_crossentropy"],
        )
        kwargs = {"sample_weight": weights, "batch_size": 6, "verbose": 0}
        found.append(
            [
                bank.evaluate(x, y, MIXED, **kwargs),
                bank.evaluate(x, y, MIXED, return_dict=True, **kwargs),
            ]
        )
    (expected, by_name), (scores, scores_by_name) = found
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores_by_name == pytest.approx(by_name, abs=1e-5)


def test_losses_of_several_outputs(files, data, tmp_path):
    """Keras counts them as metrics (on TensorFlow, by batches)."""
    x, y = data
    found = []
    for capacity in (3, 2):
        base = make_classifier().get_layer(index=1)
        keras.utils.set_random_seed(1)
        heads = [keras.layers.Dense(n, name=f"head{n}") for n in (2, 4)]
        model = keras.Model(base.input, [head(base.output) for head in heads])
        folder = tmp_path / f"bank{capacity}"
        bank = keras_vera.AdapterBank(model, capacity, folder)
        for name in NAMES:
            bank.add(name)
        bank.model.compile(
            loss=[
                keras.losses.SparseCategoricalCrossentropy(
                    from_logits=True, name=name
                )
                for name in ("first", "second")
            ]
        )
        for kwargs in ({"return_dict": True}, {}):
            values = bank.evaluate(
                x, [y % 2, y], MIXED, batch_size=4, verbose=0, **kwargs
            )
            if kwargs:
                found.append(list(values))
                values = list(values.values())
            found.append(values)
    names, values, in_order, other_names, other_values, other_in_order = found
    assert names == other_names and len(names) == 3
    assert min(values) > 0.1
    assert other_values == pytest.approx(values, abs=1e-5)
    assert other_in_order == pytest.approx(in_order, abs=1e-5)


class Users(str, enum.Enum):  # noqa: UP042 - that of before 3.11.
    ANN = "ann"
    BOB = "bob"
    EVE = "eve"


def test_names_in_other_forms(files, data):
    x, _ = data
    bank = open_bank(files, None)
    expected = bank.predict(x, MIXED)
    texts = [name or "" for name in MIXED]
    for names in (
        tuple(MIXED),
        np.array(texts),
        np.array([text.encode() for text in texts]),
        np.array(MIXED, object),
        [name and Users(name) for name in MIXED],
    ):
        np.testing.assert_array_equal(bank.predict(x, names), expected)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda b, x, y: b.fit(x, y), "`adapters` must be a list"),
        (
            lambda b, x, y: b.fit(x, y, adapters=MIXED, validation_data=(x, y)),
            r"must end with the name.*\(x, y, names\)",
        ),
        (
            lambda b, x, y: b.fit(
                x, y, adapters=MIXED, validation_data=(x, y, np.ones(len(x)))
            ),
            "`validation_data` must hold names",
        ),
        (
            lambda b, x, y: b.fit(
                x, y, adapters=MIXED, validation_data=(x, y, ["zoe"] * len(x))
            ),
            "no adapter named 'zoe'",
        ),
        (
            lambda b, x, y: b.fit(
                x, y, adapters=MIXED, validation_data=(x, y, ["ann"])
            ),
            "1 names for 8 examples",
        ),
        (lambda b, x, y: b.fit(as_tf_data(x, y)), "of 2 parts"),
        (lambda b, x, y: b.fit(as_tf_data(x, y, y)), "numbers of dtype int"),
        (lambda b, x, y: b.fit(PyData(x, y, y)), "numbers of dtype int"),
        (lambda b, x, y: b.fit(PyData(x, y, ["zoe"] * 8)), "'zoe'"),
        (lambda b, x, y: b.fit(PyData(x, y, MIXED), y), "must be parts"),
        (
            lambda b, x, y: b.fit(PyData(x, y, MIXED), adapters=["bob"]),
            "'ann'|'eve'",
        ),
        (lambda b, x, y: b.predict(x, [3] * 8), "must hold names"),
        (lambda b, x, y: b.predict(x[:2], {"ann", "bob"}), "must be a list"),
    ],
)
def test_bad_names(files, data, call, match):
    bank = open_bank(files, None)
    before = stacks(bank)
    with pytest.raises(ValueError, match=match):
        call(bank, *data)
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_a_dataset_that_cannot_be_read_costs_nothing(files, data, tmp_path):
    """On JAX, Keras loses all numbers of a model whose first batch fails."""
    x, y = data
    bank = open_bank(files, tmp_path / "bank")
    bank.fit(x, y, adapters=MIXED, verbose=0)
    before = stacks(bank)
    base = numpy_weights(bank.model.base)
    outputs = bank.predict(x, MIXED)
    broken = as_tf_data(x, y, ["zoe"] * len(x))
    for method in (bank.fit, bank.evaluate):
        with pytest.raises(Exception, match="'zoe'"):
            method(broken, verbose=0)
    np.testing.assert_array_equal(bank.predict(x, MIXED), outputs)
    for old, new in zip(base, numpy_weights(bank.model.base), strict=True):
        np.testing.assert_array_equal(old, new)
    assert before.keys() == stacks(bank).keys()


def text_classifier(path):
    """Returns one with an adapter, of which it writes the file."""
    task = hub_text.make_classifier()
    keras_vera.enable_vera(task, rank=4)
    banks.randomize(task, 1)
    keras_vera.save_adapter(task, path)
    return task


def test_texts_with_names(tmp_path):
    """A preprocessor takes the texts of datasets, too."""
    torch = pytest.importorskip("torch")
    task = text_classifier(tmp_path / "a.vera.safetensors")
    texts, y = ["a b c", "b", "d h", "g"], np.array([0, 1, 2, 0])
    names = ["a", "", "a", "a"]
    expected = predict(task, texts)
    bank = keras_vera.AdapterBank(task, capacity=2)
    bank.load("a", tmp_path / "a.vera.safetensors")
    for make in (PyData, as_tf_data):
        found = bank.predict(make(texts, y, names))
        assert largest_difference(found[[0, 2]], expected[[0, 2]]) < ROUNDING
        assert largest_difference(found[1], expected[1]) > 1e-4
    # Whose default collate makes a tuple of the texts of a batch.
    loader = torch.utils.data.DataLoader(
        list(zip(texts, y.tolist(), names)), batch_size=2
    )
    assert largest_difference(bank.predict(loader), found) < ROUNDING
    compile_bank(bank, keras.optimizers.SGD(0.0), "sum_over_batch_size")
    history = bank.fit(
        texts,
        y,
        adapters=names,
        validation_data=(texts, y, names),
        verbose=0,
    )
    found = bank.evaluate(as_tf_data(texts, y, names), verbose=0)
    assert history.history["val_loss"] == [pytest.approx(found, abs=1e-5)]


def test_pairs_of_texts_as_pytorch_collates_them(tmp_path):
    """Its default makes `[(a, c), (b, d)]` of `(a, b)` and `(c, d)`."""
    torch = pytest.importorskip("torch")
    task = text_classifier(tmp_path / "a.vera.safetensors")
    segments = ["a b c", "b", "d h", "g"], ["h", "a b", "c", "d d"]
    expected = predict(task, segments)
    bank = keras_vera.AdapterBank(task, capacity=1)
    bank.load("a", tmp_path / "a.vera.safetensors")
    rows = list(zip(zip(*segments), ["a"] * 4))
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    assert largest_difference(bank.predict(loader), expected) < ROUNDING


@pytest.mark.skipif(
    not hasattr(getattr(np, "dtypes", None), "StringDType"),
    reason="of NumPy 2 alone",
)
def test_strings_of_any_length(tmp_path):
    task = text_classifier(tmp_path / "a.vera.safetensors")
    bank = keras_vera.AdapterBank(task, capacity=1)
    bank.load("a", tmp_path / "a.vera.safetensors")
    texts, names = ["a b c", "b", "d h", "g"], ["a", "", "a", "a"]
    parts = [np.array(x, np.dtypes.StringDType()) for x in (texts, names)]
    found, expected = bank.predict(PyData(*parts)), bank.predict(texts, names)
    assert largest_difference(found, expected) < ROUNDING


@pytest.mark.parametrize("capacity", [2, 3], ids=["in parts", "at once"])
@pytest.mark.parametrize("method", ["predict", "evaluate"])
def test_a_dataset_without_batches(files, tmp_path, method, capacity):
    bank = open_bank(files, tmp_path / "bank", capacity)
    with pytest.raises(ValueError, match="one batch"):
        getattr(bank, method)(batch for batch in ())


@pytest.mark.parametrize("where", ["fit", "evaluate", "validation"])
def test_targets_that_are_missing_are_named(where):
    bank = make_bank({}, capacity=1)
    bank.add("ann")
    bank.model.compile("sgd", "mse")
    x, y = np.zeros((4, 3, banks.INPUTS)), np.zeros((4, banks.CLASSES))
    names = ["ann"] * 4
    before = numpy_weights(bank.model)
    with pytest.raises(ValueError, match="`y`.* must hold the targets"):
        if where == "fit":
            bank.fit(x, adapters=names)
        elif where == "evaluate":
            bank.evaluate(x, adapters=names)
        else:
            bank.fit(x, y, adapters=names, validation_data=(x, None, names))
    for now, value in zip(numpy_weights(bank.model), before, strict=True):
        np.testing.assert_array_equal(now, value)
