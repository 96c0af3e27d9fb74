import io
import json
import math
import os
import re

import numpy as np
import safetensors.numpy
from keras import ops

from keras_vera import _adaptation
from keras_vera import _base_scope
from keras_vera import _keras
from keras_vera._adapter_format import AdapterFileError
from keras_vera._adapter_format import check_names
from keras_vera._adapter_format import decode
from keras_vera._adapter_format import errors_about
from keras_vera._adapter_format import parsed
from keras_vera._adapter_format import read_bytes
from keras_vera._adapter_format import write_files
from keras_vera._checks import check_d_initial
from keras_vera._checks import check_dropout
from keras_vera._checks import check_integer
from keras_vera._peft_families import find_family
from keras_vera._peft_families import heads_of
from keras_vera._peft_families import modules_of
from keras_vera._peft_families import parts_of
from keras_vera._peft_families import prefix_of
from keras_vera._peft_parts import join_parts
from keras_vera._peft_parts import split_parts
from keras_vera._peft_parts import with_parts
from keras_vera._peft_pvera import as_vera_config
from keras_vera._peft_pvera import as_vera_tensors
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._kinds import kind_of
from keras_vera.projection import SharedProjection

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MODEL = "base_model.model."
_MATRICES = "base_model.vera_A", "base_model.vera_B"
_OF_MODULE = re.compile(
    r"(?P<module>.+)\.(?P<what>vera_lambda_d|vera_lambda_b|base_layer\.bias)"
)
_OF_HEAD = re.compile(r"(?P<module>.+)\.(?P<what>weight|bias)")


def load_peft_adapter(model, folder, head=True):
    """Adapts a KerasHub model with a VeRA adapter of Hugging Face PEFT.

    The adapter must have been trained on the Hugging Face model that the
    KerasHub model was converted from, such as by `from_preset(folder)`. The
    outputs are then the same. From here on the adapter is like any other: it
    can be trained, merged, and saved by `save_adapter`, which stores PEFT's
    random matrices as well, as no seed of this package makes them.

    Biases that PEFT trained (`bias="vera_only"`) belong to the adapter, and
    go with it; heads (`modules_to_save`) are assigned to those of the task.
    `bias="all"`, which trains layers without an adapter, is refused.
    Of PVeRA's adapters, the means are taken, as PEFT does at inference.
    If PEFT did not save its matrices, they are made again with PyTorch, which
    promises the same numbers for one of its versions and platforms only.

    Args:
        model: A KerasHub backbone or task of one of the families in
            `docs/peft.md`, such as BERT, RoBERTa, Llama, Gemma or ViT, with
            the weights that the adapter was trained on.
        folder: `str` or `pathlib.Path`, the folder that PEFT's
            `save_pretrained` made: `adapter_config.json` and
            `adapter_model.safetensors`.
        head: Boolean, whether to load what the adapter holds of a head
            (`modules_to_save`) as well. `False` leaves that of `model` as it
            is. Defaults to `True`.

    Raises:
        keras_vera.AdapterFileError: If the folder cannot be read, is damaged,
            holds another kind of adapter, or does not fit the model.
        ValueError: If the model is of no known family, or has VeRA or LoRA
            already. In any case the model is as it was.

    Example:

    ```python
    backbone = keras_hub.models.Backbone.from_preset("hf://google-bert/bert-base-uncased")
    keras_vera.load_peft_adapter(backbone, "my-peft-vera-adapter")
    ```
    """
    _base_scope.check_outside(model)
    _adaptation.check_model(model)
    backbone, family = find_family(model)
    folder = os.fspath(folder)
    config = _read_config(os.path.join(folder, _CONFIG))
    filepath = os.path.join(folder, _WEIGHTS)
    tensors = _read_weights(filepath)
    modules, older = modules_of(backbone, family)
    parts = parts_of(backbone, family)
    known = with_parts(modules, parts)
    heads = heads_of(model, family)
    if not head:
        tensors = _without_heads(tensors, heads, config["modules_to_save"])
    with errors_about(filepath, "does not fit the model"):
        tensors = as_vera_tensors(tensors, config["halves"])
        matrices = [tensors.pop(name, None) for name in _MATRICES]
        found, of_heads = _sorted_entries(
            tensors, family.prefix, known, older, heads
        )
        shares = {x: len(names) for names in parts.values() for x in names}
        rows, columns = 0, 0
        for module, entries in found.items():
            share = shares.get(module, 1)
            m, n = _check_module(
                module, entries, known[module], share, config["r"]
            )
            rows, columns = max(rows, m), max(columns, n)
        _check_heads(of_heads, heads)
        absent = all(x is None for x in matrices)
        if absent and not config["save_projection"]:
            matrices = _peft_matrices(config, rows, columns)
        _check_matrices(matrices, config["r"], rows, columns)
        matrices = matrices[0][:, :rows], matrices[1][:columns]
        found, matrices, starts = join_parts(found, matrices, parts, modules)
        layers, offsets, values = [], [], []
        for module, entries in found.items():
            offset = starts.get(module, 0)
            first = offset
            for layer in modules[module]:
                n = _contraction(layer).n
                part = slice(offset - first, offset - first + n)
                layers.append(layer)
                offsets.append(offset)
                values.append(
                    {
                        what: array if what == "vera_lambda_d" else array[part]
                        for what, array in entries.items()
                    }
                )
                offset += n
        projection = SharedProjection.from_matrices(
            np.ascontiguousarray(matrices[0].T),
            np.ascontiguousarray(matrices[1].T),
        )
    _adaptation.Adaptation(
        projection=projection,
        targets=config["target_modules"],
        d_initial=config["d_initial"],
        dropout=config["vera_dropout"],
        bases=_adaptation.find_bases(model),
        layers=layers,
        output_offsets=offsets,
    ).apply(model)
    for layer, entries in zip(layers, values):
        layer.vera_lambda_d.assign(entries["vera_lambda_d"])
        layer.vera_lambda_b.assign(entries["vera_lambda_b"])
        if "base_layer.bias" in entries:
            bias = entries["base_layer.bias"].reshape(layer.bias.shape)
            layer.set_adapter_bias(bias)
    for module, entries in of_heads.items():
        heads[module].kernel.assign(entries["weight"].T)
        heads[module].bias.assign(entries["bias"])


