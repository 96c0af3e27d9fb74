"""Adapters written as PEFT reads them: as VeRA, or as LoRA."""

import json
import os
import re

import keras
import numpy as np
import safetensors.numpy

from keras_vera import _keras
from keras_vera._types import FilePath
from keras_vera.files.disk import errors_about
from keras_vera.files.disk import write_files
from keras_vera.files.hub_paths import check_is_here
from keras_vera.layers import _base_scope
from keras_vera.layers._in_place import is_adapted
from keras_vera.model import adaptation
from keras_vera.peft import lora
from keras_vera.peft.families import find_family
from keras_vera.peft.families import heads_of
from keras_vera.peft.families import modules_of
from keras_vera.peft.families import parts_of
from keras_vera.peft.families import prefix_of
from keras_vera.peft.load import CONFIG
from keras_vera.peft.load import MATRICES
from keras_vera.peft.load import MODEL
from keras_vera.peft.load import WEIGHTS
from keras_vera.peft.load import contraction_of
from keras_vera.peft.parts import split_parts
from keras_vera.product.checks import check_finite


@_base_scope.suspended()
def save_peft_adapter(
    model: keras.Layer,
    folder: FilePath,
    base_model_name_or_path: str | None = None,
    as_lora: bool | int = False,
    batch: object = None,
) -> dict | None:
    """Saves an adapter as Hugging Face PEFT reads it: as VeRA, or as LoRA.

    `PeftModel.from_pretrained(hugging_face_model, folder)` then gives the
    outputs of `model`, if the Hugging Face model has the same base weights.
    The adapter of a backbone is for a plain model (`AutoModel`), that of a
    task for the task's model (`AutoModelForSequenceClassification`,
    `AutoModelForCausalLM`, ...), with the head if that is of the same form.

    PEFT cannot make our random matrices, so the file holds them: it is larger
    than the one of `save_adapter`. Where Hugging Face has one fused module and
    KerasHub several layers with vectors of their own (GPT-2's `c_attn`), the
    rank in the file is a multiple of the adapter's.

    **As LoRA**, an adapter goes where VeRA is unknown, such as to vLLM. VeRA
    of rank r is LoRA of rank r with the matrices `A * d` and `B * b`, so
    `as_lora=True` is exact, for every `structure`. A lower rank, such as
    `as_lora=16`, makes smaller and faster adapters, and is an approximation:
    the best one of that rank for each module, which may lack most of an
    update whose directions weigh about the same. What is returned says so.

    Args:
        model: A KerasHub backbone or task, adapted with VeRA, of one of the
            families that `load_peft_adapter` knows.
        folder: `str` or `pathlib.Path`, made if it does not exist.
        base_model_name_or_path: `str`, the name of the base model for PEFT's
            `AutoPeftModel`. Defaults to `None`.
        as_lora: Boolean or positive integer. `True` writes LoRA of the
            adapter's own rank, an integer LoRA of at most that rank. Defaults
            to `False`: VeRA.
        batch: Inputs of `model`, on which the error of `as_lora` is measured,
            as `model(batch)` takes them. Defaults to `None`.

    Returns:
        `None` for VeRA. For LoRA, a dict with `"lost"`, a dict by module of
        the share of the squared (Frobenius) norm of its update that the file
        lacks; and with `batch` also `"output_error"`, the largest difference
        in an output that this makes, and `"output_change"`, the largest that
        the adapter itself makes, to compare it with.

    Raises:
        ValueError: If the model is not adapted or of no known family, or has
            an adapter that PEFT cannot express.
        keras_vera.AdapterFileError: If a file cannot be written. Older files
            are then as they were.

    Example:

    ```python
    keras_vera.enable_vera(causal_lm)
    causal_lm.fit(texts)
    keras_vera.save_peft_adapter(causal_lm, "to-peft")
    report = keras_vera.save_peft_adapter(
        causal_lm, "lora-for-vllm", as_lora=16, batch=inputs
    )
    print(max(report["lost"].values()), report["output_error"])
    ```
    """
    check_is_here(
        "folder",
        folder,
        "Write a folder here and upload it with huggingface_hub's "
        "`upload_folder`.",
    )
    lora.check_as_lora(as_lora, batch)
    adapted = adaptation.check_adapted(model)
    cut = _keras.cut_over_processes(model.variables)
    _keras.check_all_here("save_peft_adapter", cut)
    adaptation.check_base_is_clean(model, adapted)
    backbone, family = find_family(model)
    modules = _adapted_modules(model, modules_of(backbone, family)[0], adapted)
    heads = _trained_heads(model, family)
    if batch is not None and any(x.quantization_mode for x in adapted):
        raise ValueError(
            "The error of LoRA is measured with other kernels for a moment, "
            f"which the quantized base of model '{model.name}' does not take. "
            "Leave `batch` out, or measure it on the float base."
        )
    _keras.synchronize(model)
    prefix = prefix_of(model, family)
    parts = parts_of(backbone, family)
    if as_lora is False:
        _check_one_dense_pair(model, adapted)
        report = None
        tensors, config = _in_vera_terms(modules, prefix, parts)
    else:
        exact = {x: lora.module_factors(own) for x, own in modules.items()}
        factors, lost = lora.truncated(lora.split(exact, parts), as_lora)
        report = {"lost": {prefix + x: share for x, share in lost.items()}}
        if batch is not None:
            others = lora.joined(factors, parts)
            report["output_error"], report["output_change"] = (
                lora.output_errors(model, batch, modules, exact, others)
            )
        tensors, config = _in_lora_terms(modules, factors, prefix, parts)
    for module, layer in heads.items():
        name = f"{MODEL}{module}"
        tensors[f"{name}.weight"] = _keras.to_numpy(layer.kernel).T
        tensors[f"{name}.bias"] = _keras.to_numpy(layer.bias)
    config = {
        "base_model_name_or_path": base_model_name_or_path,
        "target_modules": [
            prefix + name
            for module in modules
            for name in parts.get(module, (module,))
        ],
        "modules_to_save": sorted({x.split(".")[0] for x in heads}) or None,
        "fan_in_fan_out": family.fan_in_fan_out,
        "inference_mode": True,
        **config,
    }
    _write(os.fspath(folder), tensors, config)
    return report


