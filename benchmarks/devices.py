"""Several devices against one: each call, and the largest difference.

Makes the same calls on one device and in each engine, on simulated devices of
a CPU, each in processes of its own. Prints for each engine and call the largest
absolute difference of what comes out: outputs, losses, or the numbers in a
file. Of texts, it counts the tokens that differ.

    python benchmarks/devices.py
"""

import argparse
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np

ROWS, LENGTH, VOCABULARY = 16, 12, 64
SOME = slice(0, 11)  # A batch that does not divide.
NAMES = ["ann"] * 5 + ["bob"] * 6 + [None] * 5
FIT = {"epochs": 3, "shuffle": False, "verbose": 0}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    # Of a process: the name of its engine, its number, a port and a folder.
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- Engines: how each is started, and what differs in it.


class OneDevice:
    """Everything as on one device, which others change.

    Attributes:
        backend: String.
        devices: String, for the table.
        processes: Integer.
        environment: Dict of strings.
        cannot: Dict from names of calls to why they do not work.
    """

    devices, processes, environment, cannot = "1", 1, {}, {}
    scope = contextlib.nullcontext

    def __init__(self, backend, number=0, port=None):
        self.backend, self.number, self.port = backend, number, port

    def start(self):
        """Makes the devices, before there is a model."""

    def fit(self, model, x, y):
        model.fit(x, y, batch_size=ROWS, **FIT)

    def fit_bank(self, bank, x, y, names):
        bank.fit(x, y, adapters=names, batch_size=ROWS, **FIT)

    def loss(self, model, x, y):
        return model.evaluate(x, y, batch_size=ROWS, verbose=0)


class DataParallel(OneDevice):
    devices = "8"
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

    def start(self):
        from keras import distribution

        if self.processes > 1:
            address = f"127.0.0.1:{self.port}"
            distribution.initialize(address, self.processes, self.number)
        self.scope = self.distribution().scope

    def distribution(self):
        from keras import distribution

        return distribution.DataParallel(auto_shard_dataset=False)


class ModelParallel(DataParallel):
    devices, mesh = "1 x 8", (1, 8)

    def distribution(self):
        from keras import distribution

        import keras_vera

        mesh = distribution.DeviceMesh(self.mesh, ("batch", "model"))
        # The model that is asked for its layers must be on one device.
        layouts = keras_vera.layout_map(
            make_backbone(), mesh, "all-linear", capacity=7
        )
        return distribution.ModelParallel(
            layout_map=layouts,
            batch_dim_name="batch",
            auto_shard_dataset=False,
        )


class ModelParallel2x4(ModelParallel):
    devices, mesh = "2 x 4", (2, 4)


TWO_PROCESSES = {
    "devices": "2 processes x 4",
    "processes": 2,
    "environment": {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    },
}


class DataParallelInProcesses(DataParallel):
    """Each process has its part of the examples."""

    vars().update(TWO_PROCESSES)
    cannot = dict.fromkeys(
        ["predict", "generate", "bank_predict", "bank_generate"],
        "A limit of Keras: no process holds the outputs of the others. Losses "
        "(`evaluate`) and files are compared in this column.",
    )

    def own(self, values):
        if isinstance(values, dict):
            return {key: self.own(value) for key, value in values.items()}
        part = ROWS // self.processes
        return values[self.number * part : (self.number + 1) * part]

    def fit(self, model, x, y):
        part = ROWS // self.processes
        model.fit(self.own(x), self.own(y), batch_size=part, **FIT)

    def fit_bank(self, bank, x, y, names):
        part = ROWS // self.processes
        x, y, names = self.own(x), self.own(y), self.own(names)
        bank.fit(x, y, adapters=names, batch_size=part, **FIT)

    def loss(self, model, x, y):
        part = ROWS // self.processes
        x, y = self.own(x), self.own(y)
        return model.evaluate(x, y, batch_size=part, verbose=0)


