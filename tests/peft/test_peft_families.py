"""Every family of models from and to PEFT, against transformers and PEFT."""

import copy
import dataclasses
import functools
import json

import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers as hf
from helpers import adapted
from helpers import spoil
from helpers import state
from peft_families import FAMILIES
from peft_families import both_models
from peft_families import hidden_states
from peft_families import keras_hidden_states
from peft_families import with_peft

import keras_vera
from keras_vera.peft.families import find_family
from keras_vera.peft.tables import FAMILIES as TABLES

pytestmark = pytest.mark.in_turn

# Layers of KerasHub that are bare weights in transformers.
ROUTER = "sparse_feedforward_gate_dense"
NOT_LINEAR_THERE = {
    "gpt_oss": "router_dense",
    "mixtral": ROUTER,
    "qwen2_moe": ROUTER,
    "qwen3_moe": ROUTER,
    "qwen3_5_moe": "router_gate",
}


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_every_table_has_a_model():
    there = {"qwen": "qwen2", "qwenmoe": "qwen2moe", "swintransformer": "swin"}
    tables = {
        name.removesuffix("Backbone").replace("_", "").lower()
        for name in TABLES
    }
    rows = {name.replace("_", "") for name in FAMILIES}
    assert {there.get(name, name) for name in tables} <= rows


