"""One folder, and several banks and processes on it.

Two banks in one process know no more of each other than two processes do.
`benchmarks/folder.py` is the same with processes.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import banks
import keras
import numpy as np
import pytest
import scripts
from banks import ROUNDING
from banks import alone
from banks import compile_bank
from banks import expected_rows
from banks import make_classifier
from banks import make_files
from banks import stacks
from helpers import largest_difference
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import rule

import keras_vera
from keras_vera import AdapterFileError
from keras_vera.bank import rows
from keras_vera.files import disk

pytestmark = [pytest.mark.in_turn, pytest.mark.eager]

NAMES = ["ann", "bob", "eve", "zoe"]
ENDING = ".vera.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files of adapters, which tests must not change."""
    return make_files(tmp_path_factory.mktemp("originals"), NAMES)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(3)
    return rng.normal(size=(6, 3, banks.INPUTS)).astype("float32")


@pytest.fixture(scope="module")
def outputs(originals, x):
    return alone(originals, x)


@pytest.fixture(scope="module")
def two_models():
    return make_classifier(), make_classifier()


@pytest.fixture
def two(two_models, originals, tmp_path):
    """Two banks on one folder, with `ann`, `bob` and `eve`."""
    folder = tmp_path / "bank"
    folder.mkdir()
    for name in NAMES[:3]:
        shutil.copy(originals[name], folder)
    return [keras_vera.AdapterBank(m, 3, folder=folder) for m in two_models]


def folder_of(bank):
    return pathlib.Path(bank._register.folder.path)


def contents(bank):
    return {p.name: p.read_bytes() for p in folder_of(bank).iterdir()}


def assert_right(bank, outputs, x, adapters):
    found = bank.predict(x[: len(adapters)], adapters)
    expected = expected_rows(outputs, adapters)
    assert largest_difference(found, expected) < ROUNDING


# ---- What one writes, the other has.


def test_changes_are_noticed(two, originals, outputs, x):
    writer, reader = two
    assert_right(reader, outputs, x, ["ann", "bob", "eve", None])
    writer.load("ann", originals["zoe"], replace=True)
    writer.remove("bob")
    writer.rename("eve", "new")
    writer.load("more", originals["bob"])
    now = {
        **{None: outputs[None], "ann": outputs["zoe"]},
        **{"new": outputs["eve"], "more": outputs["bob"]},
    }
    for bank in two:
        assert bank.names == ["ann", "more", "new"] and len(bank) == 3
        assert "new" in bank and "bob" not in bank
        assert_right(bank, now, x, ["new", "ann", None, "more", "ann"])
        for name in ("bob", "eve"):
            with pytest.raises(AdapterFileError, match=f"named '{name}'"):
                bank.predict(x[:2], ["ann", name])


def test_training_is_noticed(two, outputs, x, tmp_path):
    writer, reader = two
    assert_right(reader, outputs, x, ["ann", "bob"])
    compile_bank(writer, keras.optimizers.SGD(0.5))
    writer.fit(x[:2], np.array([1, 2]), adapters=["ann", "eve"], verbose=0)
    trained = {n: folder_of(writer) / f"{n}{ENDING}" for n in NAMES[:3]}
    now = alone(trained, x)
    assert largest_difference(now["ann"], outputs["ann"]) > banks.DIFFERENT
    assert largest_difference(now["bob"], outputs["bob"]) == 0
    assert_right(reader, now, x, ["ann", "bob", "eve", None])


