"""The places where Keras' public API does not reach, in one file.

Written against Keras 3.15. What each function relies on is said there; a
release of Keras that changes it breaks this file alone.
"""

import contextlib
import copy
import functools
import gc
import inspect
import itertools
import sys
import weakref

import keras
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import object_registration
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.utils import naming

# Compiled functions that models keep. KerasHub's Gemma 4 has one for
# generation with an assistant model.
COMPILED = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
    "_cached_spec_generate_fn",
)


def structural_paths(model):
    """Returns `{path: layer}` for `model` and all layers below it.

    The path is the one under which Keras' own saving finds the layer
    (attribute names and positions in containers); unlike `layer.path` it is
    unique and the same in every build of a model. `model` itself has path "".
    """
    paths = {}
    seen = set()

    def visit(layer, path):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        paths[path] = layer
        if not layer._layers:
            # Nothing below; and reading `kernel` of an adapted layer costs.
            return
        for attribute, child in saving_lib._walk_saveable(layer):
            child_path = f"{path}/{attribute}" if path else attribute
            if isinstance(child, keras.Layer):
                visit(child, child_path)
            elif isinstance(child, (list, dict, tuple)):
                visit_container(child, child_path, set())

    def visit_container(container, path, outer):
        if id(container) in outer:
            return
        outer = outer | {id(container)}
        if isinstance(container, dict):
            container = list(container.values())
        counts = {}
        for child in container:
            if isinstance(child, (list, dict, tuple)):
                name = "container"
            elif isinstance(child, KerasSaveable):
                name = naming.to_snake_case(type(child).__name__)
            else:
                continue
            count = counts[name] = counts.get(name, -1) + 1
            child_path = f"{path}/{name}_{count}" if count else f"{path}/{name}"
            if isinstance(child, keras.Layer):
                visit(child, child_path)
            elif name == "container":
                visit_container(child, child_path, outer)

    visit(model, "")
    return paths


def own_variables(layer):
    """Returns the weights of `layer` itself, without its sub-layers'."""
    return layer._trainable_variables + layer._non_trainable_variables


def trained_variables(layer):
    """Returns the weights of `layer` itself that were made to train."""
    return list(layer._trainable_variables)


def untrained_variables(layer):
    """Returns the weights of `layer` itself that were made not to train.

    Which of the two lists holds a variable says so, whatever flags are set.
    Seed generators and metrics have lists of their own.
    """
    return list(layer._non_trainable_variables)


def flatten_layers(model):
    """Returns `model` and every layer below it, each once."""
    return model._flatten_layers()


def flatten_in_order(layer):
    """Returns the layers below in the order of `Layer.weights`."""
    found = [layer]
    for below in layer._layers:
        found.extend(flatten_in_order(below))
    return list({id(x): x for x in found}.values())


def sub_layers(layer):
    return list(layer._layers)


def stored_attribute(layer, name):
    """Returns what an instance has under the name of a property."""
    # On PyTorch, layers in attributes are kept as modules.
    for values in (vars(layer), vars(layer).get("_modules", {})):
        if name in values:
            return values[name]
    # TensorFlow asks for each attribute before its first value is stored.
    raise AttributeError(f"{type(layer).__name__!r} object has no {name!r}")


def update_variables_one_by_one(optimizer, grads, variables, learning_rate):
    """Makes a step by `update_step`, as Keras does on the other backends.

    On PyTorch, Keras has another form of it for all variables together.
    """
    from keras.src.backend.torch.optimizers import torch_parallel_optimizer

    together = torch_parallel_optimizer.TorchParallelOptimizer
    step = super(together, optimizer)._backend_update_step
    step(grads, variables, learning_rate)


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


def takes_training(layer):
    return layer._call_has_training_arg


def draws_random_numbers(layer):
    return bool(layer._seed_generators)


# The functions of Keras that give a model other weights.
_LOADERS = {
    keras.Layer.set_weights.__code__,
    saving_lib._load_state.__code__,
    legacy_h5_format._set_weights.__code__,
}


