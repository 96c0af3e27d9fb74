import math
from importlib import metadata

import keras
from keras import backend
from keras import ops

from keras_vera import _adaptation
from keras_vera import _adapter_format
from keras_vera import _keras
from keras_vera._adapter_format import AdapterFileError
from keras_vera._adapter_format import check_file_dtype
from keras_vera._adapter_format import check_filepath
from keras_vera._checks import check_d_initial
from keras_vera._checks import check_dropout
from keras_vera._fingerprint import kernel_fingerprint
from keras_vera.layers._base_layer import kernel_dtype
from keras_vera.layers._base_layer import kernel_shape
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._kinds import kind_of
from keras_vera.projection import EXPLICIT
from keras_vera.projection import SharedProjection
from keras_vera.projection import pair_sha256

_VERSION = metadata.version("keras_vera")

# What a projection is made from.
_PAIR = ("rank", "seed", "structure")
# The entries of a pair that no seed makes.
_MATRICES = ("vera_kernel_a", "vera_kernel_b")


def save_adapter(model, filepath, dtype="float32"):
    """Saves what was trained: the vectors, and the task head if there is one.

    The file holds every trainable variable of `model`, and the state (such as
    moving averages) of the layers outside the base that train, each under its
    structural path. The header says how to make the rest: rank, seed and hash
    of the random matrices, the adapted layers and a fingerprint of their
    kernels. It is written beside its destination first and then renamed, so a
    failure leaves an old file as it was.

    Args:
        model: A model on which, or on a part of which, `enable_vera` was
            called, or one that holds `keras_vera.layers`.
        filepath: `str` or `pathlib.Path`. Must end in `.vera.safetensors`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`: how floats are
            stored (those of 64 bits as they are). Half the bytes cost a
            relative error of 2**-11 or 2**-8 in every number. Defaults to
            `"float32"`, which is exact.

    Raises:
        ValueError: If the model is not adapted, if its kernels hold another
            adapter from a weights file, if `model.trainable` is `False`, if
            a number is not finite (in `dtype`), or if an argument makes no
            sense.
        keras_vera.AdapterFileError: If the file cannot be written. An older
            file is then as it was.

    Example:

    ```python
    keras_vera.save_adapter(model, "sst2.vera.safetensors")
    ```
    """
    filepath = check_filepath(filepath)
    check_file_dtype(dtype)
    layers = _adaptation.check_adapted(model)
    _adaptation.check_base_is_clean(model, layers)
    if not model.trainable:
        raise ValueError(
            f"`model.trainable` is False on model '{model.name}', so what was "
            "trained outside the base, such as a head, would be lost. Set "
            "`model.trainable = True` before saving."
        )
    _keras.synchronize(model)
    paths = _keras.structural_paths(model)
    tensors = {
        name: as_array(name, variable, dtype)
        for name, variable in trained_variables(paths).items()
    }
    for path, layer in paths.items():
        if getattr(layer, "vera_base_bias", None) is not None:
            name = _entry_name(path, "bias", tensors)
            tensors[name] = as_array(name, layer.bias, dtype)
    projection = layers[0].projection
    if projection.structure == EXPLICIT:
        # No seed makes them again.
        for name in _MATRICES:
            tensors[name] = ops.convert_to_numpy(getattr(projection, name))
    _adapter_format.write(filepath, make_header(model, paths), tensors)


