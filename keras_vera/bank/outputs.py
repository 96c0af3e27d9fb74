"""The outputs of a bank's model for examples of any number of adapters."""

import functools

import numpy as np
from keras import ops
from keras import tree

from keras_vera import _keras
from keras_vera.bank.data import Batches


def outputs_of(model, slots, data, batch_size, errors, kwargs):
    """Predicts in parts whose adapters fit into the slots.

    Args:
        model: The `BankModel`.
        slots: Its `Slots`.
        data: The `Examples` or `Batches`.
        batch_size: Integer, for `Examples`.
        errors: Dict that takes the errors of adapters that cannot be read, by
            name; `None`: they are raised.
        kwargs: Dict of further arguments of `keras.Model.predict`.

    Returns:
        NumPy arrays in the structure of the model's outputs.
    """
    kwargs = {"verbose": 0, **kwargs}
    if not isinstance(data, Batches):
        bring = functools.partial(slots.bring, errors=errors)
        outputs = []
        for part, size in slots.parts(data.names, batch_size):
            x = data.part(part, bring)
            outputs.append(model.predict(x, batch_size=size, **kwargs))
    elif _keras.batch_divisor() == 1 and slots.have_room_for(data.names):
        x, *_ = data.joined(slots.ids(data.names))
        return model.predict(x, **kwargs)
    else:
        outputs = [
            outputs_of_parts(model, parts)
            for parts, *_ in slots.batches(data, kwargs)
        ]
    return _concatenated(outputs)


def outputs_of_parts(model, parts):
    """Returns the outputs for a batch, as NumPy arrays.

    Args:
        model: The `BankModel`.
        parts: Iterable of the inputs of parts of the batch.
    """
    return _concatenated(
        [
            tree.map_structure(ops.convert_to_numpy, model.predict_on_batch(x))
            for x in parts
        ]
    )


def _concatenated(outputs):
    return tree.map_structure(lambda *ys: np.concatenate(ys), *outputs)