def is_loading_weights():
    """Returns whether an assignment comes from a function that loads weights.

    Keras says nowhere that it loads; but its functions are on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _LOADERS:
            return True
        frame = frame.f_back
    return False


def share_registered_name(plain_class, new_class):
    """Lets files name a class as they name the one it takes the place of."""
    names = object_registration.GLOBAL_CUSTOM_NAMES
    if plain_class in names:
        names[new_class] = names[plain_class]


def copy_mask(source, target):
    mask = backend.get_keras_mask(source)
    if mask is not None:
        backend.set_keras_mask(target, mask)


def is_rematerialized(layer):
    return getattr(layer, "_remat_mode", None) is not None


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
        What `thaw_own_variables` needs to undo this.
    """
    frozen = [(v, v.trainable) for v in own_variables(layer)]
    to_freeze = [v for v in layer._trainable_variables if id(v) not in kept]
    is_whole = len(to_freeze) == len(layer._trainable_variables)
    moved = to_freeze if is_whole else []
    _move(layer, moved, "non_trainable_variables")
    for variable in to_freeze:
        variable.trainable = False
    return moved, frozen


def thaw_own_variables(layer, record):
    moved, frozen = record
    _move(layer, moved, "trainable_variables")
    for variable, trainable in frozen:
        variable.trainable = trainable


def _move(layer, variables, to):
    tracker = layer._tracker
    living = {id(v) for v in own_variables(layer)}
    variables = [v for v in variables if id(v) in living]
    for variable in variables:
        tracker.untrack(variable)
    tracker.config[to][1][:0] = variables
    tracker.stored_ids[to].update(id(v) for v in variables)


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


def reset_compiled(layers):
    """Makes every living model that holds one of `layers` trace afresh.

    Compiled functions have the old layers and the old set of trainable
    variables baked in; so has a built optimizer, which starts again (its
    moments belong to variables that no longer train). Models do not know who
    contains them, hence the search.
    """
    changed = {id(layer) for layer in layers}
    holding, others = [], []
    for model in living_models():
        below = flatten_layers(model)
        is_changed = not changed.isdisjoint(id(layer) for layer in below)
        (holding if is_changed else others).append(model)
    for model in holding:
        for name in COMPILED:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        _reset_optimizer_of(model, others)
        if keras.backend.backend() == "torch":
            # `model.parameters()` lists what was there at build time.
            for layer in flatten_layers(model):
                if layer.built:
                    layer._track_variables()


# Weak references to all models, by id: not a `WeakSet`, which asks models of
# users whether they are equal. The garbage collector, which knows them as
# well, does not list what `gc.freeze()` put aside.
_models = {}


def living_models():
    models = [reference() for reference in list(_models.values())]
    # Keras leaves instances behind that it made and never initialized.
    return [m for m in models if m is not None and "_layers" in vars(m)]


def remember_model(model):
    """Makes `living_models` list a model that was not made by its class."""

    def forget(reference, key=id(model)):
        if _models.get(key) is reference:
            del _models[key]

    _models[id(model)] = weakref.ref(model, forget)


def _remember_all_models():
    """Relies on `keras.Model.__new__`, which makes every model, also those
    that are loaded, cloned and copied. Those made before are found once."""
    make_plain = keras.Model.__new__

    @functools.wraps(make_plain)
    def make(cls, *args, **kwargs):
        model = make_plain(cls, *args, **kwargs)
        remember_model(model)
        return model

    keras.Model.__new__ = staticmethod(make)
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    for candidate in gc.get_objects():
        if issubclass(type(candidate), keras.Model):
            remember_model(candidate)
    if frozen:
        gc.freeze()


_remember_all_models()

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
    made = type(optimizer).from_config(optimizer.get_config())
    for one, original in zip(_parts(made), _parts(optimizer)):
        for name in (_EXCLUDED, f"{_EXCLUDED}_pattern"):
            if hasattr(original, name):
                setattr(one, name, copy.copy(getattr(original, name)))
    return made


def _parts(optimizer):
    """Returns the optimizer and those inside it."""
    inner = getattr(optimizer, "inner_optimizer", None)
    inner = [] if inner is None else [inner]
    inner += getattr(optimizer, "optimizers", [])
    return [optimizer, *(part for each in inner for part in _parts(each))]


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
    by_variable = getattr(optimizer, "_optimizer_map", None)
    if by_variable is None:
        return
    # Those that a function picks come again when it is asked again.
    listed = [getattr(by_variable, "default_optimizer", None)]
    if hasattr(by_variable, "values"):
        listed += by_variable.values()
    optimizer._inner_optimizers = [
        part
        for part in optimizer.optimizers
        if any(part is one for one in listed)
    ]


def _undo_own_build(optimizer, living):
    kept = _ids_of_constructor_variables(optimizer)
    for variable in list(optimizer._variables):
        if id(variable) not in kept:
            optimizer._untrack_variable(variable)
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


def is_saving_or_loading():
    """Says whether a `.keras` file is written or read.

    Copies and pickles are such files, too. `clone_model`, `to_json` and HDF5
    files of the older form share no objects.
    """
    return objects_being_loaded() is not None


