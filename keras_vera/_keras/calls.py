"""What is known of the call that runs."""

import functools
import inspect
import threading

from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope

# Whether a thread `is_rematerializing`.
_thread = threading.local()


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
    in a stateless scope, where nothing else assigns to weights of layers. Nor
    is there one where the backward pass runs a layer again.
    """
    return (
        is_in_layer_call()
        or in_stateless_scope()
        or getattr(_thread, "is_rematerializing", False)
    )


def is_in_inference_call():
    """Returns whether a call runs, on data, that is known not to train."""
    context = global_state.get_global_attribute("current_call_ctx")
    return (
        context is not None
        and not in_stateless_scope()
        and not context.get_value("training")
    )


def serve_rematerialization(is_plain):
    """Lets what `keras.remat` runs again be known as a call.

    On JAX it is a part of the call, as nothing runs in the backward pass.

    Args:
        is_plain: Function that says whether what is called now must not run
            again.
    """
    if backend.backend() == "jax":
        return
    plain_remat = backend.core.remat

    def remat(function):
        @functools.wraps(function, updated=())
        def known(*args, **kwargs):
            before = getattr(_thread, "is_rematerializing", False)
            _thread.is_rematerializing = True
            try:
                return function(*args, **kwargs)
            finally:
                _thread.is_rematerializing = before

        rematerialized = plain_remat(known)

        @functools.wraps(function, updated=())
        def call(*args, **kwargs):
            run = function if is_plain() else rematerialized
            return run(*args, **kwargs)

        return call

    backend.core.remat = remat


def copy_mask(source, target):
    mask = backend.get_keras_mask(source)
    if mask is not None:
        backend.set_keras_mask(target, mask)


def bound_arguments(method, args, kwargs):
    """Returns the arguments of a call of `method` by their names."""
    return dict(inspect.signature(method).bind(*args, **kwargs).arguments)