def _write(folder, tensors, config):
    tensors = {
        name: np.ascontiguousarray(array, dtype="float32")
        for name, array in tensors.items()
    }
    for name, array in tensors.items():
        check_finite(name, array)
    with errors_about(folder, "could not be written"):
        os.makedirs(folder, exist_ok=True)
    content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_files(
        {
            os.path.join(folder, WEIGHTS): content,
            os.path.join(folder, CONFIG): text.encode(),
        }
    )


def _adapted_modules(model, modules, adapted):
    """Returns the modules with adapters, or raises if a layer has none."""
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


def _check_one_dense_pair(model, adapted):
    structures = {layer.projection.structure for layer in adapted}
    if not structures <= {"dense", "explicit"}:
        raise ValueError(
            "PEFT's VeRA has the paper's dense pair only. Received: model "
            f"'{model.name}', adapted with structure={structures}. Save it "
            "with `as_lora=True`, or keep it with `keras_vera.merge(model)`."
        )
    if len({id(layer.projection) for layer in adapted}) > 1:
        raise ValueError(
            f"Model '{model.name}' holds adapters with several random pairs, "
            "and PEFT's VeRA has one. Save it with `as_lora=True`."
        )


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
        for plan in adaptation.adaptations(layers)
        for variable, _ in plan.trained.base_values()
    ]
    return [*model.trainable_variables, *in_base]


