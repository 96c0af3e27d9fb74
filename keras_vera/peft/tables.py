"""The names of one linear module in transformers and in KerasHub, by family.

The names are those of transformers 5; `older` has those of version 4 where
they differ. A new family is a new entry in `FAMILIES`, and a row in
`tests/peft_families.py`.
"""

from dataclasses import dataclass
from dataclasses import field


@dataclass(frozen=True)
class Family:
    """How the modules of one architecture are named on both sides.

    Attributes:
        prefix: String, the name of the backbone in a task model of Hugging
            Face (`base_model_prefix`).
        blocks: Tuple of kinds of blocks: the path of a Hugging Face block,
            that of a Keras block, and a dict of paths below them, Hugging
            Face to Keras. `{}` in a block's path stands for a number, and
            several for a number each. A tuple of Keras paths are the layers
            that one module became, in the order of its outputs; a tuple of
            Hugging Face paths, those of the modules that KerasHub made one
            layer of, with equal shares of its outputs. What a model does not
            have is left out.
        others: Dict of modules outside the blocks.
        heads: Dict of modules of the task's head, outside the backbone, to
            the names of layers in a Keras task.
        older: Tuple like `blocks`, with the names of transformers 4.
        fan_in_fan_out: Boolean, whether Hugging Face has `Conv1D` modules.
    """

    prefix: str
    blocks: tuple
    others: dict = field(default_factory=dict)
    heads: dict = field(default_factory=dict)
    older: tuple = ()
    fan_in_fan_out: bool = False


