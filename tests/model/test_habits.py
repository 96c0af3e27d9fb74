"""Random models in the hands of random users.

`HABITS_MINUTES=60 pytest -n 0 tests/model/test_habits.py` goes on for an hour
with new seeds, does not stop at a failure, and prints what it found.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
import random
import re
import tempfile
import time
import traceback

import habit_models
import habits
import hypothesis
import keras
import pytest
from habits import Action
from hypothesis import strategies as st

MINUTES = float(os.environ.get("HABITS_MINUTES", 0))
BACKEND = keras.backend.backend()
RUNS = itertools.count(1)

TARGETS = [
    "all-linear",
    "attention",
    "mlp",
    "embedding",
    "conv",
    ["all-linear", "conv"],
    "last",
    ".*inner",
    habits.NAME,
]
OPTIMIZERS = ["sgd", "momentum", "adamw", "accumulating", "vera"]


def one(*values):
    return st.sampled_from(values)


# The first of each choice is the simplest one, to which examples shrink.
ACTIONS = [
    st.builds(
        habits.Enable,
        targets=st.sampled_from(TARGETS),
        where=one("base", "model"),
        exclude=one(None, None, None, ".*inner"),
        train=st.sampled_from(
            [None, None, None, "norm", "bias", ["norm", "bias"], "last"]
        ),
        rank=one(3, 1),
        seed=one(0, 9),
        structure=one("dense", "blocks"),
        dropout=one(0.0, 0.2),
        plan=one("auto", "folded", "additive"),
    ),
    st.builds(habits.Spoil, seed=one(1, 2)),
    st.builds(habits.Train, how=one("loop", "batch", "fit", "checkpoint")),
    st.builds(
        habits.Toggle,
        layer=st.just(0) | st.integers(1, 20),
        value=st.booleans(),
    ),
    st.builds(
        habits.Compile,
        optimizer=st.sampled_from(OPTIMIZERS),
        eager=one(True, True, True, False),
        jit=st.booleans(),
    ),
    st.builds(habits.Predict),
    st.builds(habits.Evaluate),
    st.builds(habits.Save, then=one("fresh", "adapted")),
    st.builds(habits.Load),
    st.builds(habits.SaveWeights),
    st.builds(habits.LoadWeights),
    st.builds(habits.SaveModel, ending=one(".keras", ".h5")),
    st.builds(habits.Copy, how=one("clone", "deepcopy", "pickle")),
    st.builds(habits.Quantize),
    st.builds(habits.Disable),
    st.builds(habits.Merge),
    st.builds(
        habits.Base,
        inner=one(
            habits.Predict(),
            habits.Evaluate(),
            habits.Save(),
            habits.Disable(),
            habits.Merge(),
            habits.Bank(),
        ),
        error=st.booleans(),
    ),
    st.builds(habits.AddHead),
    st.builds(habits.Bank, fits=st.booleans(), folder=st.booleans()),
]
# Most of what there is to check begins with an adapter that shows.
BEGINNINGS = st.one_of(
    st.lists(st.one_of(ACTIONS), max_size=2),
    ACTIONS[0].map(lambda enable: [enable, habits.Spoil()]),
    ACTIONS[0].map(lambda enable: [enable]),
)
SEQUENCES = st.builds(
    lambda start, rest: start + rest,
    BEGINNINGS,
    st.lists(st.one_of(ACTIONS), min_size=4, max_size=8),
)
cases = hypothesis.given(recipe=habit_models.recipes(), actions=SEQUENCES)


@pytest.mark.skipif(MINUTES > 0, reason="`HABITS_MINUTES` runs more.")
@hypothesis.settings(
    # JAX compiles every operation of every model.
    max_examples={"torch": 12, "tensorflow": 6, "jax": 2}[BACKEND],
    # Hypothesis shrinks for minutes; the hour's run has a way of its own.
    phases=[hypothesis.Phase.generate],
)
@cases
def test_habits(recipe, actions):
    error = error_of(recipe, actions)
    if error is not None:
        raise error


@pytest.mark.skipif(MINUTES == 0, reason="`HABITS_MINUTES` is not set.")
def test_habits_for_long(capsys):
    end, found = time.time() + 60 * MINUTES, {}
    counts = collections.Counter()

    def case(recipe, actions):
        if time.time() > end:
            return
        counts["sequences"] += 1
        counts["steps"] += len(actions)
        error = error_of(recipe, actions)
        if error is None:
            return
        key = key_of(error)
        counts[key] += 1
        if key not in found:
            # What comes after the step that failed does not matter.
            actions = actions[: error.step + 1]
            # Not longer than half a minute for each.
            limit = min(end, time.time() + 30)
            found[key] = described(*shrunk(recipe, actions, error, limit))
            with capsys.disabled():
                print(f"\n{key}\n{found[key]}", flush=True)

    explore = hypothesis.settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )(cases(case))
    try:
        while time.time() < end:
            hypothesis.seed(random.SystemRandom().randrange(2**32))(explore)()
    finally:
        with capsys.disabled():
            print(f"\n{counts['sequences']} sequences, {counts['steps']} steps")
            for key in found:
                print(f"{counts[key]} times {key}", flush=True)
    assert not found


def error_of(recipe, actions):
    """Returns the error with which a case fails, or `None`."""
    if next(RUNS) % 10 == 0:
        free()
    with tempfile.TemporaryDirectory() as folder:
        try:
            habits.run(recipe, actions, pathlib.Path(folder))
        except Exception as error:
            return error


def shrunk(recipe, actions, error, limit):
    """Returns a shorter case that fails alike, and its error.

    With fewer runs than Hypothesis takes, as each builds several models, and
    with the shortest that is known when the time is over.
    """
    case, key = (recipe, actions), key_of(error)
    size = None
    while size != len(repr(case)):
        size = len(repr(case))
        position = 0
        while True:
            candidates = list(shorter(*case))[position:]
            for candidate in candidates:
                if time.time() > limit:
                    return *case, error
                other = error_of(*candidate)
                if other is not None and key_of(other) == key:
                    # What failed to shrink before hardly will now.
                    case, error = candidate, other
                    break
                position += 1
            else:
                break
    return *case, error


def shorter(recipe, actions):
    """Yields the case with one thing less, or one thing simpler."""
    for i in range(len(actions)):
        yield recipe, actions[:i] + actions[i + 1 :]
    for name in ("stages", "head"):
        value = getattr(recipe, name)
        for i in range(len(value) - (name == "head")):
            less = value[:i] + value[i + 1 :]
            yield dataclasses.replace(recipe, **{name: less}), actions
    for simpler in simplified(recipe):
        yield simpler, actions
    for i, action in enumerate(actions):
        for simpler in simplified(action):
            yield recipe, actions[:i] + [simpler] + actions[i + 1 :]


def simplified(thing):
    """Yields a dataclass with one field at its default."""
    for field in dataclasses.fields(thing):
        if field.name not in ("stages", "head"):
            simpler = dataclasses.replace(thing, **{field.name: field.default})
            if simpler != thing:
                yield simpler


def key_of(error):
    """Returns what makes two failures the same one."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [
        f"{pathlib.Path(x.filename).name}:{x.name}"
        for x in frames
        if "keras_vera" in x.filename
    ]
    owner = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        mine = frame.f_locals.get("self")
        if isinstance(mine, Action):
            owner = type(mine).__name__
    text = re.sub(r"'[^']*'|[\d.]+(e-?\d+)?", "#", str(error))[:80]
    return f"{owner}: {type(error).__name__}: {text} {where[-1:]}"


def described(recipe, actions, error):
    lines = "".join(f"    {x}\n" for x in actions)
    tail = traceback.format_exception(error)[-3:]
    return f"  {recipe}\n{lines}" + "".join(tail)


def free():
    """Frees what models leave behind: cycles, and compiled programs."""
    if BACKEND == "jax":
        import jax

        jax.clear_caches()
    keras.backend.clear_session(free_memory=True)
