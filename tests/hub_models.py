"""Tiny KerasHub models of six families, from constructor arguments alone."""

import keras_hub
import numpy as np
from keras import ops

VOCABULARY = 13
LENGTH = 6
CLASSES = 3
TEXT = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
HEADS = {"num_heads": 2, "max_sequence_length": LENGTH, "dropout": 0.0}
# Fewer heads for keys and values, so that query and value differ in width.
GROUPED = {"num_query_heads": 2, "num_key_value_heads": 1}


def bert(**kwargs):
    return keras_hub.models.BertBackbone(**TEXT, **HEADS, **kwargs)


def roberta(**kwargs):
    return keras_hub.models.RobertaBackbone(**TEXT, **HEADS, **kwargs)


def gemma(**kwargs):
    return keras_hub.models.GemmaBackbone(
        **{**TEXT, **kwargs}, **GROUPED, head_dim=4
    )


def gemma4(**kwargs):
    return keras_hub.models.Gemma4Backbone(
        **TEXT,
        **GROUPED,
        head_dim=4,
        image_size=8,
        layer_types=["full_attention"] * 2,
        **kwargs,
    )


def llama(**kwargs):
    return keras_hub.models.LlamaBackbone(**TEXT, **GROUPED, **kwargs)


def gpt2(**kwargs):
    return keras_hub.models.GPT2Backbone(**TEXT, **HEADS, **kwargs)


def vit(**kwargs):
    return keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        **kwargs,
    )


CLASSIFIER = {"num_classes": CLASSES, "dropout": 0.0, "preprocessor": None}
CAUSAL_LM = {"preprocessor": None}
# Family: function that makes the backbone, class and arguments of the task.
FAMILIES = {
    "bert": (bert, "BertTextClassifier", CLASSIFIER),
    "roberta": (roberta, "RobertaTextClassifier", CLASSIFIER),
    "gemma": (gemma, "GemmaCausalLM", CAUSAL_LM),
    "llama": (llama, "LlamaCausalLM", CAUSAL_LM),
    "gpt2": (gpt2, "GPT2CausalLM", CAUSAL_LM),
    "vit": (vit, "ViTImageClassifier", CLASSIFIER),
}
# And one for what it alone has, a generation with a draft model.
TASKS = {**FAMILIES, "gemma4": (gemma4, "Gemma4CausalLM", CAUSAL_LM)}
CAUSAL_LMS = ["gemma", "llama", "gpt2"]


def make_backbone(family, **kwargs):
    """Returns a backbone, the same one whenever it is made.

    All its weights are random, also the biases and norms that start at 0 or
    1: so none of them can be lost unnoticed.
    """
    backbone = TASKS[family][0](**kwargs)
    randomize(backbone)
    return backbone


def make_task(family, backbone=None, **kwargs):
    """Returns a task model with a random head, the same one every time."""
    if backbone is None:
        backbone = make_backbone(family)
    _, name, usual = TASKS[family]
    task = getattr(keras_hub.models, name)(
        backbone=backbone, **{**usual, **kwargs}
    )
    randomize(task, skip=backbone)
    return task


def randomize(model, skip=None):
    rng = np.random.default_rng(0)
    skipped = set() if skip is None else {id(w) for w in skip.weights}
    for weight in model.weights:
        if id(weight) not in skipped:
            weight.assign(ops.cast(rng.normal(0, 0.5, weight.shape), "float32"))


def make_inputs(family, rows=8):
    """Returns random inputs, some with padding, and labels for `fit`."""
    rng = np.random.default_rng(1)
    if family == "vit":
        images = rng.normal(size=(rows, 8, 8, 3)).astype("float32")
        return images, rng.integers(CLASSES, size=rows)
    inputs = make_prompt(rows, rng.integers(3, LENGTH + 1, size=(rows, 1)))
    if family == "bert":
        segments = rng.integers(2, size=(rows, LENGTH))
        inputs["segment_ids"] = segments.astype("int32")
    shape = (rows, LENGTH) if family in CAUSAL_LMS else (rows,)
    classes = VOCABULARY if family in CAUSAL_LMS else CLASSES
    return inputs, rng.integers(classes, size=shape)


def make_prompt(rows=3, lengths=3):
    """Returns token ids, of which the first `lengths` are given."""
    rng = np.random.default_rng(2)
    mask = np.broadcast_to(np.arange(LENGTH) < lengths, (rows, LENGTH))
    tokens = rng.integers(1, VOCABULARY, size=(rows, LENGTH))
    return {
        "token_ids": np.where(mask, tokens, 0).astype("int32"),
        "padding_mask": mask.astype("int32"),
    }
