"""Accuracy of each method against the numbers that it trains.

Every method trains the same model with the same head, batches and number of
steps. Its rate is searched on the validation data, with one seed, by factors
of 2, until the best is not the last in a row; the other seeds train with the
best one. Each run appends a line of JSON to a file, and what the file has is
not trained again, so that the script may be stopped at any time, and asked for
more later or on another machine. Ends with two tables of all in the file, and
with `--figure` a figure of accuracies against trained numbers. No `--methods`:
nothing is trained.
Options that are not its own go to the task's example, such as `--limit`.

Rates of the head are those of `--rest` for all, and searched for the head
alone. What trains beside the head is counted without it.

    python benchmarks/evidence.py --output evidence.jsonl
    python benchmarks/evidence.py --output evidence.jsonl --data DIR \\
        --tasks sst2 --methods lora8 vera256 --seeds 5
    python benchmarks/evidence.py --output evidence.jsonl --tasks e2e \\
        --methods lora8 vera256 --steps 80 --batch_size 8

How the loss depends on the rate of the vectors, for what might move the best:

    python benchmarks/evidence.py --output evidence.jsonl --steps 80 \\
        --methods vera64 vera256 vera1024 vera256-blocks \\
        --rates 0.01 0.02 0.04 --seeds 1
"""

import argparse
import json
import pathlib
import tempfile
import time

import keras
import methods as ways
import numpy as np
import tasks

from keras_vera import optimizers

