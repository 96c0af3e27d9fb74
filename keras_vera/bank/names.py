"""Names for each example, and the examples as a model takes them."""

import numpy as np
from keras import ops
from keras import tree

# Or of characters.
_WITHOUT_ORDER = (str, bytes, dict, set, frozenset)


def names_of(adapters, examples=None, argument="`adapters`"):
    """Returns names as a list; `None` and empty ones are the base model.

    Args:
        adapters: List, NumPy array, pandas series or tensor of strings.
        examples: Integer, how many names there must be, or `None`.
        argument: String, for messages.
    """
    if isinstance(adapters, _WITHOUT_ORDER) or not hasattr(adapters, "__len__"):
        raise ValueError(
            f"{argument} must be a list with a name for each example. "
            f"Received: adapters={adapters!r}"
        )
    if hasattr(adapters, "numpy"):
        adapters = adapters.numpy()
    if hasattr(adapters, "tolist"):
        adapters = adapters.tolist()
    names = []
    for name in adapters:
        if isinstance(name, bytes):
            name = name.decode()
        if name is not None and not isinstance(name, str):
            raise ValueError(
                f"{argument} must hold names, which are strings, or `None` "
                f"for the base model. Received: {name!r} (of type "
                f"{type(name).__name__})"
            )
        # Of a subclass, such as an enumeration of strings, the string.
        names.append(None if name is None else str.__str__(name) or None)
    if examples is not None and (len(names) != examples or not names):
        raise ValueError(
            f"{argument} must have one name for each example, at least one. "
            f"Received: {len(names)} names for {examples} examples"
        )
    return names


def are_names(values):
    """Says whether values are texts, so that they can be names."""
    dtype = getattr(values, "dtype", None)
    if dtype is not None:
        kind = str(getattr(dtype, "name", dtype)).lower()
        return any(part in kind for part in ("str", "bytes", "object"))
    return isinstance(values, (list, tuple)) and all(
        value is None or isinstance(value, (str, bytes)) for value in values
    )


def count_examples(x):
    values = list(x.values()) if isinstance(x, dict) else [x]
    if any(isinstance(value, str) for value in values):
        return 1
    # Before lists, which may be of images.
    texts = [value for value in values if are_names(value)]
    arrays = [value for value in values if hasattr(value, "shape")]
    return len([*texts, *arrays, *tree.flatten(x)][0])


def has_preprocessor(model):
    return getattr(model, "preprocessor", None) is not None


def preprocessed(model, x, y=None, sample_weight=None):
    """Returns x, y and weights as `model` itself would be given them."""
    if has_preprocessor(model):
        data = model.preprocess_samples(x, y, sample_weight)
        if not isinstance(data, tuple):
            data = (data,)
        x, y, sample_weight = (*data, None, None)[:3]
    return tree.map_structure(as_numpy, (x, y, sample_weight))


def as_numpy(x):
    if x is None or isinstance(x, np.ndarray):
        return x
    return ops.convert_to_numpy(x)