@_base_scope.suspended()
def save_peft_adapter(model, folder, base_model_name_or_path=None):
    """Saves an adapter as Hugging Face PEFT reads it.

    `PeftModel.from_pretrained(hugging_face_model, folder)` then gives the
    outputs of `model`, if the Hugging Face model has the same base weights.
    The adapter of a backbone is for a plain model (`AutoModel`), that of a
    task for the task's model (`AutoModelForSequenceClassification`,
    `AutoModelForCausalLM`, ...), with the head if that is of the same form.

    PEFT cannot make our random matrices, so the file holds them: it is larger
    than the one of `save_adapter`. Where Hugging Face has one fused module and
    KerasHub several layers with vectors of their own (GPT-2's `c_attn`), the
    rank in the file is a multiple of the adapter's.

    Args:
        model: A KerasHub backbone or task, adapted with VeRA, of one of the
            families that `load_peft_adapter` knows.
        folder: `str` or `pathlib.Path`, made if it does not exist.
        base_model_name_or_path: `str`, the name of the base model for PEFT's
            `AutoPeftModel`. Defaults to `None`.

    Raises:
        ValueError: If the model is not adapted or of no known family, or has
            an adapter that PEFT cannot express.
        keras_vera.AdapterFileError: If a file cannot be written. Older files
            are then as they were.

    Example:

    ```python
    keras_vera.save_peft_adapter(
        classifier, "sst2-peft", base_model_name_or_path="roberta-base"
    )
    ```
    """
    adapted = _adaptation.check_adapted(model)
    _adaptation.check_base_is_clean(model, adapted)
    backbone, family = find_family(model)
    modules = _adapted_modules(model, modules_of(backbone, family)[0], adapted)
    heads = _trained_heads(model, family)
    _keras.synchronize(model)
    prefix = prefix_of(model, family)
    parts = parts_of(backbone, family)
    tensors = split_parts(
        _in_peft_terms(modules, prefix), _MATRICES, _MODEL + prefix, parts
    )
    for module, layer in heads.items():
        name = f"{_MODEL}{module}"
        tensors[f"{name}.weight"] = ops.convert_to_numpy(layer.kernel).T
        tensors[f"{name}.bias"] = ops.convert_to_numpy(layer.bias)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds NaN or infinity.")
    has_biases = any(x.vera_base_bias is not None for x in adapted)
    settings = adapted[0]._vera_settings
    config = {
        "peft_type": "VERA",
        "base_model_name_or_path": base_model_name_or_path,
        "r": len(tensors[_MATRICES[0]]),
        "target_modules": [
            prefix + name
            for module in modules
            for name in parts.get(module, (module,))
        ],
        "modules_to_save": sorted({x.split(".")[0] for x in heads}) or None,
        "save_projection": True,
        "projection_prng_key": 0,
        "d_initial": settings.d_initial,
        "vera_dropout": settings.dropout,
        "fan_in_fan_out": family.fan_in_fan_out,
        "bias": "vera_only" if has_biases else "none",
        "inference_mode": True,
    }
    folder = os.fspath(folder)
    with errors_about(folder, "could not be written"):
        os.makedirs(folder, exist_ok=True)
    tensors = {
        name: np.ascontiguousarray(array, dtype="float32")
        for name, array in tensors.items()
    }
    content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_files(
        {
            os.path.join(folder, _WEIGHTS): content,
            os.path.join(folder, _CONFIG): text.encode(),
        }
    )


