"""Which Keras layer a linear module of Hugging Face transformers became.

One table per model family. The names are those of transformers 5; `older` has
those of version 4 where they differ. A new family is a new entry in
`FAMILIES`, and a model in `tests/test_peft_adapter.py`.
"""

from dataclasses import dataclass
from dataclasses import field

import keras

from keras_vera import _keras


@dataclass(frozen=True)
class Family:
    """How the modules of one architecture are named on both sides.

    Attributes:
        prefix: String, the name of the backbone in a task model of Hugging
            Face (`base_model_prefix`).
        blocks: A pair of paths, of a Hugging Face block and of a Keras block,
            with `{}` for its number.
        modules: Dict of paths below a block, Hugging Face to Keras. A tuple
            of Keras paths are the layers that a fused module became, in the
            order of its outputs.
        others: Dict of modules outside the blocks.
        heads: Dict of modules of the task's head, outside the backbone, to
            the names of layers in a Keras task.
        older: Pair like `blocks` and dict like `modules`, or `None`.
        fan_in_fan_out: Boolean, whether Hugging Face has `Conv1D` modules.
    """

    prefix: str
    blocks: tuple
    modules: dict
    others: dict = field(default_factory=dict)
    heads: dict = field(default_factory=dict)
    older: tuple | None = None
    fan_in_fan_out: bool = False


_ENCODER = {
    "attention.self.query": "_self_attention_layer.query_dense",
    "attention.self.key": "_self_attention_layer.key_dense",
    "attention.self.value": "_self_attention_layer.value_dense",
    "attention.output.dense": "_self_attention_layer.output_dense",
    "intermediate.dense": "_feedforward_intermediate_dense",
    "output.dense": "_feedforward_output_dense",
}
_DISTILBERT = {
    "attention.q_lin": "_self_attention_layer.query_dense",
    "attention.k_lin": "_self_attention_layer.key_dense",
    "attention.v_lin": "_self_attention_layer.value_dense",
    "attention.out_lin": "_self_attention_layer.output_dense",
    "ffn.lin1": "_feedforward_intermediate_dense",
    "ffn.lin2": "_feedforward_output_dense",
}
_GPT2 = {
    "attn.c_attn": (
        "_self_attention_layer.query_dense",
        "_self_attention_layer.key_dense",
        "_self_attention_layer.value_dense",
    ),
    "attn.c_proj": "_self_attention_layer.output_dense",
    "mlp.c_fc": "_feedforward_intermediate_dense",
    "mlp.c_proj": "_feedforward_output_dense",
}
_DECODER = {
    "self_attn.q_proj": "_self_attention_layer._query_dense",
    "self_attn.k_proj": "_self_attention_layer._key_dense",
    "self_attn.v_proj": "_self_attention_layer._value_dense",
    "self_attn.o_proj": "_self_attention_layer._output_dense",
    "mlp.gate_proj": "_feedforward_gate_dense",
    "mlp.up_proj": "_feedforward_intermediate_dense",
    "mlp.down_proj": "_feedforward_output_dense",
}
_GEMMA = {
    "self_attn.q_proj": "attention.query_dense",
    "self_attn.k_proj": "attention.key_dense",
    "self_attn.v_proj": "attention.value_dense",
    "self_attn.o_proj": "attention.output_dense",
    "mlp.gate_proj": "gating_ffw",
    "mlp.up_proj": "gating_ffw_2",
    "mlp.down_proj": "ffw_linear",
}
_VIT = {
    "attention.q_proj": "mha.query_dense",
    "attention.k_proj": "mha.key_dense",
    "attention.v_proj": "mha.value_dense",
    "attention.o_proj": "mha.output_dense",
    "mlp.fc1": "mlp.dense_1",
    "mlp.fc2": "mlp.dense_2",
}
_VIT_OLDER = {
    "attention.attention.query": "mha.query_dense",
    "attention.attention.key": "mha.key_dense",
    "attention.attention.value": "mha.value_dense",
    "attention.output.dense": "mha.output_dense",
    "intermediate.dense": "mlp.dense_1",
    "output.dense": "mlp.dense_2",
}
_DINOV2 = {
    "attention.q_proj": "attention.attention.query_dense",
    "attention.k_proj": "attention.attention.key_dense",
    "attention.v_proj": "attention.attention.value_dense",
    "attention.o_proj": "attention.attention.output_dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    # Of SwiGLU; its `gate_proj` and `up_proj` are one layer in KerasHub.
    "mlp.down_proj": "mlp.weights_out",
}
_DINOV2_OLDER = {
    "attention.attention.query": "attention.attention.query_dense",
    "attention.attention.key": "attention.attention.key_dense",
    "attention.attention.value": "attention.attention.value_dense",
    "attention.output.dense": "attention.attention.output_dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_out": "mlp.weights_out",
}

