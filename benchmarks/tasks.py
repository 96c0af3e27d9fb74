"""What the methods of `benchmarks/evidence.py` are compared on.

The models and the data are those of the examples.
"""

import contextlib
import io
import pathlib
import sys

import jupytext
import keras
import numpy as np

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def example(name, options, until):
    """Runs an example's cells up to a heading; returns what they define."""
    path = EXAMPLES / f"{name}.py"
    names = {"__name__": "example"}
    argv, sys.argv = sys.argv, [str(path), *map(str, options)]
    sys.path.insert(0, str(EXAMPLES))  # Examples share a file.
    try:
        for cell in jupytext.read(path).cells:
            if until in cell.source:
                return names
            if cell.cell_type == "code":
                exec(compile(cell.source, str(path), "exec"), names)
    finally:
        sys.argv = argv
        sys.path.remove(str(EXAMPLES))
    raise RuntimeError(f"{path} has no heading '{until}'.")


class Classifier:
    """A task of an example that trains a new head on a backbone."""

    def __init__(self, name, options):
        names = example(name, options, "## The head alone")
        self.make_model = names["make_classifier"]
        self.train = names["x_train"], names["y_train"], None
        self.validation = (*names["validation_data"], None)
        self.test = names["x_test"], names["y_test"], None

    def compile(self, model, optimizer):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])


class LanguageModel:
    """A task of an example that trains a language model on answers.

    Args:
        name: String, of the example.
        options: List of its options.
        arrays: Function from what the example defines to the arrays to
            train, validate and test with.
    """

    def __init__(self, name, options, arrays):
        names = example(name, options, "## The model as it is")
        self.load = names["_causal_lm"].load
        self.preset = names["args"].preset
        self.train, self.validation, self.test = arrays(names)

    def make_model(self, seed):
        keras.utils.set_random_seed(seed)
        model = self.load(self.preset)
        # It gets arrays.
        model.preprocessor = None
        return model

    def compile(self, model, optimizer):
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        )
        model.compile(optimizer, loss, weighted_metrics=[])


def _e2e(names):
    test = [(meaning, texts[0]) for meaning, texts in names["test"].items()]
    arrays = names["train_arrays"], names["validation_arrays"]
    return *arrays, names["arrays"](test)


def _instructions(names):
    pairs = names["held_out"]
    half = len(pairs) // 2
    parts = names["train"], pairs[:half], pairs[half:]
    return [names["arrays_of"](part) for part in parts]


def _sst2(folder, data):
    """Writes SST-2 as the example reads it; the example makes the splits."""
    path = pathlib.Path(folder) / "sst2.tsv"
    with open(path, "w", encoding="utf-8") as file:
        for part in ("train", "dev", "test"):
            source = pathlib.Path(data) / "sst2" / f"{part}.txt"
            for line in source.read_text(encoding="utf-8").splitlines():
                label, sentence = line.split(" ", 1)
                file.write(f"{label}\t{sentence}\n")
    return path


def load(task, folder, data=None, options=()):
    """Returns a task.

    Args:
        task: String: `"docstrings"`, `"sst2"`, `"digits"`, `"e2e"` or
            `"instructions"`.
        folder: A folder that lives as long as the task.
        data: A folder with `sst2` in it.
        options: List of options of the example.
    """
    options = [*options, "--output_dir", folder]
    if task == "sst2":
        options += ["--data", _sst2(folder, data)]
    with contextlib.redirect_stdout(io.StringIO()):
        if task == "digits":
            return Classifier("image_classification", options)
        # More than the examples take by default.
        if task == "e2e":
            options = ["--pairs", "480", "--held_out", "60", *options]
            return LanguageModel("data_to_text", options, _e2e)
        if task == "instructions":
            options = ["--held_out", "64", *options]
            return LanguageModel("instruction_tuning", options, _instructions)
        return Classifier("text_classification", options)


def _rows(arrays, order):
    return keras.tree.map_structure(
        lambda array: None if array is None else array[order], arrays
    )


def first(arrays, count):
    """Returns the first rows of arrays."""
    return _rows(arrays, slice(count))


def train(task, model, optimizer, steps, batch_size, seed):
    """Trains a model of a task; the same batches for every method."""
    rng = np.random.default_rng(seed)
    count, needed = len(task.train[1]), steps * batch_size
    order = [rng.permutation(count) for _ in range(-(-needed // count))]
    order = np.concatenate(order)[:needed]
    task.compile(model, optimizer)
    x, y, weights = _rows(task.train, order)
    model.fit(x, y, batch_size, sample_weight=weights, shuffle=False, verbose=0)


def measure(model, arrays, batch_size):
    """Returns the loss, and of a classifier the accuracy, by name."""
    x, y, weights = arrays
    return model.evaluate(
        x, y, batch_size, sample_weight=weights, verbose=0, return_dict=True
    )
