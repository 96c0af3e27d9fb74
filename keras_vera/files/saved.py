"""What an adapter file holds of a model."""

import keras
from keras import backend
from keras import ops

from keras_vera import _keras
from keras_vera._version import version
from keras_vera.files import format as adapter_format
from keras_vera.layers._base_layer import kernel_dtype
from keras_vera.layers._base_layer import kernel_shape
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._fingerprint import kernel_fingerprint
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._kinds import kind_of
from keras_vera.model import adaptation
from keras_vera.model.frozen import state_of
from keras_vera.product.projection import EXPLICIT
from keras_vera.product.projection import pair_sha256

_VERSION = version()

# What a projection is made from.
PAIR = ("rank", "seed", "structure")
# The entries of a pair that no seed makes.
MATRICES = ("vera_kernel_a", "vera_kernel_b")


def trained_variables(paths, plan=None, head=True, given=(), state=True):
    """Returns what an adapter file must hold, by structural path and name.

    Args:
        paths: Dict of the layers of a model, by structural path.
        plan: The `Adaptation` of a model that is not adapted yet; its vectors
            are missing.
        head: Whether to return what lies outside the base as well.
        given: Names of entries that a file has. What lies outside the base
            is returned as well if it is one of them.
        state: Whether to return layers outside the base that have state
            alone, which files of before do not hold.
    """
    plans = adaptations(paths) if plan is None else [plan]
    in_base = base_ids(paths, plan)
    trained_in_base = {id_ for plan in plans for id_ in plan.trained.ids}
    trained = {}
    for path, layer in paths.items():
        outside = id(layer) not in in_base
        if outside and not head and not is_adapted(layer):
            continue
        own = named_variables(path, layer)
        if is_adapted(layer):
            kept = {id(layer.vera_lambda_d), id(layer.vera_lambda_b)}
        elif outside:
            kept = _kept_outside(layer, own.values(), state)
            kept |= {id(own[name]) for name in own if name in given}
        else:
            kept = set()
        if outside or plan is None:
            kept |= {id(v) for v in own.values() if v.trainable}
        kept |= trained_in_base
        trained.update({k: v for k, v in own.items() if id(v) in kept})
    return trained


def _kept_outside(layer, variables, state=True):
    """Returns the ids of what must be saved of a layer outside the base."""
    if any(v.trainable for v in variables):
        # It is saved with its state.
        return {id(v) for v in variables}
    # What has only state, such as statistics, moves as well. What is frozen
    # does not, in Keras.
    moves = state and layer.trainable
    return {id(v) for v in state_of(layer)} if moves else set()


def saved_variables(paths):
    """Returns what an adapter file of an adapted model holds.

    That is what trains, and what has moved outside the base since it was
    adapted: what has trained and is frozen now would be lost.
    """
    plans = adaptations(paths)
    in_base = base_ids(paths)
    moved = [
        name
        for path, layer in paths.items()
        if plans and id(layer) not in in_base and not is_adapted(layer)
        for name in _names_if_moved(path, layer, plans)
    ]
    return trained_variables(paths, given=moved)


def _names_if_moved(path, layer, plans):
    own = named_variables(path, layer)
    if _kept_outside(layer, own.values()):
        return []
    as_it_was = all(
        plan.outside.is_as_it_was(variable)
        for variable in own.values()
        for plan in plans
    )
    return [] if as_it_was else list(own)


def base_ids(paths, plan=None):
    """Returns the ids of the layers of the bases in a model."""
    plans = adaptations(paths) if plan is None else [plan]
    return {id(layer) for plan in plans for layer in plan.frozen.layers}


def named_variables(path, layer):
    """Returns the variables of a layer itself, by their names in files."""
    named = {}
    for name, variable in _keras.named_own_variables(layer):
        named[entry_name(path, name, named)] = variable
    return named


def entry_name(path, name, taken):
    name = f"{path}/{name}" if path else name
    count = 0
    unique = name
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def expected_entries(paths, header=None, tensors=(), plan=None, head=True):
    """Returns the shape and dtype of each entry that a file must have.

    Args:
        paths: Dict of the layers of a model, by structural path.
        header: Dict, the header of the file, if there is one.
        tensors: Dict of its entries.
        plan: The `Adaptation` of a model that is not adapted yet.
        head: Whether what lies outside the base counts as well.
    """
    state = header is None or bool(header["unsaved"])
    variables = trained_variables(paths, plan, head, tensors, state)
    expected = {
        name: (tuple(variable.shape), _dtype_in_files(variable))
        for name, variable in variables.items()
    }
    if plan is not None:
        for path in header["layers"]:
            layer = paths[path]
            n = kind_of(type(layer))._make_contraction(layer).n
            rank = header["layers"][path]["rank"]
            sizes = {"vera_lambda_d": rank, "vera_lambda_b": n}
            for name, size in sizes.items():
                expected[entry_name(path, name, ())] = (size,), "float32"
    return expected


def without_head(header, tensors):
    """Returns those entries of a file that belong to the base."""
    return {
        name: array
        for name, array in tensors.items()
        if _is_of_base(name.rpartition("/")[0], header)
    }


def _is_of_base(path, header):
    """Says whether the layer at `path` is one of the base, or adapted."""
    trained = {name.rpartition("/")[0] for name in header["trained"]}
    return (
        path in header["layers"]
        or path in trained
        or (path not in header["outside"] and _is_below(path, header["bases"]))
    )


def _is_below(path, bases):
    return any(f"{path}/".startswith(f"{x}/" if x else "") for x in bases)


