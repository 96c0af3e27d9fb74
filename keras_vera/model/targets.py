"""Which layers `targets` means."""

import difflib
import re
import warnings

import keras

from keras_vera.layers._kinds import reason_against
from keras_vera.model.roles import ROLES
from keras_vera.model.roles import TRAIN_ROLES
from keras_vera.model.roles import adaptable_layers
from keras_vera.model.roles import refused_layers
from keras_vera.product.checks import check_integer


def resolve_targets(targets, exclude, rank, paths):
    """Returns the rank of each layer that is to be adapted.

    Args:
        targets: A role, a layer name, a regular expression that fullmatches
            Keras paths, or else structural ones, a predicate, a list of these,
            or a dict of ranks (`None` for `rank`) by these. Where several
            match a layer, the last one counts.
        exclude: As `targets`, without a dict; or `None`.
        rank: Integer.
        paths: Dict of the layers that can be meant, by structural path.

    Returns:
        A dict of ranks by keys of `paths`, in their order.

    Raises:
        ValueError: If a target is of no known form or matches no layer that
            can be adapted.
    """
    if isinstance(targets, dict):
        if not all(map(_is_one, targets)):
            _raise_no_target("targets", targets)
        ranks = {
            target: rank if own is None else check_integer("rank", own, 1)
            for target, own in targets.items()
        }
    else:
        ranks = dict.fromkeys(listed("targets", targets), rank)
    if not ranks:
        _raise_no_target("targets", targets)
    found, left = {}, set()
    for target, own in ranks.items():
        matched, refused = _resolve_one("targets", target, paths)
        found.update(dict.fromkeys(matched, own))
        left.update(refused)
    excluded = set()
    for target in [] if exclude is None else listed("exclude", exclude):
        for matched in _resolve_one("exclude", target, paths):
            excluded.update(matched)
    found = {p: found[p] for p in paths if p in found and p not in excluded}
    if not found:
        raise ValueError(
            f"`exclude` leaves nothing of `targets`. Received: "
            f"targets={targets!r}, exclude={exclude!r}"
        )
    found = _built(found, paths)
    _warn_about([p for p in paths if p in left - excluded], paths)
    return found


def _warn_about(refused, paths):
    """Says which layers a target means and VeRA cannot adapt."""
    if refused:
        first = paths[refused[0]]
        warnings.warn(
            f"{len(refused)} layers that `targets` matches cannot be adapted "
            f"and stay as they are: {', '.join(refused[:5])}"
            f"{', ...' if len(refused) > 5 else ''}. The first is a "
            f"{type(first).__name__}: {reason_against(first)}. Name them in "
            "`exclude` if that is as you want it.",
            stacklevel=4,
        )


def listed(name, targets):
    listed = [targets] if _is_one(targets) else targets
    if (
        not isinstance(listed, (list, tuple))
        or not listed
        or not all(map(_is_one, listed))
    ):
        _raise_no_target(name, targets)
    return listed


def _is_one(target):
    """Says whether it is text or a predicate; layers are callable as well."""
    if isinstance(target, (type, keras.Layer)):
        return False
    return callable(target) or (isinstance(target, str) and bool(target))


def _raise_no_target(name, targets):
    also = ", or a dict of ranks by these" if name == "targets" else ""
    roles = [*(TRAIN_ROLES if name == "train" else ()), *ROLES]
    raise ValueError(
        f"`{name}` must be a role ({', '.join(map(repr, roles))}), the name "
        "of a layer, a regular expression over layer paths, a predicate that "
        f"takes a layer, or a list of these{also}. "
        f"Received: {name}={targets!r}"
    )


def _built(found, paths):
    """Leaves out layers that hold no weights yet, and says so."""
    unbuilt = [path for path in found if not paths[path].built]
    if len(unbuilt) == len(found):
        raise ValueError(
            f"The layers that `targets` matches are not built: {unbuilt}. "
            "Call the model on a batch of data that reaches them first."
        )
    if unbuilt:
        warnings.warn(
            f"{len(unbuilt)} layers that `targets` matches are not built and "
            f"stay as they are: {', '.join(unbuilt[:5])}"
            f"{', ...' if len(unbuilt) > 5 else ''}. To adapt them, call the "
            "model on a batch of data that reaches them before `enable_vera`.",
            stacklevel=4,
        )
    return {path: own for path, own in found.items() if path not in unbuilt}


