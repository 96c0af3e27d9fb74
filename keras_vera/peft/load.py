import io
import math
import os
import re

import keras
import numpy as np

from keras_vera import _keras
from keras_vera._types import FilePath
from keras_vera.files.disk import AdapterFileError
from keras_vera.files.disk import errors_about
from keras_vera.files.disk import read_bytes
from keras_vera.files.format import decode
from keras_vera.files.format import parsed
from keras_vera.files.format import read_index
from keras_vera.files.hub_paths import check_is_here
from keras_vera.layers import _base_scope
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._kinds import kind_of
from keras_vera.model import adaptation
from keras_vera.peft.families import find_family
from keras_vera.peft.families import heads_of
from keras_vera.peft.families import modules_of
from keras_vera.peft.families import parts_of
from keras_vera.peft.parts import join_parts
from keras_vera.peft.parts import with_parts
from keras_vera.peft.pvera import as_vera_config
from keras_vera.peft.pvera import as_vera_tensors
from keras_vera.product.checks import check_d_initial
from keras_vera.product.checks import check_dropout
from keras_vera.product.checks import check_integer
from keras_vera.product.projection import SharedProjection

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL = "base_model.model."
MATRICES = "base_model.vera_A", "base_model.vera_B"
_OF_MODULE = re.compile(
    r"(?P<module>.+)\.(?P<what>vera_lambda_d|vera_lambda_b|base_layer\.bias)"
)
_OF_HEAD = re.compile(r"(?P<module>.+)\.(?P<what>weight|bias)")


def load_peft_adapter(
    model: keras.Layer, folder: FilePath, head: bool = True
) -> None:
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
    backbone = keras_hub.models.Backbone.from_preset(
        "hf://FacebookAI/roberta-base"
    )
    keras_vera.load_peft_adapter(backbone, "peft-adapter-folder")
    ```
    """
    check_is_here(
        "folder",
        folder,
        "Download it with huggingface_hub's `snapshot_download`, and pass the "
        "folder that this returns.",
    )
    _base_scope.check_outside(model)
    adaptation.check_model(model)
    # Heads as well: a trained one in the folder could not be loaded.
    adaptation.check_no_lora(model, _keras.flatten_layers(model))
    _keras.check_all_here("load_peft_adapter", model.variables)
    backbone, family = find_family(model)
    folder = os.fspath(folder)
    config = _read_config(os.path.join(folder, CONFIG))
    filepath = os.path.join(folder, WEIGHTS)
    tensors = _read_weights(filepath)
    modules, older = modules_of(backbone, family)
    parts = parts_of(backbone, family)
    known = with_parts(modules, parts)
    heads = heads_of(model, family)
    if not head:
        tensors = _without_heads(tensors, heads, config["modules_to_save"])
    with errors_about(filepath, "does not fit the model"):
        tensors = as_vera_tensors(tensors, config["halves"])
        matrices = [tensors.pop(name, None) for name in MATRICES]
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
        pair = matrices[0][:, :rows], matrices[1][:columns]
        found, matrices, starts = join_parts(found, pair, parts, modules)
        layers, offsets, values = [], [], []
        for module, entries in found.items():
            offset = starts.get(module, 0)
            first = offset
            for layer in modules[module]:
                n = contraction_of(layer).n
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
        with _keras.strategy_scope(model):
            projection = SharedProjection.from_matrices(
                np.ascontiguousarray(matrices[0].T),
                np.ascontiguousarray(matrices[1].T),
            )
    adaptation.Adaptation(
        projection=projection,
        targets=config["target_modules"],
        d_initial=config["d_initial"],
        dropout=config["vera_dropout"],
        bases=adaptation.find_bases(model),
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


def contraction_of(layer):
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
        read_index(io.BytesIO(content), len(content))
        for name, array in tensors.items():
            if array.dtype != "float32":
                raise ValueError(f"'{name}' has dtype {array.dtype}.")
        return tensors


def _sorted_entries(tensors, prefix, modules, older, heads):
    """Returns the entries by module, and those of heads by module."""
    found, of_heads, unknown = {}, {}, []
    for name, array in tensors.items():
        path = name.removeprefix(MODEL)
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
        path = name.removeprefix(MODEL)
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
        adaptation.check_layer(layer, module)
    n = sum(contraction_of(layer).n for layer in layers) // share
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
    return contraction_of(layers[0]).m, n


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