def serve_legacy_files(weights_of):
    """Lets HDF5 files of the older form hold what `weights_of` returns.

    Keras asks one function for the variables of a layer, in their order in
    such files, and uses their `shape`, `path` and `assign` and their values.

    Args:
        weights_of: Function that takes a layer and returns a list of what is
            used as variables, or `None` for Keras' own list.
    """
    plain = legacy_h5_format._legacy_weights

    def legacy_weights(layer):
        weights = weights_of(layer)
        return plain(layer) if weights is None else weights

    legacy_h5_format._legacy_weights = legacy_weights


def objects_being_loaded():
    """Returns the dict that `load_model` shares objects by, or `None`."""
    return global_state.get_global_attribute("shared_objects/id_to_obj_map")


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
        # Keras' `jax.core` has no name for it.
        from jax._src.core import trace_state_clean

        is_alone = (
            in_stateless_scope()
            or not trace_state_clean()
            or _is_in_step_of_jax()
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
        return model, _count_of_steps(model)
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
    model, count = mark
    return _count_of_steps(model) != count


def _count_of_steps(model):
    import torch

    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or torch.compiler.is_compiling():
        return None
    # The tensor's own counter, as reading its value waits for the device.
    return optimizer.iterations.value._version


def stored_value(variable):
    """Returns `value` as Keras has it, also of our own kind of variable."""
    return backend.Variable.value.fget(variable)


def as_value(variable, array):
    """Returns an array in the form that `variable.value` has."""
    tensor = backend.convert_to_tensor(array, dtype=variable._dtype)
    return variable._maybe_autocast(tensor)


def can_assign_traced():
    """Says whether a variable takes a value that is traced."""
    return keras.backend.backend() != "jax" or in_stateless_scope()


def hidden_group(store, create=False):
    """Returns the HDF5 group for what plain Keras must not see, or `None`.

    It lies beside the group of a layer's own variables in a weights file,
    where Keras looks at nothing. Stores of another kind have none.
    """
    variables = getattr(store, "_h5_entry_group", None)
    parent = getattr(variables, "parent", None)
    if parent is None:
        return None
    if create:
        return parent.require_group("keras_vera")
    if "keras_vera" not in parent:
        return None
    return saving_lib.safe_get_h5_group(parent, "keras_vera")


def hidden_array(group, name):
    return saving_lib.safe_get_h5_dataset(group, name)[()]


def data_kind(x):
    """Returns the library of a dataset, such as `"tf"`; else `None`."""
    for kind, is_kind in (
        ("tf", data_adapters.is_tf_dataset),
        ("torch", data_adapters.is_torch_dataloader),
        ("grain", data_adapters.is_grain_dataset),
    ):
        if is_kind(x):
            return kind
    return None


def numpy_batches(data, batch_size, steps):
    """Yields `(x, y, sample_weight)` of all that `evaluate` takes.

    Args:
        data: As `validation_data` of `keras.Model.fit`.
        batch_size: Integer or `None`, of batches that are made of arrays.
        steps: Integer, the largest number of batches, or `None`.
    """
    unpack = data_adapter_utils.unpack_x_y_sample_weight
    x, y, sample_weight = unpack(data)
    adapter = data_adapters.get_data_adapter(
        x, y, sample_weight, batch_size=batch_size or 32
    )
    try:
        for batch in itertools.islice(adapter.get_numpy_iterator(), steps):
            yield unpack(batch)
    finally:
        # The workers of a `PyDataset` read on, also after the last step.
        if getattr(adapter, "enqueuer", None) is not None:
            adapter.enqueuer.stop()


def split_validation(x, y, sample_weight, validation_split):
    """Splits arrays as `fit` does; both parts are `(x, y, sample_weight)`."""
    return array_slicing.train_validation_split(
        (x, y, sample_weight), validation_split=validation_split
    )


def bound_arguments(method, args, kwargs):
    """Returns the arguments of a call of `method` by their names."""
    return dict(inspect.signature(method).bind(*args, **kwargs).arguments)


def comparison(model, monitor, mode, min_delta):
    """Returns what says whether a metric is better than it was.

    `EarlyStopping` knows which metrics of the compiled model go up.
    """
    monitoring = keras.callbacks.EarlyStopping(
        f"val_{monitor}", min_delta=min_delta, mode=mode
    )
    monitoring.set_model(model)
    monitoring._set_monitor_op()
    return lambda value, best: bool(monitoring._is_improvement(value, best))
