"""What a variable's value is, where it is traced or held elsewhere."""

import contextlib
import sys

import keras
import numpy as np
from keras.src import backend
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_vera._keras.devices import is_tracing_jax
from keras_vera._keras.devices import placed


def synchronize(model):
    """Brings variables up to date in the middle of `fit` on JAX."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


@contextlib.contextmanager
def values_kept(model):
    """Gives variables their values back where an error has taken them.

    On JAX, Keras takes them out of a model while it runs, and loses them if
    the first batch cannot be read.
    """
    if keras.backend.backend() != "jax":
        yield
        return

    def variables():
        optimizer = getattr(model, "optimizer", None)
        state = optimizer.variables if optimizer is not None else []
        return [*model.variables, *model.metrics_variables, *state]

    kept = {id(v): v._value for v in variables()}
    try:
        yield
    except BaseException:
        synchronize(model)
        for variable in variables():
            if variable._value is None:
                # What is new has not counted anything.
                value = kept.get(id(variable))
                if value is None:
                    value = keras.ops.zeros(variable.shape, variable.dtype)
                variable._value = value
        raise


def is_traced(x):
    """Says whether `x` has no value yet, as in `jit` and `tf.function`."""
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(x, jax.core.Tracer)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    import torch

    return x.is_meta or torch.compiler.is_compiling()


def reading_place():
    """Returns where Python reads variables for one computation alone.

    That is a graph of TensorFlow, or `True`. It is `None` where functions that
    were compiled before are called, and read variables themselves.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not tf.executing_eagerly():
            return tf.compat.v1.get_default_graph()
        return True if in_stateless_scope() else None
    if keras.backend.backend() == "jax":
        is_alone = (
            in_stateless_scope() or is_tracing_jax() or _is_in_step_of_jax()
        )
        return True if is_alone else None
    return True


def _is_in_step_of_jax():
    """Says whether a step of Keras' trainer is running, as `run_eagerly` does.

    Variables have no values there, and what the trainer would bring them up to
    date with is one step old, which a callback cannot be told from. The step
    is called by an inner function of the trainer, `iterator_step`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "iterator_step" and "trainer" in code.co_filename:
            return True
        frame = frame.f_back
    return False


def is_read_at(place, value):
    """Says whether a variable's `value` is read at a `reading_place` now.

    It is not in a function that is traced meanwhile and compiled for more.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.executing_eagerly():
            return place is None or place is True
        graph = tf.compat.v1.get_default_graph()
        # The graphs of branches and loops have classes of their own.
        while graph is not place and type(graph).__name__ != "FuncGraph":
            graph = getattr(graph, "outer_graph", None)
        return graph is place and place is not None
    if keras.backend.backend() == "jax":
        return place is not None or not is_traced(value)
    return not value.is_meta


def reading_mark(model):
    """Returns what `has_read_since` and `has_trained_since` need."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        graph = tf.compat.v1.get_default_graph()
        return graph, len(graph.get_operations())
    if keras.backend.backend() == "torch":
        return model, _optimizer_and_steps(model)
    return None


def has_read_since(mark, variables):
    """Says whether anything put into a graph reads one of the variables."""
    if keras.backend.backend() != "tensorflow":
        return False
    graph, count = mark
    outside = {id(stored_value(variable).handle) for variable in variables}
    handles = {
        id(inside)
        for captured, inside in getattr(graph, "captures", ())
        if id(captured) in outside
    }
    return any(
        id(x) in handles
        for operation in graph.get_operations()[count:]
        for x in operation.inputs
    )


def has_trained_since(mark):
    """Says whether the model's optimizer has made a step, on PyTorch."""
    if keras.backend.backend() != "torch":
        return False
    model, before = mark
    optimizer, count = _optimizer_and_steps(model)
    if optimizer is not before[0]:
        # The model was compiled since.
        return optimizer is not None and int(optimizer.iterations) > 0
    return count != before[1]


def _optimizer_and_steps(model):
    import torch

    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or torch.compiler.is_compiling():
        return None, None
    # The tensor's own counter, as reading its value waits for the device.
    return optimizer, optimizer.iterations.value._version


def stored_value(variable):
    """Returns `value` as Keras has it, also of our own kind of variable."""
    return backend.Variable.value.fget(variable)


def as_value(variable, array):
    """Returns an array in the form that `variable.value` has."""
    if not is_tracing_jax():
        array = placed(variable, np.asarray(array))
    tensor = backend.convert_to_tensor(array, dtype=variable._dtype)
    return variable._maybe_autocast(tensor)


def is_lost(variable):
    """Says whether a variable has no value, after a call on JAX failed."""
    return variable._value is None


def can_assign_traced():
    """Says whether a variable takes a value that is traced."""
    return keras.backend.backend() != "jax" or in_stateless_scope()
