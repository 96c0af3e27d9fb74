"""Which layers `targets` means."""

import difflib
import re
import warnings

from keras_vera._checks import check_integer
from keras_vera._roles import ROLES
from keras_vera._roles import TRAIN_ROLES
from keras_vera._roles import adaptable_layers
from keras_vera.layers._kinds import KINDS


def resolve_targets(targets, exclude, rank, paths):
    """Returns the rank of each layer that is to be adapted.

    Args:
        targets: A role, a layer name, a regular expression that fullmatches
            structural or Keras paths, a predicate, a list of these, or a dict
            of ranks (`None` for `rank`) by these. Where several match a layer,
            the last one counts.
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
        ranks = {
            target: rank if own is None else check_integer("rank", own, 1)
            for target, own in targets.items()
        }
    else:
        ranks = dict.fromkeys(listed("targets", targets), rank)
    if not ranks:
        _raise_no_target("targets", targets)
    found = {}
    for target, own in ranks.items():
        for path in _resolve_one("targets", target, paths):
            found[path] = own
    excluded = set()
    for target in [] if exclude is None else listed("exclude", exclude):
        excluded.update(_resolve_one("exclude", target, paths))
    found = {p: found[p] for p in paths if p in found and p not in excluded}
    if not found:
        raise ValueError(
            f"`exclude` leaves nothing of `targets`. Received: "
            f"targets={targets!r}, exclude={exclude!r}"
        )
    return _built(found, paths)


def listed(name, targets):
    one = isinstance(targets, str) or callable(targets)
    listed = [targets] if one else targets
    if (
        not isinstance(listed, (list, tuple))
        or not listed
        or not all(t and (isinstance(t, str) or callable(t)) for t in listed)
    ):
        _raise_no_target(name, targets)
    return listed


def _raise_no_target(name, targets):
    also = ", or a dict of ranks by these" if name == "targets" else ""
    roles = [*(TRAIN_ROLES if name == "train" else ()), *ROLES]
    raise ValueError(
        f"`{name}` must be a role ({', '.join(map(repr, roles))}), a layer "
        "name, a regular expression over layer paths, a predicate that takes "
        f"a layer, or a list of these{also}. Received: {name}={targets!r}"
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
    adaptable = adaptable_layers(paths)
    if callable(target):
        found = [p for p, layer in adaptable.items() if target(layer)]
        what = f"the predicate {target!r}"
    elif target in ROLES:
        found = ROLES[target](paths, adaptable)
        what = f"the role {target!r}"
    else:
        found = _named(argument, target, paths, adaptable)
        what = repr(target)
    if not found:
        _raise_nothing(argument, what, paths, adaptable)
    return found


def _named(argument, target, paths, adaptable):
    """Returns the layers that can be adapted, of this name or so on."""
    named = matching(argument, target, paths)
    found = [p for p in named if p in adaptable]
    if named and not found:
        types = sorted({type(paths[p]).__name__ for p in named})
        supported = ", ".join(c.__name__ for c in KINDS)
        raise ValueError(
            f"`{argument}` holds {target!r}, which names layers of type "
            f"{', '.join(types)}. VeRA adapts {supported} layers, and "
            "subclasses that keep their `call`, unless a model reads their "
            "private variables."
        )
    return found


def matching(argument, target, paths):
    """Returns the layers of this name or attribute, or that it matches."""
    named = [
        p
        for p, layer in paths.items()
        if target in (layer.name, p.rsplit("/", 1)[-1])
    ]
    if not named:
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise ValueError(
                f"`{argument}` holds {target!r}, which is neither a layer's "
                f"name nor a valid regular expression ({error})."
            ) from None
        named = [
            p
            for p, layer in paths.items()
            if pattern.fullmatch(p) or pattern.fullmatch(layer.path or "")
        ]
    return named


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
