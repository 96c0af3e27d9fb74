import json
import os
import tempfile
from importlib import metadata

import keras
import safetensors
import safetensors.numpy
from keras import ops

from keras_vera import _keras
from keras_vera import adaptation
from keras_vera._checks import check_d_initial
from keras_vera._checks import check_dropout
from keras_vera._fingerprint import kernel_fingerprint
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._kinds import kind_of
from keras_vera.projection import SharedProjection

EXTENSION = ".vera.safetensors"
_HEADER = "keras_vera"
_FORMAT_VERSION = 1
_HEADER_KEYS = (
    "rank",
    "seed",
    "d_initial",
    "dropout",
    "targets",
    "bases",
    "layers",
    "projection",
)


class AdapterFileError(ValueError):
    """An adapter file is damaged, or does not fit the model."""


def save_adapter(model, filepath):
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

    Raises:
        ValueError: If the model is not adapted, if its kernels hold another
            adapter from a weights file, or if `filepath` ends otherwise.
        OSError: If the file cannot be written.

    Example:

    ```python
    keras_vera.save_adapter(model, "sst2.vera.safetensors")
    ```
    """
    filepath = check_filepath(filepath)
    layers = adaptation.check_adapted(model)
    adaptation.check_base_is_clean(model, layers)
    _keras.synchronize(model)
    adapted = adaptation.adapted_layers(model)
    tensors = {
        name: _as_array(variable)
        for name, variable in _trained_variables(model).items()
    }
    content = safetensors.numpy.save(
        tensors, metadata=_make_header(model, adapted)
    )
    _write_atomically(filepath, content)


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
        keras_vera.AdapterFileError: If the file is damaged or belongs to
            another base, or to another rank, seed or set of layers.
        OSError: If the file cannot be read.

    Example:

    ```python
    classifier = keras_hub.models.BertTextClassifier.from_preset(
        "bert_base_en", num_classes=2
    )
    keras_vera.load_adapter(classifier, "sst2.vera.safetensors")
    ```
    """
    header, tensors = _read(filepath)
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a Keras model. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    _keras.synchronize(model)
    paths = _keras.structural_paths(model)
    if any(is_adapted(layer) for layer in paths.values()):
        _check_adapted_model(paths, header, filepath)
        plan = None
    else:
        plan = _plan(model, paths, header, filepath)
    _check_entries(model, header, tensors, plan, filepath)
    if plan is not None:
        plan.apply(model)
    for name, variable in _trained_variables(model).items():
        variable.assign(tensors[name])


def check_filepath(filepath):
    filepath = os.fspath(filepath)
    if not filepath.endswith(EXTENSION):
        raise ValueError(
            f"`filepath` must end in `{EXTENSION}`. "
            f"Received: filepath={filepath}"
        )
    return filepath


def _trained_variables(model, plan=None):
    """Returns what an adapter file holds, by structural path and name.

    Args:
        model: An adapted model, or one that `plan` will adapt.
        plan: The `Adaptation` to come, whose bases will be frozen.
    """
    layers = _keras.structural_paths(model)
    if plan is None:
        plans = [getattr(x, "vera_adaptation", None) for x in layers.values()]
    else:
        plans = [plan]
    bases = [base for p in plans if p is not None for base in p.bases]
    in_base = {id(x) for base in bases for x in _keras.flatten_layers(base)}
    trained = {}
    for path, layer in layers.items():
        outside = id(layer) not in in_base
        if plan is not None and not outside:
            continue
        own = _keras.own_variables(layer)
        # A layer outside the base that trains is saved with its state.
        has_state = (
            outside and not is_adapted(layer) and any(v.trainable for v in own)
        )
        for variable in own:
            if variable.trainable or has_state:
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


def _make_header(model, adapted):
    layers = list(adapted.values())
    settings = {
        (x.projection.seed, x.projection.rank, x._vera_settings) for x in layers
    }
    if len(settings) > 1:
        raise ValueError(
            f"Model '{model.name}' holds adapters of different seeds, ranks "
            "or settings, which one file cannot hold. Save its parts one by "
            f"one. Received: {sorted(map(str, settings))}"
        )
    record = getattr(layers[0], "vera_adaptation", None)
    paths = {id(x): p for p, x in _keras.structural_paths(model).items()}
    bases = [] if record is None else [paths.get(id(b)) for b in record.bases]
    if None in bases:
        raise ValueError(
            f"`model` must hold the whole of what `enable_vera` adapted. "
            f"Received: model '{model.name}', a part of it."
        )
    m = max(x._vera_contraction.m for x in layers)
    n = max(x._vera_contraction.n for x in layers)
    projection = layers[0].projection
    targets = None if record is None else record.targets
    header = {
        "format_version": _FORMAT_VERSION,
        "rank": projection.rank,
        "seed": projection.seed,
        "d_initial": layers[0]._vera_settings.d_initial,
        "dropout": layers[0]._vera_settings.dropout,
        "targets": "predicate" if callable(targets) else targets,
        "bases": bases,
        "layers": {
            path: {
                "kernel_shape": list(layer._kernel.shape),
                "kernel_dtype": layer.variable_dtype,
                "kernel_fingerprint": kernel_fingerprint(layer._kernel),
            }
            for path, layer in adapted.items()
        },
        "projection": {
            "input_dim": m,
            "output_dim": n,
            "sha256": projection.sha256(m, n),
        },
        "keras_vera_version": metadata.version("keras_vera"),
        "keras_version": keras.version(),
    }
    # One entry: safetensors writes several in an order that varies.
    return {_HEADER: json.dumps(header)}


