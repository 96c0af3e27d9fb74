"""Optimizers, as they are inside."""

import contextlib
import copy
import functools

import keras
from keras.src import api_export

from keras_vera._keras.classes import class_like


def update_variables_one_by_one(optimizer, grads, variables, learning_rate):
    """Makes a step by `update_step`, as Keras does on the other backends.

    On PyTorch, Keras has another form of it for all variables together.
    """
    from keras.src.backend.torch.optimizers import torch_parallel_optimizer

    together = torch_parallel_optimizer.TorchParallelOptimizer
    step = super(together, optimizer)._backend_update_step
    step(grads, variables, learning_rate)


def check_built_with(optimizer, variables):
    """Raises, as Keras does, for variables of another model."""
    optimizer._check_variables_are_known(variables)


def divided(optimizer, grads, variables):
    """Returns each part of a built `MultiOptimizer`, and what it has to apply.

    Raises, as Keras does, for variables of another model, and where there is
    no gradient at all; warns where some are missing.

    Args:
        optimizer: A `MultiOptimizer`.
        grads: List of gradients, or `None`.
        variables: List of the variables that they are of.
    """
    check_built_with(optimizer, variables)
    grads, variables = optimizer._filter_empty_gradients(grads, variables)
    pairs = [[] for _ in optimizer.optimizers]
    for grad, variable in zip(grads, variables):
        part = optimizer._var_to_optimizer_idx[optimizer._var_key(variable)]
        pairs[part].append((grad, variable))
    return list(zip(optimizer.optimizers, pairs))


def named_in_files(plain_name):
    """Returns a decorator for a class that files name as one of Keras' own.

    Relies on files naming a class by this table, and on loading by another.

    Args:
        plain_name: String, the exported name of a class that does without
            what the new one adds.
    """

    def register(new_class):
        api_export.REGISTERED_OBJS_TO_NAMES[new_class] = plain_name
        return new_class

    return register


def read_from_files_as(plain_name):
    """Returns a decorator for a class that makes what files name as Keras' own.

    Relies on loading a class by this table. What is named so and is not of
    the new class, its `from_config` must make as Keras does.
    """

    def register(new_class):
        api_export.REGISTERED_NAMES_TO_OBJS[plain_name] = new_class
        return new_class

    return register


def mix_in(mixin, optimizer):
    """Puts a class before that of an optimizer, which keeps its names."""
    optimizer.__class__ = _mixed_class(mixin, type(optimizer))


def mix_out(optimizer):
    """Undoes the last `mix_in`."""
    optimizer.__class__ = type(optimizer).vera_plain_class


@functools.cache
def _mixed_class(mixin, plain_class):
    made = class_like(plain_class, (mixin,))
    name = api_export.REGISTERED_OBJS_TO_NAMES.get(plain_class)
    return made if name is None else named_in_files(name)(made)


def in_any_replica(mask):
    """Returns where a mask is true in any replica of `tf.distribute`.

    Gradients are those of one replica until the optimizer sums them up.
    """
    if keras.backend.backend() != "tensorflow":
        return mask
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return mask
    # In floats, which every kind of device can sum up.
    counts = replica.all_reduce(
        tf.distribute.ReduceOp.SUM, tf.cast(mask, "float32")
    )
    return counts > 0


