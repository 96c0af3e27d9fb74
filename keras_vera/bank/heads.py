"""Task heads in an `AdapterBank`: a dense layer with a kernel per example."""

import functools

import keras
import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera.layers._mixed_batch import check_rows
from keras_vera.layers._mixed_batch import rows_of


class BankHead:
    """Before a `Dense` class: in a mixed batch, a product for each example."""

    def call(self, inputs, training=None):
        rows = rows_of(self)
        if rows is None:
            return super().call(inputs, training=training)
        kernel, bias, classes = rows
        check_rows(self, inputs, kernel)
        x = ops.cast(inputs, self.compute_dtype)
        # Examples may have several rows each, one after the other.
        examples = ops.shape(kernel)[0]
        tokens = ops.reshape(x, (examples, -1, ops.shape(x)[-1]))
        y = ops.matmul(tokens, ops.cast(kernel, x.dtype))
        if bias is not None:
            y = y + ops.cast(bias, x.dtype)[:, None, :]
        if classes is not None:
            present = ops.arange(self.units) < classes[:, None, None]
            y = ops.where(present, y, ops.cast(_absent(y), y.dtype))
        y = ops.reshape(y, (*ops.shape(x)[:-1], self.units))
        return y if self.activation is None else self.activation(y)


def _absent(logits):
    """The logit of a class that an adapter does not have."""
    is_float16 = keras.backend.standardize_dtype(logits.dtype) == "float16"
    return -3e4 if is_float16 else -1e9


def make_head(layer):
    """Turns a dense layer into a head, in place, as layers are adapted."""
    if not isinstance(layer, BankHead):
        layer.__class__ = _head_class(type(layer))


def is_possible_head(layer):
    return (
        isinstance(layer, keras.layers.Dense)
        and (
            isinstance(layer, BankHead)
            or type(layer).call is keras.layers.Dense.call
        )
        and not layer.lora_enabled
        and layer.quantization_mode is None
    )


def output_head(model, heads):
    """Returns the head whose columns are the classes.

    `None` if there is none, or if it is not known which one it is.

    Args:
        model: The model that the bank is for.
        heads: List of its heads.
    """
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    # The order of the layers of other models is not that of their calls.
    if not outputs or not all(map(keras.backend.is_keras_tensor, outputs)):
        return heads[0] if len(heads) == 1 else None
    found = {_source(y, heads, *y.shape[-1:]) for y in outputs}
    found.intersection_update(heads)
    return found.pop() if len(found) == 1 else None


def _source(y, heads, classes=None):
    """Returns the head that gives a symbolic output its classes.

    Or the input that it is; `None` if it is not known, or if absent classes
    would not be absent there.
    """
    operation, node, index = y._keras_history
    if isinstance(operation, keras.layers.InputLayer):
        return operation
    inside = _inside(operation, heads)
    if _keras.is_graph(operation):
        y = keras.tree.flatten(operation.outputs)[index]
        source = _source(y, heads, classes)
        if not isinstance(source, keras.layers.InputLayer):
            return source
    elif inside:
        # What else goes on inside of a layer is not known.
        is_known = heads == inside[:1] or _called(operation) is inside[0]
        sizes = {*y.shape[-1:], classes}
        return inside[0] if is_known and sizes == {inside[0].units} else None
    elif not _keeps_classes(operation, node, y, classes):
        return None
    inputs = _keras.symbolic_inputs(operation, node)
    sources = {_source(x, heads, classes) for x in inputs}
    return sources.pop() if len(sources) == 1 else None


def _inside(operation, heads):
    if not isinstance(operation, keras.Layer):
        return []
    return [x for x in heads if x in _keras.flatten_layers(operation)]


def _called(operation):
    is_wrapper = isinstance(operation, keras.layers.Wrapper)
    return operation.layer if is_wrapper else operation


# Steps of Keras that make no less of more, by what they are called.
_GROWING = {"add", "average", "cast", "dropout", "identity", "linear", "relu"}
_GROWING |= {"hardsigmoid", "logsigmoid", "sigmoid", "softplus", "tanh"}


def _keeps_classes(operation, node, y, classes):
    """Says whether classes stay apart, and absent ones below the others.

    Args:
        operation: What comes behind a head.
        node: Integer, in which of its calls.
        y: Its symbolic output.
        classes: Integer, how many classes there are.
    """
    is_activation = isinstance(operation, keras.layers.Activation)
    kind = operation.activation if is_activation else type(operation)
    if not kind.__module__.startswith("keras."):
        return False
    name = kind.__name__.lower().replace("_", "")
    x, *others = _keras.symbolic_inputs(operation, node)
    last = len(x.shape) - 1
    if name in ("reshape", "flatten"):
        return True  # What counts is the last axis in the end.
    if name in ("mean", "max"):
        axes = keras.tree.flatten(operation.axis)
        return not {None, -1, last}.intersection(axes)
    if name.startswith(("globalaverage", "globalmax")):
        return operation.data_format == "channels_last"
    if any(x.shape != y.shape for x in (x, *others)):
        return False
    if name in ("softmax", "logsoftmax"):
        axis = getattr(operation, "axis", -1)
        return axis in (-1, last) and y.shape[-1] == classes
    if name in ("subtract", "multiply", "divide", "truedivide"):
        first, second = _keras.call_arguments(operation, node)
        if name == "multiply" and second is x:
            first, second = second, first
        if others or first is not x:
            return False
        return name == "subtract" or np.all(ops.convert_to_numpy(second) >= 0)
    return name in _GROWING


@functools.cache
def _head_class(plain_class):
    return _keras.class_like(plain_class, (BankHead,))
