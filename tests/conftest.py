"""What is set before Keras is imported, and who imports it."""

import os
import sys
import tempfile
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


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests that are other backends' in turn, and try "
        "more examples of each property",
    )


def pytest_configure(config):
    for line in (
        "in_turn(backend): takes long or depends little on the backend. Each "
        "is run by one of the three backends, by the named one or most by "
        "PyTorch (none: by no one), unless `--all` or the name of a test is "
        "given.",
        "members_in_turn: each backend runs the first of the parameters of a "
        "test; the others are in turn.",
        "eager: is not about graphs, so that TensorFlow makes none, unless "
        "`--all` is given. `eager(False)` is, in a file of such.",
    ):
        config.addinivalue_line("markers", line)
    # What distributes the tests runs none, and they start sooner without it.
    alone = config.option.collectonly or not config.option.numprocesses
    if IS_WORKER or alone:
        config.pluginmanager.import_plugin("suite")
