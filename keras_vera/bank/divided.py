"""Batches that `keras.distribution` cuts into parts of one size.

It takes no others, and a call that gets one loses the values of the model.
"""

import math

import numpy as np
from keras import ops
from keras import tree

from keras_vera import _keras
from keras_vera.bank.ids import ids_in
from keras_vera.bank.ids import join_ids
from keras_vera.bank.ids import split_ids


def is_arrays(x):
    """Says whether inputs of `bank.model` are arrays of all examples."""
    ids = ids_in(x)
    return isinstance(ids, (np.ndarray, list)) or ops.is_tensor(ids)


def is_divided(count, batch_size):
    """Says whether the batches of so many examples can all be cut."""
    divisor = _keras.batch_divisor()
    batch_size = batch_size or 32
    return count % divisor == 0 and (
        count <= batch_size or batch_size % divisor == 0
    )


def padded_inputs(x):
    """Adds examples of the base, whose id is 0, until batches can be cut.

    Args:
        x: Inputs of `bank.model`, in arrays.

    Returns:
        The inputs, and a function that takes the outputs for them and removes
        what is too much.
    """
    count = len(ids_in(x)) if is_arrays(x) else 0
    missing = -count % _keras.batch_divisor()
    if not missing:
        return x, lambda outputs: outputs
    inputs, ids = split_ids(x)
    inputs = tree.map_structure(
        lambda v: np.concatenate([v, np.repeat(v[:1], missing, axis=0)]),
        tree.map_structure(ops.convert_to_numpy, inputs),
    )
    ids = np.concatenate([np.asarray(ids), np.zeros(missing, "int32")])
    return join_ids(inputs, ids), lambda outputs: tree.map_structure(
        lambda y: y[:count], outputs
    )


def divided_size(batch_size):
    """Returns the next larger size of a batch that can be cut."""
    divisor = _keras.batch_divisor()
    return math.ceil((batch_size or 32) / divisor) * divisor


def check_divided(what, x, batch_size=None, in_one=False):
    """Raises unless batches of arrays can all be cut.

    Args:
        what: String, what has the examples, for the message.
        x: Inputs of `bank.model`. Datasets are not looked at.
        batch_size: Integer, or `None` for Keras' own.
        in_one: Boolean, whether all examples are one batch.
    """
    if not is_arrays(x):
        return
    count = len(ids_in(x))
    if not is_divided(count, count if in_one else batch_size):
        divisor = _keras.batch_divisor()
        raise ValueError(
            f"The active `keras.distribution` cuts each batch into {divisor} "
            f"parts, so the number of examples in {what}, and `batch_size`, "
            f"must be multiples of {divisor}. Received: {count} examples"
            + ("" if in_one else f", batch_size={batch_size or 32}")
            + ". Leave out examples, or add some with the id 0 (the name "
            "`None`), which train nothing."
        )
