"""A bank in `tf.distribute`, on two devices."""

import pytest
from device_scripts import run
from helpers import backend

if backend() != "tensorflow":
    pytest.skip("`tf.distribute` is TensorFlow's.", allow_module_level=True)


def test_mirrored_banks_train_as_one(tmp_path):
    run("tf_devices.py", tmp_path)
