"""Several devices against one: each call, and the largest difference.

Runs the same calls on one device and with each engine of the backend, on
simulated devices of a CPU, and prints for each engine and call the largest
absolute difference of what comes out: losses, outputs, or the numbers in the
files that are written. `generate` compares tokens.

    KERAS_BACKEND=jax python benchmarks/devices.py
    KERAS_BACKEND=tensorflow python benchmarks/devices.py

PyTorch's `DistributedDataParallel` needs several processes: see
`tests/devices/torch_processes.py`.
"""

import argparse
import contextlib
import tempfile

import keras
import keras_hub
import numpy as np

import keras_vera

DEVICES = 8
TARGETS = "all-linear"
NAMES = ["ann"] * 6 + ["bob"] * 5 + [None] * 5


def engines():
    """Returns functions that return a scope, by name."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
        )
        names = [f"CPU:{i}" for i in range(DEVICES)]
        found = {"MirroredStrategy": tf.distribute.MirroredStrategy(names)}
    elif keras.config.backend() == "jax":
        import jax

        # Before JAX counts them.
        jax.config.update("jax_num_cpu_devices", DEVICES)
        distribution = keras.distribution
        found = {"DataParallel": distribution.DataParallel()}
        for shape in ((1, DEVICES), (2, DEVICES // 2)):
            mesh = distribution.DeviceMesh(shape, ("batch", "model"))
            layouts = keras_vera.layout_map(
                make_model(1).backbone, mesh, TARGETS
            )
            found[f"ModelParallel {shape[0]}x{shape[1]}"] = (
                distribution.ModelParallel(
                    layout_map=layouts, batch_dim_name="batch"
                )
            )
    else:
        raise SystemExit("Keras has engines on JAX and TensorFlow alone.")
    return {name: engine.scope for name, engine in found.items()}


def make_model(layers=2):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=64,
        num_layers=layers,
        num_query_heads=8,
        num_key_value_heads=8,
        hidden_dim=32,
        intermediate_dim=64,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    compile_model(model)
    return model


def compile_model(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)


def data():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 64, (16, 12)).astype("int32")
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    prompts = {**x, "padding_mask": (np.arange(12) < 5) * x["padding_mask"]}
    return x, np.roll(tokens, -1, axis=1), prompts


def numbers_of(path):
    _, tensors = keras_vera.files.format.read(path)
    return np.concatenate([tensors[k].ravel() for k in sorted(tensors)])


def calls(folder, scope):
    """Yields the name of each call, and what comes out of it."""
    x, y, prompts = data()
    fit = {"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0}
    file = f"{folder}/one.vera.safetensors"
    with scope():
        model = make_model()
        keras_vera.enable_vera(model, rank=8, targets=TARGETS)
        yield "enable", model.predict(x, verbose=0)
        yield "fit", model.fit(x, y, **fit).history["loss"]
        yield "predict", model.predict(x, verbose=0)
        with keras_vera.base_model(model):
            yield "base_model", model.predict(x, verbose=0)
        keras_vera.save_adapter(model, file)
        yield "save", numbers_of(file)
        bank = keras_vera.AdapterBank(model, capacity=7)
        bank.add("ann")
        bank.load("bob", file)
        compile_model(bank.model)
        yield "bank fit", bank.fit(x, y, adapters=NAMES, **fit).history["loss"]
        few = {key: value[:11] for key, value in x.items()}
        yield "bank predict", bank.predict(few, NAMES[:11])
        model.compile(sampler="greedy")
        few = {key: value[:11] for key, value in prompts.items()}
        made = bank.generate(few, NAMES[:11], stop_token_ids=None)
        yield "bank generate", made["token_ids"]
        compile_model(model)
        keras_vera.disable_vera(model)
        keras_vera.load_adapter(model, file)
        yield "load", model.predict(x, verbose=0)
        keras_vera.merge(model)
        yield "merge", model.predict(x, verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    found = engines()
    columns = {"one device": contextlib.nullcontext, **found}
    results = {}
    for name, scope in columns.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = dict(calls(folder, scope))
    one = results.pop("one device")
    print(f"{keras.config.backend()}, {DEVICES} devices\n")
    print("| call |", " | ".join(results), "|")
    print("|---|" + "---|" * len(results))
    for call, expected in one.items():
        shown = [
            f"{np.abs(np.asarray(made[call]) - np.asarray(expected)).max():.1e}"
            for made in results.values()
        ]
        print("|", call, "|", " | ".join(shown), "|")


if __name__ == "__main__":
    main()