def _resolve_one(argument, target, paths):
    """Returns the paths that a target means, and those that it would mean.

    The latter are of subclasses that VeRA cannot adapt. To leave them out,
    they may be named alone.
    """
    adaptable, refused = adaptable_layers(paths), refused_layers(paths)
    if callable(target):
        found = [p for p, layer in adaptable.items() if target(layer)]
        left = [p for p, layer in refused.items() if target(layer)]
        what = f"the predicate {target!r}"
    elif target in ROLES:
        found = ROLES[target](paths, adaptable)
        left = _in_role(target, paths, adaptable, refused)
        what = f"the role {target!r}"
    else:
        found, left = _named(argument, target, paths, adaptable, refused)
        what = repr(target)
    if found or (left and argument == "exclude"):
        return found, left
    if left:
        _raise_refused(argument, what, left, paths)
    _raise_nothing(argument, what, paths, adaptable)


def _in_role(role, paths, adaptable, refused):
    """Returns the refused layers that play a role."""
    if not refused:
        return []
    try:
        members = ROLES[role](paths, {**adaptable, **refused})
    except Exception:
        # A subclass may have a kernel that cannot be told the shape of.
        return []
    return [p for p in members if p in refused]


def _named(argument, target, paths, adaptable, refused):
    """Returns the layers of this name or so that can be adapted, and not."""
    named = matching(argument, target, paths)
    found = [p for p in named if p in adaptable]
    left = [p for p in named if p in refused]
    if named and not found and not (left and argument == "exclude"):
        _raise_refused(argument, repr(target), named, paths)
    return found, left


def matching(argument, target, paths):
    """Returns the layers that a name or a regular expression means.

    Names and paths as Keras shows them go first. Those by which its saving
    finds a layer have other layers' names in them: whichever `Dense` is second
    in a list has a path that ends with `dense_1`.
    """
    found = [p for p, layer in paths.items() if layer.name == target]
    found = found or [p for p in paths if target == _attribute(p, paths)]
    if found:
        return found
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(
            f"`{argument}` holds {target!r}, which is neither a layer's "
            f"name nor a valid regular expression ({error})."
        ) from None
    shown = [p for p, x in paths.items() if pattern.fullmatch(x.path or "")]
    return shown or [p for p in paths if pattern.fullmatch(p)]


def _attribute(path, paths):
    """Returns the attribute of a layer that holds this one, or `None`."""
    owner, _, name = path.rpartition("/")
    return name if owner in paths else None


def _raise_refused(argument, what, named, paths):
    types = sorted({type(paths[p]).__name__ for p in named})
    reasons = [reason_against(paths[p]) for p in named]
    reason = next((x for x in reasons if x), None)
    if reason is None:
        reason = "the model reads their private variables"
    raise ValueError(
        f"`{argument}` holds {what}, which names layers of type "
        f"{', '.join(types)}. VeRA cannot adapt {', '.join(named[:5])}"
        f"{', ...' if len(named) > 5 else ''}: {reason}."
    )


def _raise_nothing(argument, what, paths, adaptable):
    names = sorted({layer.name for layer in adaptable.values()})
    near = difflib.get_close_matches(what.strip("'"), names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    available = ", ".join(map(repr, names[:30])) or "none"
    roles = {name: len(role(paths, adaptable)) for name, role in ROLES.items()}
    roles = ", ".join(f"{name!r} ({n})" for name, n in roles.items() if n)
    raise ValueError(
        f"`{argument}`: {what} matches no layer that can be adapted.{hint} "
        f"Roles that match layers of this model: {roles or 'none'}. "
        f"Layers that can be adapted: {available}"
        f"{', ...' if len(names) > 30 else ''}. Pass a role, names, a regular "
        "expression over layer paths, or a predicate."
    )
