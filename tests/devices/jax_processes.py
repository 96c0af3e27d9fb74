"""One of the processes of a program of JAX; see `test_jax_distribution.py`.

Arguments: the number of this process, a port, a folder, and `data`, `model`
or `vectors`: what is sharded.
"""

import hashlib
import pathlib
import sys
import time

import keras
import numpy as np
import tiny_model
from keras import distribution

import keras_vera
from keras_vera._keras import processes

number, port, folder, what = int(sys.argv[1]), *sys.argv[2:5]
distribution.initialize(f"127.0.0.1:{port}", 2, number)


def make_distribution():
    if what == "data":
        return distribution.DataParallel(auto_shard_dataset=False)
    mesh = distribution.DeviceMesh((1, 8), ("batch", "model"))
    layouts = distribution.LayoutMap(mesh)
    layouts[".*up/kernel"] = (None, "model")
    layouts[".*down/kernel"] = ("model", None)
    if what == "vectors":
        layouts[".*up/vera_lambda_b"] = ("model",)
        layouts["vera_projection/vera_kernel_a"] = ("model", None)
        layouts["vera_projection/vera_kernel_b"] = (None, "model")
        layouts["layers/.*/vera_lambda_."] = ("model", None)
    return distribution.ModelParallel(
        layout_map=layouts, auto_shard_dataset=False
    )


def digest(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def raises_alone(call):
    processes.PATIENCE = 2
    try:
        call()
    except RuntimeError as error:
        assert "must be called by all 2 processes" in str(error), error
    else:
        raise AssertionError("a call of one process alone must raise")
    processes.PATIENCE = 300


def alone(turn, call):
    """One process calls; the other waits until it has, however long it takes.

    Not for some seconds: where cores are few, calls would meet.
    """
    done = pathlib.Path(folder, f"{turn}.done")
    if number == turn % 2:
        raises_alone(call)
        done.touch()
    while not done.exists():
        time.sleep(0.1)


keras.distribution.set_distribution(make_distribution())
own = f"{folder}/{number}.vera.safetensors"
model = tiny_model.make_model()
keras_vera.enable_vera(model, rank=4, targets="all-linear")
rows = slice(number * 8, number * 8 + 8) if what == "data" else slice(None)
model.fit(
    tiny_model.x[rows],
    tiny_model.y[rows],
    batch_size=8 if what == "data" else 16,
    epochs=3,
    shuffle=False,
    verbose=0,
)
keras_vera.save_adapter(model, own)
print("file", digest(own))
if what == "data":
    # All numbers are in every process, so one of them may save alone.
    if number == 0:
        copy = f"{folder}/copy.vera.safetensors"
        keras_vera.save_adapter(model, copy)
        assert digest(copy) == digest(own)
    score = model.evaluate(
        tiny_model.x[rows], tiny_model.y[rows], batch_size=8, verbose=0
    )
    print("score", score)
else:
    for turn in range(2):
        alone(turn, lambda: keras_vera.save_adapter(model, own))
    adapted = model.predict(tiny_model.x, verbose=0)
    with keras_vera.base_model(model):
        base = model.predict(tiny_model.x, verbose=0)
    assert np.abs(adapted - base).max() > 1e-3
    again = model.predict(tiny_model.x, verbose=0)
    np.testing.assert_array_equal(again, adapted)
    keras_vera.disable_vera(model)
    np.testing.assert_allclose(model.predict(tiny_model.x, verbose=0), base)
    keras_vera.load_adapter(model, own)
    again = model.predict(tiny_model.x, verbose=0)
    np.testing.assert_array_equal(again, adapted)
    # Adapters in a bank.
    bank = keras_vera.AdapterBank(model, capacity=7)
    bank.add("fresh")
    bank.load("own", own)
    names = ["own"] * 8 + ["fresh"] * 8
    outputs = bank.predict(tiny_model.x, names)
    np.testing.assert_allclose(outputs[:8], adapted[:8], atol=1e-6)
    np.testing.assert_allclose(outputs[8:], base[8:], atol=1e-6)
    bank.model.compile(keras.optimizers.Adam(0.01), "mse")
    bank.fit(
        tiny_model.x, tiny_model.y, adapters=names, batch_size=16, verbose=0
    )
    bank.save("fresh", own)
    print("bank", digest(own))
    keras_vera.merge(model)
    merged = model.predict(tiny_model.x, verbose=0)
    np.testing.assert_allclose(merged, adapted, atol=1e-5)
alone(
    2,
    lambda: (
        keras_vera.enable_vera(model, rank=2)
        if what != "data"
        else keras_vera.load_adapter(model, own)
    ),
)
print("done")
