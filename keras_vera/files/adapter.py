import keras

from keras_vera import _keras
from keras_vera._types import FilePath
from keras_vera.files import fit
from keras_vera.files import format as adapter_format
from keras_vera.files import upload
from keras_vera.files.format import check_file_dtype
from keras_vera.files.saved import adaptations
from keras_vera.files.saved import as_array
from keras_vera.files.saved import carried_matrices
from keras_vera.files.saved import entry_name
from keras_vera.files.saved import expected_entries
from keras_vera.files.saved import make_header
from keras_vera.files.saved import saved_variables
from keras_vera.files.saved import trained_variables
from keras_vera.files.saved import without_head
from keras_vera.files.unsaved import as_header
from keras_vera.files.unsaved import check_unsaved
from keras_vera.files.unsaved import fingerprints
from keras_vera.layers import _base_scope
from keras_vera.layers._in_place import is_adapted
from keras_vera.model import adaptation
from keras_vera.model.trained import check_all_there


def save_adapter(
    model: keras.Layer, filepath: FilePath, dtype: str = "float32"
) -> None:
    """Saves what was trained: the vectors, and the task head if there is one.

    The file holds every trainable variable of `model`, and the state (such as
    moving averages) of the layers that train in full, outside the base or by
    `train` of `enable_vera`, each under its structural path. Outside the base
    it also holds layers that have only state, and those that are frozen and
    have moved, or been made, since `enable_vera`, such as a head that trained
    first. What it does not hold has a fingerprint, and loading raises where
    the base is another one. The header says how to make the rest: rank, seed
    and hash of the random matrices, the adapted layers and a fingerprint of
    their kernels. It is written beside its destination first and then
    renamed, so a failure leaves an old file as it was.

    Args:
        model: A model on which, or on a part of which, `enable_vera` was
            called, or one that holds `keras_vera.layers`.
        filepath: `str` or `pathlib.Path`. Must end in `.vera.safetensors`.
            Or a path on the Hugging Face Hub, as `upload_adapter` takes it.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`: how floats are
            stored (those of 64 bits as they are). Half the bytes cost a
            relative error of 2**-11 or 2**-8 in every number. Defaults to
            `"float32"`, which is exact.

    Raises:
        ValueError: If the model is not adapted, if its kernels hold another
            adapter from a weights file, if state of its base has moved, if
            its random matrices are those of another seed, if
            `model.trainable` is `False`, if a number is not finite (in
            `dtype`), if layers have no place in a file (those of a `set`), or
            if an argument makes no sense.
        keras_vera.AdapterFileError: If the file cannot be written. An older
            file is then as it was.

    Example:

    ```python
    keras_vera.enable_vera(classifier)
    classifier.fit(sentences, labels)
    keras_vera.save_adapter(classifier, "sst2.vera.safetensors")
    ```
    """
    filepath = upload.check_destination(filepath)
    check_file_dtype(dtype)
    layers = adaptation.check_adapted(model)
    adaptation.check_base_is_clean(model, layers)
    if not model.trainable:
        raise ValueError(
            f"`model.trainable` is False on model '{model.name}', so what was "
            "trained outside the base, such as a head, would be lost. Set "
            "`model.trainable = True` before saving."
        )
    with _base_scope.suspended():
        upload.write(filepath, *_contents(model, layers, dtype))


def _contents(model, layers, dtype):
    """Returns header and entries of the file of an adapted model."""
    _keras.synchronize(model)
    cut = _keras.cut_over_processes(model.variables)
    _keras.check_all_here("save_adapter", cut)
    adaptation.check_base_is_unmoved(model, layers)
    paths = _keras.structural_paths(model)
    check_all_there(model, paths, adaptations(paths))
    tensors = {
        name: as_array(name, variable, dtype)
        for name, variable in saved_variables(paths).items()
    }
    for path, layer in paths.items():
        if getattr(layer, "vera_base_bias", None) is not None:
            name = entry_name(path, "bias", tensors)
            tensors[name] = as_array(name, layer.bias, dtype)
    tensors.update(carried_matrices(layers))
    unsaved = as_header(fingerprints(paths, tensors))
    return {**make_header(model, paths), "unsaved": unsaved}, tensors


