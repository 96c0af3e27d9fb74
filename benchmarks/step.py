"""One training step of VeRA beside its peers: flops, memory, time.

For each installed backend, the same small BERT is trained by every method on
the same batch, one step of each in turn, so that a busy machine disturbs all
alike. Times are given as the ratio to the step of the floor in the same round:
the same model, frozen, in which only the biases of the adapted layers train,
so that gradients flow wherever an adapter needs them. Flops are counted: by
XLA's cost analysis on JAX, by PyTorch's `FlopCounterMode`, on TensorFlow the
matrix products of the program that XLA compiled.
Memory is XLA's temporary memory of the step on JAX and TensorFlow, the tensors
saved for the backward pass on PyTorch (parameters excluded; the peak on a GPU).

    python benchmarks/step.py
    python benchmarks/step.py --backends torch --targets all-linear --rounds 20
    python benchmarks/step.py --device gpu --dtype bfloat16 --hidden 4096 \\
        --heads 32 --ffn 11008 --batch 8 --sequence 512
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from importlib import metadata

QUERY_VALUE = ["query", "value"]
ALL_LINEAR = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]
HF_NAMES = {
    "qv": ["query", "value"],
    "all-linear": ["query", "key", "value", "dense"],
}
SEED = 0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--backends", nargs="+", default=["jax", "torch", "tensorflow"]
    )
    parser.add_argument("--targets", nargs="+", default=["qv", "all-linear"])
    parser.add_argument("--methods", nargs="+", help="a part of the names")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--ffn", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output_dir", default="benchmarks_output")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- The methods, on a KerasHub backbone.


def make_backbone(args):
    import keras
    import keras_hub

    keras.utils.set_random_seed(SEED)
    return keras_hub.models.BertBackbone(
        vocabulary_size=1000,
        num_layers=args.layers,
        num_heads=args.heads,
        hidden_dim=args.hidden,
        intermediate_dim=args.ffn,
        dropout=0.0,
        max_sequence_length=args.sequence,
        dtype=args.dtype,
    )


def target_layers(backbone, targets):
    import keras

    names = QUERY_VALUE if targets == "qv" else ALL_LINEAR
    return [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if layer.name in names
        and isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
    ]


def floor(backbone, targets):
    for variable in backbone.weights:
        variable.trainable = False
    for layer in target_layers(backbone, targets):
        layer.bias.trainable = True


def keras_lora(backbone, targets):
    # As `backbone.enable_lora` does it: the bias trains as well, and the
    # backbone itself stays trainable, or it would list no variables.
    backbone.trainable = True
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = False
    for layer in target_layers(backbone, targets):
        layer.trainable = True
        layer.enable_lora(8)


def full(backbone, targets):
    del targets
    backbone.trainable = True


def vera(backbone, targets, rank, structure="dense", plan="auto"):
    import keras_vera

    names = QUERY_VALUE if targets == "qv" else ALL_LINEAR
    keras_vera.enable_vera(
        backbone,
        rank=rank,
        targets=names,
        structure=structure,
        plan=plan,
    )


def naive(backbone, targets, rank):
    """VeRA as its formula is written, with the backend's own gradients."""
    from keras import ops

    def call(layer, inputs, training=None):
        contraction = layer._vera_layout.contraction
        a, b_matrix = layer.projection_slices()
        d, b = layer.vera_lambda_d, layer.vera_lambda_b
        a, b_matrix, d, b = (
            ops.cast(v, inputs.dtype) for v in (a, b_matrix, d, b)
        )
        h = ops.matmul(contraction.input_matrix(inputs), a) * d
        z = ops.matmul(h, b_matrix) * b
        # Not as an attribute: other layers must not read a base in a call.
        kernel = ops.convert_to_tensor(vars(layer)["_kernel"])
        y = contraction.product(inputs, kernel)
        y = y + contraction.output_tensor(z, ops.shape(inputs))
        y = y if layer.bias is None else y + layer.bias
        return y if layer.activation is None else layer.activation(y)

    vera(backbone, targets, rank)
    for layer in target_layers(backbone, targets):
        layer.call = types.MethodType(call, layer)


METHODS = {
    "floor": floor,
    "Keras LoRA 8": keras_lora,
    "naive VeRA 256": functools.partial(naive, rank=256),
    "naive VeRA 1024": functools.partial(naive, rank=1024),
    "VeRA 256": functools.partial(vera, rank=256),
    "VeRA 1024": functools.partial(vera, rank=1024),
    "VeRA 256 folded": functools.partial(vera, rank=256, plan="folded"),
    "VeRA 1024 folded": functools.partial(vera, rank=1024, plan="folded"),
    "VeRA 256 blocks": functools.partial(vera, rank=256, structure="blocks"),
    "VeRA 1024 blocks": functools.partial(vera, rank=1024, structure="blocks"),
    "full": full,
}


# ---- One step on each backend: `run()` trains once and waits for the result.