def _contraction(layer):
    if is_adapted(layer):
        return layer._vera_layout.contraction
    return kind_of(type(layer))._make_contraction(layer)


# ---- Reading.


def _read_config(filepath):
    with errors_about(filepath, "is not the config of a PEFT VeRA adapter"):
        config = as_vera_config(parsed(read_bytes(filepath).decode()))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object.")
        if config.get("peft_type") != "VERA":
            raise ValueError(f"its peft_type is {config.get('peft_type')!r}.")
        if config.get("bias", "none") not in ("none", "vera_only"):
            raise ValueError(
                f"it has bias={config['bias']!r}, which trains biases of "
                "layers without an adapter. Only 'none' and 'vera_only' can be "
                "loaded."
            )
        targets = config.get("target_modules")
        if not isinstance(targets, str | list | None) or not all(
            isinstance(target, str) for target in targets or ()
        ):
            raise ValueError(f"it has target_modules={targets!r}.")
        saved = config.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(
            isinstance(module, str) for module in saved
        ):
            raise ValueError(f"it has modules_to_save={saved!r}.")
        return {
            "modules_to_save": saved,
            "r": check_integer("r", config.get("r"), 1),
            "save_projection": bool(config.get("save_projection", True)),
            "projection_prng_key": check_integer(
                "projection_prng_key",
                config.get("projection_prng_key", 0),
                0,
                2**64 - 1,
            ),
            "d_initial": check_d_initial(config.get("d_initial", 0.1)),
            "vera_dropout": check_dropout(config.get("vera_dropout", 0.0)),
            "target_modules": targets,
            "halves": config["halves"],
        }


def _read_weights(filepath):
    if os.path.exists(filepath.replace(".safetensors", ".bin")) and (
        not os.path.exists(filepath)
    ):
        raise AdapterFileError(
            f"'{filepath}' does not exist, only a pickled 'adapter_model.bin', "
            "which could run code. Save the adapter with PEFT's "
            "`save_pretrained` again, which writes safetensors."
        )
    with errors_about(filepath, "is not the file of a PEFT adapter"):
        content = read_bytes(filepath)
        tensors = decode(content)
        check_names(io.BytesIO(content))
        for name, array in tensors.items():
            if array.dtype != "float32":
                raise ValueError(f"'{name}' has dtype {array.dtype}.")
        return tensors


def _sorted_entries(tensors, prefix, modules, older, heads):
    """Returns the entries by module, and those of heads by module."""
    found, of_heads, unknown = {}, {}, []
    for name, array in tensors.items():
        path = name.removeprefix(_MODEL)
        entry = _OF_MODULE.fullmatch(path)
        if entry:
            module = entry["module"].removeprefix(prefix + ".")
            module = older.get(module, module)
            if module in modules:
                entries = found.setdefault(module, {})
                if entry["what"] in entries:
                    raise ValueError(f"it holds '{name}' by two names.")
                entries[entry["what"]] = array
                continue
        entry = _OF_HEAD.fullmatch(path)
        if entry and entry["module"] in heads:
            of_heads.setdefault(entry["module"], {})[entry["what"]] = array
            continue
        unknown.append(name)
    if unknown:
        raise ValueError(
            f"it holds {unknown[:5]}, {len(unknown)} entries in all, for which "
            "the Keras model has no layer. If they are of a head, pass "
            "`head=False`."
        )
    if not found:
        raise ValueError("it holds no vectors.")
    return found, of_heads