class ModelParallelInProcesses(ModelParallel):
    vars().update(TWO_PROCESSES)
    cannot = dict.fromkeys(
        ["predict", "bank_predict"],
        "A limit of Keras: logits are cut over the processes, as the "
        "vocabulary is. Losses, tokens and files are compared in this column.",
    )


class MirroredStrategy(OneDevice):
    devices = "2"

    def start(self):
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        self.scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope


class DistributedDataParallel(OneDevice):
    """Each process has its part of the examples, in a loop of its own."""

    devices, processes = "2 processes", 2
    environment = {"MASTER_ADDR": "127.0.0.1"}

    def start(self):
        import torch

        os.environ["MASTER_PORT"] = self.port
        torch.distributed.init_process_group(
            "gloo", rank=self.number, world_size=self.processes
        )

    def fit(self, model, x, y):
        import torch

        part = ROWS // self.processes
        rows = slice(self.number * part, (self.number + 1) * part)
        x, y = _tensors(x, rows), _tensors(y, rows)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        model.optimizer.build(model.trainable_variables)
        for _ in range(FIT["epochs"]):
            model.zero_grad()
            loss_function()(y, wrapped(x)).backward()
            gradients = [v.value.grad for v in model.trainable_variables]
            with torch.no_grad():
                model.optimizer.apply(gradients)

    def fit_bank(self, bank, x, y, names):
        self.fit(bank.model, [x, bank.ids(names)], y)


def _tensors(x, rows):
    import torch

    if isinstance(x, dict):
        return {key: _tensors(value, rows) for key, value in x.items()}
    if isinstance(x, list):
        return [_tensors(value, rows) for value in x]
    return torch.tensor(x[rows])


ENGINES = {
    "jax DataParallel": DataParallel,
    "jax ModelParallel": ModelParallel,
    "jax ModelParallel, 2 x 4": ModelParallel2x4,
    "jax DataParallel, 2 processes": DataParallelInProcesses,
    "jax ModelParallel, 2 processes": ModelParallelInProcesses,
    "tensorflow MirroredStrategy": MirroredStrategy,
    "torch DistributedDataParallel": DistributedDataParallel,
}


# ---- The calls.


def make_backbone():
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_query_heads=8,
        num_key_value_heads=8,
        hidden_dim=32,
        intermediate_dim=64,
    )


def loss_function():
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Calls:
    """What users call, from top to bottom; returns what came out, by kind."""

    def __init__(self, engine, folder):
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, VOCABULARY, (ROWS, LENGTH)).astype("int32")
        self.x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
        self.y = np.roll(tokens, -1, axis=1)
        begun = (np.arange(LENGTH) < 5) * np.ones_like(tokens)
        self.prompts = {"token_ids": tokens, "padding_mask": begun}
        self.file = f"{folder}/{engine.number}.vera.safetensors"
        self.engine = engine

    def compile(self, model):
        import keras

        model.compile(keras.optimizers.Adam(0.01), loss_function())

    def outputs(self):
        found = {"loss": self.engine.loss(self.model, self.x, self.y)}
        if "predict" not in self.engine.cannot:
            found.update(self.predict())
        return found

    def enable_vera(self):
        import keras_hub

        import keras_vera

        self.model = keras_hub.models.LlamaCausalLM(
            make_backbone(), preprocessor=None
        )
        self.compile(self.model)
        keras_vera.enable_vera(self.model, rank=8, targets="all-linear")
        return self.outputs()

    def fit(self):
        self.engine.fit(self.model, self.x, self.y)
        return self.outputs()

    def predict(self):
        return {"outputs": self.model.predict(self.x, verbose=0)}

    def generate(self):
        made = self.model.generate(self.prompts, stop_token_ids=None)
        return {"tokens": made["token_ids"]}

    def base_model(self):
        import keras_vera

        with keras_vera.base_model(self.model):
            return self.outputs()

    def save_adapter(self):
        import keras_vera

        keras_vera.save_adapter(self.model, self.file)
        return _numbers(self.file)

    def bank_fit(self):
        import keras_vera

        self.bank = keras_vera.AdapterBank(self.model, capacity=7)
        self.bank.add("ann")
        self.bank.load("bob", self.file)
        self.compile(self.bank.model)
        self.engine.fit_bank(self.bank, self.x, self.y, NAMES)
        self.bank.save("bob", self.file)
        return _numbers(self.file)

    def bank_predict(self):
        some = {key: value[SOME] for key, value in self.x.items()}
        return {"outputs": self.bank.predict(some, NAMES[SOME])}

    def bank_generate(self):
        some = {key: value[SOME] for key, value in self.prompts.items()}
        made = self.bank.generate(some, NAMES[SOME], stop_token_ids=None)
        return {"tokens": made["token_ids"]}

    def load_adapter(self):
        import keras_vera

        # What the bank has trained.
        keras_vera.disable_vera(self.model)
        keras_vera.load_adapter(self.model, self.file)
        return self.outputs()

    def merge(self):
        import keras_vera

        keras_vera.merge(self.model)
        return self.outputs()


