"""Whether block-diagonal A and B train as well as the paper's dense pair.

Trains the text classification example's model with every structure, on the
same batches, with the same budget and learning rates, and several seeds. Each
seed makes another head, another order of the sentences and other A and B. The
data are the example's own (the sentences of Keras' docstrings) and, with
`--data DIR`, `DIR/sst2/{train,dev,test}.txt` with `label sentence` lines.

    python benchmarks/quality.py --epochs 2
    python benchmarks/quality.py --data DIR --limit 3000
"""

import argparse
import contextlib
import io
import pathlib
import statistics
import sys
import tempfile
import time

import jupytext
import keras

import keras_vera

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
FIRST_TRAINING = "## The head alone"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder with `sst2` in it")
    parser.add_argument(
        "--structures",
        nargs="+",
        default=["dense", "blocks4", "blocks8", "blocks16"],
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, help="sentences per split")
    return parser.parse_args()


def example(arguments, name="text_classification", until=FIRST_TRAINING):
    """Runs an example's cells up to the first training; returns its names."""
    path = EXAMPLES / f"{name}.py"
    names = {"__name__": "example"}
    argv, sys.argv = sys.argv, [str(path), *map(str, arguments)]
    try:
        for cell in jupytext.read(path).cells:
            if until in cell.source:
                return names
            if cell.cell_type == "code":
                exec(compile(cell.source, str(path), "exec"), names)
    finally:
        sys.argv = argv
    raise RuntimeError(f"{path} has no heading '{until}'.")


def accuracies(args, seed, folder, data):
    """Returns the test accuracy of every structure, for one seed."""
    arguments = ["--seed", seed, "--epochs", args.epochs]
    arguments += ["--output_dir", folder]
    if data is not None:
        arguments += ["--data", data]
    if args.limit is not None:
        arguments += ["--limit", args.limit]
    with contextlib.redirect_stdout(io.StringIO()):
        names = example(arguments)
    adam, rates = names["adam"], names["LEARNING_RATES"]
    found = {}
    for structure in args.structures:
        keras.backend.clear_session()
        model = names["make_classifier"]()
        keras_vera.enable_vera(
            model,
            rank=args.rank,
            seed=seed,
            targets="all-linear",
            d_initial=1.0,
            structure=structure,
        )
        optimizer = keras_vera.vera_optimizer(
            vectors=adam(rates["vera"]), rest=adam(rates["vera_head"])
        )
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            names["train_and_test"](structure, model, optimizer)
        found[structure] = 100 * names["results"][structure]["accuracy"]
        print(
            f"  seed {seed}, {structure}: {found[structure]:.1f}% in "
            f"{time.perf_counter() - start:.0f} s, "
            f"{len(names['y_train']):,} training sentences",
            flush=True,
        )
    return found


def sst2_as_table(folder, data):
    """Writes SST-2 as the example reads it; the example makes the splits."""
    path = pathlib.Path(folder) / "sst2.tsv"
    with open(path, "w", encoding="utf-8") as file:
        for part in ("train", "dev", "test"):
            source = pathlib.Path(data) / "sst2" / f"{part}.txt"
            for line in source.read_text(encoding="utf-8").splitlines():
                label, sentence = line.split(" ", 1)
                file.write(f"{label}\t{sentence}\n")
    return path


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        tasks = {"Keras docstrings": None}
        if args.data is not None:
            tasks["SST-2"] = sst2_as_table(folder, args.data)
        for task, data in tasks.items():
            print(
                f"{task}, rank {args.rank}, {args.epochs} epochs, "
                f"backend {keras.config.backend()}",
                flush=True,
            )
            runs = [
                accuracies(args, seed, folder, data)
                for seed in range(args.seeds)
            ]
            for structure in args.structures:
                values = [run[structure] for run in runs]
                differences = [
                    run[structure] - run[args.structures[0]] for run in runs
                ]
                print(
                    f"{structure:10} mean {statistics.mean(values):.2f}%, "
                    f"from {min(values):.1f}% to {max(values):.1f}%; "
                    f"to {args.structures[0]}, same seed: "
                    f"{statistics.mean(differences):+.2f} points",
                    flush=True,
                )


if __name__ == "__main__":
    main()
