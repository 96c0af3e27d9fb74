# %% [markdown]
"""
Title: One adapter on several devices

Author: the keras_vera authors

Date created: 2026/11/25

Last modified: 2026/11/25

Description: Train an adapter data parallel or model parallel, use it anywhere.

Accelerator: None

## Introduction

On JAX, Keras spreads a model over devices: its examples (`--parallel data`), or
its kernels (`--parallel model`). We're going to

- make the devices: eight simulated ones of the CPU, or with `--real` those of
  this machine,
- find how the kernels and the adapter are cut,
- train an adapter on them, and
- load its file on one device, and compare the outputs.

The order matters: first the distribution, then the model, then `enable_vera`.
"""

# %%
import argparse
import os

parser = argparse.ArgumentParser()
parser.add_argument("--parallel", choices=["data", "model"], default="data")
parser.add_argument("--real", action="store_true")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--rank", type=int, default=64)
args, _ = parser.parse_known_args()

os.environ["KERAS_BACKEND"] = "jax"
if not args.real:
    flags = os.environ.get("XLA_FLAGS", "")
    count = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{flags} {count}"

import tempfile

import keras
import keras_hub
import numpy as np

import keras_vera

# %% [markdown]
"""
## The model and the data

A small Llama with random weights, which learns to count. With a preset, it
would be `keras_hub.models.LlamaBackbone.from_preset(...)`.
"""

# %%
SETTINGS = {
    "vocabulary_size": 64,
    "num_query_heads": 8,
    "num_key_value_heads": 8,
    "hidden_dim": 64,
    "intermediate_dim": 128,
}


def make_model():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(num_layers=2, **SETTINGS)
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


starts = np.random.default_rng(0).integers(0, 64, (64, 1))
tokens = ((starts + np.arange(17)) % 64).astype("int32")
x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((64, 16), "int32")}
y = tokens[:, 1:]

# %% [markdown]
"""
## The distribution

`layout_map` finds which kernels are cut by columns and which by rows; a model
with one block tells it for all. Each device gets a part of each kernel, of `A`
and of `B`.
"""

# %%
devices = keras.distribution.list_devices()
if args.parallel == "data":
    distribution = keras.distribution.DataParallel(devices=devices)
else:
    mesh = keras.distribution.DeviceMesh(
        (1, len(devices)), ("batch", "model"), devices
    )
    small = keras_hub.models.LlamaBackbone(num_layers=1, **SETTINGS)
    distribution = keras.distribution.ModelParallel(
        layout_map=keras_vera.layout_map(small, mesh, targets="all-linear"),
        batch_dim_name="batch",
    )

# %% [markdown]
"""
## Training
"""

# %%
path = os.path.join(tempfile.mkdtemp(), "count.vera.safetensors")
with distribution.scope():
    model = make_model()
    keras_vera.enable_vera(model, rank=args.rank, targets="all-linear")
    model.fit(x, y, batch_size=16, epochs=args.epochs, verbose=2)
    keras_vera.save_adapter(model, path)
    outputs = model.predict(x, verbose=0)


def held(variable):
    """Returns the bytes of a variable on one device."""
    shape = variable.value.sharding.shard_shape(variable.value.shape)
    return int(np.prod(shape)) * variable.value.dtype.itemsize


total = sum(v.value.nbytes for v in model.variables)
on_one = sum(map(held, model.variables))
print(f"{len(devices)} devices; {on_one:,} of {total:,} bytes on each")

# %% [markdown]
"""
## On one device

The file is the same, whatever it was trained on.
"""

# %%
one = make_model()
keras_vera.load_adapter(one, path)
difference = np.abs(one.predict(x, verbose=0) - outputs).max()
print(f"Largest difference to one device: {difference:.1e}")
assert difference < 1e-4
