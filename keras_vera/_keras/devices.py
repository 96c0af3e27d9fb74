"""Where variables are, of several devices."""

import contextlib

import keras


def strategy_of(layer):
    """Returns the `tf.distribute` strategy that made a layer, or `None`."""
    if keras.backend.backend() != "tensorflow" or not layer.variables:
        return None
    variable = layer.variables[0].value
    strategy = getattr(variable, "distribute_strategy", None)
    # What TensorFlow has where there is no strategy is one as well.
    is_default = type(strategy).__name__ == "_DefaultDistributionStrategy"
    return None if is_default else strategy


def strategy_scope(layer):
    """Makes variables where those of `layer` are, as TensorFlow demands."""
    strategy = strategy_of(layer)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def is_in_other_strategy(layer):
    """Says whether `tf.distribute` is active, but not for this layer."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return (
        tf.distribute.has_strategy()
        and tf.distribute.get_strategy() is not strategy_of(layer)
    )