_ENCODER = {
    "attention.self.query": "_self_attention_layer.query_dense",
    "attention.self.key": "_self_attention_layer.key_dense",
    "attention.self.value": "_self_attention_layer.value_dense",
    "attention.output.dense": "_self_attention_layer.output_dense",
    "intermediate.dense": "_feedforward_intermediate_dense",
    "output.dense": "_feedforward_output_dense",
}
_ALBERT = {
    "attention.query": "_self_attention_layer.query_dense",
    "attention.key": "_self_attention_layer.key_dense",
    "attention.value": "_self_attention_layer.value_dense",
    "attention.dense": "_self_attention_layer.output_dense",
    "ffn": "_feedforward_intermediate_dense",
    "ffn_output": "_feedforward_output_dense",
}
_ESM = {
    "attention.self.query": "attention_layer.q_dense",
    "attention.self.key": "attention_layer.k_dense",
    "attention.self.value": "attention_layer.v_dense",
    "attention.output.dense": "attention_layer.o_dense",
    "intermediate.dense": "feedforward_intermediate_dense",
    "output.dense": "feedforward_output_dense",
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
_BART_ENCODER = {
    "self_attn.q_proj": "_self_attention_layer.query_dense",
    "self_attn.k_proj": "_self_attention_layer.key_dense",
    "self_attn.v_proj": "_self_attention_layer.value_dense",
    "self_attn.out_proj": "_self_attention_layer.output_dense",
    "fc1": "_feedforward_intermediate_dense",
    "fc2": "_feedforward_output_dense",
}
_BART_DECODER = {
    **_BART_ENCODER,
    "encoder_attn.q_proj": "_cross_attention_layer.query_dense",
    "encoder_attn.k_proj": "_cross_attention_layer.key_dense",
    "encoder_attn.v_proj": "_cross_attention_layer.value_dense",
    "encoder_attn.out_proj": "_cross_attention_layer.output_dense",
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
_GEMMA4 = {
    **_GEMMA,
    "per_layer_input_gate": "per_layer_input_gate",
    "per_layer_projection": "per_layer_up_proj",
}
_SMOLLM3 = {name: name for name in _DECODER}  # The same on both sides.
_T5GEMMA_ENCODER = {
    "self_attn.q_proj": "self_attn.query_dense",
    "self_attn.k_proj": "self_attn.key_dense",
    "self_attn.v_proj": "self_attn.value_dense",
    "self_attn.o_proj": "self_attn.output_dense",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_T5GEMMA_DECODER = {
    **_T5GEMMA_ENCODER,
    "cross_attn.q_proj": "cross_attn.query_dense",
    "cross_attn.k_proj": "cross_attn.key_dense",
    "cross_attn.v_proj": "cross_attn.value_dense",
    "cross_attn.o_proj": "cross_attn.output_dense",
}
# Routers and experts are no linear modules in transformers.
_MIXTRAL = {
    "self_attn.q_proj": "_self_attention_layer.query_dense",
    "self_attn.k_proj": "_self_attention_layer.key_dense",
    "self_attn.v_proj": "_self_attention_layer.value_dense",
    "self_attn.o_proj": "_self_attention_layer.output_dense",
}
_GPT_OSS = {name: path.removeprefix("_") for name, path in _MIXTRAL.items()}
_SHARED_EXPERT = "mlp.shared_expert_dense._feedforward_"
_QWEN_MOE = {
    **_MIXTRAL,
    "self_attn.o_proj": "_self_attention_layer._output_dense",
    "mlp.shared_expert.gate_proj": _SHARED_EXPERT + "gate_dense",
    "mlp.shared_expert.up_proj": _SHARED_EXPERT + "intermediate_dense",
    "mlp.shared_expert.down_proj": _SHARED_EXPERT + "output_dense",
    "mlp.shared_expert_gate": "mlp.shared_expert_gate_dense",
    "mlp.gate_proj": "_feedforward_gate_dense",
    "mlp.up_proj": "_feedforward_intermediate_dense",
    "mlp.down_proj": "_feedforward_output_dense",
}
_SHARED = "mlp.shared_expert._feedforward_"
# Three in four blocks have linear attention; some models, shared experts.
_QWEN3_5 = {
    **_DECODER,
    "mlp.shared_expert.gate_proj": _SHARED + "gate_dense",
    "mlp.shared_expert.up_proj": _SHARED + "intermediate_dense",
    "mlp.shared_expert.down_proj": _SHARED + "output_dense",
    "mlp.shared_expert_gate": "mlp._shared_expert_gate",
    "linear_attn.in_proj_qkv": "_linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z": "_linear_attn.in_proj_z",
    "linear_attn.in_proj_b": "_linear_attn.in_proj_b",
    "linear_attn.in_proj_a": "_linear_attn.in_proj_a",
    "linear_attn.out_proj": "_linear_attn.out_proj",
}
_METACLIP2 = {
    "self_attn.q_proj": "attention.query_dense",
    "self_attn.k_proj": "attention.key_dense",
    "self_attn.v_proj": "attention.value_dense",
    "self_attn.out_proj": "attention.output_dense",
    "mlp.fc1": "dense_1",
    "mlp.fc2": "dense_2",
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
_DEIT_PARTS = {"mlp.dense_1": "mlp.dense", "mlp.dense_2": "output_layer.dense"}
_DEIT = {name: _DEIT_PARTS.get(path, path) for name, path in _VIT.items()}
_DEIT_OLDER = {
    name: _DEIT_PARTS.get(path, path) for name, path in _VIT_OLDER.items()
}
_SWIN = {
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"): "attn.qkv",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SWIN_OLDER = {
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ): "attn.qkv",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_DINOV2 = {
    "attention.q_proj": "attention.attention.query_dense",
    "attention.k_proj": "attention.attention.key_dense",
    "attention.v_proj": "attention.attention.value_dense",
    "attention.o_proj": "attention.attention.output_dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    ("mlp.gate_proj", "mlp.up_proj"): "mlp.weights_in",
    "mlp.down_proj": "mlp.weights_out",
}
_DINOV2_OLDER = {
    "attention.attention.query": "attention.attention.query_dense",
    "attention.attention.key": "attention.attention.key_dense",
    "attention.attention.value": "attention.attention.value_dense",
    "attention.output.dense": "attention.attention.output_dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.weights_in",
    "mlp.weights_out": "mlp.weights_out",
}
_DINOV3 = {
    "attention.q_proj": "attention.query_dense",
    "attention.k_proj": "attention.key_dense",
    "attention.v_proj": "attention.value_dense",
    "attention.o_proj": "attention.output_dense",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}

_ENCODER_BLOCKS = "encoder.layer.{}", "transformer_layer_{}"
_DECODER_BLOCKS = "layers.{}", "transformer_layer_{}"
_GEMMA_BLOCKS = "layers.{}", "decoder_block_{}"
_VIT_LAYERS = "vit_encoder.encoder_layers.{}"
_DEIT_LAYERS = "deit_encoder.encoder_layers.{}"
_DINOV2_BLOCKS = "encoder.layer.{}", "encoder.layers.{}"
_SWIN_BLOCKS = "encoder.layers.{}.blocks.{}", "stages.{}.blocks.{}"
_SWIN_STAGES = (
    "encoder.layers.{}",
    "stages.{}",
    {"downsample.reduction": "downsample.reduction"},
)
_ROBERTA_HEADS = {
    "classifier.dense": "pooled_dense",
    "classifier.out_proj": "output_dense",
}
_OUTPUT_HEAD = {"classifier": "output_dense"}

# By the class of the KerasHub backbone; also for classes derived from it.
FAMILIES = {
    "BertBackbone": Family(
        prefix="bert",
        blocks=((*_ENCODER_BLOCKS, _ENCODER),),
        others={"pooler.dense": "pooled_dense"},
        heads=_OUTPUT_HEAD,
    ),
    "RobertaBackbone": Family(  # And XLM-RoBERTa.
        prefix="roberta",
        blocks=((*_ENCODER_BLOCKS, _ENCODER),),
        heads=_ROBERTA_HEADS,
    ),
    "DistilBertBackbone": Family(
        prefix="distilbert",
        blocks=(("transformer.layer.{}", "transformer_layer_{}", _DISTILBERT),),
        heads={"pre_classifier": "pooled_dense", "classifier": "output_dense"},
    ),
    "AlbertBackbone": Family(
        prefix="albert",
        blocks=(
            (
                "encoder.albert_layer_groups.{}.albert_layers.{}",
                "group_{}_inner_layer_{}",
                _ALBERT,
            ),
        ),
        others={
            "encoder.embedding_hidden_mapping_in": "embeddings_projection",
            "pooler": "pooled_dense",
        },
        heads=_OUTPUT_HEAD,
    ),
    "ESMBackbone": Family(
        prefix="esm",
        blocks=((*_ENCODER_BLOCKS, _ESM),),
        heads=_ROBERTA_HEADS,
    ),
    "BartBackbone": Family(
        prefix="model",
        blocks=(
            (
                "encoder.layers.{}",
                "encoder_transformer_layers.{}",
                _BART_ENCODER,
            ),
            (
                "decoder.layers.{}",
                "decoder_transformer_layers.{}",
                _BART_DECODER,
            ),
        ),
    ),
    "T5GemmaBackbone": Family(
        prefix="model",
        blocks=(
            ("encoder.layers.{}", "encoder_layer_{}", _T5GEMMA_ENCODER),
            ("decoder.layers.{}", "decoder_layer_{}", _T5GEMMA_DECODER),
        ),
    ),
    "GPT2Backbone": Family(
        prefix="transformer",
        blocks=(("h.{}", "transformer_layer_{}", _GPT2),),
        fan_in_fan_out=True,
    ),
    # And Llama 3.
    "LlamaBackbone": Family("model", ((*_DECODER_BLOCKS, _DECODER),)),
    "MistralBackbone": Family("model", ((*_DECODER_BLOCKS, _DECODER),)),
    "MixtralBackbone": Family("model", ((*_DECODER_BLOCKS, _MIXTRAL),)),
    "SmolLM3Backbone": Family("model", ((*_DECODER_BLOCKS, _SMOLLM3),)),
    "QwenBackbone": Family("model", ((*_DECODER_BLOCKS, _DECODER),)),
    "QwenMoeBackbone": Family("model", ((*_DECODER_BLOCKS, _QWEN_MOE),)),
    "Qwen3Backbone": Family("model", ((*_DECODER_BLOCKS, _DECODER),)),
    "Qwen3_5Backbone": Family("model", ((*_DECODER_BLOCKS, _QWEN3_5),)),
    "Qwen3_5MoeBackbone": Family("model", ((*_DECODER_BLOCKS, _QWEN3_5),)),
    "Qwen3MoeBackbone": Family("model", ((*_DECODER_BLOCKS, _DECODER),)),
    "GptOssBackbone": Family(
        "model", (("layers.{}", "transformer_layers.{}", _GPT_OSS),)
    ),
    "GemmaBackbone": Family("model", ((*_GEMMA_BLOCKS, _GEMMA),)),
    "Gemma3Backbone": Family("model", ((*_GEMMA_BLOCKS, _GEMMA),)),
    "Gemma4Backbone": Family(
        prefix="model",
        blocks=((*_GEMMA_BLOCKS, _GEMMA4),),
        others={"per_layer_model_projection": "per_layer_model_projection"},
    ),
    "MetaCLIP2Backbone": Family(
        prefix="metaclip_2",
        blocks=(
            (
                "text_model.encoder.layers.{}",
                "text_encoder.encoder_layers.{}",
                _METACLIP2,
            ),
            (
                "vision_model.encoder.layers.{}",
                "vision_encoder.encoder_layers.{}",
                _METACLIP2,
            ),
        ),
        others={
            "visual_projection": "vision_projection",
            "text_projection": "text_projection",
        },
    ),
    "ViTBackbone": Family(
        prefix="vit",
        blocks=(("layers.{}", _VIT_LAYERS, _VIT),),
        heads=_OUTPUT_HEAD,
        older=(("encoder.layer.{}", _VIT_LAYERS, _VIT_OLDER),),
    ),
    "DeiTBackbone": Family(
        prefix="deit",
        blocks=(("layers.{}", _DEIT_LAYERS, _DEIT),),
        heads=_OUTPUT_HEAD,
        older=(("encoder.layer.{}", _DEIT_LAYERS, _DEIT_OLDER),),
    ),
    "DINOV2Backbone": Family(
        prefix="dinov2",
        blocks=((*_DINOV2_BLOCKS, _DINOV2),),
        older=((*_DINOV2_BLOCKS, _DINOV2_OLDER),),
    ),
    "DINOV3Backbone": Family(
        prefix="model",
        blocks=(("model.layer.{}", "encoder.layers.{}", _DINOV3),),
        older=(("layer.{}", "encoder.layers.{}", _DINOV3),),
    ),
    "SwinTransformerBackbone": Family(
        prefix="swin",
        blocks=((*_SWIN_BLOCKS, _SWIN), _SWIN_STAGES),
        heads=_OUTPUT_HEAD,
        older=((*_SWIN_BLOCKS, _SWIN_OLDER),),
    ),
}
