"""Checks of arguments that several functions take."""

import numbers
import re

import numpy as np

from keras_vera.product.plan import PLANS


def check_integer(name, value, minimum, maximum=None):
    """Returns `value` as an `int`, or raises a `ValueError` that names it."""
    is_integer = isinstance(value, numbers.Integral)
    if (
        not is_integer
        or isinstance(value, bool)
        or value < minimum
        or (maximum is not None and value > maximum)
    ):
        limits = f"at least {minimum}"
        if maximum is not None:
            limits = f"between {minimum} and {maximum}"
        raise ValueError(
            f"`{name}` must be an integer, {limits}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    return int(value)


def check_finite(name, array):
    if not np.isfinite(array).all():
        raise ValueError(f"'{name}' holds NaN or infinity.")


def check_d_initial(value):
    # With d and b both at zero, both gradients are zero for ever.
    if not isinstance(value, numbers.Real) or not 0 < abs(value) < 1e30:
        raise ValueError(
            "`d_initial` must be a finite number other than 0 (with d and b "
            f"both 0 nothing trains). Received: d_initial={value!r}"
        )
    return float(value)


def check_dropout(value):
    if not isinstance(value, numbers.Real) or not 0 <= value < 1:
        raise ValueError(
            f"`dropout` must be a number in [0, 1). Received: dropout={value!r}"
        )
    return float(value)


def check_structure(value):
    """Returns the number of blocks that `structure` names; 1 if dense."""
    if value == "dense":
        return 1
    found = isinstance(value, str) and re.fullmatch(r"blocks(\d{0,3})", value)
    blocks = int(found[1] or 16) if found else 0
    if not 2 <= blocks <= 256:
        raise ValueError(
            "`structure` must be 'dense', 'blocks' (16 blocks), or 'blocks' "
            "with a number of blocks from 2 to 256, such as 'blocks4'. "
            f"Received: structure={value!r}"
        )
    return blocks


def check_plan(value):
    if value not in PLANS:
        raise ValueError(
            f"`plan` must be one of {', '.join(map(repr, PLANS))}. "
            f"Received: plan={value!r}"
        )
    return value
