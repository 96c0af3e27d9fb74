import collections
import os
import sys
import tempfile

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER and "--all" not in sys.argv:
    # Most of the time goes into compiling; what is compiled runs once or
    # twice. Processes that tests start inherit it, as do those of xdist.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
    )
if not IS_WORKER and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Models of many tests compile to the same programs.
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import keras  # noqa: E402 - reads these variables.
import numpy as np  # noqa: E402
import plans  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck  # noqa: E402
from hypothesis import settings  # noqa: E402

BACKEND = keras.backend.backend()

# Of every six tests that are in turn, who runs them: PyTorch compiles nothing.
TURNS = ["jax", "tensorflow", "torch", "torch", "torch", "torch"]

for profile, max_examples in (("short", 10), ("all", 40)):
    settings.register_profile(
        profile,
        # Backends compile and allocate on first use, so times vary widely.
        deadline=None,
        max_examples=max_examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests that are other backends' in turn, and try "
        "more examples of each property",
    )


def pytest_configure(config):
    settings.load_profile("all" if config.option.all else "short")
    config.addinivalue_line(
        "markers",
        "in_turn: takes long or depends little on the backend. Each is run by "
        "one of the three backends, most by PyTorch, unless `--all` or the "
        "name of a test is given.",
    )


def pytest_collection_modifyitems(config, items):
    named = any("::" in argument for argument in config.args)
    if named or config.option.all:
        return
    numbers = collections.Counter()
    kept, left = [], []
    for item in items:
        # What is for one backend alone is in turn with nothing.
        if item.get_closest_marker("in_turn") and not any(
            item.iter_markers("skipif")
        ):
            number = numbers[item.module]
            numbers[item.module] += 1
            if TURNS[number % len(TURNS)] != BACKEND:
                left.append(item)
                continue
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(params=plans.DIFFERENT, ids=str)
def plan(request):
    """Runs a test with every form; small models would all be additive."""
    with plans.forced(request.param):
        yield request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
