"""Two devices of `tf.distribute`; see `test_tf_distribute.py`."""

import sys

import keras
import numpy as np
import tensorflow as tf
import tiny_model

import keras_vera

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
# Graphs run once or twice.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, y = tiny_model.x, tiny_model.y
folder = sys.argv[1]

# All examples of "b" and "c" are in the second half, which is one replica's.
NAMES = ["a"] * 8 + ["b", "c"] * 4


def make_bank():
    model = tiny_model.make_model()
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    bank = keras_vera.AdapterBank(model, capacity=4)
    for name in "abcd":
        bank.add(name)
    return bank


def fit(bank, optimizer):
    bank.model.compile(optimizer, "mse")
    bank.fit(
        x, y, adapters=NAMES, batch_size=16, epochs=3, shuffle=False, verbose=0
    )


def values(variables):
    return [np.asarray(v) for v in variables]


def assert_close(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


for optimizer in (keras.optimizers.Adam, keras.optimizers.SGD):
    one = make_bank()
    fit(one, optimizer(0.05))
    with strategy.scope():
        both = make_bank()
        fit(both, optimizer(0.05))
    steps = both.model.row_steps().tolist()
    assert steps == one.model.row_steps().tolist() == [0, 3, 3, 3, 0]
    trained = values(one.model.trainable_variables)
    assert_close(values(both.model.trainable_variables), trained)
    for variable in both.model.variables:
        if variable is not both.model._strays:
            first, second = values(variable.value.values)
            np.testing.assert_array_equal(first, second, variable.path)
outputs = one.predict(x[:11], NAMES[:11])
assert np.abs(outputs - one.predict(x[:11], [None] * 11)).max() > 1e-3
assert_close(both.predict(x[:11], NAMES[:11]), outputs)
for name in "abc":
    path = f"{folder}/{name}.vera.safetensors"
    both.save(name, path)
# Outside of the scope, what comes later is mirrored as well.
both.grow(6)
for variable in both.model.variables:
    assert strategy.extended.variable_created_in_scope(variable.value)
assert_close(both.predict(x[:11], NAMES[:11]), outputs)
# Ids without an adapter are noticed in every replica.
ids = np.array([1] * 8 + [6] * 8, "int32")
data = tf.data.Dataset.from_tensor_slices(((x, ids), y)).batch(16)
try:
    both.model.evaluate(data, verbose=0)
except ValueError as error:
    assert "8 examples had `adapter_ids` without" in str(error), error
else:
    raise AssertionError("strays of the second replica")
