"""Which tests run, and what they share."""

import collections
import gc
import itertools
import zlib

import keras
import numpy as np
import plans
import pytest
from hypothesis import HealthCheck
from hypothesis import settings
from scripts import small_minilm  # noqa: F401 - a fixture.

BACKEND = keras.backend.backend()

# Of every 20 tests that are in turn, who runs them: PyTorch compiles nothing.
TURNS = ["jax", "tensorflow", *["torch"] * 18]
# The same of every six members of a kind.
MEMBERS = ["jax", "tensorflow", *["torch"] * 4]

for profile, max_examples in (("short", 10), ("all", 40)):
    settings.register_profile(
        profile,
        # Backends compile and allocate on first use, so times vary widely.
        deadline=None,
        max_examples=max_examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


def pytest_configure(config):
    settings.load_profile("all" if config.option.all else "short")
    if BACKEND == "tensorflow" and not config.option.all:
        import tensorflow as tf

        # As for XLA above: most graphs run once or twice.
        options = {"disable_meta_optimizer": True}
        tf.config.optimizer.set_experimental_options(options)


def pytest_collection_modifyitems(config, items):
    # The longest first, or one process would end alone with them.
    items.sort(key=lambda item: item.path.name != "test_benchmarks.py")
    named = any("::" in argument for argument in config.args)
    if named or config.option.all:
        return
    turns = collections.defaultdict(itertools.count)
    kept, left = [], []
    for item in items:
        ours = runs_it(item, turns) in (BACKEND, None)
        (kept if ours else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def runs_it(item, turns):
    """Returns the backend that runs a test, or `None` for each of them."""
    if any(item.iter_markers("skipif")):
        # What is for one backend alone is in turn with nothing.
        return None
    marks = [
        mark for mark in item.iter_markers() if mark.name.endswith("in_turn")
    ]
    if not marks:
        return None
    # The marks of a test come before those of its file.
    if marks[0].name == "in_turn":
        if marks[0].args:
            return marks[0].args[0]
        return whose(next(turns[item.module]), TURNS)
    number = next(turns[item.function])
    # Each test begins elsewhere, or few backends would run a second parameter.
    start = zlib.crc32(item.function.__name__.encode()) % 36
    return whose(start + number, MEMBERS) if number else None


def whose(number, turns):
    """Each round begins one later, or parameters would fall in step with it."""
    return turns[(number + number // len(turns)) % len(turns)]


@pytest.fixture(autouse=True, scope="module")
def frozen_objects():
    # Keras collects garbage after each layer that it quantizes. That takes a
    # second each time among all that modules and earlier tests have made.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(params=plans.DIFFERENT, ids=str)
def plan(request):
    """Runs a test with every form; small models would all be additive."""
    with plans.forced(request.param):
        yield request.param


@pytest.fixture(autouse=BACKEND == "tensorflow")
def run_eagerly(request):
    eager = request.node.get_closest_marker("eager")
    graphs = eager is None or eager.args == (False,)
    if graphs or request.config.option.all:
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