def outside_of_tracing():
    """Returns a context in which variables have values.

    On TensorFlow, optimizers are built while the first step is traced, and on
    JAX, users may do so.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    if keras.backend.backend() == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    return contextlib.nullcontext()


def _allow_that_nothing_decays():
    """Lets optimizers exclude all that trains from weight decay.

    On PyTorch, Keras' own method fails for an empty list, which it has where
    the vectors are excluded and nothing else trains.
    """
    from keras.src.backend.torch.optimizers import torch_optimizer

    cls = torch_optimizer.TorchOptimizer
    apply_plain = cls._apply_weight_decay

    @functools.wraps(apply_plain)
    def apply(optimizer, variables):
        variables = [v for v in variables if optimizer._use_weight_decay(v)]
        if variables:
            apply_plain(optimizer, variables)

    cls._apply_weight_decay = apply


if keras.backend.backend() == "torch":
    _allow_that_nothing_decays()


# What `exclude_from_weight_decay` was told, which is in no config.
_EXCLUDED = "_exclude_from_weight_decay"


def _reset_optimizer_of(model, others):
    """Makes the optimizer of `model` start again with other variables.

    Args:
        model: A model whose trainable variables have changed.
        others: List of models that have not changed.
    """
    optimizer = getattr(model, "optimizer", None)
    if not getattr(optimizer, "built", False):
        return
    try:
        if any(_trains(optimizer, other) for other in others):
            # It goes on where it is.
            model.optimizer = _unbuilt_copy(optimizer)
        else:
            _undo_build(optimizer, {id(v) for v in model.variables})
    except Exception:
        # A custom optimizer of another make: `fit` then asks for `compile`,
        # instead of training the wrong variables.
        model.compiled = False


def _trains(optimizer, model):
    if getattr(model, "optimizer", None) is not optimizer:
        return False
    trained = {id(v) for v in optimizer._trainable_variables}
    return trained <= {id(v) for v in model.trainable_variables}


def _unbuilt_copy(optimizer):
    config = optimizer.get_config()
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is None:
        made = type(optimizer).from_config(config)
    else:
        # From its config, it would be of the class that files name.
        config["inner_optimizer"] = _unbuilt_copy(inner)
        made = type(optimizer)(**config)
    for one, original in zip(_parts(made), _parts(optimizer, given=True)):
        copy_exclusions(original, one)
    return made


def copy_exclusions(optimizer, made):
    """Excludes from weight decay what another optimizer excludes."""
    for name in (_EXCLUDED, f"{_EXCLUDED}_pattern"):
        if hasattr(optimizer, name):
            setattr(made, name, copy.copy(getattr(optimizer, name)))


def _parts(optimizer, given=False):
    """Returns the optimizer and those inside it.

    Args:
        optimizer: An optimizer.
        given: Whether to leave out what it made by itself.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    inner = [] if inner is None else [inner]
    several = getattr(optimizer, "optimizers", [])
    inner += _given(optimizer) if given else several
    return [optimizer, *(part for x in inner for part in _parts(x, given))]


def _given(optimizer):
    """Returns the optimizers that a `MultiOptimizer` was made of."""
    by_variable = getattr(optimizer, "_optimizer_map", None)
    listed = [getattr(by_variable, "default_optimizer", None)]
    # Those that a function picks come again when it is asked again.
    if hasattr(by_variable, "values"):
        listed += by_variable.values()
    return [
        part
        for part in getattr(optimizer, "optimizers", [])
        if any(part is one for one in listed)
    ]


def _undo_build(optimizer, living):
    """Makes an optimizer, and those inside it, as before `build`.

    It stays the same object, with all that it was told since it was made.
    Relies on `build` making all variables but those of the constructor anew,
    and on what `BaseOptimizer.build` and `MultiOptimizer.build` set.

    Args:
        optimizer: A built optimizer.
        living: Set of the ids of the variables of its model.
    """
    for part in _parts(optimizer):
        if part.built:
            _undo_own_build(part, living)
        if hasattr(part, "_optimizer_map"):
            part._inner_optimizers = _given(part)


def _undo_own_build(optimizer, living):
    kept = _ids_of_constructor_variables(optimizer)
    for variable in list(optimizer._variables):
        if id(variable) not in kept:
            optimizer._untrack_variable(variable)
    # TensorFlow wraps the list, and keeps a copy of what was in it, which it no
    # longer uses once something has been removed.
    if hasattr(optimizer._variables, "_last_wrapped_list_snapshot"):
        optimizer._variables._last_wrapped_list_snapshot = []
    optimizer._iterations.assign(0)
    # A new variable may get the id of one that is gone.
    for variable in optimizer._trainable_variables:
        if id(variable) not in living:
            excluded = getattr(optimizer, _EXCLUDED, set())
            excluded.discard(optimizer._var_key(variable))
    getattr(optimizer, f"{_EXCLUDED}_cache", {}).clear()
    optimizer._trainable_variables_indices.clear()
    # Not as an attribute, which would be tracked.
    vars(optimizer)["_trainable_variables"] = []
    optimizer.built = False


def _ids_of_constructor_variables(optimizer):
    try:
        made = type(optimizer).from_config(optimizer.get_config())
    except Exception:
        variables = [optimizer._iterations, optimizer._learning_rate]
    else:
        variables = optimizer._variables[: len(made._variables)]
    return {id(variable) for variable in variables}
