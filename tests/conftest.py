import collections
import tempfile

import keras
import numpy as np
import plans
import pytest
from hypothesis import HealthCheck
from hypothesis import settings

# Backends compile and allocate on first use, so times vary widely.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax

    # Models of many tests compile to the same programs.
    CACHE = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", CACHE.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests that are other backends' in turn",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "in_turn: takes long or depends little on the backend. Each backend "
        "runs every third one, so that all three run all, unless `--all` or "
        "the name of a test is given.",
    )


def pytest_collection_modifyitems(config, items):
    named = any("::" in argument for argument in config.args)
    if named or config.option.all:
        return
    turn = ["jax", "tensorflow", "torch"].index(BACKEND)
    numbers = collections.Counter()
    kept, left = [], []
    for item in items:
        # What is for one backend alone is in turn with nothing.
        if item.get_closest_marker("in_turn") and not any(
            item.iter_markers("skipif")
        ):
            number = numbers[item.module]
            numbers[item.module] += 1
            if number % 3 != turn:
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
