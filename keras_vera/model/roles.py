"""The roles that layers play in a model, known by its structure.

No list of models: a role is found from what a layer is, what it is called by
the layer that owns it, and which layers stand beside it.
"""

import re

import keras

from keras_vera import _keras
from keras_vera.layers._kinds import KINDS
from keras_vera.layers._kinds import family_of
from keras_vera.layers._kinds import reason_against
from keras_vera.model.frozen import trained_variables

_LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)
_CONVOLUTION = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)

# A projection in an attention layer, by its name or its attribute's name.
_PROJECTION = re.compile(
    r"_*(?P<role>query|key|value|q|k|v|receptance)"
    r"(_(dense|dense_layer|einsum|proj|projection|projector))?"
)
# Query, key and value in one.
_FUSED = re.compile(r"(.*_)?(qkv|query_key_value)\d*(_.*)?")
_OUTPUT = re.compile(r"_*(attention_)?(output|out|o)(_.*)?")
_MLP = re.compile(r"(.*_)?(mlp|ffn?|ffw|feed_?forward)(_.*)?|fc\d")

_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)
# KerasHub has its own, of many names; not what only holds a norm.
_NORM = re.compile(r".*norm(alization)?(\dd|gated)?", re.IGNORECASE)

# Layers whose owner reads their private variable, where no adapter shows: by
# the class of the owner, and the attribute.
_READ_PRIVATELY = {("SAM3GeometryEncoder", "cls_embed")}


def adaptable_layers(paths):
    """Returns the layers that VeRA can adapt, built or not, by path."""
    return {
        path: layer
        for path, layer in paths.items()
        if reason_against(layer) is None and not _is_read_privately(path, paths)
    }


def refused_layers(paths):
    """Returns the layers that only their subclass keeps from VeRA, by path."""
    return {
        path: layer
        for path, layer in paths.items()
        if family_of(type(layer)) and reason_against(layer) is not None
    }


def _is_read_privately(path, paths):
    owner, _, attribute = path.rpartition("/")
    owner_class = type(paths.get(owner)).__name__
    return (owner_class, attribute) in _READ_PRIVATELY


def _of_classes(classes):
    def role(paths, adaptable):
        return [p for p, x in adaptable.items() if isinstance(x, classes)]

    return role


def _attention_qv(paths, adaptable):
    """Query and value; a kernel that also holds the key, as a whole."""
    return [
        place.path
        for places in _attention_layers(paths, adaptable)
        for place in places
        if place.projection in ("q", "v", "fused")
    ]


def _attention(paths, adaptable):
    return [
        place.path
        for places in _attention_layers(paths, adaptable)
        for place in places
    ]


def _mlp(paths, adaptable):
    """Finds what widens and what narrows again, side by side."""
    attention = set(_attention(paths, adaptable))
    found = []
    for owner, places in _places_by_owner(paths, adaptable).items():
        places = [
            place
            for place in places
            if place.path not in attention and adaptable[place.path].built
        ]
        sizes = {x.path: _sizes(adaptable[x.path]) for x in places}
        named = bool(_MLP.fullmatch(owner.rpartition("/")[2]))
        inside = set()
        for up in places:
            m, n = sizes[up.path]
            for down in places:
                # A gate may be in the same kernel.
                fits = sizes[down.path] in [(n, m), (n / 2, m)]
                is_mlp = named or n > m or any(map(_MLP.fullmatch, up.names))
                if down is not up and fits and is_mlp:
                    inside.update((up.path, down.path))
        found += [place.path for place in places if place.path in inside]
    return found


ROLES = {
    "attention-qv": _attention_qv,
    "attention": _attention,
    "mlp": _mlp,
    "all-linear": _of_classes(_LINEAR),
    "conv": _of_classes(_CONVOLUTION),
    "embedding": _of_classes(keras.layers.Embedding),
}


# How tensor parallel training cuts a kernel.
COLUMNS, ROWS = "columns", "rows"


