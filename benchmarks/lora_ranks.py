"""What an adapter is worth as LoRA of its own rank and of lower ones.

Trains VeRA on all linear layers for a task of `benchmarks/tasks.py`, such as
the text classifier (MiniLM), or the language model that writes sentences from
data (SmolLM2). Options that are not its own go to the task's example.
Writes each with `save_peft_adapter(as_lora=...)`, and prints for each rank the
bytes of the file; the share of the squared norm of the updates that it lacks,
least, mean and most of all modules; the largest error of an output on a few
examples, as a share of the largest change that the adapter makes; and how well
the model does with the updates of the file. Heads are as they were trained.

    python benchmarks/lora_ranks.py
    python benchmarks/lora_ranks.py --task e2e --steps 30 --batch_size 8
"""

import argparse
import os
import pathlib
import tempfile

import keras
import numpy as np
import safetensors.numpy
import tasks

import keras_vera
from keras_vera.layers._in_place import is_adapted
from keras_vera.peft import lora
from keras_vera.peft.families import find_family
from keras_vera.peft.families import modules_of
from keras_vera.peft.families import prefix_of

FEW = 8  # Examples, on which outputs are compared.


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="docstrings", help="or e2e")
    parser.add_argument("--rank", type=int, default=256, help="of VeRA")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--examples", type=int, help="to test with")
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[128, 64, 32, 16, 8, 1]
    )
    return parser.parse_known_args()


def trained(args, options, folder):
    """Returns a model, a few inputs, and what says how well it does."""
    task = tasks.load(args.task, folder, options=options)
    model = task.make_model(0)
    keras_vera.enable_vera(
        model, rank=args.rank, targets="all-linear", structure="blocks"
    )
    optimizer = keras_vera.vera_optimizer(total_steps=args.steps)
    tasks.train(task, model, optimizer, args.steps, args.batch_size, seed=0)
    test = tasks.first(task.test, args.examples)

    def quality():
        found = tasks.measure(model, test, args.batch_size)
        return ", ".join(f"{x:.3f}" for _, x in sorted(found.items()))

    return model, tasks.first(test[0], FEW), quality


def in_file(folder, model, modules):
    """Returns the factors of the updates in a file of LoRA, by module."""
    _, family = find_family(model)
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = safetensors.numpy.load_file(path)

    def matrix(module, which):
        before = "base_model.model." + prefix_of(model, family)
        return tensors[f"{before}{module}.lora_{which}.weight"].T

    return {x: (matrix(x, "A"), matrix(x, "B")) for x in modules}


def compare(args, model, few, quality):
    backbone, family = find_family(model)
    modules = {
        module: layers
        for module, layers in modules_of(backbone, family)[0].items()
        if all(is_adapted(layer) for layer in layers)
    }
    exact = {x: lora.module_factors(own) for x, own in modules.items()}
    print(f"{args.task}, backend {keras.config.backend()}")
    print("| | bytes | norm lacking: least, mean, most | output | quality |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "ours.vera.safetensors")
        keras_vera.save_adapter(model, path)
        row("VeRA", path, "", "", quality())
        for rank in (True, *args.ranks):
            report = keras_vera.save_peft_adapter(
                model, folder, as_lora=rank, batch=few
            )
            lost = list(report["lost"].values())
            others = in_file(folder, model, modules)
            with lora.other_updates(modules, exact, others):
                found = quality()
            row(
                "LoRA, exact" if rank is True else f"LoRA, rank {rank}",
                pathlib.Path(folder, "adapter_model.safetensors"),
                ", ".join(f"{x(lost):.3f}" for x in (min, np.mean, max)),
                f"{report['output_error'] / report['output_change']:.1e}",
                found,
            )
    with keras_vera.base_model(model):
        print(f"| no adapter | | | 1 | {quality()} |", flush=True)


def row(title, path, *cells):
    size = f"{path.stat().st_size:,}"
    print(f"| {' | '.join([title, size, *cells])} |", flush=True)


def main():
    args, options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, *trained(args, options, folder))


if __name__ == "__main__":
    main()
