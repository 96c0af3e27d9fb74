"""What is known of the call that runs."""

import inspect

from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope


def is_training(training):
    """Returns whether the running call trains.

    Keras passes `training` only to a `call` that asks for it.
    """
    if training is None:
        context = global_state.get_global_attribute("current_call_ctx")
        if context is not None:
            training = context.get_value("training")
    return bool(training)


def is_in_layer_call():
    """Returns whether a layer is being called, or what calls layers."""
    return global_state.get_global_attribute("current_call_ctx") is not None


def is_in_call():
    """Returns whether a layer is being called.

    Keras calls a model without a context of calls in `stateless_call`, but
    in a stateless scope, where nothing else assigns to weights of layers.
    """
    return is_in_layer_call() or in_stateless_scope()


def is_in_inference_call():
    """Returns whether a call runs, on data, that is known not to train."""
    context = global_state.get_global_attribute("current_call_ctx")
    return (
        context is not None
        and not in_stateless_scope()
        and not context.get_value("training")
    )


def copy_mask(source, target):
    mask = backend.get_keras_mask(source)
    if mask is not None:
        backend.set_keras_mask(target, mask)


def bound_arguments(method, args, kwargs):
    """Returns the arguments of a call of `method` by their names."""
    return dict(inspect.signature(method).bind(*args, **kwargs).arguments)