def _as_array(variable):
    array = ops.convert_to_numpy(variable)
    # float32 holds every 16-bit float, and all readers know it.
    return array.astype("float32") if array.dtype.itemsize == 2 else array


def _write_atomically(filepath, content):
    folder = os.path.dirname(filepath) or "."
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # `mkstemp` makes files that only the owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, filepath)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(filepath):
    """Returns the header and the entries of an adapter file."""
    try:
        with safetensors.safe_open(filepath, framework="numpy") as file:
            raw = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise AdapterFileError(
            f"'{filepath}' is not an adapter file, or is damaged: {error}"
        ) from None
    try:
        header = json.loads(raw[_HEADER])
    except (KeyError, ValueError):
        header = None
    if not isinstance(header, dict):
        raise AdapterFileError(
            f"'{filepath}' is not an adapter file of keras_vera: its metadata "
            f"has no JSON object named '{_HEADER}'."
        )
    if header.get("format_version") != _FORMAT_VERSION:
        raise AdapterFileError(
            f"'{filepath}' has format version {header.get('format_version')}. "
            f"This version of keras_vera reads {_FORMAT_VERSION}; install a "
            "newer one."
        )
    missing = [key for key in _HEADER_KEYS if key not in header]
    if missing:
        raise AdapterFileError(f"The header of '{filepath}' lacks {missing}.")
    return header, tensors


def _check_adapted_model(paths, header, filepath):
    """Checks that the adapters of a model are those of the file."""
    adapted = {p: x for p, x in paths.items() if is_adapted(x)}
    for layer in adapted.values():
        received = (layer.projection.rank, layer.projection.seed)
        if received != (header["rank"], header["seed"]):
            raise AdapterFileError(
                f"'{filepath}' has rank={header['rank']} and "
                f"seed={header['seed']}, but VeRA is enabled on the model "
                f"with rank={received[0]} and seed={received[1]}. Call "
                "`keras_vera.disable_vera(model)` first."
            )
    _check_names(header["layers"], adapted, "adapted layers", filepath)
    _check_kernels(adapted, header, filepath)
    _check_projection(next(iter(adapted.values())).projection, header, filepath)


def _plan(model, paths, header, filepath):
    """Returns the `Adaptation` that the header asks for, unapplied."""
    adaptation.check_model(model)
    absent = [p for p in header["layers"] if p not in paths]
    absent += [p for p in header["bases"] if p not in paths]
    if absent or not header["bases"]:
        raise AdapterFileError(
            f"'{filepath}' belongs to another base: the model has no layers "
            f"{absent or list(header['layers'])}"
            f"{'' if absent else ' that are adapted'}."
        )
    layers = {p: paths[p] for p in header["layers"]}
    for path, layer in layers.items():
        adaptation.check_layer(layer, path)
    _check_kernels(layers, header, filepath)
    projection = SharedProjection(seed=header["seed"], rank=header["rank"])
    size = header["projection"]
    projection.reserve(size["input_dim"], size["output_dim"])
    _check_projection(projection, header, filepath)
    return adaptation.Adaptation(
        projection=projection,
        targets=header["targets"],
        d_initial=check_d_initial(header["d_initial"]),
        dropout=check_dropout(header["dropout"]),
        bases=[paths[p] for p in header["bases"]],
        layers=list(layers.values()),
    )


def _check_kernels(layers, header, filepath):
    """Checks the base: shapes, and values where the dtype is the same."""
    shapes, values = [], []
    for path, layer in layers.items():
        expected = header["layers"][path]
        if list(layer._kernel.shape) != expected["kernel_shape"]:
            shapes.append(
                f"'{path}' has a kernel of shape {tuple(layer._kernel.shape)},"
                f" not {tuple(expected['kernel_shape'])}"
            )
        elif (
            layer.variable_dtype == expected["kernel_dtype"]
            and kernel_fingerprint(layer._kernel)
            != expected["kernel_fingerprint"]
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


def _check_projection(projection, header, filepath):
    size = header["projection"]
    received = projection.sha256(size["input_dim"], size["output_dim"])
    if received != size["sha256"]:
        raise AdapterFileError(
            f"'{filepath}' was trained with other random matrices than "
            f"seed={header['seed']}, rank={header['rank']} make here."
        )


def _check_entries(model, header, tensors, plan, filepath):
    """Checks names and shapes of all entries against the model's variables."""
    expected = {
        name: tuple(variable.shape)
        for name, variable in _trained_variables(model, plan).items()
    }
    if plan is not None:
        for path, layer in zip(header["layers"], plan.layers):
            n = kind_of(type(layer))._make_contraction(layer).n
            expected[f"{path}/vera_lambda_d"] = (header["rank"],)
            expected[f"{path}/vera_lambda_b"] = (n,)
    _check_names(tensors, expected, "entries", filepath)
    wrong = [
        f"'{name}' has shape {tensors[name].shape}, not {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
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