def adaptations(paths):
    """Returns what `enable_vera` did to layers of a model, each once."""
    return adaptation.adaptations(paths.values())


def _base_paths(model, paths):
    """Returns where the frozen parts are in `model`."""
    places = {id(layer): path for path, layer in paths.items()}
    parts = adaptation.parts_of_bases(model, paths.values())
    return [places[id(part)] for part in parts]


def make_header(model, paths):
    adapted = {p: x for p, x in paths.items() if is_adapted(x)}
    layers = list(adapted.values())
    settings = {(pair_of(x), x._vera_settings) for x in layers}
    if len(settings) > 1:
        raise ValueError(
            f"Model '{model.name}' holds adapters of different seeds, ranks, "
            "structures or settings, which one file cannot hold. Save its "
            f"parts one by one. Received: {sorted(map(str, settings))}"
        )
    (((rank, seed, structure), own),) = settings
    plan = getattr(layers[0], "vera_adaptation", None)
    targets = None if plan is None else plan.targets
    if isinstance(targets, dict):
        targets = list(targets)
    bases = _base_paths(model, paths)
    check_matrices(model, layers)
    return {
        "format_version": adapter_format.FORMAT_VERSION,
        "rank": rank,
        "seed": seed,
        "structure": structure,
        "d_initial": own.d_initial,
        "dropout": own.dropout,
        "targets": "predicate" if callable(targets) else targets,
        "bases": bases,
        "outside": _grown_since(paths, bases),
        "trained": _trained_in_base(paths),
        "layers": {
            path: {
                "kernel_shape": list(kernel_shape(layer)),
                "kernel_dtype": kernel_dtype(layer),
                "kernel_fingerprint": kernel_fingerprint(stored_kernel(layer)),
                "output_offset": layer.vera_output_offset,
            }
            for path, layer in adapted.items()
        },
        "embeddings": [
            path
            for path, layer in adapted.items()
            if layer._vera_layout.contraction.one_hot
        ],
        "projection_sha256": pair_sha256(*used_pair(layers)),
        "keras_vera_version": _VERSION,
        "keras_version": keras.version(),
    }


def _grown_since(paths, bases):
    """Returns the layers below a base that it got after it was adapted.

    Such as the head that `Sequential.add` puts on it.
    """
    in_base = base_ids(paths)
    return [
        path
        for path, layer in paths.items()
        if id(layer) not in in_base and _is_below(path, bases)
    ]


def _trained_in_base(paths):
    """Returns the entries of the base that train, without state."""
    ids = {id_ for plan in adaptations(paths) for id_ in plan.trained.trained}
    return [
        name
        for path, layer in paths.items()
        for name, variable in named_variables(path, layer).items()
        if id(variable) in ids
    ]


def carried_matrices(layers):
    """Returns the entries of A and B, where no seed makes them again."""
    projection = layers[0].projection
    if projection.structure != EXPLICIT:
        return {}
    return {x: _keras.to_numpy(getattr(projection, x)) for x in MATRICES}


def as_array(name, variable, dtype):
    array = _keras.to_numpy(variable)
    if _dtype_in_files(variable) != "float32":
        if array.dtype.kind == "f":
            adapter_format.in_dtype(name, array, str(array.dtype))
        return array
    return adapter_format.in_dtype(name, array, dtype)


def _dtype_in_files(variable):
    """Half floats are read as float32, which holds all of them."""
    dtype = backend.standardize_dtype(variable.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def pair_of(layer):
    return tuple(getattr(layer.projection, name) for name in PAIR)


def _projections(layers):
    """Returns what `layers` get A and B from: one for each `enable_vera`."""
    return list({id(x.projection): x.projection for x in layers}.values())


def check_matrices(model, layers):
    """Raises unless all layers use one A and B, made of the seed if any.

    `set_weights` and checkpoints may give a model those of another one.

    Args:
        model: The model, for the message.
        layers: List of its adapted layers, of one rank, seed and structure.
    """
    projections = _projections(layers)
    for projection in projections:
        if not projection.is_made_of_seed(*projection.beginnings()):
            raise ValueError(
                f"The random matrices of model '{model.name}' are not those of "
                f"seed={projection.seed}, and a file says no more than the "
                "seed. `set_weights` or a checkpoint of another seed has "
                "brought them. Enable VeRA with the seed that they were made "
                "with, or call `keras_vera.disable_vera(model)` before you "
                "load an adapter."
            )
    if projections[0].structure == EXPLICIT and len(projections) > 1:
        pairs = {
            pair_sha256(x.vera_kernel_a, x.vera_kernel_b) for x in projections
        }
        if len(pairs) > 1:
            raise ValueError(
                f"Model '{model.name}' holds adapters with different random "
                "matrices that no seed makes, which one file cannot hold. "
                "Save and load its parts one by one."
            )


def used_pair(layers):
    """Returns what `layers` use of A and B: the largest slice of each."""
    projections = _projections(layers)
    if projections[0].structure == EXPLICIT:
        return projections[0].vera_kernel_a, projections[0].vera_kernel_b
    used = [layer._vera_layout.contraction for layer in layers]
    m, n = max(x.m for x in used), max(x.n for x in used)
    # Of one seed, the larger begins as the smaller.
    a = max((x.vera_kernel_a for x in projections), key=lambda x: x.shape[0])
    b = max((x.vera_kernel_b for x in projections), key=lambda x: x.shape[1])
    return ops.convert_to_tensor(a)[:m], ops.convert_to_tensor(b)[:, :n]
