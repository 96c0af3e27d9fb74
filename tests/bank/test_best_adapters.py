"""Callbacks of a bank: the best of each adapter, and Keras' own."""

import banks
import keras
import numpy as np
import pytest
from banks import make_bank
from banks import make_classifier
from banks import make_files
from banks import stacks
from helpers import largest_difference
from keras import ops
from safetensors.numpy import load_file
from test_bank_training import entries

import keras_vera
from keras_vera.callbacks import BestAdapters

pytestmark = [pytest.mark.in_turn, pytest.mark.eager]

NAMES = ["ann", "bob", "eve"]
EPOCHS = 8
PATIENCE = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture(scope="module")
def data():
    """Examples of three adapters in each batch of six, and others."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(24, 3, banks.INPUTS)).astype("float32")
    return x, rng.integers(banks.CLASSES, size=24), NAMES * 8


def compiled(model):
    # With a mean over the batch, the size of the batch would scale steps.
    model.compile(
        keras.optimizers.Adam(0.02, epsilon=1e-3),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        ),
        metrics=["accuracy", "sparse_categorical_crossentropy"],
    )
    return model


def open_bank(files, folder=None, capacity=3):
    if folder is None:
        bank = make_bank(files, capacity=capacity)
    else:
        bank = keras_vera.AdapterBank(make_classifier(), capacity, folder)
        for name, file in files.items():
            bank.load(name, file)
    compiled(bank.model)
    return bank


def fit(bank, data, callbacks, epochs=EPOCHS, own_ids=False, **more):
    x, y, names = data
    train, rest = slice(0, 12), slice(12, None)
    kwargs = {
        "batch_size": 6,
        "epochs": epochs,
        "shuffle": False,
        "verbose": 0,
        "callbacks": callbacks,
        **more,
    }
    if own_ids:
        ids = bank.ids(names)
        return bank.model.fit(
            [x[train], ids[train]],
            y[train],
            validation_data=([x[rest], ids[rest]], y[rest]),
            **kwargs,
        )
    return bank.fit(
        x[train],
        y[train],
        adapters=names[train],
        validation_data=(x[rest], y[rest], names[rest]),
        **kwargs,
    )


@pytest.fixture(scope="module")
def alone(files, data, tmp_path_factory):
    """What each becomes by itself, and the epochs that it took."""
    x, y, names = data
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for name in NAMES:
        model = make_classifier()
        keras_vera.load_adapter(model, files[name])
        compiled(model)
        rows = np.flatnonzero(np.array(names) == name)
        train, rest = rows[rows < 12], rows[rows >= 12]
        stop = keras.callbacks.EarlyStopping(
            patience=PATIENCE, restore_best_weights=True
        )
        history = model.fit(
            x[train],
            y[train],
            validation_data=(x[rest], y[rest]),
            batch_size=2,
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            callbacks=[stop],
        )
        file = folder / f"{name}.vera.safetensors"
        keras_vera.save_adapter(model, file)
        found[name] = load_file(file), history.history["val_loss"]
    lengths = {len(losses) for _, losses in found.values()}
    assert len(lengths) > 1, "all stop together, which tests little"
    return found


@pytest.mark.parametrize("way", ["memory", "folder", "bank.model"])
def test_each_is_what_it_becomes_alone(files, data, alone, tmp_path, way):
    folder = tmp_path / "bank" if way == "folder" else None
    bank = open_bank(files, folder)
    best = BestAdapters(patience=PATIENCE, folder=tmp_path / "best")
    history = fit(bank, data, [best], own_ids=way == "bank.model")
    assert len(history.epoch) == max(len(v) for _, v in alone.values())
    for name, (expected, losses) in alone.items():
        # `evaluate` alone sums over batches of 2, and takes their mean.
        means = list(best.history[name].values())
        assert len(means) == len(losses)
        assert best.best_epochs[name] == int(np.argmin(losses))
        assert best.best[name] == min(means)
        stopped = len(losses) - 1
        assert best.stopped_epochs.get(name, EPOCHS - 1) == stopped
        files_of_it = [tmp_path / "best" / f"{name}.vera.safetensors"]
        if folder is not None:
            files_of_it.append(folder / f"{name}.vera.safetensors")
        for found in (
            entries(bank, name, tmp_path),
            *map(load_file, files_of_it),
        ):
            for key, value in expected.items():
                assert largest_difference(found[key], value) < 1e-4, key


def test_a_stopped_adapter_stays_where_it_is(files, data):
    bank = open_bank(files)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            state = [
                np.array(ops.convert_to_numpy(v))
                for v in bank.model.optimizer.variables
                if len(v.shape) > 1
            ]
            seen.append([*stacks(bank).values(), *state])

    # Whatever comes after the first epoch is no improvement.
    best = BestAdapters(patience=2, min_delta=1e9, restore_best=False)
    x, y, names = data
    late = ["ann", "bob"] * 6
    bank.fit(
        x[:12],
        y[:12],
        adapters=late,
        validation_data=(x[:1], y[:1], ["ann"]),
        epochs=5,
        shuffle=False,
        verbose=0,
        callbacks=[best, Look()],
    )
    assert best.stopped_epochs == {"ann": 2}
    assert len(seen) == 5, "`bob` has no validation examples and goes on"
    ann, bob = bank.ids(["ann", "bob"])
    for third, last in zip(seen[2], seen[4], strict=True):
        np.testing.assert_array_equal(third[ann], last[ann])
    for row in (ann, bob):
        assert any(np.any(a[row] != b[row]) for a, b in zip(seen[1], seen[2]))
    assert any(np.any(a[bob] != b[bob]) for a, b in zip(seen[2], seen[4]))
    # It trains again in the next `fit`.
    bank.fit(x[:1], y[:1], adapters=["ann"], verbose=0)
    after = list(stacks(bank).values())
    assert any(np.any(a[ann] != b[ann]) for a, b in zip(after, seen[4]))


def test_metrics_are_those_of_evaluate(files, data):
    bank = open_bank(files)
    x, y, names = data
    best = BestAdapters("accuracy")
    history = fit(bank, data, [best], epochs=1)
    for name in NAMES:
        rows = [i for i in range(12, 24) if names[i] == name]
        expected = bank.evaluate(
            x[rows], y[rows], [name] * 4, verbose=0, return_dict=True
        )
        assert best.history[name] == {0: pytest.approx(expected["accuracy"])}
    mean = np.mean([best.history[name][0] for name in NAMES])
    assert history.history["val_accuracy"] == [pytest.approx(mean)]


def test_who_has_no_validation_examples_is_named(files, data):
    bank = open_bank(files)
    x, y, _ = data
    with pytest.warns(UserWarning, match="'bob'"):
        bank.fit(
            x[:2],
            y[:2],
            adapters=["ann", "bob"],
            validation_data=(x[:2], y[:2], ["ann", "eve"]),
            verbose=0,
            callbacks=[best := BestAdapters()],
        )
    assert set(best.history) == {"ann"}


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda b, d: fit(b, d, [BestAdapters("recall")]), "monitor='recall'"),
        (
            lambda b, d: b.fit(
                *d[:2], adapters=d[2], callbacks=[BestAdapters()]
            ),
            "needs validation examples",
        ),
        (lambda b, d: BestAdapters(mode="up"), "mode='up'"),
        (lambda b, d: BestAdapters(patience=-1), "patience=-1"),
        (
            lambda b, d: compiled(make_classifier()).fit(
                *d[:2], callbacks=[BestAdapters()]
            ),
            "of an `AdapterBank`",
        ),
        (
            lambda b, d: fit(
                b, d, [keras.callbacks.ModelCheckpoint("a.keras")]
            ),
            "save_weights_only",
        ),
        (
            lambda b, d: fit(
                b,
                d,
                [keras_vera.callbacks.AdapterCheckpoint("a.vera.safetensors")],
            ),
            "BestAdapters",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(files, data, call, match):
    bank = open_bank(files)
    before = stacks(bank)
    with pytest.raises(ValueError, match=match):
        call(bank, data)
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.parametrize(
    "call",
    [
        keras_vera.enable_vera,
        keras_vera.disable_vera,
        keras_vera.merge,
        keras_vera.summary,
        lambda model: keras_vera.base_model(model).__enter__(),
        lambda model: keras_vera.AdapterBank(model, 3),
        lambda model: keras_vera.save_adapter(model, "a.vera.safetensors"),
        lambda model: keras_vera.save_peft_adapter(model, "a"),
        lambda model: keras_vera.load_peft_adapter(model, "a"),
        None,
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_bank_is_no_adapted_model(files, call, inside):
    bank = make_bank(files)
    model = bank.model
    if inside:
        x = keras.Input((3, banks.INPUTS))
        ids = keras.Input((), dtype="int32")
        model = keras.Model([x, ids], bank.model([x, ids]))
    if call is None:

        def call(model):
            keras_vera.load_adapter(model, files["ann"])

    before = stacks(bank)
    with pytest.raises(ValueError, match="of an `AdapterBank`, nor hold one"):
        call(model)
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


# ---- Keras' own callbacks.


def test_weights_files(files, data, tmp_path):
    bank = open_bank(files)
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.weights.h5", save_weights_only=True
    )
    fit(bank, data, [checkpoint], epochs=1)
    expected = stacks(bank)
    fit(bank, data, [], epochs=1)
    bank.model.load_weights(tmp_path / "1.weights.h5")
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    bank.rename("ann", "zoe")
    with pytest.raises(ValueError, match="same adapters in the same slots"):
        bank.model.load_weights(tmp_path / "1.weights.h5")
    with pytest.raises(NotImplementedError, match="`bank.save"):
        bank.model.save(tmp_path / "bank.keras")
    assert not (tmp_path / "bank.keras").exists()


def test_early_stopping_restores(files, data):
    bank = open_bank(files)
    kept = []

    class Script(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["val_loss"] = [1.0, 2.0][epoch]
            kept.append(stacks(bank))

    stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    fit(bank, data, [Script(), stop], epochs=2)
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, kept[0][key], err_msg=key)


def test_interrupted_training_goes_on(files, data, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    whole = open_bank(files)
    fit(whole, data, [], epochs=3)
    with pytest.raises(KeyboardInterrupt):
        fit(open_bank(files), data, [backup(), Interrupt()], epochs=3)
    bank = open_bank(files)
    fit(bank, data, [backup()], epochs=3)
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, stacks(whole)[key], err_msg=key)
    mine, theirs = (
        [ops.convert_to_numpy(v) for v in each.model.optimizer.variables]
        for each in (bank, whole)
    )
    for value, expected in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("frequency", [3, [2, 3, 7]], ids=str)
def test_only_epochs_that_validate_count(files, data, frequency):
    bank = open_bank(files)
    best = BestAdapters(patience=2)
    history = fit(bank, data, [best], validation_freq=frequency)
    due = [2, 5] if frequency == 3 else [1, 2, 6]
    assert len(history.history["val_loss"]) == len(due)
    for losses in best.history.values():
        assert list(losses) == due[: len(losses)] and len(losses) > 1
    assert set(best.best_epochs.values()) <= set(due)
