"""Adapters that are made of others in an `AdapterBank`."""

import numpy as np

from keras_vera.files.combined import combined


def mean(adapters, names, classes):
    """Returns the mean of adapters: its arrays and its classes.

    Args:
        adapters: List of pairs, the arrays of an adapter by entry name and
            its number of classes.
        names: List of their names, for messages.
        classes: Integer, the classes that it must have, or `None`.
    """
    if not adapters:
        raise ValueError(
            "`like` must be the name of an adapter, or a list of names, one "
            "at least. Received: like=[]"
        )
    found = {own for _, own in adapters}
    if len(found) > 1 or classes not in (None, *found):
        raise ValueError(
            "`like` must name adapters with the same number of classes, which "
            "is that of `classes` if it is given. Received: "
            f"classes={classes}, like={names!r}, with {sorted(found)} classes"
        )
    every = [arrays for arrays, _ in adapters]
    return {
        name: np.mean([x[name] for x in every], axis=0, dtype="float64").astype(
            array.dtype
        )
        for name, array in every[0].items()
    }, *found


def combination(files, adapters, weights, method, head):
    """Returns arrays and classes of a combination, and what it has lost.

    Args:
        files: The `BankFiles` of the bank.
        adapters: Dict by name of pairs, as `mean` has them.
        weights, method, head: See `keras_vera.combine`.
    """
    found = {classes for _, classes in adapters.values()}
    if head is None and len(found) > 1:
        raise ValueError(
            "The adapters have different numbers of classes, "
            f"{sorted(found)}. Pass `head`, the adapter whose head the result "
            "gets."
        )
    matrices = list(files.matrices.values()) or None
    tensors = {name: arrays for name, (arrays, _) in adapters.items()}
    header, arrays, lost = combined(
        files.header, tensors, weights, method, head, matrices
    )
    if header is not files.header:
        raise ValueError(
            "This sum has no d and b that make it exactly, and an adapter "
            "with matrices of its own does not go into a bank. Use "
            "`method='nearest'`, or combine files."
        )
    arrays = {name: arrays[name] for name in files.variables}
    return arrays, min(found) if head is None else adapters[head][1], lost