def test_a_file_is_read_when_it_is_another(two, originals, x, monkeypatch):
    writer, reader = two
    read, original = [], reader._files.read

    def counted(file):
        read.append(os.path.basename(file).split(".")[0])
        return original(file)

    monkeypatch.setattr(reader._files, "read", counted)
    for change, expected in (
        (lambda: None, ["ann", "bob"]),
        (lambda: None, []),
        (lambda: writer.load("bob", originals["eve"], replace=True), ["bob"]),
        # The same numbers, in another file.
        (lambda: writer.load("bob", originals["eve"], replace=True), ["bob"]),
        (lambda: writer.remove("eve"), []),
        (
            lambda: writer.rename("ann", "eve") or writer.rename("eve", "ann"),
            [],
        ),
    ):
        change()
        if expected is None:
            continue
        reader.predict(x[:3], ["ann", "bob", None])
        assert read == expected
        read.clear()


OPENED = None


@pytest.fixture
def opened():
    """A list that gets the paths of all files that are opened."""
    global OPENED
    if OPENED is None:
        # There is no way to take a hook back.
        sys.addaudithook(
            lambda event, args: event == "open" and OPENED.append(args[0])
        )
    OPENED = []
    return lambda file: sum(str(path) == str(file) for path in OPENED)


def test_a_file_is_opened_once(two, originals, opened, x, tmp_path):
    bank, _ = two
    bank.predict(x[:1], ["ann"])
    assert opened(folder_of(bank) / f"ann{ENDING}") == 1
    bank.load("new", originals["zoe"])
    assert opened(originals["zoe"]) == 1
    keras_vera.load_adapter(make_classifier(), originals["bob"])
    assert opened(originals["bob"]) == 1
    both = {originals["ann"]: 0.5, originals["eve"]: 0.5}
    keras_vera.combine(both, tmp_path / f"both{ENDING}", method="nearest")
    assert opened(originals["ann"]) == opened(originals["eve"]) == 1


# ---- Who comes second overwrites nothing.


@pytest.mark.parametrize(
    "call",
    [
        lambda bank, file: bank.add("new"),
        lambda bank, file: bank.add("new", like="ann"),
        lambda bank, file: bank.load("new", file),
        lambda bank, file: bank.rename("bob", "new"),
        lambda bank, file: keras_vera.combine(
            {"ann": 1.0}, "new", method="nearest", bank=bank
        ),
    ],
    ids=["add", "like", "load", "rename", "combine"],
)
@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_no_name_is_taken_twice(two, originals, call, moment, monkeypatch):
    first, second = two
    if moment == "before":
        first.load("new", originals["zoe"])
    else:
        check = second._register.check_new

        def checked(name, *args):
            check(name, *args)
            first.load("new", originals["zoe"])

        monkeypatch.setattr(second._register, "check_new", checked)
    before = {
        **contents(first),
        f"new{ENDING}": originals["zoe"].read_bytes(),
    }
    with pytest.raises(ValueError, match="named 'new' already"):
        call(second, originals["eve"])
    assert contents(first) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda bank: bank.remove("ann"),
        lambda bank: bank.rename("ann", "new"),
        lambda bank: bank.save("ann", folder_of(bank).parent / f"x{ENDING}"),
        lambda bank: bank.add("new", like=["bob", "ann"]),
    ],
    ids=["remove", "rename", "save", "like"],
)
def test_what_goes_meanwhile_is_unknown(two, call, monkeypatch):
    first, second = two
    check = second._register.check_known

    def checked(*args, **kwargs):
        found = check(*args, **kwargs)
        if "ann" in first:
            first.remove("ann")
        return found

    monkeypatch.setattr(second._register, "check_known", checked)
    with pytest.raises(AdapterFileError, match="no adapter named 'ann'"):
        call(second)
    assert second.names == ["bob", "eve"]


def test_a_file_that_comes_back_while_it_is_read(
    two, originals, outputs, x, monkeypatch
):
    writer, reader = two
    original, failures = reader._files.read, []

    def read(file):
        if not failures:
            writer.remove("ann")
        try:
            return original(file)
        except AdapterFileError as error:
            failures.append(error)
            writer.load("ann", originals["zoe"])
            raise

    monkeypatch.setattr(reader._files, "read", read)
    found = reader.predict(x[:1], ["ann"])
    assert len(failures) == 1
    assert largest_difference(found, outputs["zoe"][:1]) < ROUNDING


