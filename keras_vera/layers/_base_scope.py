"""Which variables show the base's values, inside `keras_vera.base_model`.

Where Python reads variables for one computation alone (PyTorch; a function
that is being traced), only this thread reads the base's values, as constants:
nothing is assigned, and no gradient goes to the adapter. Elsewhere functions
that were compiled before read the variables themselves, so these are assigned
the base's values and given back. Both are known here, so that files hold the
adapter wherever they are saved.
"""

import contextlib
import functools
import threading

import keras
import numpy as np

from keras_vera import _keras

# Its `scopes` are the blocks that a thread is in, the innermost last. (Not a
# `ContextVar`, which `torch.compile` does not follow.)
_thread = threading.local()

# What variables that were assigned are to be given back, by their ids.
_kept: dict = {}
_lock = threading.RLock()


class _Scope:
    def __init__(self, model, values):
        self.model = model
        self.variables = [variable for variable, _ in values]
        self.values = {id(variable): value for variable, value in values}
        self.place = _keras.reading_place()


class _Kept:
    def __init__(self, variable, base):
        self.variable = variable
        self.own = _to_numpy(variable)
        self.base = base
        self.blocks = 0


class _Based:
    """Before the class of a variable that the base model has not, or has with
    another value."""

    @property
    def value(self):
        stored = _keras.stored_value(self)
        shown = _shown_instead(self, stored)
        return stored if shown is None else _keras.as_value(self, shown)

    def assign(self, value):
        if _is_suspended():
            kept = _kept.get(id(self))
            if kept is not None:
                kept.own = _keras.to_numpy(value).copy()
                return value
        elif any(scope.place is not None for scope in _scopes()):
            scope = _scope_of(self, _keras.stored_value(self))
            if scope is not None and scope.place is not None:
                raise _trained(scope.model)
        return super().assign(value)

    @property
    def handle(self):
        """What TensorFlow asks for to find gradients."""
        stored = _keras.stored_value(self)
        scope = _scope_of(self, stored)
        if scope is not None:
            raise _trained(scope.model)
        return stored.handle


@functools.cache
def _based_class(plain_class):
    # A bias of the base is of a class of its own, as it is frozen.
    return _keras.class_like(plain_class, (_Based,))


@contextlib.contextmanager
def base_scope(model, values, others=()):
    """Lets `model` be its base.

    Args:
        model: An adapted model.
        values: List of pairs, a variable and its value in the base.
        others: List of the variables of its adapter that the base may have
            with any value; they must not be changed in the block.
    """
    for variable in [*(v for v, _ in values), *others]:
        if not isinstance(variable, _Based):
            variable.__class__ = _based_class(type(variable))
    scope = _Scope(model, values)
    if scope.place is None:
        _keras.synchronize(model)
        _keras.check_all_here("base_model", model.variables)
        values = values + [(v, _to_numpy(v)) for v in others]
        inside = _assigned(model, values)
    else:
        inside = _only_read(scope)
    with inside:
        before = _scopes()
        _thread.scopes = (*before, scope)
        try:
            yield
        finally:
            _thread.scopes = before


def suspended():
    """Lets this thread read and assign the adapter itself, also inside."""
    return _with_suspension(True)


def resumed():
    """Ends `suspended` for a block."""
    return _with_suspension(False)


@contextlib.contextmanager
def _with_suspension(is_suspended):
    before = _is_suspended()
    _thread.is_suspended = is_suspended
    try:
        yield
    finally:
        _thread.is_suspended = before


def shows_base(variable):
    """Says whether this thread reads the base's value of `variable` now."""
    return bool(_scopes()) and (
        not _is_suspended()
        and _scope_of(variable, _keras.stored_value(variable)) is not None
    )


def check_outside(model):
    """Raises if `model`, or a part of it, is inside `base_model`."""
    if not isinstance(model, keras.Layer) or not (_scopes() or _kept):
        return
    layers = {id(layer) for layer in _keras.flatten_layers(model)}
    is_inside = any(id(v) in _kept for v in model.variables) or any(
        id(layer) in layers
        for scope in _scopes()
        for layer in _keras.flatten_layers(scope.model)
    )
    if is_inside:
        raise ValueError(
            "`model` must not be changed while it is its base. Received: model "
            f"'{model.name}', inside `with keras_vera.base_model(...)`. Leave "
            "the block first."
        )


@contextlib.contextmanager
def _assigned(model, values):
    """Assigns the values, and gives back what was there."""
    with _lock:
        for variable, value in values:
            kept = _kept.get(id(variable))
            if kept is None:
                kept = _kept[id(variable)] = _Kept(variable, value)
                keras.Variable.assign(variable, value)
            kept.blocks += 1
    try:
        yield
    except BaseException:
        _give_back(model, values)
        raise
    if _give_back(model, values):
        raise _trained(model)


def _give_back(model, values):
    """Returns whether something else has changed the variables."""
    is_changed = False
    with _lock:
        _keras.synchronize(model)
        for variable, _ in values:
            kept = _kept[id(variable)]
            kept.blocks -= 1
            if kept.blocks:
                continue
            del _kept[id(variable)]
            # Keras on JAX loses the values where a call fails.
            if not _keras.is_lost(variable):
                stored = _to_numpy(variable)
                is_changed |= not (
                    np.array_equal(stored, kept.base, equal_nan=True)
                    or np.array_equal(stored, kept.own, equal_nan=True)
                )
            keras.Variable.assign(variable, kept.own)
    return is_changed


@contextlib.contextmanager
def _only_read(scope):
    """Raises for what reads the adapter in a way that is not seen here."""
    mark = _keras.reading_mark(scope.model)
    yield
    if _keras.has_read_since(mark, scope.variables):
        raise ValueError(
            "Inside `keras_vera.base_model`, a compiled function was called "
            f"that reads the adapter of model '{scope.model.name}'. In a "
            "compiled function, call the model itself in the block, or "
            "functions that are not compiled by themselves."
        )
    if _keras.has_trained_since(mark):
        raise _trained(scope.model)


def _shown_instead(variable, stored):
    """Returns what a reader gets instead of the stored value, or `None`."""
    if not _is_suspended():
        scope = _scope_of(variable, stored)
        if scope is not None:
            return scope.values[id(variable)]
    kept = _kept.get(id(variable)) if _kept else None
    # A thread that is in no block, or one that saves.
    if kept is not None and _keras.is_read_at(None, stored):
        return kept.own
    return None


def _scope_of(variable, stored):
    """Returns the innermost block that this read of `variable` is in."""
    for scope in reversed(_scopes()):
        if id(variable) in scope.values and _keras.is_read_at(
            scope.place, stored
        ):
            return scope
    return None


def _scopes():
    return getattr(_thread, "scopes", ())


def _is_suspended():
    return getattr(_thread, "is_suspended", False)


def _to_numpy(variable):
    return np.array(_keras.to_numpy(_keras.stored_value(variable)))


def _trained(model):
    return ValueError(
        f"Model '{model.name}' was trained inside `keras_vera.base_model`, "
        "where its adapter is 0. The adapter is what it was before. Train "
        "outside of the block; in a training step, compute the base's outputs "
        "inside it, and loss, gradients and updates after it."
    )


# In the backward pass, when the block has ended, it would be another model.
_keras.serve_rematerialization(lambda: bool(_scopes()))
