"""What an adapter is worth as LoRA of its own rank and of lower ones.

Trains VeRA as two examples do, on all linear layers: the text classifier
(MiniLM), and the language model that writes sentences from data (SmolLM2).
Writes each with `save_peft_adapter(as_lora=...)`, and prints for each rank the
bytes of the file; the share of the squared norm of the updates that it lacks,
least, mean and most of all modules; the largest error of an output on a few
examples, as a share of the largest change that the adapter makes; and how well
the model does with the updates of the file. Heads are as they were trained.

    python benchmarks/lora_ranks.py
    python benchmarks/lora_ranks.py --tasks docstrings --epochs 1
    python benchmarks/lora_ranks.py --tasks e2e --steps 30
"""

import argparse
import contextlib
import io
import os
import pathlib
import tempfile

import keras
import numpy as np
import safetensors.numpy
from tasks import example

import keras_vera
from keras_vera.layers._in_place import is_adapted
from keras_vera.peft import lora
from keras_vera.peft.families import find_family
from keras_vera.peft.families import modules_of
from keras_vera.peft.families import prefix_of

FEW = 8  # Examples, on which outputs are compared.


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["docstrings", "e2e"])
    parser.add_argument("--rank", type=int, default=256, help="of VeRA")
    parser.add_argument("--epochs", type=int, default=3, help="of docstrings")
    parser.add_argument("--steps", type=int, default=60, help="of e2e")
    parser.add_argument("--limit", type=int, help="sentences per split")
    parser.add_argument("--validation", type=int, default=64, help="e2e pairs")
    parser.add_argument("--preset", help="in the place of SmolLM2")
    parser.add_argument("--length", type=int, default=96, help="e2e tokens")
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[128, 64, 32, 16, 8, 1]
    )
    return parser.parse_args()


def docstrings(args, folder):
    """Returns a trained text classifier, a few inputs, and its test."""
    options = ["--epochs", args.epochs, "--output_dir", folder]
    if args.limit is not None:
        options += ["--limit", args.limit]
    names = example("text_classification", options, "## The head alone")
    model = names["make_classifier"]()
    keras_vera.enable_vera(
        model, rank=args.rank, targets="all-linear", structure="blocks"
    )
    optimizer = keras_vera.vera_optimizer(total_steps=names["total_steps"]())
    names["train_and_test"]("VeRA", model, optimizer)
    x, y = names["x_test"], names["y_test"]

    def quality():
        found = model.evaluate(x, y, verbose=0, return_dict=True)
        return f"{found['loss']:.3f}, {found['accuracy']:.1%}"

    return model, {key: value[:FEW] for key, value in x.items()}, quality


def e2e(args, folder):
    """Returns a trained language model, a few inputs, and its test."""
    pairs = max(args.validation, 8 * args.steps)
    options = ["--epochs", 1, "--output_dir", folder, "--limit", pairs]
    options += ["--length", args.length]
    if args.preset is not None:
        options += ["--preset", args.preset]
    names = example("data_to_text", options, "## The model as it is")
    model = names["lm"]
    keras_vera.enable_vera(
        model, rank=args.rank, targets="all-linear", structure="blocks"
    )
    optimizer = keras_vera.vera_optimizer(total_steps=args.steps)
    data = [_first(x, 8 * args.steps) for x in names["train_arrays"]]
    names["train_on"](model, data, optimizer)
    x, y, weights = (
        _first(x, args.validation) for x in names["validation_arrays"]
    )

    def quality():
        with names["_causal_lm"].taking_arrays(model):
            loss = model.evaluate(
                x, y, sample_weight=weights, batch_size=8, verbose=0
            )
        return f"{loss:.3f}"

    return model, _first(x, FEW), quality


def _first(x, count):
    if isinstance(x, dict):
        return {key: value[:count] for key, value in x.items()}
    return x[:count]


def in_file(folder, model, modules):
    """Returns the factors of the updates in a file of LoRA, by module."""
    _, family = find_family(model)
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = safetensors.numpy.load_file(path)

    def matrix(module, which):
        before = "base_model.model." + prefix_of(model, family)
        return tensors[f"{before}{module}.lora_{which}.weight"].T

    return {x: (matrix(x, "A"), matrix(x, "B")) for x in modules}


def compare(args, name, model, few, quality):
    backbone, family = find_family(model)
    modules = {
        module: layers
        for module, layers in modules_of(backbone, family)[0].items()
        if all(is_adapted(layer) for layer in layers)
    }
    exact = {x: lora.module_factors(own) for x, own in modules.items()}
    print(f"\n{name}, backend {keras.config.backend()}")
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
    args = parse_arguments()
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                trained = {"docstrings": docstrings, "e2e": e2e}[task](
                    args, folder
                )
            compare(args, task, *trained)


if __name__ == "__main__":
    main()
