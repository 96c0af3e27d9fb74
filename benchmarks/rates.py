"""Loss against the rate of `vera_optimizer`, for what might move the best one.

Trains the text classification example's model with every combination of the
arguments, each on the same batches, and appends a line of JSON for each to a
file. What the file has is not trained again, so that the script may be stopped
at any time, and asked for more later. Ends with a table of all in the file.

    python benchmarks/rates.py --output rates.jsonl
    python benchmarks/rates.py --output rates.jsonl --ranks 1024 --steps 2000
"""

import argparse
import contextlib
import io
import itertools
import json
import pathlib
import tempfile

import keras
import numpy as np
from quality import example
from quality import sst2_as_table

import keras_vera

SETTINGS = ["task", "steps", "targets", "structure", "rank", "d_initial"]
KEY = [*SETTINGS, "batch_size", "seed", "rest", "rate"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="file of JSON lines")
    parser.add_argument("--data", help="a folder with `sst2`; default: Keras")
    parser.add_argument("--limit", type=int, help="sentences per split")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rest", type=float, default=3e-3, help="rate of the head"
    )
    for name, kind, default in (
        ("steps", int, [80]),
        ("targets", str, ["all-linear"]),
        ("structures", str, ["dense"]),
        ("ranks", int, [256]),
        ("d_initials", float, [0.1]),
        ("rates", float, [0.01, 0.02, 0.04, 0.08]),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=default)
    return parser.parse_args()


def combinations(args):
    """Yields the runs that are asked for, as dicts."""
    lists = [args.steps, args.targets, args.structures, args.ranks]
    lists += [args.d_initials, [args.batch_size], [args.seed], [args.rest]]
    task = "Keras docstrings" if args.data is None else "SST-2"
    for values in itertools.product([task], *lists, args.rates):
        yield dict(zip(KEY, values, strict=True))


def read(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def sentences(args):
    """Returns what the cells of the example define."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--output_dir", folder, "--seed", args.seed]
        if args.data is not None:
            arguments += ["--data", sst2_as_table(folder, args.data)]
        if args.limit is not None:
            arguments += ["--limit", args.limit]
        with contextlib.redirect_stdout(io.StringIO()):
            return example(arguments)


def train(names, run):
    """Returns losses and the accuracy after so many steps."""
    keras.backend.clear_session()
    model = names["make_classifier"](run["seed"])
    keras_vera.enable_vera(
        model,
        rank=run["rank"],
        seed=run["seed"],
        targets=run["targets"],
        d_initial=run["d_initial"],
        structure=run["structure"],
    )
    model.compile(
        keras_vera.vera_optimizer(run["rate"], run["rest"], run["steps"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rng = np.random.default_rng(run["seed"])
    count = len(names["y_train"])
    needed = run["steps"] * run["batch_size"]
    order = [rng.permutation(count) for _ in range(-(-needed // count))]
    order = np.concatenate(order)[:needed]
    x = {name: array[order] for name, array in names["x_train"].items()}
    history = model.fit(
        x,
        names["y_train"][order],
        batch_size=run["batch_size"],
        shuffle=False,
        verbose=0,
    ).history
    loss, accuracy = model.evaluate(*names["validation_data"], verbose=0)
    return {
        "training_loss": history["loss"][0],
        "loss": loss,
        "accuracy": accuracy,
    }


def table(lines):
    """Yields a line for each setting: its loss at each rate."""
    settings = {tuple(line[x] for x in SETTINGS): [] for line in lines}
    for line in lines:
        settings[tuple(line[x] for x in SETTINGS)].append(line)
    for setting, found in settings.items():
        losses = {}
        for line in found:
            losses.setdefault(line["rate"], []).append(line["loss"])
        losses = {rate: np.mean(x) for rate, x in sorted(losses.items())}
        best = min(losses, key=losses.get)
        shown = ", ".join(f"{rate:g}: {x:.3f}" for rate, x in losses.items())
        yield f"{' '.join(map(str, setting))}: best {best:g} of {shown}"


def main():
    args = parse_arguments()
    output = pathlib.Path(args.output)
    done = [[line[name] for name in KEY] for line in read(output)]
    runs = [x for x in combinations(args) if list(x.values()) not in done]
    names = sentences(args) if runs else None
    for run in runs:
        found = train(names, run)
        with output.open("a") as file:
            file.write(json.dumps({**run, **found}) + "\n")
        print(f"{run} {found}", flush=True)
    for line in table(read(output)):
        print(line)


if __name__ == "__main__":
    main()
