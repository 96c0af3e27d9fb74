"""Optimizers that leave alone the rows of adapters absent from a batch.

A dense step of Adam moves whatever has moments, also what had no gradient.
"""

import keras
import numpy as np
from keras import ops

from keras_vera import _keras

# The first dimension of a variable would be one like any other to them, or
# their state starts as the variable, which a new adapter changes.
_MIXING_ROWS = (
    keras.optimizers.Adafactor,
    keras.optimizers.Lamb,
    keras.optimizers.Muon,
    keras.optimizers.ScheduleFreeAdamW,
)
_MIXING_OPTIONS = (
    "clipnorm",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "use_ema",
)


class TrainsRows:
    """Before a Keras optimizer class: only rows with a gradient change.

    All trained variables have one row for each adapter. An adapter is in the
    batch if any of its numbers has a gradient other than 0. For all others,
    variables and state stay as they are, weight decay included. Each has its
    own count of steps, as Adam's bias correction needs it: with one for all, a
    rare adapter would make steps that are several times too large. Row 0 is
    the base model and never changes, so its state is that of a row that was
    never trained.

    The count of a row that is stopped, so that it stays as it is whatever its
    gradient, is kept as its complement, which is negative.
    """

    def build(self, variables):
        if not all(getattr(v, "vera_is_stack", False) for v in variables):
            # It was compiled for another model afterwards.
            _keras.mix_out(self)
            self.build(variables)
            return
        _check(self)
        super().build(variables)
        self.count_rows()

    def count_rows(self):
        rows = self._trainable_variables[0].shape[0]
        self._row_iterations = self.add_variable(
            (rows,), dtype="int32", name="row_iterations"
        )
        for part in getattr(self, "optimizers", [self]):
            if not isinstance(part, _CountsRows):
                _keras.mix_in(_CountsRows, part)
            # Not an attribute, whose variable would be tracked again.
            vars(part)["_counts"] = self._row_iterations

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not self.built:
            self.build(variables)
            if not isinstance(self, TrainsRows):
                self.apply(grads, trainable_variables)
                return
        _keras.check_built_with(self, variables)
        grads = [None if grad is None else _dense(grad) for grad in grads]
        row = np.arange(variables[0].shape[0])
        moving = row < 0
        for grad in grads:
            if grad is not None:
                axes = tuple(range(1, len(grad.shape)))
                has_gradient = ops.any(ops.not_equal(grad, 0), axis=axes)
                moving = ops.logical_or(moving, has_gradient)
        moving = _keras.in_any_replica(moving)
        counts = ops.convert_to_tensor(self._row_iterations)
        may_move = ops.logical_and(counts >= 0, row > 0)
        moving = ops.logical_and(moving, may_move)
        by_row = variables + _state_by_row(self)
        before = [ops.copy(ops.convert_to_tensor(v)) for v in by_row]
        super().apply(grads, variables)
        for variable, old in zip(by_row, before):
            mask = ops.reshape(moving, (-1, *[1] * (len(old.shape) - 1)))
            new = ops.convert_to_tensor(variable)
            variable.assign(ops.where(mask, new, old))
        self._row_iterations.assign_add(ops.cast(moving, "int32"))

    def load_own_variables(self, store):
        super().load_own_variables(store)
        # Whoever stopped rows was part of the `fit` that was saved.
        stop_rows(self, None)


class _CountsRows:
    """Before a Keras optimizer class: a step is the number of it in its row.

    Schedules of the learning rate go by the steps of all rows, and so does the
    product of momenta that Nadam keeps.
    """

    _counts = None  # The variable that holds the steps of each row.
    _row_steps = None  # These, in the shape of what is updated just now.

    @property
    def iterations(self):
        if self._row_steps is None:
            return super().iterations
        return self._row_steps

    def update_step(self, gradient, variable, learning_rate):
        shape = (-1, *[1] * (len(variable.shape) - 1))
        steps = ops.reshape(ops.convert_to_tensor(self._counts), shape)
        vars(self)["_row_steps"] = steps
        try:
            super().update_step(gradient, variable, learning_rate)
        finally:
            del vars(self)["_row_steps"]

    def _parallel_update_step(self, grads, variables, learning_rate):
        # Keras' own for PyTorch takes one count of steps for all numbers.
        _keras.update_variables_one_by_one(
            self, grads, variables, learning_rate
        )


def train_rows(optimizer):
    """Makes an optimizer one that trains rows, in place.

    Args:
        optimizer: What `keras.Model.compile` takes.

    Returns:
        The optimizer.

    Raises:
        ValueError: If it would mix adapters.
    """
    optimizer = keras.optimizers.get(optimizer)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    _check(inner)
    if not isinstance(inner, TrainsRows):
        _keras.mix_in(TrainsRows, inner)
        if inner.built:
            inner.count_rows()
    return optimizer


def row_steps(optimizer):
    """Returns the steps that each row has made; `None` before the first."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not getattr(inner, "built", False):
        return None
    counts = _keras.to_numpy(inner._row_iterations)
    return np.where(counts < 0, ~counts, counts)


def stop_rows(optimizer, rows):
    """Keeps more rows and their state as they are, or lets all move again.

    Args:
        optimizer: What `train_rows` returned.
        rows: List of integers; `None` starts all that were stopped.
    """
    steps = row_steps(optimizer)
    if steps is not None:
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        is_stopped = np.zeros(len(steps), bool)
        if rows is not None:
            is_stopped |= _keras.to_numpy(inner._row_iterations) < 0
            is_stopped[rows] = True
        inner._row_iterations.assign(np.where(is_stopped, ~steps, steps))


def reset_rows(optimizer, rows):
    """Gives rows the state of rows that were never trained."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.built:
        return
    is_reset = np.zeros(inner._trainable_variables[0].shape[0], bool)
    is_reset[rows] = True
    for variable in _state_by_row(inner):
        mask = is_reset.reshape(-1, *[1] * (len(variable.shape) - 1))
        value = ops.convert_to_tensor(variable)
        variable.assign(ops.where(mask, value[:1], value))


if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _dense(grad):
        # Of gathered rows, the gradient is sparse, and an adapter with two
        # examples stands twice in it: Adam would add the squares of both.
        return tf.convert_to_tensor(grad)

else:

    def _dense(grad):
        return grad


def _state_by_row(optimizer):
    """Returns the optimizer's variables that have a row for each adapter."""
    shapes = {tuple(v.shape) for v in optimizer._trainable_variables}
    shapes.add(tuple(optimizer._row_iterations.shape))
    return [v for v in optimizer.variables if tuple(v.shape) in shapes]


def _check(optimizer):
    for part in getattr(optimizer, "optimizers", [optimizer]):
        if isinstance(part, _MIXING_ROWS):
            raise ValueError(
                "`optimizer` must treat every number by itself, with a state "
                "of zeros at first, or adapters would train each other. Use "
                "Adam, AdamW, SGD, RMSprop or the like. "
                f"Received: optimizer={type(part).__name__}"
            )
        for option in _MIXING_OPTIONS:
            if getattr(part, option, None):
                raise ValueError(
                    f"`optimizer` must not use `{option}`, which would mix "
                    "the adapters of a bank. Received: "
                    f"{type(part).__name__}({option}={getattr(part, option)})"
                )