# Where the search begins; that of VeRA at the default of `vera_optimizer` for
# many layers.
RATES = {"head": 0.008, "full": 0.0001, "lora": 0.001}
SETTING = ["task", "method", "targets", "steps", "batch_size"]
KEY = [*SETTING, "seed", "rate"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="file of JSON lines")
    parser.add_argument("--figure", help="where to draw accuracies, an SVG")
    parser.add_argument("--data", help="a folder with `sst2` in it")
    parser.add_argument("--tasks", nargs="+", default=["docstrings"])
    parser.add_argument(
        "--methods",
        nargs="*",
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
    parser.add_argument(
        "--rates", nargs="+", type=float, help="instead of the search"
    )
    return parser.parse_known_args()


class Runs:
    """The runs of a file, and those that are made."""

    def __init__(self, args, options):
        self.args, self.options = args, options
        self.path = pathlib.Path(args.output)
        self.tasks = {}
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
        name = run["task"]
        if name not in self.tasks:
            self.tasks[name] = tasks.load(
                name, self.folder.name, self.args.data, self.options
            )
        start = time.perf_counter()
        found = train(self.tasks[name], run, self.args.rest)
        found["seconds"] = round(time.perf_counter() - start)
        with self.path.open("a") as file:
            file.write(json.dumps({**run, **found}) + "\n")
        print(f"{run} {found}", flush=True)
        return found["loss"]


def train(task, run, rest):
    """Returns what came of one training."""
    keras.backend.clear_session()
    model = task.make_model(run["seed"])
    model, own = ways.apply(run["method"], model, run["targets"], run["seed"])
    optimizer = ways.optimizer(
        run["method"], model, own, run["rate"], rest, run["steps"]
    )
    size = run["batch_size"]
    tasks.train(task, model, optimizer, run["steps"], size, run["seed"])
    found = {"numbers": sum(int(np.prod(v.shape)) for v in own)}
    for prefix, part in (("", task.validation), ("test_", task.test)):
        measured = tasks.measure(model, part, size)
        found.update({prefix + key: x for key, x in measured.items()})
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


def start_of(method, steps):
    if method.startswith("vera"):
        return float(f"{optimizers._default_rate(steps):.3g}")
    return next(x for name, x in RATES.items() if method.startswith(name))


def settings_of(lines):
    """Yields each setting of a task and a method, with its lines."""
    for setting in dict.fromkeys(tuple(x[y] for y in SETTING) for x in lines):
        yield (
            setting,
            [x for x in lines if tuple(x[y] for y in SETTING) == setting],
        )


def at_best_rates(lines):
    """Yields each setting with its lines of the best rate, one a seed."""
    for setting, same in settings_of(lines):
        swept = [x for x in same if x["seed"] == 0]
        if swept:
            rate = min(swept, key=lambda x: x["loss"])["rate"]
            yield setting, [x for x in same if x["rate"] == rate]


def mean_and_ends(seeds, name):
    values = [x[name] for x in seeds]
    return np.mean(values), min(values), max(values)


def table(lines):
    """Yields a line for each method of each task: seeds at its best rate."""
    yield (
        "| task, steps | method | targets | numbers | rate | seeds "
        "| test accuracy | test loss |"
    )
    yield "|---" * 8 + "|"
    for (task, method, targets, steps, size), seeds in at_best_rates(lines):
        shown = [
            "{:.4f} ({:.4f} to {:.4f})".format(*mean_and_ends(seeds, name))
            if name in seeds[0]
            else ""
            for name in ("test_accuracy", "test_loss")
        ]
        yield (
            f"| {task}, {steps} x {size} | {method} | {targets} | "
            f"{seeds[0]['numbers']:,} | {seeds[0]['rate']:g} | {len(seeds)} | "
            + " | ".join(shown)
            + " |"
        )


def by_rate(lines):
    """Yields a line for each method of each task: validation losses."""
    yield "| task, steps | method | targets | rate: validation loss, seed 0 |"
    yield "|---" * 4 + "|"
    for (task, method, targets, steps, size), same in settings_of(lines):
        losses = {x["rate"]: x["loss"] for x in same if x["seed"] == 0}
        shown = ", ".join(f"{x:g}: {losses[x]:.3f}" for x in sorted(losses))
        yield f"| {task}, {steps} x {size} | {method} | {targets} | {shown} |"


def draw(lines, output):
    """Draws accuracies against trained numbers, a panel for each task."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "keras_vera"
    found = [x for x in at_best_rates(lines) if "test_accuracy" in x[1][0]]
    names = list(dict.fromkeys(setting[0] for setting, _ in found))
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(6 * len(names), 5),
        layout="constrained",
        squeeze=False,
    )
    for name, axes in zip(names, panels[0], strict=True):
        points = {"lora": [], "vera": [], "full": []}
        for (task, method, *_), seeds in found:
            mean, low, high = mean_and_ends(seeds, "test_accuracy")
            if task == name and method == "head":
                axes.axhline(mean, color="gray", linestyle=":")
                axes.text(
                    0, mean, " head", transform=axes.get_yaxis_transform()
                )
            elif task == name:
                point = seeds[0]["numbers"], mean, mean - low, high - mean
                points[method[:4]].append(point)
                axes.annotate(
                    method,
                    point[:2],
                    # Below, as VeRA may have as many numbers.
                    xytext=(4, -9 if method.startswith("lora") else 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        for kind, of_kind in points.items():
            if of_kind:
                x, y, low, high = zip(*sorted(of_kind), strict=True)
                line = "-" if kind == "lora" else ""
                axes.errorbar(x, y, (low, high), fmt="o" + line, capsize=2)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.2)  # Names are beside their points.
        axes.set_xlabel("trained numbers, without the head")
        axes.set_title(name)
    panels[0, 0].set_ylabel("test accuracy: mean, least and most of the seeds")
    # A point is as high in each panel.
    ends = [axes.get_ylim() for axes in panels[0]]
    height = max(high - low for low, high in ends)
    for axes, (low, high) in zip(panels[0], ends, strict=True):
        middle = (low + high) / 2
        axes.set_ylim(middle - height / 2, middle + height / 2)
    figure.savefig(output, metadata={"Date": None})


def main():
    args, options = parse_arguments()
    runs = Runs(args, options)
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
                    rate = best_rate(loss_of, start_of(method, args.steps))
                for seed in range(1, args.seeds):
                    loss_of(rate, seed)
    lines = runs.lines()
    if args.figure:
        draw(lines, args.figure)
    print("\n".join([*table(lines), "", *by_rate(lines)]))


if __name__ == "__main__":
    main()