def _without_heads(tensors, heads, saved):
    """Returns the entries that are of no head, by its place or by PEFT."""

    def is_of_head(name):
        path = name.removeprefix(_MODEL)
        entry = _OF_HEAD.fullmatch(path)
        return (
            entry is not None
            and not _OF_MODULE.fullmatch(path)
            and (
                entry["module"] in heads
                or not set(saved).isdisjoint(entry["module"].split("."))
            )
        )

    return {k: v for k, v in tensors.items() if not is_of_head(k)}


def _check_module(module, entries, layers, share, rank):
    """Checks the entries, and returns the module's inputs and outputs.

    `share` is the number of modules that share the layers' outputs.
    """
    for layer in layers:
        _adaptation.check_layer(layer, module)
    n = sum(_contraction(layer).n for layer in layers) // share
    wanted = {"vera_lambda_d": (rank,), "vera_lambda_b": (n,)}
    if "base_layer.bias" in entries:
        if any(layer.bias is None for layer in layers):
            raise ValueError(f"'{module}' has no bias in Keras.")
        wanted["base_layer.bias"] = (n,)
    received = {what: array.shape for what, array in entries.items()}
    if received != wanted:
        raise ValueError(
            f"'{module}' has entries of shapes {received}, not {wanted}."
        )
    return _contraction(layers[0]).m, n


def _check_heads(of_heads, heads):
    for module, entries in of_heads.items():
        layer = heads[module]
        received = {what: array.shape for what, array in entries.items()}
        wanted = {
            "weight": tuple(layer.kernel.shape)[::-1],
            "bias": tuple(layer.bias.shape),
        }
        if received != wanted:
            raise ValueError(
                f"the head '{module}' has entries of shapes {received}, not "
                f"{wanted}. Pass `head=False` to load the vectors alone."
            )


def _check_matrices(matrices, rank, rows, columns):
    shapes = [getattr(x, "shape", None) for x in matrices]
    if any(shape is None or len(shape) != 2 for shape in shapes) or (
        (shapes[0][0], shapes[1][1]) != (rank, rank)
        or shapes[0][1] < rows
        or shapes[1][0] < columns
    ):
        raise ValueError(
            f"its random matrices have the shapes {shapes}, and those of the "
            f"layers are {(rank, rows)} and {(columns, rank)}."
        )


