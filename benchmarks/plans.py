"""Flops of one adapted layer in each of its forms, by the number of tokens.

Counts what XLA compiles for a training step, forward and backward, in which
the gradient also goes on to the layer's input, and divides it by what the
frozen layer takes. Nothing is run, so the numbers are the same everywhere.
Prints a table and draws the figure of `docs/how-it-works.md`.

    python benchmarks/plans.py --output docs/_static/plans.svg
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras

import keras_vera

FORMS = ("additive", "folded", "auto")
LORA = "Keras LoRA, rank 8"


def make(width, rank, form):
    layer = keras.layers.Dense(width, use_bias=False)
    model = keras.Sequential([keras.Input((width,)), layer])
    if form is None:
        layer.trainable = False
    elif form == LORA:
        layer.enable_lora(8)
    else:
        structure = "blocks" if form == "blocks" else "dense"
        plan = "auto" if form == "blocks" else form
        keras_vera.enable_vera(
            model,
            rank=rank,
            targets="all-linear",
            structure=structure,
            plan=plan,
        )
    return model


def count(model, tokens, width):
    """Returns the flops of a forward and a backward pass."""

    def loss(trained, x):
        frozen = [v.value for v in model.non_trainable_variables]
        outputs, _ = model.stateless_call(trained, frozen, x, training=True)
        return jnp.vdot(outputs, outputs)

    trained = [v.value for v in model.trainable_variables]
    x = jax.ShapeDtypeStruct((tokens, width), "float32")
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return step.lower(trained, x).compile().cost_analysis()["flops"]


def counts(width, rank, tokens):
    """Returns the flops of each form, as ratios to the frozen layer's."""
    models = {
        form: make(width, rank, form) for form in (*FORMS, "blocks", LORA)
    }
    floors = [count(make(width, rank, None), t, width) for t in tokens]
    return {
        form: [
            count(model, t, width) / floor
            for t, floor in zip(tokens, floors, strict=True)
        ]
        for form, model in models.items()
    }


def draw(found, tokens, width, rank, output):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "keras_vera"
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for form, ratios in found.items():
        is_ours = form in ("auto", "blocks")
        axes.plot(
            tokens,
            ratios,
            linewidth=2.5 if is_ours else 1.2,
            linestyle="-" if is_ours else "--",
            label={"auto": "auto, the default"}.get(form, form),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("flops / frozen layer")
    axes.set_title(
        f"A training step of one {width} x {width} layer, rank {rank}"
    )
    axes.legend()
    figure.savefig(output, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[2**k for k in range(16)]
    )
    parser.add_argument("--output", help="where to draw the figure, an SVG")
    args = parser.parse_args()
    found = counts(args.width, args.rank, args.tokens)
    print(f"| tokens | {' | '.join(found)} |")
    print(f"|---|{'---|' * len(found)}")
    for i, number in enumerate(args.tokens):
        cells = " | ".join(f"{ratios[i]:.2f}" for ratios in found.values())
        print(f"| {number:,} | {cells} |")
    if args.output:
        draw(found, args.tokens, args.width, args.rank, args.output)


if __name__ == "__main__":
    main()
