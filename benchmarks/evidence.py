"""Accuracy of each method against the numbers that it trains.

Every method trains the same model with the same head, batches and number of
steps. Its rate is searched on the validation data, with one seed, by factors
of 2, until the best is not the last in a row; the other seeds train with the
best one. Each run appends a line of JSON to a file, and what the file has is
not trained again, so that the script may be stopped at any time, and asked for
more later or on another machine. Ends with a table of all in the file.

Rates of the head are those of `--rest` for all, and searched for the head
alone. What trains beside the head is counted without it.

    python benchmarks/evidence.py --output evidence.jsonl
    python benchmarks/evidence.py --output evidence.jsonl --data DIR \\
        --tasks sst2 --methods lora8 vera256 --seeds 5
"""

import argparse
import contextlib
import io
import json
import pathlib
import tempfile
import time

import keras
import methods as ways
import numpy as np
from quality import example
from quality import sst2_as_table

EXAMPLES = {
    "docstrings": "text_classification",
    "sst2": "text_classification",
    "digits": "image_classification",
}
# Where the search begins.
RATES = {"head": 0.008, "full": 0.0001, "lora": 0.004, "vera": 0.05}
KEY = ["task", "method", "targets", "steps", "batch_size", "seed", "rate"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="file of JSON lines")
    parser.add_argument("--data", help="a folder with `sst2` in it")
    parser.add_argument("--tasks", nargs="+", default=["docstrings"])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[
            *("head", "full", "lora1", "lora4", "lora8", "lora32"),
            *("vera256", "vera256-blocks", "vera1024-blocks"),
            *("vera256-groups8", "vera256-scale", "vera256-norm"),
        ],
        help="as in `methods.py`",
    )
    parser.add_argument("--targets", nargs="+", default=["all-linear"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rest", type=float, default=3e-3)
    parser.add_argument("--limit", type=int, help="examples per split")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="instead of the search"
    )
    return parser.parse_args()


class Runs:
    """The runs of a file, and those that are made."""

    def __init__(self, args):
        self.args, self.path = args, pathlib.Path(args.output)
        self.names = {}
        # Of what an example makes, such as a pretrained model.
        self.folder = tempfile.TemporaryDirectory()

    def lines(self):
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def loss(self, run):
        """Returns the loss on validation data, after training if need be."""
        for line in self.lines():
            if all(line[name] == run[name] for name in KEY):
                return line["loss"]
        start = time.perf_counter()
        found = train(self.args, self.task(run["task"]), run)
        found["seconds"] = round(time.perf_counter() - start)
        with self.path.open("a") as file:
            file.write(json.dumps({**run, **found}) + "\n")
        print(f"{run} {found}", flush=True)
        return found["loss"]

    def task(self, name):
        """Returns what the cells of the task's example define."""
        if name not in self.names:
            folder = self.folder.name
            options = ["--output_dir", folder]
            if name == "sst2":
                options += ["--data", sst2_as_table(folder, self.args.data)]
            if self.args.limit is not None:
                options += ["--limit", self.args.limit]
            with contextlib.redirect_stdout(io.StringIO()):
                self.names[name] = example(options, EXAMPLES[name])
        return self.names[name]


def train(args, names, run):
    """Returns what came of one training."""
    keras.backend.clear_session()
    model = names["make_classifier"](run["seed"])
    model, own = ways.apply(run["method"], model, run["targets"], run["seed"])
    model.compile(
        ways.optimizer(
            run["method"], model, own, run["rate"], args.rest, run["steps"]
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # The same batches for every method.
    rng = np.random.default_rng(run["seed"])
    x, y = names["x_train"], names["y_train"]
    needed = run["steps"] * run["batch_size"]
    order = [rng.permutation(len(y)) for _ in range(-(-needed // len(y)))]
    order = np.concatenate(order)[:needed]
    model.fit(
        keras.tree.map_structure(lambda array: array[order], x),
        y[order],
        batch_size=run["batch_size"],
        shuffle=False,
        verbose=0,
    )
    found = {"numbers": sum(int(np.prod(v.shape)) for v in own)}
    for prefix, data in (
        ("", names["validation_data"]),
        ("test_", (names["x_test"], names["y_test"])),
    ):
        loss, accuracy = model.evaluate(*data, verbose=0)
        found.update({f"{prefix}loss": loss, f"{prefix}accuracy": accuracy})
    return found


def best_rate(loss_of, start):
    """Returns the rate with the least loss, of those a factor of 2 apart."""
    losses = {rate: loss_of(rate) for rate in (start, 2 * start)}
    while True:
        best = min(losses, key=losses.get)
        if best == min(losses):
            losses[best / 2] = loss_of(best / 2)
        elif best == max(losses):
            losses[best * 2] = loss_of(best * 2)
        else:
            return best


def start_of(method):
    return next(x for name, x in RATES.items() if method.startswith(name))


def table(lines):
    """Yields a line for each method of each task: seeds at its best rate."""
    settings = [KEY[:5]] + [[line[x] for x in KEY[:5]] for line in lines]
    for setting in dict.fromkeys(map(tuple, settings[1:])):
        same = [x for x in lines if tuple(x[y] for y in KEY[:5]) == setting]
        swept = [x for x in same if x["seed"] == 0]
        if not swept:
            continue
        rate = min(swept, key=lambda x: x["loss"])["rate"]
        seeds = [x for x in same if x["rate"] == rate]
        task, method, targets, steps, batch_size = setting
        shown = [
            f"{np.mean([x[name] for x in seeds]):.4f} "
            f"({min(x[name] for x in seeds):.4f} to "
            f"{max(x[name] for x in seeds):.4f})"
            for name in ("test_accuracy", "test_loss")
        ]
        yield (
            f"| {task}, {steps} x {batch_size} | {method} | {targets} | "
            f"{seeds[0]['numbers']:,} | {rate:g} | {len(seeds)} | "
            + " | ".join(shown)
            + " |"
        )


HEADING = (
    "| task, steps | method | targets | numbers | rate | seeds | test accuracy "
    "| test loss |\n|" + "---|" * 8
)


def main():
    args = parse_arguments()
    runs = Runs(args)
    for task in args.tasks:
        for method in args.methods:
            # The head alone and all have no targets.
            targets = args.targets
            for target in ["-"] if method in ("head", "full") else targets:
                values = [task, method, target, args.steps, args.batch_size]

                def loss_of(rate, seed=0, values=values):
                    run = dict(zip(KEY, [*values, seed, rate], strict=True))
                    return runs.loss(run)

                if args.rates:
                    losses = {rate: loss_of(rate) for rate in args.rates}
                    rate = min(losses, key=losses.get)
                else:
                    rate = best_rate(loss_of, start_of(method))
                for seed in range(1, args.seeds):
                    loss_of(rate, seed)
    print(HEADING)
    for line in table(runs.lines()):
        print(line)


if __name__ == "__main__":
    main()
