"""Outputs and gradients of a layer, with the tools of each backend."""

import keras
from keras import ops


def to_float64(tensor):
    # NumPy has no bfloat16 of its own.
    tensor = ops.cast(tensor, "float32") if is_bfloat16(tensor) else tensor
    return ops.convert_to_numpy(tensor).astype("float64")


def is_bfloat16(tensor):
    return keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"


def outputs_and_gradients(layer, x, upstream):
    """Returns `layer(x)` and the gradients of `sum(layer(x) * upstream)`.

    Args:
        layer: A built layer.
        x: NumPy array, the input.
        upstream: NumPy array of the shape of the output.

    Returns:
        A float64 array, the output, and a dict of float64 arrays: the gradient
        of `x` under "x" and of each trainable variable under its name.
    """
    function = {
        "jax": _with_jax,
        "tensorflow": _with_tensorflow,
        "torch": _with_torch,
    }[keras.backend.backend()]
    y, gradients = function(layer, x, upstream)
    names = ["x"] + [v.name for v in layer.trainable_variables]
    gradients = map(to_float64, gradients)
    return to_float64(y), dict(zip(names, gradients, strict=True))


def _with_jax(layer, x, upstream):
    import jax

    frozen = [v.value for v in layer.non_trainable_variables]

    def loss(x, trained):
        y, _ = layer.stateless_call(trained, frozen, x)
        return ops.sum(ops.multiply(y, ops.cast(upstream, y.dtype))), y

    trained = [v.value for v in layer.trainable_variables]
    function = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradient, others), y = function(ops.convert_to_tensor(x), trained)
    return y, [gradient, *others]


def _with_tensorflow(layer, x, upstream):
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = ops.sum(ops.multiply(y, ops.cast(upstream, y.dtype)))
    trained = [v.value for v in layer.trainable_variables]
    return y, tape.gradient(loss, [x, *trained])


def _with_torch(layer, x, upstream):
    import torch

    x = ops.convert_to_tensor(x).requires_grad_()
    y = layer(x)
    loss = ops.sum(ops.multiply(y, ops.cast(upstream, y.dtype)))
    trained = [v.value for v in layer.trainable_variables]
    return y.detach(), torch.autograd.grad(loss, [x, *trained])