def load_adapter(
    model: keras.Layer, filepath: FilePath, head: bool = True
) -> None:
    """Loads an adapter file into its base model, or into an adapted model.

    A base model is adapted as the header says, and everything is checked
    before: an error leaves the model as it was.

    Args:
        model: The model that `save_adapter` was called on, built again: with
            the same base weights, and with the same head if the file has one.
            If VeRA is enabled on it, the rank, seed and layers must be those
            of the file, and `dropout` and `d_initial` stay its own.
        filepath: `str` or `pathlib.Path`, made by `save_adapter`. Or a path on
            the Hugging Face Hub: `"hf://user/repo"`, with `@revision` behind
            it for a branch, tag or commit, and with a name where the file is
            not `adapter.vera.safetensors`.
        head: Boolean, whether to load what trained outside the base as well,
            such as a task head. `False` leaves it as `model` has it, which
            may have a head of another size. Defaults to `True`.

    Raises:
        keras_vera.AdapterFileError: If the file cannot be read, is damaged,
            or belongs to another base, or to another rank, seed or set of
            layers, or holds numbers that the model's dtype cannot.
        ValueError: If `model` is no Keras model, is that of a bank, has
            layers that have no place in a file (those of a `set`), or is
            adapted with random matrices that its seed does not make.
        ImportError: If the path is on the Hub, and huggingface_hub is not
            installed.

    Example:

    ```python
    classifier = keras_hub.models.TextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_vera.load_adapter(classifier, "sst2.vera.safetensors")
    ```
    """
    header, tensors = adapter_format.read(filepath)
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a Keras model. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    _base_scope.check_outside(model)
    adaptation.check_no_bank(model)
    _keras.synchronize(model)
    _keras.check_all_here("load_adapter", model.variables)
    paths = _keras.structural_paths(model)
    matrices = fit.popped_matrices(header, tensors, filepath)
    biases = {
        path: tensors.pop(name)
        for path in header["layers"]
        if (name := entry_name(path, "bias", ())) in tensors
        and name not in header["trained"]
    }
    if not head:
        tensors = without_head(header, tensors)
    if any(is_adapted(layer) for layer in paths.values()):
        layers = fit.check_fits(paths, header, filepath)
        expected = expected_entries(paths, header, tensors, head=head)
        fit.check_entries(expected, tensors, header, filepath)
        fit.check_biases(layers, biases, filepath)
        found = fingerprints(paths, {*tensors, *_bias_names(biases)})
        check_unsaved(found, header, filepath, head)
        own = trained_variables(
            paths, head=head, given=tensors, state=bool(header["unsaved"])
        )
        fit.check_ranges(own, tensors, filepath)
    else:
        with _keras.strategy_scope(model):
            layers, plan = _checked_adaptation(
                model, paths, header, tensors, matrices, biases, filepath, head
            )
        plan.apply(model)
    loaded = trained_variables(
        paths, head=head, given=tensors, state=bool(header["unsaved"])
    )
    for name, variable in loaded.items():
        variable.assign(tensors[name])
    owners = {name.rpartition("/")[0] for name in loaded}
    kept = _keras.finalize_state([paths[path] for path in owners])
    if kept:
        _keras.reset_compiled(kept)
    for path, layer in layers.items():
        if path in biases or getattr(layer, "vera_base_bias", None) is not None:
            layer.set_adapter_bias(biases.get(path))


def _bias_names(biases):
    return [entry_name(path, "bias", ()) for path in biases]


def _checked_adaptation(
    model, paths, header, tensors, matrices, biases, filepath, head
):
    """Returns how a base model is to be adapted for a file.

    Also the layers to adapt, by path. Everything is checked.
    """
    projection, settings = fit.checked_settings(header, matrices, filepath)
    layers, bases, outside, base_layers = fit.check_base_model(
        model, paths, header, filepath, head
    )
    fit.check_kernels(layers, header, filepath)
    fit.note_ranks(header, tensors, filepath)
    trained = fit.check_trained(layers, paths, header, base_layers, filepath)
    plan = adaptation.Adaptation(
        projection=projection,
        targets=header["targets"],
        bases=bases,
        trained=trained,
        outside=outside,
        layers=list(layers.values()),
        output_offsets=[x["output_offset"] for x in header["layers"].values()],
        ranks=[x["rank"] for x in header["layers"].values()],
        **settings,
    )
    expected = expected_entries(paths, header, tensors, plan, head)
    fit.check_entries(expected, tensors, header, filepath)
    fit.check_biases(layers, biases, filepath)
    found = fingerprints(paths, {*tensors, *_bias_names(biases)}, plan)
    check_unsaved(found, header, filepath, head)
    own = trained_variables(paths, plan, head, tensors, bool(header["unsaved"]))
    fit.check_ranges(own, tensors, filepath)
    fit.check_dims(projection, layers, header, filepath)
    return layers, plan
