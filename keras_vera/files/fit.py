"""What an adapter file must fit, before anything is changed."""

import math

import numpy as np
from keras import backend

from keras_vera import _keras
from keras_vera.files.format import AdapterFileError
from keras_vera.files.saved import MATRICES
from keras_vera.files.saved import PAIR
from keras_vera.files.saved import check_matrices
from keras_vera.files.saved import entry_name
from keras_vera.files.saved import named_variables
from keras_vera.files.saved import pair_of
from keras_vera.files.saved import used_pair
from keras_vera.files.saved import without_head
from keras_vera.layers._base_layer import kernel_dtype
from keras_vera.layers._base_layer import kernel_shape
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._fingerprint import kernel_fingerprint
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._kinds import kind_of
from keras_vera.model import adaptation
from keras_vera.model.train_targets import trained_variables_of
from keras_vera.product.checks import check_d_initial
from keras_vera.product.checks import check_dropout
from keras_vera.product.projection import EXPLICIT
from keras_vera.product.projection import SharedProjection
from keras_vera.product.projection import pair_sha256


def popped_matrices(header, tensors, filepath):
    """Takes A and B out of the entries, if the file carries them."""
    if header["structure"] != EXPLICIT:
        return None
    matrices = [tensors.pop(name, None) for name in MATRICES]
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


def checked_settings(header, matrices, filepath):
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
    check_kernels(layers, header, filepath, reference)
    if reference is not None:
        sha256 = reference["projection_sha256"]
    else:
        check_matrices(paths[""], list(layers.values()))
        sha256 = pair_sha256(*used_pair(list(layers.values())))
    _check_pair(sha256, header, filepath)
    return layers


def check_trained(layers, paths, header, plan_layers, filepath):
    """Returns what of the base is to train: lists of variables, by layer.

    Args:
        layers: Dict of the layers to adapt, by path.
        paths: Dict of the layers of the model, by structural path.
        header: Dict, the header of the file.
        plan_layers: List of the layers of the base.
        filepath: String, for messages.
    """
    in_base = {id(layer) for layer in plan_layers}
    trained = {}
    for name in header["trained"]:
        path = name.rpartition("/")[0]
        layer = paths.get(path)
        if id(layer) not in in_base:
            raise AdapterFileError(
                f"'{filepath}' belongs to another base: the base has no layer "
                f"'{path}', which trains there."
            )
        variable = named_variables(path, layer).get(name)
        allowed = {id(v) for v in trained_variables_of(layer, path in layers)}
        if id(variable) not in allowed:
            raise AdapterFileError(
                f"'{filepath}' belongs to another base: '{name}' trains there, "
                "which the model has not, or cannot train."
            )
        trained.setdefault(layer, []).append(variable)
    return trained


def _check_adapted_model(paths, header, filepath):
    """Checks that the adapters of a model are those of the file."""
    adapted = {p: x for p, x in paths.items() if is_adapted(x)}
    expected = tuple(header[name] for name in PAIR)
    for layer in adapted.values():
        received = pair_of(layer)
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


def check_base_model(model, paths, header, filepath, head):
    """Returns the layers to adapt, by path; the bases of the header; the
    layers below them that are not of the base; and those that are."""
    adaptation.check_model(model)
    wanted = [*header["layers"], *header["bases"]]
    if head:
        wanted += header["outside"]
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
    bases = [paths[path] for path in header["bases"]]
    outside = [paths[x] for x in header["outside"] if x in paths]
    below = [x for base in bases for x in _keras.flatten_layers(base)]
    base_layers = [x for x in below if x not in outside]
    adaptation.check_no_lora(model, base_layers)
    for path, layer in layers.items():
        adaptation.check_layer(layer, path)
    return layers, bases, outside, base_layers


def check_kernels(layers, header, filepath, reference=None):
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


