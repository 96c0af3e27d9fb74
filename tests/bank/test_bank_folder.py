"""Banks larger than the device, and banks that several threads use."""

import threading

import banks
import keras
import numpy as np
import pytest
from banks import DIFFERENT
from banks import ROUNDING
from banks import alone
from banks import compile_bank
from banks import expected_rows
from banks import make_bank
from banks import make_classifier
from banks import make_files
from banks import stacks
from helpers import largest_difference
from safetensors.numpy import load_file

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

NAMES = [f"user{i}" for i in range(8)]


@pytest.fixture(scope="module")
def folder_of_all(tmp_path_factory):
    """A folder with eight adapters, which tests must not change."""
    folder = tmp_path_factory.mktemp("bank")
    make_files(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(3)
    return rng.normal(size=(24, 3, banks.INPUTS)).astype("float32")


@pytest.fixture(scope="module")
def outputs(folder_of_all, x):
    files = {name: folder_of_all / f"{name}.vera.safetensors" for name in NAMES}
    return alone(files, x)


@pytest.fixture
def folder(folder_of_all, tmp_path):
    """The same, to be changed."""
    copy = tmp_path / "bank"
    copy.mkdir()
    for file in folder_of_all.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def open_bank(folder, capacity=3):
    return keras_vera.AdapterBank(make_classifier(), capacity, folder=folder)


def count_reads(bank, monkeypatch):
    read, original = [], bank._files.read

    def counted(file):
        read.append(str(file).split("/")[-1].split(".")[0])
        return original(file)

    monkeypatch.setattr(bank._files, "read", counted)
    return read


def assert_right(bank, outputs, x, adapters, **kwargs):
    found = bank.predict(x[: len(adapters)], adapters, **kwargs)
    expected = expected_rows(outputs, adapters)
    assert largest_difference(found, expected) < ROUNDING


def test_more_adapters_than_slots(folder_of_all, outputs, x):
    bank = open_bank(folder_of_all)
    assert bank.names == NAMES and len(bank) == 8 and "user7" in bank
    rng = np.random.default_rng(0)
    for batch_size in (1, 4, 32):
        adapters = [*NAMES, None, *rng.choice(NAMES, 15).tolist()]
        rng.shuffle(adapters)
        assert_right(bank, outputs, x, adapters, batch_size=batch_size)
    assert bank.capacity == 3
    assert {v.shape[0] for v in bank.model.trainable_variables} == {4}


def test_the_least_recently_used_leaves(folder_of_all, outputs, x, monkeypatch):
    bank = open_bank(folder_of_all)
    read = count_reads(bank, monkeypatch)

    def use(*names):
        read.clear()
        assert_right(bank, outputs, x, list(names))
        return read

    assert use("user0", "user1", "user2") == ["user0", "user1", "user2"]
    assert use("user0", None) == []
    assert use("user3") == ["user3"]  # In the place of user1.
    assert use("user0", "user2", "user3") == []
    assert use("user1") == ["user1"]  # In the place of user0.
    assert use("user0", "user3") == ["user0"]


def test_opening_reads_no_adapter(folder_of_all, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("read a file")

    monkeypatch.setattr(keras_vera.files.format, "opened", refuse)
    assert len(open_bank(folder_of_all)) == 8


def test_changes_are_in_the_folder(folder, folder_of_all, outputs, x):
    bank = open_bank(folder)
    bank.predict(x[:2], ["user5", "user6"])
    bank.remove("user5")
    bank.rename("user6", "a/b .. ü.vera.safetensors")
    bank.add("fresh", classes=2)
    bank.load("again", folder_of_all / "user5.vera.safetensors")
    outputs = {
        **outputs,
        "a/b .. ü.vera.safetensors": outputs["user6"],
        "again": outputs["user5"],
    }
    adapters = ["again", "user0", "a/b .. ü.vera.safetensors", None]
    for opened in (bank, open_bank(folder)):
        assert "user5" not in opened and "user6" not in opened
        assert len(opened) == 9 and "fresh" in opened
        assert_right(opened, outputs, x, adapters)
        assert (opened.predict(x[:1], ["fresh"])[0, 2:] == -1e9).all()
    assert [path.parent for path in folder.rglob("*")] == [folder] * 9


def test_training_is_in_the_folder(folder, x, tmp_path):
    bank = open_bank(folder)
    y = np.arange(6) % banks.CLASSES
    adapters = ["user0", "user7", "user0", "user3", "user7", "user0"]
    compile_bank(bank, keras.optimizers.SGD(0.1))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    bank.fit(x[:6], y, adapters=adapters, shuffle=False, verbose=0)
    changed = {
        p.name for p in folder.iterdir() if before[p.name] != p.read_bytes()
    }
    assert changed == {f"user{i}.vera.safetensors" for i in (0, 3, 7)}
    # As in a bank that holds all of them.
    reference = make_bank({n: tmp_path / n for n in []}, capacity=8)
    for name in NAMES:
        (tmp_path / "old.vera.safetensors").write_bytes(
            before[f"{name}.vera.safetensors"]
        )
        reference.load(name, tmp_path / "old.vera.safetensors")
    compile_bank(reference, keras.optimizers.SGD(0.1))
    reference.fit(x[:6], y, adapters=adapters, shuffle=False, verbose=0)
    for name in ("user0", "user3", "user7"):
        reference.save(name, tmp_path / "new.vera.safetensors")
        expected = load_file(tmp_path / "new.vera.safetensors")
        found = load_file(folder / f"{name}.vera.safetensors")
        for key, value in expected.items():
            assert largest_difference(found[key], value) < 1e-6, key


def test_a_training_that_fails_changes_nothing(folder, outputs, x):
    bank = open_bank(folder)
    compile_bank(bank, keras.optimizers.SGD(0.1))

    class Fail(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            # Other adapters cannot take the place of those in training.
            with pytest.raises(ValueError, match="do not fit"):
                bank.predict(x[:1], ["user7"])
            raise KeyboardInterrupt

    adapters = ["user0", "user1", "user2"]
    with pytest.raises(KeyboardInterrupt):
        bank.fit(
            x[:3],
            np.zeros(3, "int32"),
            adapters=adapters,
            callbacks=[Fail()],
            verbose=0,
        )
    assert_right(bank, outputs, x, adapters)
    assert_right(open_bank(folder), outputs, x, adapters)


def test_what_is_no_number_costs_its_own_adapter_alone(folder, outputs, x):
    bank = open_bank(folder)
    compile_bank(bank, keras.optimizers.SGD(0.1))
    adapters = ["user0", "user1", "user0", "user2", "user2"]
    broken = np.array(x[:5])
    broken[1] = np.nan
    with pytest.raises(ValueError, match=r"1 adapters hold NaN.*\['user1'\]"):
        bank.fit(broken, np.arange(5) % 4, adapters=adapters, verbose=0)
    assert_right(bank, outputs, x, ["user1", "user3"])
    alone = open_bank(folder)
    for name in ("user0", "user2"):
        found = bank.predict(x[:1], [name])
        assert largest_difference(found, outputs[name][:1]) > DIFFERENT
        # What was written.
        assert largest_difference(found, alone.predict(x[:1], [name])) == 0


def test_errors_leave_the_bank_as_it_was(folder, outputs, x):
    bank = open_bank(folder)
    bank.predict(x[:3], NAMES[:3])
    before = stacks(bank)
    (folder / "user3.vera.safetensors").write_bytes(b"damaged")
    (folder / "user4.vera.safetensors").unlink()
    for name in ("user3", "user4"):
        with pytest.raises(keras_vera.AdapterFileError, match=name):
            bank.predict(x[:2], ["user7", name])
    with pytest.raises(keras_vera.AdapterFileError, match="user4"):
        bank.remove("user4")
    with pytest.raises(ValueError, match="gives no ids"):
        bank.ids(["user0"])
    with pytest.raises(ValueError, match="4 different adapters do not fit"):
        bank.fit(x[:4], np.zeros(4), adapters=NAMES[:4])
    with pytest.raises(ValueError, match="'user0' already"):
        bank.add("user0")
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    assert_right(bank, outputs, x, NAMES[:3])


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "folder"])
def test_threads(folder, outputs, x, on_disk):
    """Answers stay right while other threads add and remove adapters."""
    if on_disk:
        bank = open_bank(folder)
    else:
        files = {n: folder / f"{n}.vera.safetensors" for n in NAMES}
        bank = make_bank(files, capacity=10)
    spare = folder.parent / "spare.vera.safetensors"
    spare.write_bytes((folder / "user0.vera.safetensors").read_bytes())
    errors = []
    done = threading.Event()

    def guarded(function, *args):
        def run():
            try:
                function(*args)
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(6):
            adapters = rng.choice(NAMES, 4).tolist()
            assert_right(bank, outputs, x, adapters, batch_size=4)

    def change():
        # Once at least, also if the readers are through before it begins.
        while True:
            bank.load("new", spare)
            bank.rename("new", "renamed")
            bank.remove("renamed")
            if done.is_set():
                break

    bank.predict(x[:4], NAMES[:1] * 4)
    readers = [guarded(read, seed) for seed in range(3)]
    changer = guarded(change)
    for thread in (changer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    changer.join()
    assert not errors
    assert sorted(bank.names) == NAMES
