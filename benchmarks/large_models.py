"""Bytes of large models on several devices, computed from shapes.

For Llama-7B, 13B and 70B (Touvron et al., 2023), on 8 devices and on 64, with
adapters on all linear layers: what a device holds, and what it takes part in
sending in one training step. Kernels are cut over 8 devices as
`keras_vera.layout_map` does; 64 devices are 8 such groups with other examples.

    python benchmarks/large_models.py
    python benchmarks/large_models.py --check 2 4

`--check` compares the same formulas with what XLA has compiled of a small
model, on as many groups of as many devices (`collectives.py`).
"""

import argparse
import collections
import dataclasses
import math
import sys

COLUMNS, ROWS = "columns", "rows"
LORA_RANK = 8
# Of d, b, A, B and the numbers of Adam. LoRA's are counted so, too.
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linear(self):
        """Yields m, n and the cut of each linear layer of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        yield from [(self.hidden, n, COLUMNS) for n in (self.hidden, kv, kv)]
        yield self.hidden, self.hidden, ROWS
        yield from [(self.hidden, self.ffn, COLUMNS)] * 2
        yield self.ffn, self.hidden, ROWS

    @property
    def numbers_cut(self):
        kernels = sum(m * n for m, n, _ in self.linear())
        return self.layers * kernels + 2 * self.vocabulary * self.hidden

    @property
    def numbers_whole(self):
        return (2 * self.layers + 1) * self.hidden  # Scales of the norms.


MODELS = {
    "Llama-7B": Model(32, 4096, 11008, 32, 32, 32000),
    "Llama-13B": Model(40, 5120, 13824, 40, 40, 32000),
    "Llama-70B": Model(80, 8192, 28672, 64, 8, 32000),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Attributes: groups of devices with other examples, the devices of a
    group, the tokens of a group, and the bytes of an activation."""

    groups: int
    devices: int
    tokens: int
    itemsize: int = 2


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The model without adapters: what all others send as well."""

    def trained(self, model, setting):
        """Returns the numbers that train, and how many a device holds."""
        return 0, 0

    def shared(self, model, setting):
        """Returns the bytes of A and B on a device."""
        return 0

    def sent(self, model, setting):
        """Returns the bytes of the results of a step's collectives, by kind
        and by how many devices take part."""
        sums = collections.Counter()
        if setting.devices > 1:
            # Forward: embeddings, and two in a block. Backward: each kernel
            # that is cut by columns; query, key and value not in the first.
            count = 1 + 2 * model.layers + 5 * model.layers - 3
            size = setting.tokens * model.hidden * setting.itemsize
            sums["all-reduce", setting.devices] = count * size
        return sums


@dataclasses.dataclass(frozen=True)
class LoRA(Frozen):
    """With each matrix cut as the side of the kernel that it is on. (Keras'
    own LoRA sends more: see `collectives.py`.)"""

    rank: int = LORA_RANK

    def trained(self, model, setting):
        whole = held = 0
        for m, n, cut in model.linear():
            whole += self.rank * (m + n)
            if cut == COLUMNS:
                held += self.rank * (m + n // setting.devices)
            else:
                held += self.rank * (m // setting.devices + n)
        return model.layers * whole, model.layers * held

    def sent(self, model, setting):
        sums = super().sent(model, setting)
        if setting.devices > 1:
            # x A of what is cut by rows, and its gradient by columns.
            layers = model.layers * len(list(model.linear()))
            size = setting.tokens * self.rank * setting.itemsize
            sums["all-reduce", setting.devices] += layers * size
        _add_gradients(sums, self, model, setting)
        return sums


@dataclasses.dataclass(frozen=True)
class VeRA(Frozen):
    rank: int = 256
    blocks: int = 1

    @property
    def width(self):
        """The numbers of a row of A that are stored."""
        return self.blocks * math.ceil(self.rank / self.blocks**2)

    def trained(self, model, setting):
        whole = held = 0
        for _, n, cut in model.linear():
            whole += self.rank + n
            held += self.rank + (n // setting.devices if cut == COLUMNS else n)
        return model.layers * whole, model.layers * held

    def shared(self, model, setting):
        m = max(m for m, _, _ in model.linear())
        n = max(n for _, n, _ in model.linear())
        return (m + n) // setting.devices * self.width * FLOAT32

    def sent(self, model, setting):
        sums = super().sent(model, setting)
        if setting.devices > 1:
            sums.update(self._sent_in_group(model, setting))
        _add_gradients(sums, self, model, setting)
        return sums

    def _sent_in_group(self, model, setting):
        sums, devices = collections.Counter(), setting.devices
        # Once in a step: A whole where a kernel is cut by columns, B where it
        # is cut by rows.
        inputs = {m for m, _, cut in model.linear() if cut == COLUMNS}
        outputs = {n for _, n, cut in model.linear() if cut == ROWS}
        whole = (sum(inputs) + sum(outputs)) * self.width * FLOAT32
        sums["all-gather", devices] += whole
        # A slice lies on the first devices, and is spread over all before: at
        # most as much again.
        sums["collective-permute", devices] += whole
        for _, n, cut in model.linear():
            if cut == COLUMNS:
                each = self.rank * FLOAT32  # The gradient of d.
            elif self.blocks == 1:
                # x A, of which a device has what its inputs give.
                each = setting.tokens * self.rank * setting.itemsize
            else:
                each = n * FLOAT32  # The gradient of b; and of all channels:
                of_d = model.layers * self.blocks * self.width * FLOAT32
                sums["all-gather", devices] += of_d
            sums["all-reduce", devices] += model.layers * each
        return sums


def _add_gradients(sums, method, model, setting):
    """Adds the gradients of what a device holds, which groups add up."""
    if setting.groups > 1:
        _, held = method.trained(model, setting)
        sums["all-reduce", setting.groups] += held * FLOAT32


METHODS = {
    "LoRA 8": LoRA(),
    "VeRA 256": VeRA(),
    "VeRA 1024": VeRA(1024),
    "VeRA 1024, 16 blocks": VeRA(1024, 16),
}


def sent_by_device(sums):
    """Returns what one device sends, with rings."""
    total = 0
    for (kind, devices), size in sums.items():
        passes = 2 if kind == "all-reduce" else 1
        total += passes * (devices - 1) / devices * size
    return total


def table(devices, tokens):
    setting = Setting(devices // 8, 8, tokens)
    print(
        f"\n{devices} devices, {setting.groups} groups of 8, "
        f"{tokens:,} tokens in each; MB\n"
    )
    print(
        "| | base on a device | trained | held, with Adam "
        "| A and B on a device | sent by a device: base | adapter |"
    )
    print("|---|" + "---|" * 6)
    for name, model in MODELS.items():
        base = 2 * (model.numbers_cut / 8 + model.numbers_whole)
        of_base = sent_by_device(Frozen().sent(model, setting))
        for title, method in METHODS.items():
            trained, held = method.trained(model, setting)
            sent = sent_by_device(method.sent(model, setting)) - of_base
            figures = [
                base,
                trained * FLOAT32,
                3 * held * FLOAT32,
                method.shared(model, setting),
                of_base,
                sent,
            ]
            shown = " | ".join(f"{x / 1e6:,.1f}" for x in figures)
            print(f"| {name}, {title} | {shown} |")


# ---- The same formulas, and what XLA has compiled.


def check(mesh, small=()):
    """Prints what is computed beside what is compiled; returns whether they
    are equal, and no more is spread than the formula has."""
    import collectives

    args = ["--mesh", *map(str, mesh), *small]
    equal = True
    for structure, blocks in (("dense", 1), ("blocks8", 8)):
        found = collectives.parse_arguments([*args, "--structure", structure])
        model = Model(
            found.layers,
            found.hidden,
            found.ffn,
            *[found.heads] * 2,
            found.vocabulary,
        )
        groups, devices = mesh
        tokens = found.batch * found.sequence // groups
        setting = Setting(groups, devices, tokens, FLOAT32)
        computed = expected(VeRA(found.rank, blocks), model, setting)
        compiled = collectives.count(found, "VeRA")
        for kind, size in computed.items():
            print(f"{structure}, {mesh}: {kind} {size:,}, {compiled[kind]:,}")
            if kind == "collective-permute":
                equal &= compiled[kind] <= size
            else:
                equal &= compiled[kind] == size
    return equal


def expected(method, model, setting):
    """Returns what `collectives.py` counts, in a model of float32."""
    sums = collections.Counter()
    for (kind, _), size in method.sent(model, setting).items():
        sums[kind] += size
    # A backbone does not read the table of the logits.
    tables = model.vocabulary * model.hidden
    numbers = (model.numbers_cut - tables) // setting.devices
    numbers += model.numbers_whole + method.trained(model, setting)[1]
    # With the ids and the mask of the tokens.
    sums["arguments"] = FLOAT32 * (
        numbers + 2 * setting.tokens
    ) + method.shared(model, setting)
    return sums


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4 * 2048)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument(
        "--check", type=int, nargs=2, help="groups, and devices of each"
    )
    args, small = parser.parse_known_args()
    if args.check:
        sys.exit(not check(tuple(args.check), small))
    for devices in args.devices:
        table(devices, args.tokens)


if __name__ == "__main__":
    main()
