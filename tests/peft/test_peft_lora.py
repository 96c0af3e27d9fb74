"""Adapters written as LoRA, checked against PEFT, transformers and NumPy."""

import json

import keras_hub
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from helpers import adapted
from helpers import largest_difference
from helpers import spoil
from helpers import state
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from peft_families import FAMILIES
from peft_families import both_models
from peft_families import hidden_states
from peft_families import images
from peft_families import keras_hidden_states
from peft_families import tokens
from peft_families import with_peft
from test_peft_families import HEADS
from test_peft_families import NOT_LINEAR_THERE
from test_peft_families import both_tasks
from test_peft_families import gated_dinov2

import keras_vera
from keras_vera.peft.families import find_family
from keras_vera.peft.families import modules_of
from keras_vera.peft.families import parts_of
from keras_vera.product.structure import Blocks
from keras_vera.product.structure import Dense

pytestmark = pytest.mark.in_turn

# The bases of some differ by so much, such as by BERT's approximate GELU.
ATOL = 1e-4


def keras_batch(backbone):
    if len(backbone.inputs) == 1:
        return images()
    batch = {"token_ids": tokens(), "padding_mask": np.ones((2, 6), "int32")}
    if "segment_ids" in backbone.input:
        batch["segment_ids"] = np.zeros((2, 6), "int32")
    return batch


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    file = folder / "adapter_model.safetensors"
    return config, safetensors.numpy.load_file(file)


def product(tensors, module):
    """The update of a module as a file of LoRA says it: [n, m]."""
    name = f"base_model.model.{module}"
    up = tensors[f"{name}.lora_B.weight"].astype("float64")
    return up @ tensors[f"{name}.lora_A.weight"]


def outputs_in_peft(family, folder):
    """Outputs of the Hugging Face model with the adapter in a folder."""
    model, _ = both_models(family, folder.parent / "base")
    return hidden_states(peft.PeftModel.from_pretrained(model, folder))


def updates(backbone):
    """The update of each module by its definition, in float64: [n, m]."""
    found = {}
    family = find_family(backbone)[1]
    of_parts = parts_of(backbone, family)
    for module, layers in modules_of(backbone, family)[0].items():
        parts = []
        for layer in layers:
            merged = layer.kernel
            own = layer._kernel
            change = ops.convert_to_numpy(merged).astype("float64")
            change = change - ops.convert_to_numpy(own)
            layout = getattr(layer, "_vera_layout", None)
            if layout is None:
                change = change.reshape(change.shape[0], -1)
            else:
                change = ops.convert_to_numpy(
                    layout.contraction.kernel_matrix(change)
                )
            parts.append(change)
        change = np.concatenate(parts, axis=1).T
        names = of_parts.get(module, (module,))
        found.update(zip(names, np.split(change, len(names))))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_the_own_rank_is_exact(family, tmp_path):
    model, backbone = both_models(family, tmp_path / "base")
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
    assert largest_difference(expected, base) > 0.01
    before = state(backbone)
    report = keras_vera.save_peft_adapter(
        backbone, tmp_path / "lora", "some/base", as_lora=True
    )
    assert state(backbone) == before
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    np.testing.assert_allclose(hidden_states(with_adapter), expected, atol=ATOL)
    written, tensors = read(tmp_path / "lora")
    for module, truth in updates(backbone).items():
        received = product(tensors, module)
        np.testing.assert_allclose(received, truth, atol=1e-6)
        assert np.abs(truth).max() > 0.01
    config = with_adapter.peft_config["default"]
    assert (config.r, config.lora_alpha) == (5, 5)
    assert config.base_model_name_or_path == "some/base"
    assert not config.rank_pattern
    # What PEFT reads of it may be shorter.
    assert set(report["lost"]) == set(written["target_modules"])
    assert set(report["lost"].values()) == {0.0}


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
@pytest.mark.parametrize("structure", ["dense", "blocks2"])
def test_layers_of_different_ranks(family, structure, tmp_path):
    model, backbone = both_models(family, tmp_path / "base")
    # GPT-2's query and value are two layers of one module.
    ranks = {".*query.*": 3, ".*value.*": 6, ".*intermediate.*|.*ffw.*": 5}
    keras_vera.enable_vera(backbone, targets=ranks, structure=structure)
    assert {x.vera_lambda_d.shape[0] for x in adapted(backbone)} == {3, 5, 6}
    spoil(backbone, scale=0.3)
    expected = keras_hidden_states(backbone)
    keras_vera.save_peft_adapter(backbone, tmp_path / "lora", as_lora=True)
    np.testing.assert_allclose(
        outputs_in_peft(family, tmp_path / "lora"), expected, atol=1e-5
    )
    config, tensors = read(tmp_path / "lora")
    # Blocks cut other channels for each rank, dense layers the first ones.
    fused = {"dense": 6, "blocks2": 9}[structure]
    assert config["r"] == (fused if family == "gpt2" else 6)
    for name, array in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name[len("base_model.model.") : -len(".lora_A.weight")]
            key = module.replace(".", r"\.")
            assert config["rank_pattern"].get(key, config["r"]) == len(array)
    assert config["alpha_pattern"] == config["rank_pattern"] != {}
    if structure == "dense":
        keras_vera.save_peft_adapter(backbone, tmp_path / "vera")
        np.testing.assert_allclose(
            outputs_in_peft(family, tmp_path / "vera"), expected, atol=1e-4
        )


