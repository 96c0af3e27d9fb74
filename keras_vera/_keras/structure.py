"""What a model is made of: layers, their paths and their variables."""

import re

import keras
from keras.src.models.functional import Functional
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import naming

# What names in files have in the place of Keras' own for an unnamed variable.
UNNAMED = "unnamed"


def structural_paths(model):
    """Returns `{path: layer}` for `model` and all layers below it.

    The path is the one under which Keras' own saving finds the layer
    (attribute names and positions in containers); unlike `layer.path` it is
    unique and the same in every build of a model. `model` itself has path "".

    Raises:
        ValueError: If layers with weights have no such path: those of a
            `set`, and those whose path another layer has.
    """
    paths = {}
    seen = set()
    # Layers that are found in order, and those of sets.
    in_order, in_sets, doubles = set(), [], []

    def visit(layer, path):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        other = paths.setdefault(path, layer)
        if other is not layer:
            doubles.append((path, other, layer))
        if not layer._layers:
            # Nothing below; and reading `kernel` of an adapted layer costs.
            return
        for attribute, child in saving_lib._walk_saveable(layer):
            child_path = f"{path}/{attribute}" if path else attribute
            # In the list of a subclassed model are those of its sets as well.
            is_own = attribute != "layers" or is_graph(layer)
            if isinstance(child, keras.Layer):
                in_order.add(id(child))
                visit(child, child_path)
            elif isinstance(child, (list, dict, tuple)):
                visit_container(child, child_path, set(), is_own)
            elif isinstance(child, set):
                in_sets.extend(child)

    def visit_container(container, path, outer, is_own):
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
                if isinstance(child, set):
                    in_sets.extend(child)
                continue
            count = counts[name] = counts.get(name, -1) + 1
            child_path = f"{path}/{name}_{count}" if count else f"{path}/{name}"
            if isinstance(child, keras.Layer):
                if is_own:
                    in_order.add(id(child))
                visit(child, child_path)
            elif name == "container":
                visit_container(child, child_path, outer, is_own)

    visit(model, "")
    in_sets = [x for x in in_sets if id(x) not in in_order]
    _check_paths(model, in_sets, doubles)
    return paths


def _check_paths(model, in_sets, doubles):
    lost = [x.name for x in _layers_with_weights(in_sets)]
    if lost:
        raise ValueError(
            f"Model '{model.name}' has layers with weights in a `set`: "
            f"{lost[:5]}. A set has no order, so that no file says which of "
            "them is which. Keep them in a list, and build the model again."
        )
    for path, *layers in doubles:
        if _layers_with_weights(layers):
            raise ValueError(
                f"Model '{model.name}' has two layers with one path in files, "
                f"'{path}': {' and '.join(repr(x.name) for x in layers)}, of "
                f"the classes {' and '.join(type(x).__name__ for x in layers)}"
                ". Rename a class, or keep the layers in several lists, and "
                "build the model again."
            )


def _layers_with_weights(values):
    """Returns the layers among `values` that have weights, or in tuples."""
    found = []
    for value in values:
        if isinstance(value, tuple):
            found += _layers_with_weights(value)
        elif isinstance(value, keras.Layer):
            if any(own_variables(x) for x in flatten_layers(value)):
                found.append(value)
    return found


def own_variables(layer):
    """Returns the weights of `layer` itself, without its sub-layers'."""
    return layer._trainable_variables + layer._non_trainable_variables


def named_own_variables(layer):
    """Returns pairs of names and weights of `layer` itself.

    The names are the same in every build: a weight without a name goes by its
    place among those of the layer, in the order in which they were made.
    """
    own = own_variables(layer)
    names = [variable.name for variable in own]
    numbers = {i: number_of_unnamed(name) for i, name in enumerate(names)}
    made = sorted(
        (i for i in numbers if numbers[i] is not None), key=numbers.get
    )
    for place, i in enumerate(made):
        names[i] = f"{UNNAMED}_{place}"
    return list(zip(names, own))


def number_of_unnamed(name):
    """Returns the number that Keras gave a variable without a name.

    It counts those of the process: `variable`, `variable_1` and so on. Other
    names have none, `None`.
    """
    match = re.fullmatch("variable(?:_([0-9]{1,18}))?", name)
    return None if match is None else int(match[1] or 0)


def without_number(path):
    """Returns a path to a variable without the number that Keras gave it."""
    owner, slash, name = path.rpartition("/")
    is_unnamed = number_of_unnamed(name) is not None
    return owner + slash + UNNAMED if is_unnamed else path


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


def takes_training(layer):
    return layer._call_has_training_arg


def draws_random_numbers(layer):
    return bool(layer._seed_generators)


def is_graph(layer):
    """Says whether a layer is a model made of symbolic inputs and outputs."""
    return isinstance(layer, (Functional, keras.Sequential))


def symbolic_inputs(operation, node):
    """Returns the symbolic tensors that an operation was called on.

    Args:
        operation: A layer or another operation.
        node: Integer, in which of its calls.
    """
    return operation._inbound_nodes[node].input_tensors


def call_arguments(operation, node):
    """Returns all that an operation was called on, flat; see above."""
    arguments = operation._inbound_nodes[node].arguments
    return keras.tree.flatten((arguments.args, arguments.kwargs))


def is_rematerialized(layer):
    return getattr(layer, "_remat_mode", None) is not None
