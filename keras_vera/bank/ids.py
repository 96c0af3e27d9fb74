"""`adapter_ids`, the input of `bank.model` beside those of the base."""

import keras
import numpy as np
from keras import ops

IDS = "adapter_ids"


def split_ids(inputs):
    """Returns the inputs of the base model, and the ids."""
    if isinstance(inputs, dict) and IDS in inputs:
        inputs = dict(inputs)
        ids = inputs.pop(IDS)
        return inputs, ids
    if isinstance(inputs, (list, tuple)) and len(inputs) > 1:
        *inputs, ids = inputs
        return inputs[0] if len(inputs) == 1 else inputs, ids
    raise ValueError(
        f"The inputs must be those of the base model and `{IDS}`: a dict with "
        f"the key '{IDS}', or a list or tuple that ends with the ids. "
        f"Received: inputs of type {type(inputs).__name__}"
    )


def join_ids(x, ids):
    """Undoes `split_ids`."""
    if isinstance(x, dict):
        return {**x, IDS: ids}
    return [*x, ids] if isinstance(x, (list, tuple)) else [x, ids]


def ids_in(x):
    """Returns the ids in the inputs of `bank.model`, or `None`."""
    if isinstance(x, dict):
        return x.get(IDS)
    if isinstance(x, (list, tuple)) and len(x) > 1:
        return x[-1]
    return None


def has_ids(x):
    """Says whether `x` looks like inputs of `bank.model`."""
    ids = ids_in(x)
    dtype = getattr(ids, "dtype", None)
    if dtype is None or len(getattr(ids, "shape", ())) != 1:
        return False
    return "int" in keras.backend.standardize_dtype(
        getattr(dtype, "name", dtype)
    )


def raise_unless(known, ids):
    known = ops.convert_to_numpy(known)
    if not known.all():
        ids = np.unique(ops.convert_to_numpy(ids)[~known])
        raise ValueError(
            f"`{IDS}` must be ids of adapters in the bank, as `bank.ids` "
            f"gives them. Received: {ids[:5].tolist()}"
        )


def nan_unless(known, y):
    if not keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(y.dtype)
    ):
        return y
    known = ops.reshape(known, (-1, *[1] * (len(y.shape) - 1)))
    return ops.where(known, y, ops.cast(float("nan"), y.dtype))
