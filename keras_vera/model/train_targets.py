"""Which variables of a base `train` means."""

import difflib

from keras_vera import _keras
from keras_vera.model.frozen import trained_variables
from keras_vera.model.roles import ROLES
from keras_vera.model.roles import TRAIN_ROLES
from keras_vera.model.roles import adaptable_layers
from keras_vera.model.roles import is_bias
from keras_vera.model.roles import scales_of
from keras_vera.model.targets import listed
from keras_vera.model.targets import matching

_BIAS, _NORM = "bias", "norm"


def resolve_train(train, adapted, paths, model_paths):
    """Returns the variables that train beside the vectors, by layer.

    Args:
        train: As `targets` of `resolve_targets`, but without a dict, over all
            layers and with the roles of `TRAIN_ROLES`; or `None`. A layer
            stands for all that is below it, a norm for itself.
        adapted: List of the layers that get adapters.
        paths: Dict of the layers of the base, by structural path.
        model_paths: Dict of all layers of the model, likewise.

    Returns:
        A dict of lists of variables.

    Raises:
        ValueError: If a target is of no known form, matches nothing that can
            train, or something that is to be adapted.
    """
    if train is None:
        return {}
    in_base = {id(layer) for layer in paths.values()}
    found = {}
    for target in listed("train", train):
        if target == _BIAS:
            layers, what = list(paths.values()), biases_of
        else:
            layers = _layers_of(target, paths, model_paths, in_base)
            _check_in_full(target, layers, adapted)
            what = scales_of if target == _NORM else trained_variables_of
        matched = {layer: own for layer in layers if (own := what(layer))}
        if not matched:
            raise ValueError(
                f"`train`: {_described(target)} matches nothing with "
                "variables that can train, or only layers that are not built. "
                "Name other layers, or call the model on a batch of data first."
            )
        for layer, own in matched.items():
            both = {id(v): v for v in [*found.get(layer, []), *own]}
            found[layer] = list(both.values())
    return found


def trained_variables_of(layer, is_adapted=False):
    """Returns what of a layer itself can train in the base."""
    if is_adapted or getattr(layer, "quantization_mode", None) is not None:
        return biases_of(layer)
    return trained_variables(layer)


def biases_of(layer):
    return [v for v in trained_variables(layer) if is_bias(v)]


def _layers_of(target, paths, model_paths, in_base):
    """Returns the layers of the base that a target means, and those below."""
    found = _found(target, paths)
    if not found:
        outside = [p for p in _found(target, model_paths) if p not in paths]
        if outside:
            raise ValueError(
                f"`train`: {_described(target)} matches {outside[:5]}, which "
                "lies outside the base and trains anyway. Leave it out of "
                "`train`."
            )
        _raise_nothing(target, paths)
    if target == _NORM:
        # What a norm wraps is none.
        return [paths[path] for path in found]
    layers = [x for p in found for x in _keras.flatten_layers(paths[p])]
    return [x for x in {id(x): x for x in layers}.values() if id(x) in in_base]


def _found(target, paths):
    if callable(target):
        return [path for path, layer in paths.items() if target(layer)]
    if target in TRAIN_ROLES:
        return TRAIN_ROLES[target](paths)
    if target in ROLES:
        return ROLES[target](paths, adaptable_layers(paths))
    return matching("train", target, paths)


def _check_in_full(target, layers, adapted):
    both = [x.name for x in layers if any(x is other for other in adapted)]
    if both:
        raise ValueError(
            f"`train`: {_described(target)} matches layers that `targets` "
            f"adapts: {both[:5]}. A layer has an adapter or trains in full. "
            f"Leave it out of `train`, or name it in `exclude`."
        )
    quantized = [
        x.name
        for x in layers
        if getattr(x, "quantization_mode", None) is not None
    ]
    if quantized:
        raise ValueError(
            f"`train`: {_described(target)} matches quantized layers, whose "
            f"kernels cannot train: {quantized[:5]}. Adapt them by `targets`, "
            "or leave them out of `model.quantize` with its `filters`."
        )


def _raise_nothing(target, paths):
    names = sorted({layer.name for layer in paths.values()})
    near = difflib.get_close_matches(str(target), names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"`train`: {_described(target)} matches no layer of the base.{hint} "
        f"Layers of the base: {', '.join(map(repr, names[:30]))}"
        f"{', ...' if len(names) > 30 else ''}. Pass names, a regular "
        "expression over layer paths, a predicate, 'norm', 'bias' or another "
        "role."
    )


def _described(target):
    return f"the predicate {target!r}" if callable(target) else repr(target)
