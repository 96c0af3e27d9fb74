"""Checks of arguments that several functions take."""

import numbers


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