@pytest.mark.parametrize("family", FAMILIES)
def test_from_peft(family, tmp_path):
    model, backbone = both_models(family, tmp_path / "base")
    base = hidden_states(model)
    assert_same(keras_hidden_states(backbone), base)
    with_adapter = with_peft(model, FAMILIES[family].targets)
    with_adapter.save_pretrained(tmp_path / "peft")
    expected = hidden_states(with_adapter)
    assert np.abs(expected - base).max() > 0.01

    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert_same(keras_hidden_states(backbone), expected)
    # It is an adapter like any other.
    file = tmp_path / "from_peft.vera.safetensors"
    keras_vera.save_adapter(backbone, file)
    keras_vera.disable_vera(backbone)
    assert_same(keras_hidden_states(backbone), base)
    keras_vera.load_adapter(backbone, file)
    assert_same(keras_hidden_states(backbone), expected)
    # And back again, into a model that never saw it.
    keras_vera.save_peft_adapter(backbone, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(
        with_adapter.unload(), tmp_path / "back"
    )
    assert_same(hidden_states(back), expected)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["r"] == 5 or family == "swin"  # See `_peft_parts.py`.
    keras_vera.merge(backbone)
    assert_same(keras_hidden_states(backbone), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_peft(family, tmp_path):
    model, backbone = both_models(family, tmp_path / "base")
    # What the names in task models begin with.
    assert find_family(backbone)[1].prefix == model.base_model_prefix
    base = hidden_states(model)
    keras_vera.enable_vera(
        backbone,
        rank=5,
        seed=3,
        targets="all-linear",
        exclude=NOT_LINEAR_THERE.get(family),
    )
    spoil(backbone, scale=0.3)
    expected = keras_hidden_states(backbone)
    assert np.abs(expected - base).max() > 0.01
    keras_vera.save_peft_adapter(backbone, tmp_path / "peft")
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    assert_same(hidden_states(with_adapter), expected)


HEADS = {
    "bert": (
        hf.BertForSequenceClassification,
        ["classifier"],
        keras_hub.models.BertTextClassifier,
    ),
    "roberta": (
        hf.RobertaForSequenceClassification,
        ["classifier"],
        keras_hub.models.RobertaTextClassifier,
    ),
    "xlm_roberta": (
        hf.XLMRobertaForSequenceClassification,
        ["classifier"],
        keras_hub.models.XLMRobertaTextClassifier,
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        ["pre_classifier", "classifier"],
        keras_hub.models.DistilBertTextClassifier,
    ),
    "albert": (
        hf.AlbertForSequenceClassification,
        ["classifier"],
        keras_hub.models.AlbertTextClassifier,
    ),
    "esm": (
        hf.EsmForSequenceClassification,
        ["classifier"],
        keras_hub.models.ESMProteinClassifier,
    ),
    "vit": (
        hf.ViTForImageClassification,
        ["classifier"],
        functools.partial(keras_hub.models.ViTImageClassifier, pooling="token"),
    ),
    "deit": (
        hf.DeiTForImageClassification,
        ["classifier"],
        functools.partial(
            keras_hub.models.DeiTImageClassifier, pooling="token"
        ),
    ),
    "swin": (
        hf.SwinForImageClassification,
        ["classifier"],
        keras_hub.models.SwinTransformerImageClassifier,
    ),
}


def both_tasks(family, folder):
    """Returns a classifier of Hugging Face, and KerasHub's of another head."""
    base, backbone = both_models(family, folder)
    model_class, _, task_class = HEADS[family]
    config = copy.deepcopy(FAMILIES[family].config)
    config.num_labels = 3
    model = model_class(config).eval()
    inner = getattr(model, model.base_model_prefix)
    missing, _ = inner.load_state_dict(base.state_dict(), strict=False)
    assert not missing
    task = task_class(backbone=backbone, preprocessor=None, num_classes=3)
    return model, task


@pytest.mark.parametrize("family", HEADS)
def test_heads_travel(family, tmp_path):
    model, task = both_tasks(family, tmp_path / "base")
    _, heads, _ = HEADS[family]
    with_adapter = with_peft(
        model, FAMILIES[family].targets, modules_to_save=heads
    )
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_(0, 0.5)
    with_adapter.save_pretrained(tmp_path / "peft")
    keras_vera.load_peft_adapter(task, tmp_path / "peft")
    expected = hidden_states(with_adapter)
    assert_same(keras_hidden_states(task), expected)
    keras_vera.save_peft_adapter(task, tmp_path / "back", "some/base")
    model, _ = both_tasks(family, tmp_path / "base")
    back = peft.PeftModel.from_pretrained(model, tmp_path / "back").eval()
    assert_same(hidden_states(back), expected)
    assert back.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("save_projection", [True, False])
def test_means_of_pvera(save_projection, tmp_path):
    model, backbone = both_models("bert", tmp_path / "base")
    with_adapter = with_peft(
        model,
        ["query", "intermediate.dense"],
        peft.PveraConfig,
        save_projection=save_projection,
        pvera_dropout=0.1,
    )
    with_adapter.save_pretrained(tmp_path / "peft")
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert_same(keras_hidden_states(backbone), hidden_states(with_adapter))
    layer = adapted(backbone)[0]
    assert layer.projection.rank == 5
    assert layer._vera_settings.dropout == 0.1


def test_pvera_without_halves_is_refused(tmp_path):
    model, backbone = both_models("bert", tmp_path / "base")
    with_peft(model, ["query"], peft.PveraConfig).save_pretrained(
        tmp_path / "peft"
    )
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(x for x in tensors if x.endswith("lambda_d"))
    tensors[name] = tensors[name][:-1]
    safetensors.numpy.save_file(tensors, file)
    before = state(backbone)
    with pytest.raises(keras_vera.AdapterFileError, match="has no halves"):
        keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before


def gated_dinov2(folder, monkeypatch):
    """DINOv2's SwiGLU, whose gate and values are one layer in KerasHub."""
    row = FAMILIES["dinov2"]
    config = type(row.config)(
        **{**row.config.to_dict(), "use_swiglu_ffn": True}
    )
    monkeypatch.setitem(
        FAMILIES, "dinov2", dataclasses.replace(row, config=config)
    )
    return both_models("dinov2", folder)


@pytest.mark.parametrize(
    "targets",
    [
        ["v_proj", "down_proj"],
        ["gate_proj", "v_proj"],
        ["up_proj", "v_proj"],
        ["gate_proj", "up_proj", "down_proj"],
    ],
)
def test_parts_of_one_layer(targets, tmp_path, monkeypatch):
    model, backbone = gated_dinov2(tmp_path / "base", monkeypatch)
    with_adapter = with_peft(model, targets, bias="vera_only")
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_(0, 0.5)
    with_adapter.save_pretrained(tmp_path / "peft")
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    expected = hidden_states(with_adapter)
    assert_same(keras_hidden_states(backbone), expected)
    keras_vera.save_peft_adapter(backbone, tmp_path / "back")
    loaded = safetensors.numpy.load_file(
        tmp_path / "back" / "adapter_model.safetensors"
    )
    model, _ = gated_dinov2(tmp_path / "base", monkeypatch)
    back = peft.PeftModel.from_pretrained(model, tmp_path / "back")
    # PEFT itself does not load the biases that it saves.
    with torch.no_grad():
        for name, parameter in back.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.copy_(torch.from_numpy(loaded[name]))
    assert_same(hidden_states(back), expected)


def test_a_layer_whole_and_in_parts_is_refused(tmp_path, monkeypatch):
    model, backbone = gated_dinov2(tmp_path / "base", monkeypatch)
    with_peft(model, ["gate_proj"]).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name, array in list(tensors.items()):
        if "lambda" in name:
            wide = array.repeat(2) if name.endswith("lambda_b") else array
            tensors[name.replace("gate_proj", "weights_in")] = wide
        elif name.endswith("vera_B"):
            tensors[name] = np.tile(array, (2, 1))
    safetensors.numpy.save_file(tensors, file)
    before = state(backbone)
    with pytest.raises(keras_vera.AdapterFileError, match="whole and in parts"):
        keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before