def test_layers_of_one_module_share_their_rank(tmp_path):
    _, backbone = both_models("gpt2", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=5)  # Query and value, no key.
    spoil(backbone, scale=0.3)
    keras_vera.save_peft_adapter(backbone, tmp_path / "lora", as_lora=True)
    config, tensors = read(tmp_path / "lora")
    assert config["r"] == 5 and config["fan_in_fan_out"]
    up = tensors["base_model.model.h.0.attn.c_attn.lora_B.weight"]
    assert up.shape == (48, 5)
    assert not up[16:32].any() and up[:16].all() and up[32:].all()
    np.testing.assert_allclose(
        outputs_in_peft("gpt2", tmp_path / "lora"),
        keras_hidden_states(backbone),
        atol=1e-5,
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_adapters_that_came_from_peft(family, tmp_path):
    """Explicit pairs, with offsets in B; and biases of the adapter."""
    model, backbone = both_models(family, tmp_path / "base")
    with_adapter = with_peft(model, FAMILIES[family].targets, bias="vera_only")
    for name, parameter in with_adapter.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.data.normal_(0, 0.5)
    with_adapter.save_pretrained(tmp_path / "peft")
    expected = hidden_states(with_adapter)
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    keras_vera.save_peft_adapter(backbone, tmp_path / "lora", as_lora=True)
    config, tensors = read(tmp_path / "lora")
    assert config["r"] == 5 and config["lora_bias"]
    assert any(x.any() for k, x in tensors.items() if k.endswith("bias"))
    # Unlike VeRA's, PEFT loads these biases.
    np.testing.assert_allclose(
        outputs_in_peft(family, tmp_path / "lora"), expected, atol=1e-5
    )


@pytest.mark.parametrize("family", HEADS)
def test_heads_come_along(family, tmp_path):
    model, task = both_tasks(family, tmp_path / "base")
    keras_vera.enable_vera(task, rank=3)
    spoil(task)
    head = task.output_dense
    head.kernel.assign(np.random.default_rng(4).normal(0, 1, head.kernel.shape))
    expected = keras_hidden_states(task)
    assert largest_difference(expected, hidden_states(model)) > 0.1
    keras_vera.save_peft_adapter(task, tmp_path / "lora", as_lora=True)
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    np.testing.assert_allclose(hidden_states(with_adapter), expected, atol=1e-5)
    names = {x.split(".")[0] for x in HEADS[family][1]}
    config = with_adapter.peft_config["default"]
    assert set(config.modules_to_save) == names


@pytest.mark.parametrize(
    ("family", "structure"),
    [("gpt2", "dense"), ("gemma", "dense"), ("roberta", "blocks2")],
)
def test_a_lower_rank_is_numpys_best(family, structure, tmp_path):
    _, backbone = both_models(family, tmp_path / "base")
    targets = "all-linear" if family == "gemma" else "attention-qv"
    keras_vera.enable_vera(
        backbone, rank=7, targets=targets, structure=structure
    )
    spoil(backbone, scale=0.8)
    expected = keras_hidden_states(backbone)
    report = keras_vera.save_peft_adapter(
        backbone, tmp_path / "lora", as_lora=3, batch=keras_batch(backbone)
    )
    config, tensors = read(tmp_path / "lora")
    assert config["r"] == 3
    truth = updates(backbone)
    for module, lost in report["lost"].items():
        received = product(tensors, module)
        left, sizes, right = np.linalg.svd(truth[module], full_matrices=False)
        best = (left[:, :3] * sizes[:3]) @ right[:3]
        np.testing.assert_allclose(received, best, atol=1e-5 * sizes[0])
        share = np.sum(sizes[3:] ** 2) / np.sum(sizes**2)
        np.testing.assert_allclose(lost, share, rtol=1e-4)
    assert max(report["lost"].values()) > 0.05
    outputs = outputs_in_peft(family, tmp_path / "lora")
    error = largest_difference(outputs, expected)
    np.testing.assert_allclose(report["output_error"], error, rtol=1e-3)
    with keras_vera.base_model(backbone):
        without = keras_hidden_states(backbone)
    np.testing.assert_allclose(
        report["output_change"],
        largest_difference(without, expected),
        rtol=1e-5,
    )
    assert 1e-3 < report["output_error"] < report["output_change"]


def test_a_rank_that_is_no_lower_loses_nothing(tmp_path):
    _, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(
        backbone, targets={"query_dense": 3, "value_dense": 6}
    )
    spoil(backbone)
    for name, rank in (("exact", True), ("more", 8)):
        report = keras_vera.save_peft_adapter(
            backbone, tmp_path / name, as_lora=rank, batch=keras_batch(backbone)
        )
        assert set(report["lost"].values()) == {0.0}
        assert report["output_error"] == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        both = [(tmp_path / x / name).read_bytes() for x in ("exact", "more")]
        assert both[0] == both[1]
    # Layers that have less than the rank keep theirs, exactly.
    report = keras_vera.save_peft_adapter(
        backbone, tmp_path / "less", as_lora=4
    )
    config, _ = read(tmp_path / "less")
    assert config["r"] == 4 and set(config["rank_pattern"].values()) == {3}
    zero = [x == 0 for x in report["lost"].values()]
    assert zero == ["query" in x for x in report["lost"]]


@pytest.mark.parametrize("as_lora", [True, 2])
def test_parts_of_one_layer(as_lora, tmp_path, monkeypatch):
    """Each part is LoRA of its own, of the rank that it had in PEFT."""
    model, backbone = gated_dinov2(tmp_path / "base", monkeypatch)
    with_adapter = with_peft(
        model, ["gate_proj", "up_proj", "v_proj"], bias="vera_only"
    )
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_(0, 0.5)
    with_adapter.save_pretrained(tmp_path / "peft")
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    assert adapted(backbone)[0].vera_lambda_d.shape[0] == 10
    expected = hidden_states(with_adapter)
    report = keras_vera.save_peft_adapter(
        backbone, tmp_path / "lora", as_lora=as_lora, batch=images()
    )
    config, _ = read(tmp_path / "lora")
    names = {x.rsplit(".", 1)[-1] for x in config["target_modules"]}
    assert names == {"gate_proj", "up_proj", "v_proj"}
    assert set(report["lost"]) == set(config["target_modules"])
    model, _ = gated_dinov2(tmp_path / "base", monkeypatch)
    back = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    error = largest_difference(hidden_states(back), expected)
    if as_lora is True:
        ranks = {config["r"], *config["rank_pattern"].values()}
        assert 5 in ranks
        assert error < ATOL and report["output_error"] < ATOL
    else:
        assert config["r"] == 2
        np.testing.assert_allclose(report["output_error"], error, rtol=0.01)
        assert error > 1e-2


def test_saved_inside_the_base(tmp_path):
    """The same file and the same errors, where the base shows."""
    _, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=4)
    spoil(backbone, scale=0.5)
    batch = keras_batch(backbone)

    def save(name):
        return keras_vera.save_peft_adapter(
            backbone, tmp_path / name, as_lora=2, batch=batch
        )

    outside = save("outside")
    assert 0 < outside["output_error"] < outside["output_change"]
    base = state(backbone)
    with keras_vera.base_model(backbone):
        inside = save("inside")
    assert inside == outside
    assert state(backbone) == base
    for file in (tmp_path / "outside").iterdir():
        same = tmp_path / "inside" / file.name
        assert same.read_bytes() == file.read_bytes()


