"""What a training step sends between devices, counted in the compiled program.

Compiles, but does not run, a training step of a small Llama on eight simulated
devices, with the layouts of `keras_vera.layout_map`, and adds up the results of
its collectives (`all-gather` and so on) and the memory that XLA needs for them:
of the frozen model, in which one scale of the first block trains, and beside it
of VeRA and of Keras' LoRA, on all linear layers.

    python benchmarks/collectives.py
    python benchmarks/collectives.py --mesh 2 4 --rank 256 --each
"""

import argparse
import collections
import math
import os
import re

DEVICES = 8
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={DEVICES}"
)

import jax  # noqa: E402
import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402

import keras_vera  # noqa: E402
from keras_vera import _keras  # noqa: E402

LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)
# `%name = f32[8,64]{1,0} all-gather(...)`, or a tuple of results.
COLLECTIVE = re.compile(
    r"^\s*(ROOT )?\S+ = (?P<results>\S+|\(.*?\)) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all"
    r"|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"(?P<dtype>[a-z]+(?P<bits>\d+)?)\[(?P<shape>[\d,]*)\]")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mesh", type=int, nargs=2, default=[1, DEVICES])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=688)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--structure", default="dense")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--each", action="store_true", help="print each collective"
    )
    return parser.parse_args(arguments)


# ---- The model.


def make_backbone(args, layers):
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=args.vocabulary,
        num_layers=layers,
        num_query_heads=args.heads,
        num_key_value_heads=args.heads,
        hidden_dim=args.hidden,
        intermediate_dim=args.ffn,
    )


def frozen(backbone, args):
    """Trains biases of the first block, such that all gradients pass that
    adapters need."""
    for variable in backbone.trainable_variables:
        variable.trainable = False
    for layer in backbone._flatten_layers():
        first = "transformer_layer_0/" in (layer.path or "")
        if first and layer.name in ("query", "key", "value"):
            with _keras.new_state_allowed(layer):
                layer.bias = layer.add_weight(
                    name="bias", shape=layer.kernel.shape[1:]
                )


def vera(backbone, args):
    keras_vera.enable_vera(
        backbone,
        rank=args.rank,
        targets=args.targets,
        structure=args.structure,
    )


def lora(backbone, args):
    names = {
        "all-linear": [
            *("query", "key", "value", "attention_output"),
            *("feedforward_gate_dense", "feedforward_intermediate_dense"),
            "feedforward_output_dense",
        ],
        "attention-qv": ["query", "value"],
    }
    backbone.enable_lora(8, target_layer_names=names[args.targets])


METHODS = {"frozen": frozen, "VeRA": vera, "LoRA 8": lora}


def compiled_step(args, method):
    """Returns the compiled program of a training step."""
    mesh = keras.distribution.DeviceMesh(tuple(args.mesh), ("batch", "model"))
    layouts = keras_vera.layout_map(make_backbone(args, 1), mesh, args.targets)
    layouts[".*/bias"] = ("model", None)
    distribution = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
    with distribution.scope():
        backbone = make_backbone(args, args.layers)
        METHODS[method](backbone, args)
        shape = args.batch, args.sequence
        inputs = {
            "token_ids": np.zeros(shape, "int32"),
            "padding_mask": np.ones(shape, "int32"),
        }
        where = distribution.get_data_layout(shape)
        inputs = jax.device_put(inputs, where.backend_layout)
        return _compile(backbone, inputs)


def _compile(backbone, inputs):
    trained = [v.value for v in backbone.trainable_variables]
    others = [v.value for v in backbone.non_trainable_variables]

    def loss(trained, others, inputs):
        outputs, _ = backbone.stateless_call(
            trained, others, inputs, training=True
        )
        return keras.ops.mean(keras.ops.square(outputs))

    def step(trained, others, inputs):
        gradients = jax.grad(loss)(trained, others, inputs)
        return [v - 0.1 * g for v, g in zip(trained, gradients)]

    places = [v.sharding for v in trained]
    step = jax.jit(step, out_shardings=places, donate_argnums=0)
    return step.lower(trained, others, inputs).compile()


# ---- What is in the program.


def collectives(text):
    """Yields the kind and the bytes of the results of each collective."""
    for line in text.splitlines():
        found = COLLECTIVE.search(line)
        if found is not None:
            yield found["kind"], _bytes(found["results"]), line


def _bytes(results):
    return sum(
        math.prod(int(x) for x in array["shape"].split(",") if x)
        * int(array["bits"] or 8)
        // 8
        for array in ARRAY.finditer(results)
    )


def count(args, method):
    """Returns bytes by kind of collective, and `temporaries`."""
    program = compiled_step(args, method)
    counts = collections.Counter()
    for kind, size, line in collectives(program.as_text()):
        counts[kind] += size
        if args.each:
            name = re.search(r'op_name="([^"]*)"', line)
            groups = re.search(r"replica_groups=(\S+),", line)
            print(
                f"  {method}: {kind} {size:,} "
                f"{COLLECTIVE.search(line)['results']} "
                f"{name and name[1]} {groups and groups[1]}"
            )
    memory = program.memory_analysis()
    counts["temporaries"] = memory.temp_size_in_bytes
    counts["arguments"] = memory.argument_size_in_bytes
    return counts


def main():
    args = parse_arguments()
    counts = {method: count(args, method) for method in args.methods}
    kinds = sorted({kind for found in counts.values() for kind in found})
    print("| bytes |", " | ".join(kinds), "|")
    print("|---|" + "---|" * len(kinds))
    for method, found in counts.items():
        print(f"| {method} |", " | ".join(f"{found[k]:,}" for k in kinds), "|")


if __name__ == "__main__":
    main()
