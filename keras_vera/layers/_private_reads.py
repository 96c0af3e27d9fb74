"""What another layer reads of an adapted layer instead of calling it.

Where the adapter does not show there, this is an error: the other layer would
go on with the base, and nobody would know.
"""

import contextlib
import functools
import sys

import keras

from keras_vera import _keras


def variable_of_base(name):
    """Returns a property for a variable that holds the base's kernel.

    The call of another layer must not read it. Everything else may: the layer
    itself, and what saves, loads, quantizes and compares.
    """

    def get(layer):
        variable = _keras.stored_attribute(layer, name)
        check_read(layer, name)
        return variable

    def set(layer, value):
        vars(layer)[name] = value

    def delete(layer):
        del vars(layer)[name]

    return property(get, set, delete)


def check_read(layer, name):
    """Raises if another layer, in its call, reads a base with an adapter.

    To be called by the property that is read.
    """
    if (
        not _keras.is_in_layer_call()
        or layer.shows_its_base()
        or _is_own(layer, sys._getframe(2))
    ):
        return
    public = (
        "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    )
    if layer.quantization_mode is None:
        is_what, advice = "adapted", f"read `{public}` instead"
    else:
        is_what = f"quantized ({layer.quantization_mode}) and adapted"
        advice = "call this one instead"
    raise ValueError(
        f"Another layer reads `{name}` of layer '{layer.name}' in its call. "
        f"Layer '{layer.name}' is {is_what} with VeRA, and its adapter does "
        f"not show in `{name}`. Let the other layer {advice}, or leave layer "
        f"'{layer.name}' out of `targets`."
    )


def refusing_assignment(kernel, layer):
    """Returns an adapted kernel that says why nothing is assigned to it.

    It is a tensor, where the plain layer has a variable. Tensors of all
    backends take attributes while they have values.
    """
    if not _keras.is_traced(kernel):
        refuse = functools.partial(_refuse_assignment, layer.name)
        for name in ("assign", "assign_add", "assign_sub"):
            with contextlib.suppress(AttributeError, TypeError):
                setattr(kernel, name, refuse)
    return kernel


def _refuse_assignment(name, *args, **kwargs):
    raise ValueError(
        f"Layer '{name}' is adapted with VeRA, so its kernel is that of its "
        "base with the adapter in it, and nothing can be assigned to it. Give "
        "the base another kernel before `keras_vera.enable_vera` or after "
        "`keras_vera.disable_vera`, or call `keras_vera.merge(model)` first."
    )


def _is_own(layer, frame):
    """Whether the layer reads itself, in a method that every layer has.

    A subclass may read its kernel to say which shape or mask it has. A method
    that only a subclass has is there for other layers.
    """
    while frame is not None and frame.f_locals.get("self") is layer:
        if hasattr(keras.Layer, frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False
