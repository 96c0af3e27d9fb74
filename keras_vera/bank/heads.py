"""Task heads in an `AdapterBank`: a dense layer with a kernel per example."""

import functools

import keras
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

    @classmethod
    def from_config(cls, config):
        return cls.vera_head_class.from_config(config)


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
    if len(heads) < 2:
        return heads[0] if heads else None
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    # The order of the layers of other models is not that of their calls.
    if not all(map(keras.backend.is_keras_tensor, outputs)):
        return None
    found = {_last_head(y, heads) for y in outputs} - {None}
    return found.pop() if len(found) == 1 else None


def _last_head(y, heads):
    """Returns the head through which a symbolic output came last.

    `None` if there is none on its way, as far as that is one way.
    """
    while True:
        operation, node, index = y._keras_history
        if operation in heads:
            return operation
        if _has_any(operation, heads):
            if not _keras.is_graph(operation):
                return None  # Somewhere inside.
            y = keras.tree.flatten(operation.outputs)[index]
            continue
        inputs = _keras.symbolic_inputs(operation, node)
        if len(inputs) != 1:
            return None
        (y,) = inputs


def _has_any(operation, heads):
    if not isinstance(operation, keras.Layer):
        return False
    return any(x in heads for x in _keras.flatten_layers(operation))


@functools.cache
def _head_class(plain_class):
    # The name is the key of the layer in Keras' files.
    namespace = {
        "__module__": plain_class.__module__,
        "__qualname__": plain_class.__qualname__,
        "__doc__": plain_class.__doc__,
        "vera_head_class": plain_class,
    }
    return type(plain_class.__name__, (BankHead, plain_class), namespace)
