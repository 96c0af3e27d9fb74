"""How one backbone is built tiny, and what it is fed."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import keras
import numpy as np


@dataclass(frozen=True)
class Entry:
    """One row of the table of backbones.

    Args:
        make: Function without arguments that returns the built backbone,
            without dropout, so that two forward passes agree.
        inputs: Dict of name to `(shape, kind)`, or a single `(shape, kind)`
            for a backbone that takes a bare tensor. `kind` is an int, the
            exclusive upper bound of random int32 values, or `"float"`, normal
            values, `"mask"`, int32 ones, `"bool"`, true, or `"positions"`,
            int32 positions along the last axis, or a tuple of int32 values.
        modality: What the backbone reads, such as `"text"`.
    """

    make: Callable
    inputs: dict | tuple
    modality: str


def make_backbone(entry, seed=0):
    """The backbone of `entry`, with weights through which gradients flow.

    Fresh weights do not do: gates that start at 0 hide whole layers, and
    attention that starts near uniform hides query and key.
    """
    keras.utils.set_random_seed(seed)
    backbone = entry.make()
    rng = np.random.default_rng(seed)
    for v in backbone.trainable_variables:
        noise = rng.normal(size=v.shape)
        if v.ndim < 2:
            v.assign(v + 0.3 * noise.astype("float32"))
        else:
            v.assign(noise / prod(v.shape[:-1]) ** 0.5)
    return backbone


def make_inputs(entry, seed=0):
    """NumPy arrays to call the backbone of `entry` with."""
    rng = np.random.default_rng(seed)
    if isinstance(entry.inputs, tuple):
        return _array(rng, *entry.inputs)
    return {k: _array(rng, *spec) for k, spec in entry.inputs.items()}


def _array(rng, shape, kind):
    match kind:
        case "float":
            return rng.normal(size=shape).astype("float32")
        case "mask":
            return np.ones(shape, "int32")
        case "bool":
            return np.ones(shape, bool)
        case "positions":
            return np.indices(shape, "int32")[-1]
        case tuple():
            return np.broadcast_to(np.asarray(kind, "int32"), shape)
        case int():
            return rng.integers(kind, size=shape, dtype="int32")
    raise ValueError(f"`kind` is an int or a known name. Received: {kind=}")