_DECODER_BLOCKS = "layers.{}", "transformer_layer_{}"
_DINOV2_BLOCKS = "encoder.layer.{}", "encoder.layers.{}"

# By the class of the KerasHub backbone.
FAMILIES = {
    "BertBackbone": Family(
        prefix="bert",
        blocks=("encoder.layer.{}", "transformer_layer_{}"),
        modules=_ENCODER,
        others={"pooler.dense": "pooled_dense"},
        heads={"classifier": "output_dense"},
    ),
    "RobertaBackbone": Family(
        prefix="roberta",
        blocks=("encoder.layer.{}", "transformer_layer_{}"),
        modules=_ENCODER,
        heads={
            "classifier.dense": "pooled_dense",
            "classifier.out_proj": "output_dense",
        },
    ),
    "DistilBertBackbone": Family(
        prefix="distilbert",
        blocks=("transformer.layer.{}", "transformer_layer_{}"),
        modules=_DISTILBERT,
        heads={"pre_classifier": "pooled_dense", "classifier": "output_dense"},
    ),
    "GPT2Backbone": Family(
        prefix="transformer",
        blocks=("h.{}", "transformer_layer_{}"),
        modules=_GPT2,
        fan_in_fan_out=True,
    ),
    "LlamaBackbone": Family("model", _DECODER_BLOCKS, _DECODER),
    "MistralBackbone": Family("model", _DECODER_BLOCKS, _DECODER),
    "QwenBackbone": Family("model", _DECODER_BLOCKS, _DECODER),
    "GemmaBackbone": Family("model", ("layers.{}", "decoder_block_{}"), _GEMMA),
    "ViTBackbone": Family(
        prefix="vit",
        blocks=("layers.{}", "vit_encoder.encoder_layers.{}"),
        modules=_VIT,
        heads={"classifier": "output_dense"},
        older=(
            ("encoder.layer.{}", "vit_encoder.encoder_layers.{}"),
            _VIT_OLDER,
        ),
    ),
    "DINOV2Backbone": Family(
        prefix="dinov2",
        blocks=_DINOV2_BLOCKS,
        modules=_DINOV2,
        older=(_DINOV2_BLOCKS, _DINOV2_OLDER),
    ),
}


def find_family(model):
    """Returns the KerasHub backbone of `model`, and its `Family`.

    Raises:
        ValueError: If there is no backbone, or no table for it.
    """
    backbone = getattr(model, "backbone", model)
    for backbone_class in type(backbone).__mro__:
        family = FAMILIES.get(backbone_class.__name__)
        if family is not None:
            return backbone, family
    raise ValueError(
        "`model` must be a KerasHub backbone, or a task with one, of a family "
        "whose names in Hugging Face transformers are known: "
        f"{', '.join(FAMILIES)}. Received: model '{model.name}' with a "
        f"{type(backbone).__name__}."
    )


def modules_of(backbone, family):
    """Returns the Keras layers of each Hugging Face module, by its path.

    Returns:
        A dict of lists of layers, in the order of the module's outputs; and a
        dict of older names of modules.
    """
    modules, older = {}, {}
    for number in range(backbone.num_layers):
        of_block = _modules_of_block(
            backbone, family.blocks, family.modules, number
        )
        modules.update(of_block)
        if family.older:
            names = {id(x[0]): name for name, x in of_block.items()}
            for name, layers in _modules_of_block(
                backbone, *family.older, number
            ).items():
                older[name] = names[id(layers[0])]
    for name, path in family.others.items():
        modules[name] = [_layer_at(backbone, path)]
    return modules, older


def heads_of(model, family):
    """Returns the layers of a task's head by Hugging Face module."""
    if _is_backbone(model):
        return {}
    heads = {
        name: getattr(model, attribute, None)
        for name, attribute in family.heads.items()
    }
    if not all(isinstance(x, keras.layers.Dense) for x in heads.values()):
        return {}
    return heads


def prefix_of(model, family):
    """Returns what stands before the names of modules in a task model."""
    return "" if _is_backbone(model) else family.prefix + "."


def _is_backbone(model):
    return not hasattr(model, "backbone")


def _modules_of_block(backbone, blocks, modules, number):
    there, here = (path.format(number) for path in blocks)
    block = _layer_at(backbone, here)
    found = {}
    for name, paths in modules.items():
        paths = (paths,) if isinstance(paths, str) else paths
        layers = [_layer_at(block, path) for path in paths]
        if all(layer is not None for layer in layers):
            found[f"{there}.{name}"] = layers
    return found


def _layer_at(layer, path):
    """Follows attributes, names of layers and positions in lists."""
    for part in path.split("."):
        if isinstance(layer, (list, tuple)):
            layer = layer[int(part)]
        elif hasattr(layer, part):
            layer = getattr(layer, part)
        else:
            below = _keras.sub_layers(layer) if layer is not None else []
            layer = next((x for x in below if x.name == part), None)
    return layer
