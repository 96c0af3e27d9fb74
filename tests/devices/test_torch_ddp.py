"""`DistributedDataParallel` with two processes, on CPUs."""

import pytest
from device_scripts import run
from helpers import backend

if backend() != "torch":
    pytest.skip("These wrappers are PyTorch's.", allow_module_level=True)


def test_two_processes_train_as_one(tmp_path):
    run("torch_processes.py", tmp_path, processes=2, MASTER_ADDR="127.0.0.1")
