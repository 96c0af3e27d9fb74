"""The numbers of trained parameters that the paper reports, exactly.

Kopiczko et al., arXiv 2310.11454, prints them rounded (0.043M for RoBERTa
base, 1.6M for Llama 7B). All blocks of a model are alike: one block of the
real width is built, and its count taken times the real depth.
"""

import gc
import math
from dataclasses import dataclass

import keras
import keras_hub
import pytest
from keras import ops

import keras_vera

pytestmark = pytest.mark.in_turn


@dataclass
class Architecture:
    backbone: str
    depth: int
    width: int
    mlp_width: int
    heads: int

    def make_block(self):
        """Builds a backbone of the real width, with one block."""
        kwargs = {"num_layers": 1, "hidden_dim": self.width}
        if self.backbone == "ViTBackbone":
            kwargs |= {"image_shape": (16, 16, 3), "patch_size": 16}
            kwargs |= {"mlp_dim": self.mlp_width}
        else:
            kwargs |= {"vocabulary_size": 2}
            kwargs |= {"intermediate_dim": self.mlp_width}
        if self.backbone == "LlamaBackbone":
            kwargs |= {"num_query_heads": self.heads}
            kwargs |= {"num_key_value_heads": self.heads}
            kwargs |= {"dtype": "bfloat16"}  # 13B has 317M numbers a block.
        else:
            kwargs |= {"num_heads": self.heads}
        return getattr(keras_hub.models, self.backbone)(**kwargs)


ARCHITECTURES = {
    "RoBERTa base": Architecture("RobertaBackbone", 12, 768, 3072, 12),
    "RoBERTa large": Architecture("RobertaBackbone", 24, 1024, 4096, 16),
    "GPT-2 medium": Architecture("GPT2Backbone", 24, 1024, 4096, 16),
    "GPT-2 large": Architecture("GPT2Backbone", 36, 1280, 5120, 20),
    "ViT-B": Architecture("ViTBackbone", 12, 768, 3072, 12),
    "ViT-L": Architecture("ViTBackbone", 24, 1024, 4096, 16),
    "Llama 7B": Architecture("LlamaBackbone", 32, 4096, 11008, 32),
    "Llama 13B": Architecture("LlamaBackbone", 40, 5120, 13824, 40),
}


@pytest.fixture(autouse=True)
def cheap_weights(monkeypatch):
    """Shapes are all that counts here; random numbers would take minutes."""

    def zeros(self, shape, dtype=None, **kwargs):
        return ops.zeros(shape, dtype=dtype)

    for name in ("RandomNormal", "TruncatedNormal", "VarianceScaling"):
        initializer = getattr(keras.initializers, name)
        monkeypatch.setattr(initializer, "__call__", zeros)
    yield
    gc.collect()


@pytest.mark.parametrize(
    "name, targets, rank, expected",
    [
        ("RoBERTa base", "attention-qv", 1024, 43_008),
        ("RoBERTa large", "attention-qv", 256, 61_440),
        ("GPT-2 medium", "attention-qv", 1024, 98_304),
        ("GPT-2 large", "attention-qv", 1024, 165_888),
        ("ViT-B", "attention-qv", 256, 24_576),
        ("ViT-L", "attention-qv", 256, 61_440),
        ("Llama 7B", "all-linear", 1024, 1_589_248),
        ("Llama 13B", "all-linear", 1024, 2_416_640),
    ],
)
def test_counts_of_the_paper(name, targets, rank, expected):
    architecture = ARCHITECTURES[name]
    backbone = architecture.make_block()
    base = backbone.count_params()
    keras_vera.enable_vera(backbone, rank=rank, targets=targets)
    trained = sum(math.prod(v.shape) for v in backbone.trainable_variables)
    assert trained * architecture.depth == expected
    # One pair for all layers, as large as the largest.
    largest = architecture.width
    if targets == "all-linear":
        largest = architecture.mlp_width
    assert backbone.count_params() == base + trained + rank * 2 * largest