def _peft_matrices(config, m, n):
    """Makes the matrices that PEFT makes when it does not save them."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            "it was saved without its random matrices, which PEFT makes with "
            "PyTorch. Install torch, or save the adapter in PEFT again with "
            "save_projection=True."
        ) from None
    generator = torch.Generator("cpu").manual_seed(
        config["projection_prng_key"]
    )
    rank = config["r"]
    # Kaiming-uniform, with the fan-in of the largest layer.
    matrices = [
        torch.empty(shape, dtype=torch.float32)
        .uniform_(
            -math.sqrt(6 / shape[1]),
            math.sqrt(6 / shape[1]),
            generator=generator,
        )
        .numpy()
        for shape in ((config["halves"] * rank, m), (n, rank))
    ]
    return [matrices[0][:rank], matrices[1]]


# ---- Writing.


def _adapted_modules(model, modules, adapted):
    """Returns the modules with adapters, or raises if a layer has none."""
    structures = {layer.projection.structure for layer in adapted}
    if not structures <= {"dense", "explicit"}:
        raise ValueError(
            "PEFT has the paper's dense pair only. Received: model "
            f"'{model.name}', adapted with structure={structures}. Keep it "
            "with `keras_vera.merge(model)`."
        )
    if len({id(layer.projection) for layer in adapted}) > 1:
        raise ValueError(
            f"Model '{model.name}' holds adapters with several random pairs, "
            "and PEFT has one."
        )
    modules = {
        module: layers
        for module, layers in modules.items()
        if any(is_adapted(layer) for layer in layers)
    }
    known = {id(layer) for layers in modules.values() for layer in layers}
    unknown = [layer.path for layer in adapted if id(layer) not in known]
    if unknown:
        raise ValueError(
            f"The adapted layers {unknown} of model '{model.name}' have no "
            "counterpart in Hugging Face transformers."
        )
    return modules


def _trained_heads(model, family):
    heads = heads_of(model, family)
    known = {id(v) for layer in heads.values() for v in layer.weights}
    vectors = ("vera_lambda_d", "vera_lambda_b")
    unknown = [
        v.path
        for v in _trained_variables(model)
        if id(v) not in known and v.name not in vectors
    ]
    if unknown:
        raise ValueError(
            f"What trained beside the vectors of model '{model.name}', "
            f"{unknown}, has no counterpart in Hugging Face transformers. Pass "
            "`model.backbone` to save its adapter without a head; what "
            "`train` of `enable_vera` lets train cannot be saved for PEFT."
        )
    return heads


def _trained_variables(model):
    layers = _keras.flatten_layers(model)
    in_base = [
        variable
        for plan in _adaptation.adaptations(layers)
        for variable, _ in plan.trained.base_values()
    ]
    return [*model.trainable_variables, *in_base]


def _in_peft_terms(modules, prefix):
    """Returns the tensors that PEFT has for adapted modules.

    PEFT's modules use the leading rows of one B. Where the layers of a fused
    module have vectors of their own, each gets channels of its own, in which
    B is 0 outside the layer's outputs.
    """
    groups = {}
    for layers in modules.values():
        for group, layer in _channel_groups(layers):
            groups.setdefault(group, len(groups))
    first = next(x for ls in modules.values() for x in ls if is_adapted(x))
    pair = first.projection
    a = ops.convert_to_numpy(pair.vera_kernel_a)
    b_matrix = ops.convert_to_numpy(pair.vera_kernel_b)
    rank = a.shape[1]
    sizes = [
        (_contraction(layers[0]).m, sum(_contraction(x).n for x in layers))
        for layers in modules.values()
    ]
    m, n = map(max, zip(*sizes))
    peft_a = np.tile(a.T[:, :m], (len(groups), 1))
    peft_b = np.zeros((n, rank * len(groups)), "float32")
    for (place, offset, size), number in groups.items():
        size = min(n, b_matrix.shape[1]) if size is None else size
        channels = slice(number * rank, (number + 1) * rank)
        peft_b[place : place + size, channels] = b_matrix.T[
            offset : offset + size
        ]
    tensors = dict(zip(_MATRICES, (peft_a, peft_b)))
    has_biases = any(
        is_adapted(x) and x.vera_base_bias is not None
        for layers in modules.values()
        for x in layers
    )
    for module, layers in modules.items():
        d = np.zeros(peft_b.shape[1], "float32")
        for group, layer in _channel_groups(layers):
            channels = groups[group] * rank
            d[channels : channels + rank] = _scaled_d(layer)
        b = [
            ops.convert_to_numpy(x.vera_lambda_b)
            if is_adapted(x)
            else np.zeros(_contraction(x).n, "float32")
            for x in layers
        ]
        name = f"{_MODEL}{prefix}{module}"
        tensors[f"{name}.vera_lambda_d"] = d
        tensors[f"{name}.vera_lambda_b"] = np.concatenate(b)
        if has_biases and layers[0].bias is not None:
            biases = [ops.convert_to_numpy(x.bias).reshape(-1) for x in layers]
            tensors[f"{name}.base_layer.bias"] = np.concatenate(biases)
    return tensors


def _channel_groups(layers):
    """Yields which channels each adapted layer of a module uses.

    A group is the first row of PEFT's B, the first column of ours, and their
    number, `None` for all.
    """
    plain = 0, 0, None
    places = np.cumsum([0] + [_contraction(x).n for x in layers])
    adapted = [x for x in layers if is_adapted(x)]
    one_d = all(
        np.array_equal(_scaled_d(x), _scaled_d(adapted[0])) for x in adapted
    )
    in_place = all(
        x.vera_output_offset == place
        for x, place in zip(layers, places)
        if is_adapted(x)
    )
    for layer, place in zip(layers, places):
        if not is_adapted(layer):
            continue
        if one_d and in_place:
            yield plain, layer
        else:
            n = _contraction(layer).n
            yield (int(place), layer.vera_output_offset, n), layer


def _scaled_d(layer):
    """Returns d with the Kaiming factors of the layer in it."""
    factor_a, factor_b = layer._vera_layout.structure.factors
    return ops.convert_to_numpy(layer.vera_lambda_d) * (factor_a * factor_b)