def _in_lora_terms(modules, factors, prefix, parts):
    """Returns the tensors of PEFT's LoRA, and what its config says of them."""
    tensors = {}
    for module, (down, up) in factors.items():
        name = f"{MODEL}{prefix}{module}"
        tensors[f"{name}.lora_A.weight"] = down.T
        tensors[f"{name}.lora_B.weight"] = up.T
    has_biases = _has_biases(modules)
    if has_biases:
        for module, layers in modules.items():
            change = np.concatenate([_bias_change(x) for x in layers])
            names = parts.get(module, (module,))
            for name, own in zip(names, np.split(change, len(names))):
                tensors[f"{MODEL}{prefix}{name}.lora_B.bias"] = own
    ranks = {
        prefix + module: down.shape[1] for module, (down, _) in factors.items()
    }
    rank = max(ranks.values())
    # PEFT takes the keys for regular expressions.
    lower = {re.escape(x): r for x, r in ranks.items() if r != rank}
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        # As large as the rank, so that nothing is scaled.
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "lora_dropout": _settings(modules).dropout,
        "lora_bias": has_biases,
        "bias": "none",
    }


def _bias_change(layer):
    """Returns what the adapter adds to the bias of a layer."""
    if not is_adapted(layer) or layer.vera_base_bias is None:
        return np.zeros(contraction_of(layer).n)
    change = _keras.to_numpy(layer.bias) - layer.vera_base_bias
    return change.reshape(-1)


def _has_biases(modules):
    return any(
        is_adapted(layer) and layer.vera_base_bias is not None
        for layers in modules.values()
        for layer in layers
    )


def _settings(modules):
    """Returns the settings of the adapter."""
    return next(
        layer._vera_settings
        for layers in modules.values()
        for layer in layers
        if is_adapted(layer)
    )


def _in_vera_terms(modules, prefix, parts):
    """Returns the tensors of PEFT's VeRA, and what its config says of them.

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
    a = _keras.to_numpy(pair.vera_kernel_a)
    b_matrix = _keras.to_numpy(pair.vera_kernel_b)
    rank = a.shape[1]
    sizes = [
        (contraction_of(layers[0]).m, sum(contraction_of(x).n for x in layers))
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
    tensors = dict(zip(MATRICES, (peft_a, peft_b)))
    has_biases = _has_biases(modules)
    for module, layers in modules.items():
        d = np.zeros(peft_b.shape[1], "float32")
        for group, layer in _channel_groups(layers):
            channels = groups[group] * rank
            # A layer of a lower rank uses the first ones.
            own = _scaled_d(layer)
            d[channels : channels + len(own)] = own
        b = [
            _keras.to_numpy(x.vera_lambda_b)
            if is_adapted(x)
            else np.zeros(contraction_of(x).n, "float32")
            for x in layers
        ]
        name = f"{MODEL}{prefix}{module}"
        tensors[f"{name}.vera_lambda_d"] = d
        tensors[f"{name}.vera_lambda_b"] = np.concatenate(b)
        if has_biases and layers[0].bias is not None:
            biases = [_keras.to_numpy(x.bias).reshape(-1) for x in layers]
            tensors[f"{name}.base_layer.bias"] = np.concatenate(biases)
    tensors = split_parts(tensors, MATRICES, MODEL + prefix, parts)
    settings = _settings(modules)
    return tensors, {
        "peft_type": "VERA",
        "r": len(tensors[MATRICES[0]]),
        "save_projection": True,
        "projection_prng_key": 0,
        "d_initial": settings.d_initial,
        "vera_dropout": settings.dropout,
        "bias": "vera_only" if has_biases else "none",
    }


def _channel_groups(layers):
    """Yields which channels each adapted layer of a module uses.

    A group is the first row of PEFT's B, the first column of ours, and their
    number, `None` for all.
    """
    plain = 0, 0, None
    places = np.cumsum([0] + [contraction_of(x).n for x in layers])
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
            n = contraction_of(layer).n
            yield (int(place), layer.vera_output_offset, n), layer


def _scaled_d(layer):
    """Returns d with the Kaiming factors of the layer in it."""
    factor_a, factor_b = layer._vera_layout.structure.factors
    return _keras.to_numpy(layer.vera_lambda_d) * (factor_a * factor_b)