@pytest.mark.parametrize("change", ["remove", "replace", "again"])
def test_what_changes_while_fit_trains_it(two, originals, x, change):
    """The others are trained and written; this one is left as it is."""
    trainer, other = two
    compile_bank(trainer, keras.optimizers.SGD(0.5))
    held = trainer.predict(x[:1], ["bob"])

    class Change(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            if change != "replace":
                other.remove("bob")
            if change != "remove":
                other.load("bob", originals["zoe"], replace=True)
            # What trains stays, whatever happens to its file.
            found = trainer.predict(x[:1], ["bob"])
            np.testing.assert_array_equal(found, held)

    before = contents(trainer)
    with pytest.raises(AdapterFileError, match=r"while `fit` .*\['bob'\]"):
        trainer.fit(
            x[:3],
            np.array([1, 2, 3]),
            adapters=["ann", "bob", "eve"],
            callbacks=[Change()],
            verbose=0,
        )
    after = contents(trainer)
    for name in ("ann", "eve"):
        assert after[name + ENDING] != before[name + ENDING]
    if change == "remove":
        assert trainer.names == other.names == ["ann", "eve"]
    else:
        assert after[f"bob{ENDING}"] == originals["zoe"].read_bytes()
    files = {n: folder_of(trainer) / f"{n}{ENDING}" for n in trainer.names}
    for bank in two:
        assert_right(bank, alone(files, x), x, [*trainer.names, None])
    # And so it can be trained again.
    trainer.fit(x[:1], np.array([1]), adapters=[trainer.names[-2]], verbose=0)


def test_a_bank_does_not_take_its_own_training_for_a_change(two, x):
    bank, _ = two
    compile_bank(bank, keras.optimizers.SGD(0.5, momentum=0.9))
    bank.fit(x[:1], np.array([1]), adapters=["ann"], verbose=0)
    steps = bank.model.row_steps().sum()
    for _ in range(2):
        bank.fit(x[:1], np.array([1]), adapters=["ann"], verbose=0)
    # A file that is read again begins with new state of the optimizer.
    assert bank.model.row_steps().sum() == 3 * steps


# ---- The folder is not always there.


def test_a_folder_that_is_away(two, outputs, x):
    bank, _ = two
    assert_right(bank, outputs, x, ["ann", "bob"])
    before = stacks(bank)
    folder = folder_of(bank)
    folder.rename(folder.with_name("away"))
    for call in (
        lambda: bank.predict(x[:1], ["ann"]),
        lambda: bank.names,
        lambda: "ann" in bank,
        lambda: bank.add("new"),
        lambda: bank.remove("ann"),
        lambda: bank.rename("ann", "new"),
    ):
        with pytest.raises(AdapterFileError, match="No such file"):
            call()
    assert_right(bank, outputs, x, [None])
    answers = bank.predict(x[:2], ["ann", None], return_exceptions=True)
    assert isinstance(answers[0], AdapterFileError)
    assert largest_difference(answers[1], outputs[None][1]) < ROUNDING
    folder.with_name("away").rename(folder)
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    assert_right(bank, outputs, x, ["ann", "eve"])


def test_what_else_is_in_a_folder(two, originals, outputs, x):
    """Only files that have the name of an adapter are adapters."""
    bank, _ = two
    folder = folder_of(bank)
    for name in ("notes.txt", ".hidden", f"a.b{ENDING}", f"%{ENDING}", ENDING):
        shutil.copy(originals["zoe"], folder / name)
    (folder / "folder").mkdir()
    for name in ("x" * 300, "\ud800", "a\0b", "..", "/", "%61nn", "Ann "):
        assert name not in bank
        with pytest.raises(AdapterFileError, match="no adapter named"):
            bank.predict(x[:1], [name])
    assert bank.names == NAMES[:3]
    bank.load("\ud800", originals["zoe"])
    assert bank.names == [*NAMES[:3], "\ud800"]
    answers = bank.predict(x[:1], ["\ud800"])
    assert largest_difference(answers, outputs["zoe"][:1]) < ROUNDING
    with pytest.raises(AdapterFileError, match="name too long"):
        bank.add("x" * 300)


def test_left_over_files_are_removed_when_they_are_old(two, two_models):
    folder = folder_of(two[0])
    left = [folder / f".{i:016x}.vera.tmp" for i in range(2)]
    for file in left:
        file.write_bytes(b"half")
    os.utime(left[0], (0, 0))
    bank = keras_vera.AdapterBank(two_models[0], 3, folder=folder)
    assert bank.names == NAMES[:3]
    assert [file.exists() for file in left] == [False, True]


def test_versions_differ_within_a_tick(tmp_path):
    """The times of a file system may be coarse, and inodes used again."""
    file = tmp_path / "file"
    versions = set()
    for _ in range(300):
        disk.write_files({str(file): b"same"})
        versions.add(disk.version_of(os.stat(file)).modified)
    assert len(versions) == 300


# ---- Answers by row.


def test_answers_by_row(two, outputs, x):
    _, bank = two
    (folder_of(bank) / f"bob{ENDING}").write_bytes(b"damaged")
    names = ["ann", "nobody", None, "bob", "eve", "ann"]
    for size in (32, 2):
        answers = bank.predict(x, names, size, return_exceptions=True)
        assert len(answers) == 6
        for i, name in enumerate(names):
            if name in ("nobody", "bob"):
                assert isinstance(answers[i], AdapterFileError)
                assert f"{name}" in str(answers[i])
                # What is not there, and what is damaged.
                missing = isinstance(answers[i], KeyError)
                assert missing == (name == "nobody")
            else:
                difference = largest_difference(answers[i], outputs[name][i])
                assert difference < ROUNDING
    with pytest.raises(ValueError, match="`return_exceptions` is for"):
        bank.predict(iter([]) and (x for x in []), return_exceptions=True)


def test_an_adapter_that_goes_before_its_batch(two, outputs, x, monkeypatch):
    writer, bank = two
    original = bank._files.read

    def read(file):
        if "bob" in writer:
            writer.remove("bob")
        return original(file)

    monkeypatch.setattr(bank._files, "read", read)
    answers = bank.predict(x[:3], ["ann", "bob", None], return_exceptions=True)
    assert "no adapter named 'bob'" in str(answers[1])
    for i, name in ((0, "ann"), (2, None)):
        assert largest_difference(answers[i], outputs[name][i]) < ROUNDING


def test_answers_by_row_in_memory(originals, outputs, x):
    bank = banks.make_bank({"ann": originals["ann"]})
    names = ["ann", "nobody", None]
    answers = bank.predict(x[:3], names, return_exceptions=True)
    assert isinstance(answers[1], ValueError)
    for i in (0, 2):
        assert largest_difference(answers[i], outputs[names[i]][i]) < ROUNDING
    answers = bank.predict(x[:2], ["a", "b"], return_exceptions=True)
    assert all(isinstance(answer, ValueError) for answer in answers)


@pytest.mark.parametrize("bad", [[], [3], [0, 7], list(range(8))], ids=str)
def test_texts_that_a_preprocessor_refuses(bad):
    calls = []

    def preprocess(texts):
        calls.append(texts)
        if "bad" in texts:
            raise RuntimeError("bad")
        return texts

    texts = ["bad" if row in bad else f"text {row}" for row in range(8)]
    taken, errors, made = rows._readable(texts, preprocess)
    assert sorted(errors) == bad and made == taken
    assert all("refuses" in str(error) for error in errors.values())
    for row, text in enumerate(texts):
        assert taken[row] == text or row in bad and taken[row] != "bad"
    # By halves, not one by one; and in the end what is taken.
    assert len(calls) <= 1 + 6 * len(bad) + bool(bad)


def test_load_replaces_in_memory(originals, outputs, x):
    bank = banks.make_bank({n: originals[n] for n in ("ann", "bob")})
    with pytest.raises(ValueError, match="'ann' already"):
        bank.load("ann", originals["eve"])
    bank.load("ann", originals["eve"], replace=True)
    assert bank.names == ["ann", "bob"]
    now = {**outputs, "ann": outputs["eve"]}
    assert_right(bank, now, x, ["ann", "bob", None])


# ---- Any calls, on two banks, beside a dict.


class Calls(RuleBasedStateMachine):
    """Two banks on a folder do what one dict does."""

    files = two_banks = None
    names = st.sampled_from([*NAMES, "a.b", "ü"])
    which = st.integers(0, 1)
    file = st.sampled_from(NAMES)

    @initialize()
    def start(self):
        for name in self.two_banks[0].names:
            self.two_banks[0].remove(name)
        self.truth = {}  # The file that each name is a copy of.

    def call(self, function, allowed):
        if allowed:
            function()
        else:
            with pytest.raises(ValueError, match="named"):
                function()
        return allowed

    @rule(which=which, name=names, file=file, replace=st.booleans())
    def load(self, which, name, file, replace):
        bank = self.two_banks[which]
        if self.call(
            lambda: bank.load(name, self.files[file], replace=replace),
            replace or name not in self.truth,
        ):
            self.truth[name] = file

    @rule(which=which, name=names)
    def remove(self, which, name):
        bank = self.two_banks[which]
        if self.call(lambda: bank.remove(name), name in self.truth):
            del self.truth[name]

    @rule(which=which, name=names, new=names)
    def rename(self, which, name, new):
        bank = self.two_banks[which]
        allowed = name in self.truth and new not in self.truth
        if self.call(lambda: bank.rename(name, new), allowed):
            self.truth[new] = self.truth.pop(name)

    @rule(which=which, name=names, like=names)
    def add(self, which, name, like):
        bank = self.two_banks[which]
        allowed = like in self.truth and name not in self.truth
        if self.call(lambda: bank.add(name, like=like), allowed):
            self.truth[name] = self.truth[like]

    @rule(which=which, names=st.lists(names, min_size=1, max_size=3))
    def use(self, which, names):
        bank = self.two_banks[which]
        known = all(name in self.truth for name in names)
        if not self.call(lambda: bank._slots.bring(names), known):
            return
        slots = bank._slots.bring(names).tolist()
        for name, arrays in zip(names, bank.model.read(slots)):
            expected = self.arrays[self.truth[name]]
            for key, value in expected.items():
                np.testing.assert_array_equal(arrays[key], value)

    @invariant()
    def names_are_those_of_the_dict(self):
        for bank in self.two_banks:
            assert bank.names == sorted(getattr(self, "truth", bank.names))


def test_any_calls(two, originals):
    Calls.files, Calls.two_banks = originals, two
    Calls.arrays = {n: two[0]._files.read(f)[0] for n, f in originals.items()}
    machine = Calls.TestCase
    machine.settings = settings(max_examples=30, stateful_step_count=25)
    machine().runTest()


# ---- Death.


@pytest.mark.in_turn("jax")  # Files alone, in processes of their own.
def test_writers_that_are_killed(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("Windows has no `fork`.")
    script = pathlib.Path(__file__).parent / "folder_killed.py"
    output = subprocess.check_output(
        [sys.executable, script, tmp_path, "0"],
        text=True,
        env=scripts.environment(),
    )
    counts = [int(x) for x in re.findall(r"\d+", output)]
    killed, both, there, changed, left = counts
    # All kinds of moments were among them.
    assert killed > 150 and min(both, there, changed, left) > 0
