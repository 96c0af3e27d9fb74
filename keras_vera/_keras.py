"""The places where Keras' public API does not reach, in one file.

Written against Keras 3.15. What each function relies on is said there; a
release of Keras that changes it breaks this file alone.
"""

import contextlib
import gc
import sys

import keras
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import object_registration
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
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


def is_training(training):
    """Returns whether the running call trains.

    Keras passes `training` only to a `call` that asks for it.
    """
    if training is None:
        context = global_state.get_global_attribute("current_call_ctx")
        if context is not None:
            training = context.get_value("training")
    return bool(training)


def is_in_call():
    """Returns whether a layer is being called.

    Keras calls a model without a context of calls in `stateless_call`, but
    in a stateless scope, where nothing else assigns to weights of layers.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return context is not None or in_stateless_scope()


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
    variables baked in; so has a built optimizer, which starts again with its
    own configuration (its moments belong to variables that no longer train).
    Models do not know who contains them, hence the search.
    """
    changed = {id(layer) for layer in layers}
    for model in gc.get_objects():
        # Keras leaves instances behind that it made and never initialized.
        if not (
            issubclass(type(model), keras.Model) and "_layers" in vars(model)
        ):
            continue
        below = flatten_layers(model)
        if changed.isdisjoint(id(layer) for layer in below):
            continue
        for name in COMPILED:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        optimizer = getattr(model, "optimizer", None)
        if getattr(optimizer, "built", False):
            try:
                model.optimizer = type(optimizer).from_config(
                    optimizer.get_config()
                )
            except Exception:
                # A custom optimizer without a config: `fit` then asks for
                # `compile`, instead of training the wrong variables.
                model.compiled = False
        if keras.backend.backend() == "torch":
            # `model.parameters()` lists what was there at build time.
            for layer in below:
                if layer.built:
                    layer._track_variables()


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