def load_adapter(model, filepath):
    """Loads an adapter file into its base model, or into an adapted model.

    A base model is adapted as the header says, and everything is checked
    before: an error leaves the model as it was.

    Args:
        model: The model that `save_adapter` was called on, built again: with
            the same base weights, and with the same head if the file has one.
            If VeRA is enabled on it, the rank, seed and layers must be those
            of the file.
        filepath: `str` or `pathlib.Path`, made by `save_adapter`.

    Raises:
        keras_vera.AdapterFileError: If the file cannot be read, is damaged,
            or belongs to another base, or to another rank, seed or set of
            layers.

    Example:

    ```python
    classifier = keras_hub.models.BertTextClassifier.from_preset(
        "bert_base_en", num_classes=2
    )
    keras_vera.load_adapter(classifier, "sst2.vera.safetensors")
    ```
    """
    header, tensors = _adapter_format.read(filepath)
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a Keras model. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    _keras.synchronize(model)
    paths = _keras.structural_paths(model)
    matrices = _popped_matrices(header, tensors, filepath)
    biases = {
        path: tensors.pop(name)
        for path in header["layers"]
        if (name := _entry_name(path, "bias", ())) in tensors
    }
    if any(is_adapted(layer) for layer in paths.values()):
        layers = check_fits(paths, header, filepath)
        check_entries(expected_entries(paths), tensors, filepath)
        _check_biases(layers, biases, filepath)
    else:
        projection, settings = _checked_settings(header, matrices, filepath)
        layers, bases = _check_base_model(model, paths, header, filepath)
        _check_kernels(layers, header, filepath)
        _note_ranks(header, tensors, filepath)
        expected = expected_entries(paths, header, bases)
        check_entries(expected, tensors, filepath)
        _check_biases(layers, biases, filepath)
        dims = _largest_dims(layers, header)
        projection.reserve(*dims)
        pair = projection.vera_kernel_a, projection.vera_kernel_b
        if pair[0].shape[0] < dims[0] or pair[1].shape[1] < dims[1]:
            raise AdapterFileError(
                f"'{filepath}' is damaged: its random matrices are too small "
                "for its layers."
            )
        _check_pair(pair_sha256(*pair), header, filepath)
        _adaptation.Adaptation(
            projection=projection,
            targets=header["targets"],
            bases=bases,
            layers=list(layers.values()),
            output_offsets=[
                x["output_offset"] for x in header["layers"].values()
            ],
            ranks=[x["rank"] for x in header["layers"].values()],
            **settings,
        ).apply(model)
    for name, variable in trained_variables(paths).items():
        variable.assign(tensors[name])
    for path, layer in layers.items():
        if path in biases or getattr(layer, "vera_base_bias", None) is not None:
            layer.set_adapter_bias(biases.get(path))


def _note_ranks(header, tensors, filepath):
    """Adds the rank of each layer to the header: the length of its d."""
    shapes = {
        path: tensors[_entry_name(path, "vera_lambda_d", ())].shape
        for path in header["layers"]
    }
    # The highest rank says how large A and B are, so a file must hold a d of
    # that length.
    if max(map(math.prod, shapes.values())) != header["rank"]:
        raise AdapterFileError(
            f"'{filepath}' is damaged: it says that its rank is "
            f"{header['rank']}, and its vectors d have the shapes "
            f"{sorted(set(shapes.values()))}."
        )
    for path, shape in shapes.items():
        header["layers"][path]["rank"] = math.prod(shape)


def _popped_matrices(header, tensors, filepath):
    """Takes A and B out of the entries, if the file carries them."""
    if header["structure"] != EXPLICIT:
        return None
    matrices = [tensors.pop(name, None) for name in _MATRICES]
    shapes = [getattr(x, "shape", ()) for x in matrices]
    rank = header["rank"]
    if any(
        x is None or x.dtype != "float32" or x.ndim != 2 for x in matrices
    ) or (shapes[0][1], shapes[1][0]) != (rank, rank):
        raise AdapterFileError(
            f"'{filepath}' is damaged: it says that it carries the random "
            f"matrices for rank {rank}, but they have the shapes {shapes}."
        )
    _check_pair(pair_sha256(*matrices), header, filepath)
    return matrices


def _check_biases(layers, biases, filepath):
    for path, bias in biases.items():
        own = layers[path].bias
        wanted = None if own is None else tuple(own.shape)
        if bias.dtype != "float32" or bias.shape != wanted:
            raise AdapterFileError(
                f"'{filepath}' does not fit the model: '{path}/bias' has shape "
                f"{bias.shape} and dtype {bias.dtype}, not {wanted} and "
                "float32."
            )


def trained_variables(paths, bases=None):
    """Returns what an adapter file holds, by structural path and name.

    Args:
        paths: Dict of the layers of a model, by structural path.
        bases: List of the layers that will be frozen, for a model that is not
            adapted yet; nothing in them is returned.
    """
    fresh = bases is not None
    if not fresh:
        bases = _bases(paths)
    in_base = {id(x) for base in bases for x in _keras.flatten_layers(base)}
    trained = {}
    for path, layer in paths.items():
        outside = id(layer) not in in_base
        if fresh and not outside:
            continue
        own = _keras.own_variables(layer)
        if is_adapted(layer):
            kept = {id(layer.vera_lambda_d), id(layer.vera_lambda_b)}
        elif outside and any(v.trainable for v in own):
            # A layer outside the base that trains is saved with its state.
            kept = {id(v) for v in own}
        else:
            kept = set()
        for variable in own:
            if variable.trainable or id(variable) in kept:
                name = _entry_name(path, variable.name, trained)
                trained[name] = variable
    return trained


def _entry_name(path, name, taken):
    name = f"{path}/{name}" if path else name
    count = 0
    unique = name
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    return unique


