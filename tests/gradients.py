"""Outputs and gradients of a layer, with the tools of each backend."""

import keras
from keras import ops
from keras import tree


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

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = ops.sum(ops.multiply(y, ops.cast(upstream, y.dtype)))
        trained = [v.value for v in layer.trainable_variables]
        return y, tape.gradient(loss, [x, *trained])

    if getattr(layer, "quantization_mode", None) == "float8":
        # Keras' own gradient of it fails in eager mode.
        function = tf.function(function)
    return function(tf.convert_to_tensor(x))


def _with_torch(layer, x, upstream):
    import torch

    x = ops.convert_to_tensor(x).requires_grad_()
    y = layer(x)
    loss = ops.sum(ops.multiply(y, ops.cast(upstream, y.dtype)))
    trained = [v.value for v in layer.trainable_variables]
    return y.detach(), torch.autograd.grad(loss, [x, *trained])


def outputs(model, x, jit=True):
    """Returns all outputs of a model, a list of float32 arrays.

    Args:
        model: A built model.
        x: What it is called on, NumPy arrays.
        jit: Boolean, whether to compile on JAX.
    """

    return compiled_outputs(model, jit)(x)


def compiled_outputs(model, jit=True):
    """Returns `outputs` as a function of `x`, which JAX compiles once.

    As long as the model has the same variables; they may get other values.
    """

    def flat(outputs):
        return [ops.cast(y, "float32") for y in tree.flatten(outputs)]

    def call(x):
        return flat(model(x, training=False))

    if keras.backend.backend() == "torch":
        import torch

        call = torch.no_grad()(call)
    elif keras.backend.backend() == "jax" and jit:
        import jax

        compiled = jax.jit(
            lambda trained, frozen, x: flat(
                model.stateless_call(trained, frozen, x, training=False)[0]
            )
        )

        def call(x):
            trained = [v.value for v in model.trainable_variables]
            frozen = [v.value for v in model.non_trainable_variables]
            return compiled(trained, frozen, x)

    return lambda x: [ops.convert_to_numpy(y) for y in call(x)]


def squares_and_gradients(model, x, jit=True):
    """Returns the mean square of all outputs, and its gradients.

    Args:
        model: A built model.
        x: What it is called on, NumPy arrays.
        jit: Boolean, whether to compile on JAX.

    Returns:
        A number, and a list with a float32 array, zeros where nothing
        arrives, for each trainable variable.
    """

    def loss(outputs):
        return sum(
            ops.mean(ops.square(y))
            for y in tree.flatten(outputs)
            if "float" in keras.backend.standardize_dtype(y.dtype)
        )

    trained = [v.value for v in model.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        frozen = [v.value for v in model.non_trainable_variables]

        def function(trained, x):
            return loss(model.stateless_call(trained, frozen, x)[0])

        function = jax.value_and_grad(function)
        function = jax.jit(function) if jit else function
        value, gradients = function(trained, x)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(model(x))
        gradients = tape.gradient(value, trained)
    else:
        import torch

        value = loss(model(x))
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
        value = value.detach()
    return float(value), [
        ops.convert_to_numpy(ops.zeros_like(v) if g is None else g)
        for v, g in zip(trained, gradients)
    ]
