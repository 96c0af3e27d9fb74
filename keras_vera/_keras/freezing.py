"""Which variables of a layer train, and which it tracks."""

import contextlib

import keras

from keras_vera._keras.structure import own_variables


def set_trainable(layer, value):
    """Sets the flag of `layer` itself; `layer.trainable = ...` recurses."""
    layer._trainable = value


def freeze_own_variables(layer, kept=frozenset()):
    """Freezes the variables of `layer` itself, whatever is toggled later.

    `layer.trainable = True` reaches the variables that are listed as
    trainable, so they move to the other list. They go to its front, as
    `layer.weights`, and with it the order in saved files, is both in turn.
    Where some are kept, the order allows no move; `_frozen.py` sees to it
    that such variables refuse to be trainable.

    Args:
        layer: A layer.
        kept: Set of the ids of variables that are left alone.

    Returns:
        The variables that it moved, which `thaw_own_variables` moves back.
    """
    to_freeze = [v for v in layer._trainable_variables if id(v) not in kept]
    is_whole = len(to_freeze) == len(layer._trainable_variables)
    moved = to_freeze if is_whole else []
    _move(layer, moved, "non_trainable_variables")
    for variable in to_freeze:
        variable.trainable = False
    return moved


def thaw_own_variables(layer, moved):
    """Lists variables as trainable again; their flags are left alone."""
    _move(layer, moved, "trainable_variables")


def _move(layer, variables, to):
    tracker = layer._tracker
    living = {id(v) for v in own_variables(layer)}
    variables = [v for v in variables if id(v) in living]
    for variable in variables:
        tracker.untrack(variable)
    tracker.config[to][1][:0] = variables
    tracker.stored_ids[to].update(id(v) for v in variables)


def finalize_state(layers):
    """Lets layers make anew what they keep beside their variables.

    `Normalization` and its like compute with constants that they make of
    their variables when `finalize_state` is called, as Keras' loading does.

    Returns:
        List of the layers that do so; compiled functions hold the constants.
    """
    found = [x for x in layers if callable(getattr(x, "finalize_state", None))]
    for layer in found:
        layer.finalize_state()
    return found


@contextlib.contextmanager
def new_state_allowed(layer):
    """Lets a built layer take new variables, as Keras' own LoRA does."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def remove_attribute(layer, name):
    """Removes an attribute, and the variable or seed generator it holds.

    `Layer.__delattr__` would collect garbage for each variable.
    """
    value = getattr(layer, name)
    if isinstance(value, keras.Variable):
        layer._untrack_variable(value)
    elif isinstance(value, keras.random.SeedGenerator):
        layer._tracker.untrack(value)
    super(keras.Layer, layer).__delattr__(name)