CALLS = [name for name in vars(Calls) if name[0] != "_"][2:]


def _numbers(path):
    from safetensors.numpy import load_file

    return load_file(path)


# ---- Processes.


def run_child(name, number, port, folder):
    engine = engine_of(name, int(number), port)
    engine.start()
    results = {}
    with engine.scope():
        calls = Calls(engine, folder)
        for call in CALLS:
            if call in engine.cannot:
                continue
            try:
                found = getattr(calls, call)()
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            for kind, value in found.items():
                results[f"{call} {kind}"] = np.asarray(value)
    if engine.number == 0:
        np.savez(f"{folder}/results.npz", **results)


def engine_of(name, number=0, port=None):
    backend, _, rest = name.partition(" ")
    return (ENGINES[name] if rest else OneDevice)(backend, number, port)


def run(name):
    """Returns the results of an engine; a backend's name: of one device."""
    engine = engine_of(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", name]
                + [str(number), port, folder],
                env={
                    **os.environ,
                    "KERAS_BACKEND": engine.backend,
                    **engine.environment,
                },
            )
            for number in range(engine.processes)
        ]
        try:
            if any([child.wait() for child in children]):
                sys.exit(f"{name} failed.")
        finally:
            for child in children:
                child.kill()
        path = pathlib.Path(folder, "results.npz")
        with np.load(path) as results:
            return dict(results)


def cell(call, made, expected):
    """Returns the largest difference of what a call returned."""
    differences = []
    for key in made:
        if key.split()[0] != call:
            continue
        if key.endswith(" error"):
            return f"FAILED: {made[key]}"
        a, b = made[key].astype("float64"), expected[key].astype("float64")
        if key.endswith(" tokens"):
            return f"{(a != b).sum()} tokens"
        differences.append(np.abs(a - b).max())
    return f"{max(differences):.0e}"


def main():
    args = parse_arguments()
    if args.child:
        return run_child(*args.child)
    columns, reasons = {}, []
    one = {}
    for name in args.engines:
        engine = engine_of(name)
        if engine.backend not in one:
            one[engine.backend] = run(engine.backend)
        made = run(name)
        title = f"{name.partition(',')[0]}, {engine.devices}"
        columns[title] = shown = {}
        for call in CALLS:
            if call in engine.cannot:
                if engine.cannot[call] not in reasons:
                    reasons.append(engine.cannot[call])
                shown[call] = f"({1 + reasons.index(engine.cannot[call])})"
            else:
                shown[call] = cell(call, made, one[engine.backend])
    print("| |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for call in CALLS:
        row = " | ".join(shown[call] for shown in columns.values())
        print(f"| `{call}` | {row} |")
    for number, reason in enumerate(reasons, 1):
        print(f"\n({number}) {reason}")
    if "FAILED" in str(columns):
        sys.exit(1)


if __name__ == "__main__":
    main()
