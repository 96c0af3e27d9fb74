"""Loss against the rate of d and b, by the formula alone, in NumPy.

A residual network, `h + tanh(h W) / sqrt(layers)` in each layer, learns what
another one of the same kind gives, whose kernels differ from its own by random
ones of rank 4. Only d and b train, with Adam, a warm-up and a decay by a
cosine. Each row has another number of layers, width, rank, structure, share of
layers that are adapted, number of steps, or ratio of the two rates. The loss is
a mean of the last fifth of the steps, over that of the network as it was.

    python benchmarks/rates_of_formula.py
    python benchmarks/rates_of_formula.py --rows 3 4 --rates 0.05 0.1
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np

BATCH = 32
D_INITIAL = 0.1


@dataclass
class Row:
    layers: int = 8
    width: int = 64
    rank: int = 64
    blocks: int = 1
    every: int = 1  # Every how many layers one is adapted.
    steps: int = 80
    ratio: float = 1.0  # Of the rates of d and b, whose product stays.


ROWS = [
    Row(),
    Row(layers=2),
    Row(layers=24),
    Row(rank=16),
    Row(rank=256),
    Row(width=32),
    Row(width=128),
    Row(blocks=4),
    Row(every=4),
    Row(layers=2, rank=256),
    Row(layers=2, steps=800),
    Row(layers=2, steps=800, rank=256),
    Row(layers=2, steps=3200),
    Row(rank=256, ratio=1 / 16),
    Row(rank=256, ratio=16),
]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", type=int, default=list(range(len(ROWS)))
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[0.01, 0.02, 0.04, 0.08, 0.16, 0.32],
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def shared_pair(rng, row):
    """Returns A and B with their Kaiming factors."""
    size, s = (row.width, row.rank), row.blocks
    a = rng.uniform(-math.sqrt(3), math.sqrt(3), size)
    b_matrix = rng.uniform(-math.sqrt(3), math.sqrt(3), size[::-1])
    block = np.arange(row.width) * s // row.width
    channel = np.arange(row.rank)
    a *= (block[:, None] == channel % s) * math.sqrt(2 * s / row.width)
    b_matrix *= channel[:, None] // s % s == block
    b_matrix *= math.sqrt(2 * s / row.rank)
    return a.astype("float32"), b_matrix.astype("float32")


class Adam:
    """Every number by itself, with Keras' defaults but a smaller epsilon."""

    def __init__(self, variables):
        self.state = [(np.zeros_like(v), np.zeros_like(v)) for v in variables]
        self.variables = variables
        self.iterations = 0

    def step(self, gradients, rate):
        self.iterations += 1
        rate *= math.sqrt(1 - 0.999**self.iterations)
        rate /= 1 - 0.9**self.iterations
        for variable, gradient, (mean, square) in zip(
            self.variables, gradients, self.state, strict=True
        ):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            variable -= np.float32(rate) * mean / (np.sqrt(square) + 1e-12)


def forward(kernels, h):
    """Returns inputs of all layers, with the output, and their tanhs."""
    inputs, tanhs = [h], []
    for kernel in kernels:
        tanhs.append(np.tanh(h @ kernel))
        h = h + tanhs[-1] / np.float32(math.sqrt(len(kernels)))
        inputs.append(h)
    return inputs, tanhs


def trained_loss(row, rate, seed=0):
    """Returns the loss at the end over that of the network as it was."""
    rng = np.random.default_rng(seed)
    a, b_matrix = shared_pair(rng, row)

    def normal(*shape):
        return rng.normal(size=shape).astype("float32")

    width = row.width
    kernels = [normal(width, width) / np.sqrt(width) for _ in range(row.layers)]
    teacher = [
        kernel + normal(width, 4) @ normal(4, width) / 4 / np.sqrt(width)
        for kernel in kernels
    ]
    kernels, teacher = (
        [kernel.astype("float32") for kernel in each]
        for each in (kernels, teacher)
    )
    adapted = range(0, row.layers, row.every)
    d = [np.full(row.rank, D_INITIAL, "float32") for _ in adapted]
    b = [np.zeros(width, "float32") for _ in adapted]
    adam_d, adam_b = Adam(d), Adam(b)
    warmup = max(1, row.steps // 10)
    losses, losses_before = [], []
    for step in range(row.steps):
        x = normal(BATCH, width)
        y = forward(teacher, x)[0][-1]
        adapted_kernels = list(kernels)
        for layer, d_, b_ in zip(adapted, d, b, strict=True):
            adapted_kernels[layer] = kernels[layer] + (a * d_) @ b_matrix * b_
        inputs, tanhs = forward(adapted_kernels, x)
        error = inputs[-1] - y
        losses.append(np.mean(error**2))
        losses_before.append(np.mean((forward(kernels, x)[0][-1] - y) ** 2))
        gradient = error / BATCH
        d_gradients, b_gradients = [], []
        for layer in reversed(range(row.layers)):
            g = gradient * (1 - tanhs[layer] ** 2)
            g /= np.float32(math.sqrt(row.layers))
            if layer in adapted:
                i = layer // row.every
                bm = b_matrix * ((inputs[layer] @ a).T @ g)
                d_gradients.insert(0, bm @ b[i])
                b_gradients.insert(0, d[i] @ bm)
            gradient = gradient + g @ adapted_kernels[layer].T
        progress = max(0, step + 1 - warmup) / max(1, row.steps - warmup)
        factor = (1 + math.cos(math.pi * progress)) / 2
        factor *= min(1, (step + 1) / warmup)
        adam_d.step(d_gradients, rate * factor * math.sqrt(row.ratio))
        adam_b.step(b_gradients, rate * factor / math.sqrt(row.ratio))
    last = row.steps // 5
    return np.mean(losses[-last:]) / np.mean(losses_before[-last:])


def main():
    args = parse_arguments()
    for index in args.rows:
        row = ROWS[index]
        losses = {
            rate: trained_loss(row, rate, args.seed) for rate in args.rates
        }
        best = min(losses, key=losses.get)
        shown = ", ".join(f"{rate:g}: {x:.3f}" for rate, x in losses.items())
        print(f"{row}: best {best:g} of {shown}", flush=True)


if __name__ == "__main__":
    main()