def test_an_untrained_adapter_loses_nothing(tmp_path):
    model, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=4)  # b is 0.
    report = keras_vera.save_peft_adapter(
        backbone, tmp_path / "lora", as_lora=2
    )
    assert set(report["lost"].values()) == {0.0}
    np.testing.assert_allclose(
        outputs_in_peft("bert", tmp_path / "lora"),
        hidden_states(model),
        atol=1e-6,
    )


# vLLM 0.11 (vllm/config/lora.py, vllm/lora/peft_helper.py, lora/utils.py).
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_LLAMA_MODULES = {
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("as_lora", [True, 16])
def test_what_vllm_asks_of_an_adapter(as_lora, tmp_path):
    _, backbone = both_models("llama", tmp_path / "base")
    task = keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)
    ranks = {".*attention.*": 100, ".*feedforward.*": 12}
    keras_vera.enable_vera(task, targets=ranks)
    spoil(task)
    folder = tmp_path / "lora"
    keras_vera.save_peft_adapter(task, folder, as_lora=as_lora)
    assert sorted(x.name for x in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config, tensors = read(folder)
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(rank, int) and isinstance(alpha, int)
    # It takes any rank up to its `--max-lora-rank`, which is one of these.
    assert rank == (100 if as_lora is True else 16)
    assert rank <= max(VLLM_MAX_LORA_RANKS)
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert not config.get("use_dora") and not config.get("use_rslora")
    # It does not know `rank_pattern`: all modules have this scale.
    assert alpha / rank == 1
    causal_lm = transformers.LlamaForCausalLM(FAMILIES["llama"].config)
    modules = dict(causal_lm.named_modules())
    for name, array in tensors.items():
        start, module = name[: len("base_model.model.")], name.split(".")
        assert start == "base_model.model."
        assert module[-1] == "weight" and module[-2] in ("lora_A", "lora_B")
        assert module[-3] in VLLM_LLAMA_MODULES
        linear = modules[".".join(module[2:-2])]
        m, n = linear.in_features, linear.out_features
        if module[-2] == "lora_A":
            assert array.shape[0] <= rank and array.shape[1] == m
        else:
            assert array.shape[0] == n and array.shape[1] <= rank
    targets = set(config["target_modules"])
    assert {x.rsplit(".", 1)[-1] for x in targets} <= VLLM_LLAMA_MODULES


def spoil_with_nan(backbone):
    layer = adapted(backbone)[0]
    layer.vera_lambda_d.assign(np.full(layer.vera_lambda_d.shape, np.nan))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"as_lora": 0}, "`as_lora` must be `True`.*Received: as_lora=0"),
        ({"as_lora": -2}, "`as_lora` must be"),
        ({"as_lora": "16"}, "Received: as_lora='16'"),
        ({"as_lora": 2.0}, "`as_lora` must be"),
        ({"as_lora": None}, "`as_lora` must be"),
        ({"batch": np.ones((1, 4))}, "`batch` is what the error of LoRA"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    _, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=2)
    with pytest.raises(ValueError, match=message):
        keras_vera.save_peft_adapter(backbone, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_lora_is_refused(tmp_path):
    _, backbone = both_models("bert", tmp_path / "base")
    keras_vera.enable_vera(backbone, rank=2, targets=["embedding", "attention"])
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match="token_embedding.*no counterpart"):
        keras_vera.save_peft_adapter(backbone, folder, as_lora=True)
    keras_vera.disable_vera(backbone)
    keras_vera.enable_vera(backbone, rank=3)
    # A batch that the model does not take leaves it as it was.
    before = state(backbone)
    with pytest.raises(Exception):
        keras_vera.save_peft_adapter(
            backbone, folder, as_lora=1, batch={"token_ids": tokens()}
        )
    assert state(backbone) == before
    keras_vera.disable_vera(backbone)
    keras_vera.enable_vera(backbone, rank=3, train="bias")
    with pytest.raises(ValueError, match="`train` of `enable_vera`"):
        keras_vera.save_peft_adapter(backbone, folder, as_lora=True)
    keras_vera.disable_vera(backbone)
    keras_vera.enable_vera(backbone, rank=3)
    spoil_with_nan(backbone)
    for rank in (True, 1):
        with pytest.raises(ValueError, match="vera_lambda_d' holds NaN"):
            keras_vera.save_peft_adapter(backbone, folder, as_lora=rank)
    assert not folder.exists()
    keras_vera.disable_vera(backbone)
    backbone.quantize("int8")
    keras_vera.enable_vera(backbone, rank=3)
    spoil(backbone)
    with pytest.raises(ValueError, match="quantized.*batch"):
        keras_vera.save_peft_adapter(
            backbone, folder, as_lora=1, batch=keras_batch(backbone)
        )
    assert not folder.exists()
    keras_vera.save_peft_adapter(backbone, folder, as_lora=1)


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    rank=st.integers(1, 20),
    blocks=st.integers(1, 4),
)
def test_both_structures_as_matrices(m, n, rank, blocks):
    structure = Blocks(m, n, rank, blocks) if blocks > 1 else Dense(m, n, rank)
    rng = np.random.default_rng(m + n + rank)
    shapes = (m, structure.width), (structure.width, n), (rank,)
    a, b_matrix, d = (
        ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
        for shape in shapes
    )
    both = structure.as_matrices(a, b_matrix)
    full_a, full_b = (ops.convert_to_numpy(x) for x in both)
    assert full_a.shape == (m, rank) and full_b.shape == (rank, n)
    expected = structure.product(structure.scale_rows(a, d), b_matrix)
    np.testing.assert_allclose(
        (full_a * ops.convert_to_numpy(d)) @ full_b,
        ops.convert_to_numpy(expected),
        atol=1e-4,
    )
