"""Which Keras layer a linear module of Hugging Face transformers became."""

import itertools

import keras

from keras_vera import _keras
from keras_vera.peft.tables import FAMILIES


def find_family(model):
    """Returns the KerasHub backbone of `model`, and its `Family`.

    Raises:
        ValueError: If there is no backbone, or no table for it.
    """
    backbone = getattr(model, "backbone", model)
    for backbone_class in type(backbone).__mro__:
        family = FAMILIES.get(backbone_class.__name__)
        if family is not None and not _has_other_towers(backbone, family):
            return backbone, family
    raise ValueError(
        "`model` must be a KerasHub backbone, or a task with one, of a family "
        "whose names in Hugging Face transformers are known: "
        f"{', '.join(FAMILIES)}, without encoders of images or audio beside "
        f"the text. Received: model '{model.name}' with a "
        f"{type(backbone).__name__}."
    )


def modules_of(backbone, family):
    """Returns the Keras layers of each Hugging Face module, by its path.

    Modules that are one layer in Keras have one entry: `parts_of` has their
    paths.

    Returns:
        A dict of lists of layers, in the order of the module's outputs; and a
        dict of older names of modules.
    """
    modules, older, newer = {}, {}, {}
    for names, layers in _modules_in(backbone, family.blocks):
        modules[_one_name(names)] = layers
        newer[id(layers[0])] = names
    for names, layers in _modules_in(backbone, family.older):
        new = newer[id(layers[0])]
        if len(names) != len(new):  # One module, then several.
            new = (_one_name(new),)
        older.update(zip(names, new))
    for name, path in family.others.items():
        layer = _layer_at(backbone, path)
        if layer is not None:
            modules[name] = [layer]
    return modules, older


def parts_of(backbone, family):
    """Returns the modules that are one layer in Keras, in order.

    Returns:
        A dict of tuples of the modules' paths, by the name that `modules_of`
        gives them.
    """
    return {
        _one_name(names): names
        for names, _ in _modules_in(backbone, family.blocks)
        if len(names) > 1
    }


def heads_of(model, family):
    """Returns the layers of a task's head by Hugging Face module."""
    if _is_backbone(model):
        return {}
    heads = {
        name: getattr(model, attribute, None)
        for name, attribute in family.heads.items()
    }
    if not all(isinstance(x, keras.layers.Dense) for x in heads.values()):
        return {}
    return heads


def prefix_of(model, family):
    """Returns what stands before the names of modules in a task model."""
    return "" if _is_backbone(model) else family.prefix + "."


def _is_backbone(model):
    return not hasattr(model, "backbone")


def _has_other_towers(backbone, family):
    """Whether there are encoders that the table does not have.

    Their presence changes the names of the language model as well.
    """
    towers = ("vision_encoder", "audio_encoder")
    known = " ".join(path for _, path, _ in family.blocks)
    return any(
        getattr(backbone, tower, None) is not None and tower not in known
        for tower in towers
    )


def _modules_in(backbone, kinds):
    """Yields a tuple of paths of modules, and a list of their layers."""
    for there, here, modules in kinds:
        for numbers, block in _blocks(backbone, here):
            before = there.format(*numbers)
            for names, paths in modules.items():
                names = (names,) if isinstance(names, str) else names
                paths = (paths,) if isinstance(paths, str) else paths
                layers = [_layer_at(block, path) for path in paths]
                if all(layer is not None for layer in layers):
                    yield tuple(f"{before}.{x}" for x in names), layers


def _blocks(backbone, path, numbers=()):
    """Yields the numbers in a path with `{}`, and the block that is there."""
    if len(numbers) == path.count("{}"):
        block = _layer_at(backbone, path.format(*numbers))
        if block is not None:
            yield numbers, block
        return
    for number in itertools.count():
        blocks = list(_blocks(backbone, path, (*numbers, number)))
        if not blocks:
            return
        yield from blocks


def _one_name(names):
    return names[0] if len(names) == 1 else "(" + "|".join(names) + ")"


def _layer_at(layer, path):
    """Follows attributes, names of layers and positions in lists."""
    for part in path.split("."):
        if isinstance(layer, (list, tuple)):
            number = int(part)
            layer = layer[number] if number < len(layer) else None
        elif hasattr(layer, part):
            layer = getattr(layer, part)
        else:
            below = _keras.sub_layers(layer) if layer is not None else []
            layer = next((x for x in below if x.name == part), None)
    return layer