def note_ranks(header, tensors, filepath):
    """Adds the rank of each layer to the header: the length of its d."""
    shapes = {
        path: tensors[entry_name(path, "vera_lambda_d", ())].shape
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


def check_dims(projection, layers, header, filepath):
    """Makes A and B as large as the layers need them, and checks them."""
    dims = _largest_dims(layers, header)
    projection.reserve(*dims)
    pair = projection.vera_kernel_a, projection.vera_kernel_b
    if pair[0].shape[0] < dims[0] or pair[1].shape[1] < dims[1]:
        raise AdapterFileError(
            f"'{filepath}' is damaged: its random matrices are too small "
            "for its layers."
        )
    _check_pair(pair_sha256(*pair), header, filepath)


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
            f"{_described(header[name] for name in PAIR)} make here."
        )


def check_biases(layers, biases, filepath):
    for path, bias in biases.items():
        own = layers[path].bias
        wanted = None if own is None else tuple(own.shape)
        if bias.dtype != "float32" or bias.shape != wanted:
            raise AdapterFileError(
                f"'{filepath}' does not fit the model: '{path}/bias' has shape "
                f"{bias.shape} and dtype {bias.dtype}, not {wanted} and "
                "float32."
            )
        _check_range(own, bias, f"{path}/bias", filepath)


def check_ranges(variables, tensors, filepath):
    """Raises where a model's variables would hold infinity.

    Args:
        variables: Dict of variables, by entry name.
        tensors: Dict of the entries of a file.
        filepath: String, for messages.
    """
    for name, variable in variables.items():
        if name in tensors:
            _check_range(variable, tensors[name], name, filepath)


def _check_range(variable, array, name, filepath):
    if backend.standardize_dtype(variable.dtype) != "float16":
        return
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(array.astype("float16")).all()
    if not is_finite:
        raise AdapterFileError(
            f"'{filepath}' does not fit the model: '{name}' holds numbers up "
            f"to {np.abs(array).max():g}, and is of float16 there, which ends "
            "at 65504. Build the model in bfloat16 or float32."
        )


def check_entries(expected, tensors, header, filepath):
    """Checks the entries of a file against what `expected_entries` gives."""
    hint = ""
    of_base = without_head(header, expected), without_head(header, tensors)
    if not any(_misfits(*of_base)):
        hint = (
            " All of this lies outside the base, as a task head does. Pass "
            "`head=False` to load the vectors and leave the rest as the "
            "model has it."
        )
    unexpected, missing, wrong = _misfits(expected, tensors)
    if unexpected or missing:
        _raise_names("entries", unexpected, missing, filepath, hint)
    if wrong:
        raise AdapterFileError(
            f"'{filepath}' does not fit the model: {'; '.join(wrong)}.{hint}"
        )


def _misfits(expected, tensors):
    """Returns unexpected and missing entries, and what is wrong in others."""
    unexpected, missing = _differences(tensors, expected)
    wrong = [
        f"'{name}' has {what} {received}, not {wanted}"
        for name, both in expected.items()
        if name in tensors
        for what, received, wanted in zip(
            ("shape", "dtype"),
            (tensors[name].shape, tensors[name].dtype),
            both,
        )
        if received != wanted
    ]
    return unexpected, missing, wrong


def _check_names(received, expected, what, filepath):
    unexpected, missing = _differences(received, expected)
    if unexpected or missing:
        _raise_names(what, unexpected, missing, filepath)


def _differences(received, expected):
    return (
        [name for name in received if name not in expected],
        [name for name in expected if name not in received],
    )


def _raise_names(what, unexpected, missing, filepath, hint=""):
    raise AdapterFileError(
        f"The {what} of '{filepath}' are not those of the model. The file "
        f"has these, which the model has not: {unexpected}; the model has "
        f"these, which the file has not: {missing}.{hint}"
    )


def _described(pair):
    return ", ".join(f"{name}={x!r}" for name, x in zip(PAIR, pair))
