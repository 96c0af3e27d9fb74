"""What an adapter relies on and its file does not hold: fingerprints of it.

The kernels that are adapted have theirs in the header's `layers`. The rest,
such as biases, norms, their statistics and kernels without an adapter, has
here one for each layer: 8 digits that say what its variables are, and 4 that
say which values they have.
"""

import hashlib

from keras import backend

from keras_vera.files.format import UNSAVED_DIGITS
from keras_vera.files.format import AdapterFileError
from keras_vera.files.saved import base_ids
from keras_vera.files.saved import named_variables
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._fingerprint import kernel_fingerprint
from keras_vera.layers._in_place import is_adapted

_WHAT_DIGITS = 8


def fingerprints(paths, names, plan=None):
    """Returns the fingerprints of what a file does not hold.

    Args:
        paths: Dict of the layers of a model, by structural path.
        names: The names of the entries of the file.
        plan: The `Adaptation` of a model that is not adapted yet.

    Returns:
        Two dicts of strings by path: of layers of the base, and of others.
    """
    in_base = base_ids(paths, plan)
    targets = {id(layer) for layer in (plan.layers if plan else ())}
    base, outside = {}, {}
    for path, layer in paths.items():
        own = {
            name: variable
            for name, variable in named_variables(path, layer).items()
            if name not in names
        }
        if is_adapted(layer) or id(layer) in targets:
            kernel = stored_kernel(layer)
            own = {
                name: variable
                for name, variable in own.items()
                if variable is not kernel
                and not variable.name.startswith("vera_")
            }
        if own:
            found = base if id(layer) in in_base else outside
            found[path] = _fingerprint(layer, own)
    return base, outside


def as_header(found):
    """Returns fingerprints as a header has them, without the paths."""
    return ["".join(part[x] for x in sorted(part)) for part in found]


def check_unsaved(found, header, filepath, head=True):
    """Raises if what a file relies on has other values in the model.

    Variables of another shape or dtype cannot be compared, and files of
    before have nothing to compare.

    Args:
        found: What `fingerprints` returns for the model.
        header: Dict, the header of the file.
        filepath: String, for messages.
        head: Boolean, whether what lies outside the base is loaded.
    """
    if not header["unsaved"]:
        return
    base, outside = (
        _different(mine, theirs)
        for mine, theirs in zip(found, header["unsaved"])
    )
    if base:
        raise AdapterFileError(
            f"'{filepath}' belongs to another base: {len(base)} layers "
            f"({', '.join(map(repr, base[:5]))}) have weights or state with "
            "other values than those that the adapter was trained on. Load "
            "the same base weights."
        )
    if head and outside:
        raise AdapterFileError(
            f"'{filepath}' does not fit the model: {len(outside)} layers "
            f"outside the base ({', '.join(map(repr, outside[:5]))}) did not "
            "train there, so that it does not hold them, and have other "
            "values here. Load the same weights into them, or pass "
            "`head=False` to load the vectors and leave the rest as the "
            "model has it."
        )


def differ(one, other):
    """Says whether the bases of two headers differ in what files lack."""
    if not one["unsaved"] or not other["unsaved"]:
        return False
    base = dict(enumerate(_parts(one["unsaved"][0])))
    return bool(_different(base, other["unsaved"][0]))


def _different(mine, theirs):
    values = {}
    for part in _parts(theirs):
        what, value = part[:_WHAT_DIGITS], part[_WHAT_DIGITS:]
        values.setdefault(what, set()).add(value)
    return [
        path
        for path, part in mine.items()
        if (what := part[:_WHAT_DIGITS]) in values
        and part[_WHAT_DIGITS:] not in values[what]
    ]


def _parts(text):
    return [
        text[i : i + UNSAVED_DIGITS]
        for i in range(0, len(text), UNSAVED_DIGITS)
    ]


def _fingerprint(layer, variables):
    what = "".join(
        f"{name} {backend.standardize_dtype(variable.dtype)} "
        f"{list(variable.shape)}\n"
        for name, variable in variables.items()
    )
    values = "".join(
        kernel_fingerprint(_base_value(layer, variable))
        for variable in variables.values()
    )
    return _digits(what, _WHAT_DIGITS) + _digits(
        values, UNSAVED_DIGITS - _WHAT_DIGITS
    )


def _base_value(layer, variable):
    """Returns what the base has, where an adapter brought another bias."""
    bias = getattr(layer, "vera_base_bias", None)
    return variable if bias is None or variable is not layer.bias else bias


def _digits(text, count):
    return hashlib.sha256(text.encode()).hexdigest()[:count]