def batch_of(args):
    import numpy as np

    rng = np.random.default_rng(SEED)
    shape = args.batch, args.sequence
    return {
        "token_ids": rng.integers(0, 1000, shape).astype("int32"),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, "int32"),
    }


def nonzero_vectors(model):
    """b is 0 at the start, which no kernel should be able to exploit."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    for v in model.trainable_variables:
        if v.name == "vera_lambda_b":
            v.assign(rng.normal(0, 0.1, v.shape).astype("float32"))


def loss_of(outputs):
    from keras import ops

    return ops.mean(ops.square(ops.cast(outputs["sequence_output"], "float32")))


def jax_step(model, args):
    import jax
    import keras

    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    x = jax.device_put(batch_of(args))

    def loss(trained, frozen):
        outputs, _ = model.stateless_call(trained, frozen, x, training=True)
        return loss_of(outputs)

    def step(trained, state, frozen):
        value, gradients = jax.value_and_grad(loss)(trained, frozen)
        trained, state = optimizer.stateless_apply(state, gradients, trained)
        return value, trained, state

    trained = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in optimizer.variables]
    compiled = jax.jit(step).lower(trained, state, frozen).compile()
    memory = compiled.memory_analysis()

    def run():
        value, _, _ = compiled(trained, state, frozen)
        value.block_until_ready()

    run.flops = compiled.cost_analysis()["flops"]
    run.bytes = memory.temp_size_in_bytes
    return run


def tensorflow_step(model, args):
    import keras
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    x = {name: tf.constant(value) for name, value in batch_of(args).items()}

    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            value = loss_of(model(x, training=True))
        trained = model.trainable_variables
        gradients = tape.gradient(value, [v.value for v in trained])
        optimizer.apply(gradients, trained)
        return value

    def run():
        step(x).numpy()

    run.flops = xla_flops(step, x)
    run.bytes = xla_bytes(args.xla_dump)
    return run


def dump_xla():
    """Makes XLA write to a folder what TensorFlow does not tell."""
    folder = tempfile.TemporaryDirectory()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder.name}"
    return folder


def xla_bytes(folder):
    """Returns the temporary bytes of the program that was compiled last."""
    files = pathlib.Path(folder.name).glob("*_step_*buffer-assignment.txt")
    last = max(files, key=lambda file: file.stat().st_mtime_ns)
    sizes = re.findall(r"size (\d+), preallocated-temp", last.read_text())
    return sum(map(int, sizes))


def xla_flops(function, *inputs):
    """Counts the matrix products in the program that XLA compiled."""
    text = function.experimental_get_compiler_ir(*inputs)("optimized_hlo")
    shapes = dict(re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", text))
    products = re.findall(
        r"= \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?(%[\w.\-]+), .*?"
        r"lhs_contracting_dims={([\d,]*)}",
        text,
    )
    total = 0
    for output, left, contracted in products:
        left = [int(size) for size in shapes[left].split(",")]
        sizes = [int(size) for size in output.split(",") if size]
        sizes += [left[int(axis)] for axis in contracted.split(",")]
        total += 2 * math.prod(sizes)
    return total or None


def torch_step(parameters, forward, args):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-3)
    on_gpu = args.device == "gpu"

    def run():
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        run()
    run.flops = counter.get_total_flops()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        run.bytes = torch.cuda.max_memory_allocated() - before
    else:
        run.bytes = saved_bytes(parameters, forward)
    return run


def saved_bytes(parameters, forward):
    import torch

    known = {p.untyped_storage().data_ptr() for p in parameters}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    total = sum(saved.values())
    del loss
    return total


def keras_torch_step(model, args):
    from keras import ops

    x = {k: ops.convert_to_tensor(v) for k, v in batch_of(args).items()}
    return torch_step(
        [v.value for v in model.weights],
        lambda: loss_of(model(x, training=True)),
        args,
    )


# ---- PEFT, on the same architecture in Hugging Face transformers.


def peft_steps(targets, args):
    import peft
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=args.ffn,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=args.sequence,
    )
    names = HF_NAMES[targets]
    device = "cuda" if args.device == "gpu" else "cpu"
    tokens = torch.tensor(batch_of(args)["token_ids"], device=device).long()

    def make(method):
        torch.manual_seed(SEED)
        model = transformers.BertModel(config, add_pooling_layer=False)
        model = model.to(device, getattr(torch, args.dtype)).train()
        if method == "HF floor":
            for name, p in model.named_parameters():
                *_, layer, kind = name.split(".")
                p.requires_grad = kind == "bias" and layer in names
        elif method.startswith("PEFT LoRA"):
            made = peft.LoraConfig(r=8, target_modules=names)
            model = peft.get_peft_model(model, made)
        elif method.startswith("PEFT VeRA"):
            made = peft.VeraConfig(
                r=int(method.split()[-1]), target_modules=names
            )
            model = peft.get_peft_model(model, made)

        def forward():
            y = model(input_ids=tokens).last_hidden_state
            return y.float().square().mean()

        return torch_step(list(model.parameters()), forward, args)

    methods = "HF floor", "PEFT LoRA 8", "PEFT VeRA 256", "PEFT VeRA 1024"
    return {method: make(method) for method in (*methods, "HF full")}


# ---- Measuring.


def measure(steps, rounds):
    """Returns, for each step, its seconds in each round."""
    for run in steps.values():
        run()
    seconds = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds):
        # Another order each time: the one after a heavy step may be slower.
        order = names[i % len(names) :] + names[: i % len(names)]
        for name in order if i % 2 else reversed(order):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(steps, args, floor_name):
    seconds = measure(steps, args.rounds)
    rows = []
    for name, run in steps.items():
        ratios = sorted(
            own / least
            for own, least in zip(seconds[name], seconds[floor_name])
        )
        quarter = len(ratios) // 4
        rows.append(
            {
                "method": name,
                "flops": run.flops
                and run.flops / (steps[floor_name].flops or 1),
                "megabytes": run.bytes and run.bytes / 1e6,
                "ratio": statistics.median(ratios),
                "low": ratios[quarter],
                "high": ratios[-1 - quarter],
                "seconds": statistics.median(seconds[name]),
            }
        )
    return rows


def run_backend(args):
    """Measures all methods in this process; prints JSON."""
    backend, targets = args.one.split(",")
    if args.device == "cpu" and backend == "torch":
        import torch

        torch.set_num_threads(os.cpu_count())
    if backend == "tensorflow":
        args.xla_dump = dump_xla()
    steps = {}
    make_step = {
        "jax": jax_step,
        "tensorflow": tensorflow_step,
        "torch": keras_torch_step,
    }[backend]
    for name, adapt in METHODS.items():
        wanted = args.methods or [""]
        if name != "floor" and not any(part in name for part in wanted):
            continue
        model = make_backbone(args)
        adapt(model, targets)
        assert model.trainable_variables, f"{name} trains nothing."
        nonzero_vectors(model)
        steps[name] = make_step(model, args)
    rows = rows_of(steps, args, "floor")
    has_peft = importlib.util.find_spec("peft") is not None
    if backend == "torch" and has_peft and not args.methods:
        rows += rows_of(peft_steps(targets, args), args, "HF floor")
    print(json.dumps(rows))


def print_table(backend, targets, rows):
    print(f"\n{backend}, {targets}")
    print(
        f"{'':18}{'flops / floor':>14}{'MB':>9}{'time / floor':>14}"
        f"{'quartiles':>16}{'ms':>9}"
    )
    for row in rows:
        flops = "" if row["flops"] is None else f"{row['flops']:.3f}"
        size = "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        print(
            f"{row['method']:18}{flops:>14}{size:>9}{row['ratio']:14.2f}"
            f"{spread:>16}{1e3 * row['seconds']:9.1f}"
        )


def plot(results, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(4.2 * len(results), 4.5),
        sharey=False,
        layout="constrained",
        squeeze=False,
    )
    for ax, (title, rows) in zip(axes[0], results.items()):
        names = [row["method"] for row in rows][::-1]
        ratios = [row["ratio"] for row in rows][::-1]
        errors = [
            [row["ratio"] - row["low"] for row in rows][::-1],
            [row["high"] - row["ratio"] for row in rows][::-1],
        ]
        ax.barh(names, ratios, xerr=errors, color="tab:blue", alpha=0.8)
        ax.axvline(1, color="black", linewidth=1)
        ax.set_title(title)
        ax.set_xlabel("time / floor")
    figure.savefig(path, dpi=150)


def device(args):
    if args.device == "gpu":
        import torch

        return torch.cuda.get_device_name()
    cores = f"{len(os.sched_getaffinity(0))} cores"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [x.split(": ")[1] for x in lines if x.startswith("model name")]
        return f"{names[0] if names else platform.machine()}, {cores}"
    return f"{platform.machine()}, {cores}"


def main():
    args = parse_arguments()
    if args.one:
        return run_backend(args)
    results = {}
    for backend in args.backends:
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed.")
            continue
        for targets in args.targets:
            environment = {**os.environ, "KERAS_BACKEND": backend}
            environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            if args.device == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            run = subprocess.run(
                [sys.executable, *sys.argv, "--one", f"{backend},{targets}"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            if run.returncode:
                sys.exit(run.returncode)
            rows = json.loads(run.stdout.splitlines()[-1])
            results[f"{backend}, {targets}"] = rows
            print_table(backend, targets, rows)
    output_dir = pathlib.Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    plot(results, output_dir / "step.png")
    print(f"\nPython {platform.python_version()}, {device(args)}")
    names = "keras", "keras-hub", "jax", "torch", "tensorflow", "peft"
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            print(f"{name} {metadata.version(name)}", end="  ")
    print()


if __name__ == "__main__":
    main()
