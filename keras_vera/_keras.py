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


def flatten_layers(model):
    """Returns `model` and every layer below it, each once."""
    return model._flatten_layers()


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


def copy_mask(source, target):
    mask = backend.get_keras_mask(source)
    if mask is not None:
        backend.set_keras_mask(target, mask)


def is_rematerialized(layer):
    return getattr(layer, "_remat_mode", None) is not None


def set_trainable(layer, value):
    """Sets the flag of `layer` itself; `layer.trainable = ...` recurses."""
    layer._trainable = value


def freeze_own_variables(layer):
    """Freezes the variables of `layer` itself, whatever is toggled later.

    `layer.trainable = True` reaches the variables that are listed as
    trainable, so they move to the other list. They go to its front, as
    `layer.weights`, and with it the order in saved files, is both in turn.

    Returns:
        What `thaw_own_variables` needs to undo this.
    """
    frozen = [(v, v.trainable) for v in own_variables(layer)]
    moved = list(layer._trainable_variables)
    _move(layer, moved, "non_trainable_variables")
    for variable in moved:
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
        return parent.create_group("keras_vera")
    if "keras_vera" not in parent:
        return None
    return saving_lib.safe_get_h5_group(parent, "keras_vera")


def hidden_array(group, name):
    return saving_lib.safe_get_h5_dataset(group, name)[()]
