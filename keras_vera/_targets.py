"""Which layers `targets` means."""

import difflib
import re

from keras_vera.layers._kinds import KINDS
from keras_vera.layers._kinds import kind_of

# A projection in an attention layer, by its name or its attribute's name.
_PROJECTION = re.compile(
    r"_*(?P<role>query|key|value|q|k|v)"
    r"(_(dense|dense_layer|einsum|proj|projection|projector))?"
)


def _attention(paths):
    return _attention_projections(paths, None)


def _attention_qv(paths):
    return _attention_projections(paths, ("q", "v"))


def _all_linear(paths):
    return [p for p, layer in paths.items() if kind_of(type(layer))]


ROLES = {
    "attention-qv": _attention_qv,
    "attention": _attention,
    "all-linear": _all_linear,
}


def resolve_targets(targets, paths):
    """Returns the structural paths of the layers that `targets` means.

    Args:
        targets: A role, a layer name, a regular expression that fullmatches
            structural or Keras paths, a list of these, or a predicate.
        paths: Dict of the layers that can be meant, by structural path.

    Returns:
        A list of keys of `paths`, in their order.

    Raises:
        ValueError: If a target is of no known form or matches no layer that
            can be adapted.
    """
    if callable(targets):
        found = {p for p in _all_linear(paths) if targets(paths[p])}
        if not found:
            _raise_nothing(f"the predicate {targets!r}", paths)
        return [p for p in paths if p in found]
    listed = [targets] if isinstance(targets, str) else targets
    if (
        not isinstance(listed, (list, tuple))
        or not listed
        or not all(isinstance(t, str) and t for t in listed)
    ):
        raise ValueError(
            "`targets` must be a role "
            f"({', '.join(map(repr, ROLES))}), a layer name, a regular "
            "expression over layer paths, a list of these, or a predicate "
            f"that takes a layer. Received: targets={targets!r}"
        )
    found = set()
    for target in listed:
        found.update(_resolve_one(target, paths))
    return [p for p in paths if p in found]


def _resolve_one(target, paths):
    if target in ROLES:
        found = ROLES[target](paths)
        if not found:
            _raise_nothing(f"the role {target!r}", paths)
        return found
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
                f"`targets` holds {target!r}, which is neither a layer's name "
                f"nor a valid regular expression ({error})."
            ) from None
        named = [
            p
            for p, layer in paths.items()
            if pattern.fullmatch(p) or pattern.fullmatch(layer.path or "")
        ]
    found = [p for p in named if kind_of(type(paths[p]))]
    if named and not found:
        types = sorted({type(paths[p]).__name__ for p in named})
        supported = ", ".join(c.__name__ for c in KINDS)
        raise ValueError(
            f"`targets` holds {target!r}, which names layers of type "
            f"{', '.join(types)}. VeRA adapts {supported} layers, and "
            "subclasses that keep their `call`."
        )
    if not found:
        _raise_nothing(f"{target!r}", paths)
    return found


def _raise_nothing(target, paths):
    names = sorted({paths[p].name for p in _all_linear(paths)})
    near = difflib.get_close_matches(target.strip("'"), names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    available = ", ".join(map(repr, names[:30])) or "none"
    raise ValueError(
        f"`targets`: {target} matches no layer that can be adapted.{hint} "
        f"Layers that can be adapted: {available}"
        f"{', ...' if len(names) > 30 else ''}. "
        "Pass their names, a regular expression over their paths, a "
        "predicate, or targets='all-linear'."
    )


def _attention_projections(paths, roles):
    """Finds attention by structure: a layer with a query and a value below.

    Args:
        paths: Dict of layers by structural path.
        roles: First letters of the projections to return, or `None` for all
            linear layers of the attention layer.
    """
    children = {}
    for path, layer in paths.items():
        if not kind_of(type(layer)):
            continue
        parent, _, attribute = path.rpartition("/")
        match = _PROJECTION.fullmatch(layer.name) or _PROJECTION.fullmatch(
            attribute
        )
        role = match["role"][0] if match else None
        children.setdefault(parent, []).append((path, role))
    return [
        path
        for siblings in children.values()
        if {"q", "v"} <= {role for _, role in siblings}
        for path, role in siblings
        if roles is None or role in roles
    ]
