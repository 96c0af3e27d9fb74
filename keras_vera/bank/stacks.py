"""The numbers of all adapters of a bank, stacked by slots."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_vera import _keras


def new_stack(name, variable, fresh, slots):
    *folders, last = name.split("/")
    with contextlib.ExitStack() as scopes:
        # The path is that of the entry: `vera_optimizer` goes by it.
        for folder in folders:
            scopes.enter_context(keras.name_scope(folder))
        _keras.check_layout(name, (slots, *fresh.shape))
        stack = keras.Variable(
            np.repeat(fresh[None], slots, axis=0),
            dtype=variable.dtype,
            trainable=True,
            autocast=False,
            name=last,
        )
    stack.vera_is_stack = True
    # And by this.
    if hasattr(variable, "vera_layer"):
        stack.vera_layer = variable.vera_layer
    return stack


def copy_rows(before, after):
    if tuple(before.shape) == tuple(after.shape):
        after.assign(ops.convert_to_tensor(before))
    else:
        rows = ops.convert_to_tensor(after)[before.shape[0] :]
        after.assign(
            ops.concatenate([ops.convert_to_tensor(before), rows], axis=0)
        )


def padded(items):
    """Repeats the last item: a power of 2, so that few sizes are compiled."""
    count = 1 << (len(items) - 1).bit_length()
    return [*items, *[items[-1]] * (count - len(items))]
