"""One of two processes of PyTorch; see `test_torch_ddp.py`.

Arguments: the number of this process, a port, and a folder.
"""

import os
import sys

import keras
import numpy as np
import tiny_model
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import keras_vera

number, port, folder = int(sys.argv[1]), *sys.argv[2:4]
os.environ["MASTER_PORT"] = port
torch.distributed.init_process_group("gloo", rank=number, world_size=2)
rows = slice(number * 8, number * 8 + 8)
x, y = torch.tensor(tiny_model.x), torch.tensor(tiny_model.y)
reduced = []


def count(state, bucket):
    reduced.append(bucket.buffer().numel())
    total = bucket.buffer() / 2
    return (
        torch.distributed.all_reduce(total, async_op=True)
        .get_future()
        .then(lambda future: future.value()[0])
    )


def steps(wrapped, model, *inputs):
    wrapped.register_comm_hook(None, count)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for _ in range(3):
        model.zero_grad()
        outputs = wrapped(*inputs)
        torch.mean((outputs - y[rows]) ** 2).backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_variables])


def fit(model, x):
    model.fit(
        x, tiny_model.y, batch_size=16, epochs=3, shuffle=False, verbose=0
    )


def assert_same(one, both):
    for a, b in zip(one, both, strict=True):
        a, b = (keras.ops.convert_to_numpy(v) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=1e-6)


def raises(call, words):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)


# An adapter.
one, both = tiny_model.make_model(), tiny_model.make_model()
for model in (one, both):
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
fit(one, tiny_model.x)
steps(DistributedDataParallel(both), both, x[rows])
assert_same(one.trainable_variables, both.trainable_variables)
assert np.abs(keras.ops.convert_to_numpy(both.layers[0].vera_lambda_b)).max()
trained = sum(int(np.prod(v.shape)) for v in both.trainable_variables)
assert trained == 4 + 16 + 4 + 4
assert sum(reduced) == 3 * trained, (reduced, trained)
if number == 0:
    path = f"{folder}/one.vera.safetensors"
    keras_vera.save_adapter(both, path)
    again = tiny_model.make_model()
    keras_vera.load_adapter(again, path)
    assert_same(again.trainable_variables, both.trainable_variables)

# A bank; all examples of "b" and "c" are in the second process.
names = ["a"] * 8 + ["b", "c"] * 4
banks = []
for _ in range(2):
    model = tiny_model.make_model()
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    bank = keras_vera.AdapterBank(model, capacity=4)
    for name in "abcd":
        bank.add(name)
    bank.model.compile(keras.optimizers.Adam(0.01), "mse")
    banks.append(bank)
one, both = banks
ids = one.ids(names)
fit(one.model, [tiny_model.x, ids])
reduced.clear()
inputs = [x[rows], torch.tensor(ids[rows])]
steps(DistributedDataParallel(both.model), both.model, inputs)
assert_same(one.model.trainable_variables, both.model.trainable_variables)
assert both.model.row_steps().tolist() == [0, 3, 3, 3, 0]
assert sum(reduced) == 3 * 5 * trained, reduced

# What would train each process alone.
model = tiny_model.make_model()
wrapped = DistributedDataParallel(model)
raises(
    lambda: keras_vera.enable_vera(model, rank=4, targets="all-linear"),
    "before it is wrapped",
)
del wrapped
keras_vera.enable_vera(model, rank=4, targets="all-linear")
mesh = init_device_mesh("cpu", (2,))
fully_shard(model, mesh=mesh)
raises(lambda: model(tiny_model.x), "DistributedDataParallel")
model = tiny_model.make_model()
fully_shard(model, mesh=mesh)
raises(
    lambda: keras_vera.enable_vera(model, rank=4, targets="all-linear"),
    "DistributedDataParallel",
)
cpu = torch.device("cpu")
for keeps_parameters in (False, True):
    model = tiny_model.make_model()
    wrapped = FullyShardedDataParallel(
        model, device_id=cpu, use_orig_params=keeps_parameters
    )
    raises(
        lambda: keras_vera.enable_vera(model, rank=4, targets="all-linear"),
        "DistributedDataParallel",
    )
model = tiny_model.make_model()
keras_vera.enable_vera(model, rank=4, targets="all-linear")
wrapped = FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
raises(lambda: wrapped(tiny_model.x), "DistributedDataParallel")
torch.distributed.destroy_process_group()
print("done")
