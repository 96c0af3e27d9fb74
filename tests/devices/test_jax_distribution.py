"""`keras.distribution` on JAX, with eight devices or two processes."""

import pytest
from device_scripts import run
from helpers import backend

if backend() != "jax":
    pytest.skip("`keras.distribution` is JAX's.", allow_module_level=True)

EIGHT = "--xla_force_host_platform_device_count=8"
WORDS = ("file", "scor", "bank")
FOUR = "--xla_force_host_platform_device_count=4"


# Few processes: each imports for ten seconds.
@pytest.mark.parametrize(
    "what",
    [["matrices", "models", "order"], ["bank", "layouts", "checkpoints"]],
    ids=" ".join,
)
def test_eight_devices(what, tmp_path):
    run("jax_devices.py", tmp_path, *what, XLA_FLAGS=EIGHT)


def test_each_kind_of_layer(tmp_path):
    run("jax_kinds.py", tmp_path, XLA_FLAGS=EIGHT)


@pytest.mark.parametrize("what", ["data", "vectors"])
def test_two_processes(what, tmp_path):
    printed = run(
        "jax_processes.py",
        tmp_path,
        what,
        processes=2,
        XLA_FLAGS=FOUR,
        JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    )
    # The digests of what they wrote, and scores.
    first, second = (
        [line for line in text.splitlines() if line[:4] in WORDS]
        for text in printed
    )
    assert first == second and len(first) == 2