def _bases(paths):
    """Returns the frozen parts of an adapted model, each once."""
    plans = [getattr(x, "vera_adaptation", None) for x in paths.values()]
    bases = [base for p in plans if p is not None for base in p.bases]
    return list({id(base): base for base in bases}.values())


def _base_paths(model, paths):
    """Returns where the frozen parts are in `model`.

    `keras.Model(backbone.input, head(backbone.output))` holds the layers of
    the backbone, but not the backbone: then they stand for it.
    """
    places = {id(layer): path for path, layer in paths.items()}
    found, bases = [], _bases(paths)
    while bases:
        base = bases.pop(0)
        if id(base) in places:
            found.append(places[id(base)])
        elif _keras.sub_layers(base):
            bases.extend(_keras.sub_layers(base))
        else:
            raise ValueError(
                "`model` must hold the whole of what `enable_vera` adapted. "
                f"Received: model '{model.name}', a part of it."
            )
    return found


def make_header(model, paths):
    adapted = {p: x for p, x in paths.items() if is_adapted(x)}
    layers = list(adapted.values())
    settings = {(_pair_of(x), x._vera_settings) for x in layers}
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
    return {
        "format_version": _adapter_format.FORMAT_VERSION,
        "rank": rank,
        "seed": seed,
        "structure": structure,
        "d_initial": own.d_initial,
        "dropout": own.dropout,
        "targets": "predicate" if callable(targets) else targets,
        "bases": _base_paths(model, paths),
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
        "projection_sha256": pair_sha256(*_used_pair(layers)),
        "keras_vera_version": _VERSION,
        "keras_version": keras.version(),
    }


def as_array(name, variable, dtype):
    array = ops.convert_to_numpy(variable)
    if _dtype_in_files(variable) != "float32":
        return array
    return _adapter_format.in_dtype(name, array, dtype)