def cuts(paths):
    """Returns how kernels are cut in Megatron's way, by path.

    What reads the stream of a block, by columns; what writes to it, by rows.
    """
    adaptable = {p: x for p, x in adaptable_layers(paths).items() if x.built}
    found = dict.fromkeys(ROLES["embedding"](paths, adaptable), ROWS)
    for path in _mlp(paths, adaptable):
        m, n = _sizes(adaptable[path])
        found[path] = COLUMNS if n >= m else ROWS
    for places in _attention_layers(paths, adaptable):
        for place in places:
            found[place.path] = COLUMNS if place.projection else ROWS
    return found


def _norm(paths):
    return [p for p, layer in paths.items() if _is_norm(layer)]


def _is_norm(layer):
    """Whether a layer normalizes and has a scale or an offset that trains."""
    name = type(layer).__name__
    if not isinstance(layer, _NORMS) and not _NORM.fullmatch(name):
        return False
    return bool(scales_of(layer))


def scales_of(layer):
    """Returns what trains of a layer itself, and of no layer below.

    `SpectralNormalization` holds the kernel of the layer that it wraps.
    """
    _, *below = _keras.flatten_layers(layer)
    others = {id(v) for x in below for v in trained_variables(x)}
    return [v for v in trained_variables(layer) if id(v) not in others]


def is_bias(variable):
    return variable.name == "bias" or variable.name.endswith("_bias")


# What `train` of `enable_vera` takes beside these. "bias" means variables.
TRAIN_ROLES = {"norm": _norm, "bias": None}


class _Place:
    """Where a linear layer is: its owner and what it is called there.

    A layer that only wraps this one counts as this one.
    """

    def __init__(self, path, layer, paths, counts):
        owner = _owner(path, paths)
        names = [layer.name, path.rpartition("/")[2]]
        self.is_wrapped = False
        while owner and counts[owner] == 1:
            names += [paths[owner].name, owner.rpartition("/")[2]]
            owner = _owner(owner, paths)
            self.is_wrapped = True
        self.path, self.owner, self.names = path, owner, names
        self.projection = _projection(names)

    @property
    def is_output(self):
        return any(map(_OUTPUT.fullmatch, self.names))


def _projection(names):
    """Returns `"q"`, `"k"`, `"v"`, `"fused"` or `None`."""
    for name in names:
        if _FUSED.fullmatch(name):
            return "fused"
        match = _PROJECTION.fullmatch(name)
        if match:
            return match["role"][0].replace("r", "q")
    return None


def _sizes(layer):
    contraction = KINDS[family_of(type(layer))]._make_contraction(layer)
    return contraction.m, contraction.n


def _owner(path, paths):
    """Returns the path of the layer that holds this one."""
    while path:
        path = path.rpartition("/")[0]
        if path in paths:
            return path
    return ""


def _places_by_owner(paths, adaptable):
    linear = {p: x for p, x in adaptable.items() if isinstance(x, _LINEAR)}
    counts = dict.fromkeys(["", *paths], 0)
    for path in linear:
        owner = _owner(path, paths)
        while True:
            counts[owner] += 1
            if not owner:
                break
            owner = _owner(owner, paths)
    by_owner = {}
    for path, layer in linear.items():
        place = _Place(path, layer, paths, counts)
        by_owner.setdefault(place.owner, []).append(place)
    return by_owner


def _attention_layers(paths, adaptable):
    """Yields the linear layers of each attention layer.

    Attention is a layer with a query and a value, or with one kernel for
    both, below; or one whose class is called so.
    """
    for owner, places in _places_by_owner(paths, adaptable).items():
        owner_class = type(paths[owner]).__name__ if owner in paths else ""
        is_called_so = owner_class.endswith("Attention")
        projections = {place.projection for place in places}
        if is_called_so and projections == {None}:
            for place in places:
                layer = adaptable[place.path]
                m, n = _sizes(layer) if layer.built else (0, 1)
                if n == 3 * m:
                    place.projection = "fused"
        if not (
            {"q", "v"} <= projections or "fused" in projections or is_called_so
        ):
            continue
        yield [
            place
            for place in places
            if not place.is_wrapped or place.projection or place.is_output
        ]
