import collections
import gc
import itertools
import os
import sys
import tempfile
import zlib
from importlib import metadata

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER and "--all" not in sys.argv:
    # Most of the time goes into compiling; what is compiled runs once or
    # twice. Processes that tests start inherit it, as do those of xdist.
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    # Older ones end the process when they do not know a flag.
    version = metadata.version("jaxlib").split(".")
    if [int(part) for part in version[:2]] >= [0, 10]:
        flags += [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
if not IS_WORKER:
    # There is a process for each core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
from scripts import small_minilm  # noqa: E402, F401 - a fixture.

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


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests that are other backends' in turn, and try "
        "more examples of each property",
    )


def pytest_configure(config):
    settings.load_profile("all" if config.option.all else "short")
    if BACKEND == "tensorflow" and not config.option.all:
        import tensorflow as tf

        # As for XLA above: most graphs run once or twice.
        options = {"disable_meta_optimizer": True}
        tf.config.optimizer.set_experimental_options(options)
    for line in (
        "in_turn(backend): takes long or depends little on the backend. Each "
        "is run by one of the three backends, by the named one or most by "
        "PyTorch (none: by no one), unless `--all` or the name of a test is "
        "given.",
        "members_in_turn: each backend runs the first of the parameters of a "
        "test; the others are in turn.",
        "eager: is not about graphs, so that TensorFlow makes none, unless "
        "`--all` is given.",
    ):
        config.addinivalue_line("markers", line)


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
    if eager is None or request.config.option.all:
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