def _dtype_in_files(variable):
    """Half floats are read as float32, which holds all of them."""
    dtype = backend.standardize_dtype(variable.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _checked_settings(header, matrices, filepath):
    """Returns the projection of a file, and what else it sets."""
    try:
        if matrices is None:
            pair = [header[name] for name in ("seed", "rank", "structure")]
            projection = SharedProjection(*pair)
        else:
            projection = SharedProjection.from_matrices(*matrices)
        return projection, {
            "d_initial": check_d_initial(header["d_initial"]),
            "dropout": check_dropout(header["dropout"]),
        }
    except ValueError as error:
        raise AdapterFileError(f"'{filepath}' is damaged: {error}") from None


def check_fits(paths, header, filepath, reference=None):
    """Checks that a file was made on the base of an adapted model.

    Returns the adapted layers by path.

    Args:
        paths: Dict of the layers of the model, by structural path.
        header: Dict, the header of the file.
        filepath: String, for messages.
        reference: Dict, the header that the model itself would give a file,
            so that many files are checked without reading its kernels again.
    """
    layers = _check_adapted_model(paths, header, filepath)
    _check_kernels(layers, header, filepath, reference)
    if reference is not None:
        sha256 = reference["projection_sha256"]
    else:
        sha256 = pair_sha256(*_used_pair(list(layers.values())))
    _check_pair(sha256, header, filepath)
    return layers


def _check_adapted_model(paths, header, filepath):
    """Checks that the adapters of a model are those of the file."""
    adapted = {p: x for p, x in paths.items() if is_adapted(x)}
    expected = tuple(header[name] for name in _PAIR)
    for layer in adapted.values():
        received = _pair_of(layer)
        if received != expected:
            raise AdapterFileError(
                f"'{filepath}' has {_described(expected)}, but VeRA is "
                f"enabled on the model with {_described(received)}. Call "
                "`keras_vera.disable_vera(model)` first."
            )
    _check_names(header["layers"], adapted, "adapted layers", filepath)
    for path, layer in adapted.items():
        if layer.vera_output_offset != header["layers"][path]["output_offset"]:
            raise AdapterFileError(
                f"'{filepath}' does not fit the model: '{path}' uses other "
                "columns of its random matrices there."
            )
    return adapted


def _check_base_model(model, paths, header, filepath):
    """Returns the layers to adapt, by path, and the bases of the header."""
    _adaptation.check_model(model)
    wanted = [*header["layers"], *header["bases"]]
    absent = [path for path in wanted if path not in paths]
    if absent:
        raise AdapterFileError(
            f"'{filepath}' belongs to another base: the model has no layers "
            f"{absent}."
        )
    if not header["bases"]:
        raise AdapterFileError(
            f"'{filepath}' was saved from a model made of "
            "`keras_vera.layers`. Received: a model without them."
        )
    layers = {path: paths[path] for path in header["layers"]}
    for path, layer in layers.items():
        _adaptation.check_layer(layer, path)
    return layers, [paths[path] for path in header["bases"]]


def _check_kernels(layers, header, filepath, reference=None):
    """Checks the base: shapes, and values where the dtype is the same."""

    def fingerprint(path, layer):
        if reference is not None:
            return reference["layers"][path]["kernel_fingerprint"]
        return kernel_fingerprint(stored_kernel(layer))

    shapes, values = [], []
    for path, layer in layers.items():
        expected = header["layers"][path]
        if list(kernel_shape(layer)) != expected["kernel_shape"]:
            shapes.append(
                f"'{path}' has a kernel of shape {kernel_shape(layer)},"
                f" not {tuple(expected['kernel_shape'])}"
            )
        elif (
            kernel_dtype(layer) == expected["kernel_dtype"]
            and fingerprint(path, layer) != expected["kernel_fingerprint"]
        ):
            values.append(path)
    if shapes:
        raise AdapterFileError(
            f"'{filepath}' belongs to another base: {'; '.join(shapes)}."
        )
    if values:
        raise AdapterFileError(
            f"'{filepath}' belongs to another base: the kernels of {values} "
            "have other values than those that the adapter was trained on. "
            "Load the same base weights; if this model was saved with the "
            "adapter merged, it needs no adapter."
        )


def _pair_of(layer):
    return tuple(getattr(layer.projection, name) for name in _PAIR)


def _described(pair):
    return ", ".join(f"{name}={x!r}" for name, x in zip(_PAIR, pair))


def _used_pair(layers):
    """Returns what `layers` use of A and B: the largest slice of each."""
    projection = layers[0].projection
    if projection.structure == EXPLICIT:
        return projection.vera_kernel_a, projection.vera_kernel_b
    used = [layer._vera_layout.contraction for layer in layers]
    m, n = max(x.m for x in used), max(x.n for x in used)
    a = ops.convert_to_tensor(projection.vera_kernel_a)
    b_matrix = ops.convert_to_tensor(projection.vera_kernel_b)
    return a[:m], b_matrix[:, :n]


def _largest_dims(layers, header):
    """Returns the rows of A and the columns of B that layers use."""
    rows = []
    for path, layer in layers.items():
        contraction = kind_of(type(layer))._make_contraction(layer)
        offset = header["layers"][path]["output_offset"]
        rows.append((contraction.m, offset + contraction.n))
    return tuple(map(max, zip(*rows)))


def _check_pair(sha256, header, filepath):
    if sha256 != header["projection_sha256"]:
        raise AdapterFileError(
            f"'{filepath}' was trained with other random matrices than "
            f"{_described(header[name] for name in _PAIR)} make here."
        )


def expected_entries(paths, header=None, bases=None):
    """Returns the shape and dtype of each entry that a file must have.

    For a model that is not adapted yet, `header` and `bases` say how it will
    be.
    """
    expected = {
        name: (tuple(variable.shape), _dtype_in_files(variable))
        for name, variable in trained_variables(paths, bases).items()
    }
    if bases is not None:
        for path in header["layers"]:
            layer = paths[path]
            n = kind_of(type(layer))._make_contraction(layer).n
            rank = header["layers"][path]["rank"]
            sizes = {"vera_lambda_d": rank, "vera_lambda_b": n}
            for name, size in sizes.items():
                name = _entry_name(path, name, expected)
                expected[name] = (size,), "float32"
    return expected


def check_entries(expected, tensors, filepath):
    """Checks the entries of a file against what `expected_entries` gives."""
    _check_names(tensors, expected, "entries", filepath)
    wrong = [
        f"'{name}' has {what} {received}, not {wanted}"
        for name, both in expected.items()
        for what, received, wanted in zip(
            ("shape", "dtype"),
            (tensors[name].shape, tensors[name].dtype),
            both,
        )
        if received != wanted
    ]
    if wrong:
        raise AdapterFileError(
            f"'{filepath}' does not fit the model: {'; '.join(wrong)}."
        )


def _check_names(received, expected, what, filepath):
    unexpected = [name for name in received if name not in expected]
    missing = [name for name in expected if name not in received]
    if unexpected or missing:
        raise AdapterFileError(
            f"The {what} of '{filepath}' are not those of the model. The file "
            f"has these, which the model has not: {unexpected}; the model has "
            f"these, which the file has not: {missing}."
        )
