"""What the README and the site say of Keras' LoRA and of PEFT's VeRA."""

import math
import pathlib
import runpy

import keras
import keras_hub
import numpy as np
import pytest
from helpers import largest_difference
from helpers import predict

pytestmark = pytest.mark.in_turn

ROOT = pathlib.Path(__file__).parent.parent


def make_backbone():
    return keras_hub.models.RobertaBackbone(
        vocabulary_size=50,
        num_layers=1,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=8,
        max_sequence_length=6,
    )


def test_keras_lora_trains_the_biases_too():
    backbone = make_backbone()
    backbone.enable_lora(8)
    sizes = {v.path: math.prod(v.shape) for v in backbone.trainable_variables}
    assert sum(sizes.values()) * 12 == 1_800_192
    assert sum("bias" in path for path in sizes) == 2


def test_numbers_that_train():
    counts = runpy.run_path(str(ROOT / "benchmarks" / "counts.py"))
    table = counts["table"]()
    assert table in (ROOT / "docs" / "compare.md").read_text()
    rows = {}
    for line in table.splitlines()[2:]:
        name, *cells = line.strip("| ").split(" | ")
        rows[name.split(",")[0], name.split(" ")[-1]] = cells
    readme = (ROOT / "README.md").read_text()
    of_readme = [
        [cell.split(" ")[0] for cell in line.strip("| ").split(" | ")[1:]]
        for line in readme.splitlines()
        if line.startswith("| Trained, ")
    ]
    for column, cells in enumerate(of_readme):
        assert cells == [
            rows["keras_vera", "1024"][column],
            rows["PEFT's VeRA", "1024"][column],
            rows["Keras' LoRA", "8"][column],
        ]


@pytest.mark.in_turn
def test_numbers_of_llamas(monkeypatch):
    def zeros(self, shape, dtype=None, **kwargs):
        return keras.ops.zeros(shape, dtype=dtype)

    # Random numbers of real widths take long, and nothing here reads them.
    for name in ("RandomNormal", "VarianceScaling"):
        initializer = getattr(keras.initializers, name)
        monkeypatch.setattr(initializer, "__call__", zeros)
    counts = runpy.run_path(str(ROOT / "benchmarks" / "counts.py"))
    table = counts["llama_table"]()
    assert "| 1,589,248 |" in table and "| 2,416,640 |" in table
    assert table in (ROOT / "benchmarks" / "README.md").read_text()


def test_keras_lora_file_lacks_what_trained(tmp_path):
    x = {
        "token_ids": np.ones((2, 6), int),
        "padding_mask": np.ones((2, 6), int),
    }
    trained, fresh = make_backbone(), make_backbone()
    for backbone in (trained, fresh):
        backbone.enable_lora(8)
    for mine, theirs in zip(fresh.weights, trained.weights, strict=True):
        mine.assign(np.array(keras.ops.convert_to_numpy(theirs)))
    for variable in trained.trainable_variables:
        variable.assign(np.full(variable.shape, 0.2, "float32"))
    trained.save_lora_weights(tmp_path / "adapter.lora.h5")
    fresh.load_lora_weights(tmp_path / "adapter.lora.h5")
    assert largest_difference(predict(fresh, x), predict(trained, x)) > 1e-3


def test_keras_lora_says_nothing_when_it_hits_nothing():
    backbone = make_backbone()
    backbone.enable_lora(8, ["qery"])
    assert backbone.trainable_variables == []


def test_peft_raises_when_it_hits_nothing():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(target_modules=["qery"])
    with pytest.raises(ValueError):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)


def test_peft_ignores_the_adapters_of_the_examples():
    """Only its LoRA takes them."""
    import peft
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    vera = peft.VeraConfig(r=4, target_modules=["query", "value"])
    model = transformers.BertModel(config, add_pooling_layer=False)
    model = peft.get_peft_model(model, vera, adapter_name="first").eval()
    model.add_adapter("second", vera)
    for name, parameter in model.named_parameters():
        if "vera_lambda_b" in name:
            torch.nn.init.normal_(parameter)
    found = {}
    with torch.no_grad():
        x = torch.ones((2, 4), dtype=torch.long)
        for name in ("first", "second"):
            model.set_adapter(name)
            found[name] = model(input_ids=x).last_hidden_state
        mixed = model(input_ids=x, adapter_names=["first", "second"])
    mixed = mixed.last_hidden_state
    assert not torch.allclose(found["first"], found["second"], atol=1e-3)
    torch.testing.assert_close(mixed, found["second"])
