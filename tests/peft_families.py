"""Small random models of Hugging Face, one row for each family."""

import json
from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import numpy as np
import peft
import safetensors.numpy
import torch
import transformers as hf
from keras import ops

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
)
TEXT = dict(vocab_size=40, max_position_embeddings=32)
GROUPED = dict(num_key_value_heads=2, head_dim=4)
LINEAR_ATTENTION = dict(  # Of Qwen 3.5, in one of two blocks.
    num_key_value_heads=2,
    head_dim=8,  # A quarter of it turns.
    linear_key_head_dim=4,
    linear_value_head_dim=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
    tie_word_embeddings=True,
)
IMAGE = dict(image_size=16, patch_size=8)


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        model: The class of the model without a head.
        config: Its config.
        targets: PEFT's `target_modules`.
        saved_as: The class whose files KerasHub converts, if that is another.
        inputs: What the model takes.
        published: Function of the folder that `save_pretrained` wrote, which
            makes of it what is published on the Hub, where transformers 5
            writes what KerasHub's converter does not read.
        zero: Parameters with these in their names are 0.
    """

    model: Any
    config: Any
    targets: Any
    saved_as: Any = None
    inputs: str = "text"
    published: Any = lambda folder: None
    zero: tuple = ()


def settings(**values):
    """Adds settings to `config.json`, as older transformers wrote them."""

    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def renamed(*replacements):
    """Renames tensors, as older transformers wrote them."""

    def change(folder):
        file = folder / "model.safetensors"
        tensors = {}
        for name, array in safetensors.numpy.load_file(file).items():
            for old, new in replacements:
                name = name.replace(old, new)
            tensors[name] = array
        safetensors.numpy.save_file(tensors, file, {"format": "pt"})

    return change


def with_towers(model_type):
    """As the text model is in a published one with a tower for images."""

    def change(folder):
        settings(model_type=model_type)(folder)
        renamed(("model.", "model.language_model."))(folder)

    return change


def quantized_experts(folder):
    """Writes the experts, which are 0, in the form MXFP4."""
    file = folder / "model.safetensors"
    tensors = {}
    for name, array in safetensors.numpy.load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = array.shape
            blocks = np.zeros((experts, outputs, 1, inputs // 2), "uint8")
            tensors[f"{name}_blocks"] = blocks
            tensors[f"{name}_scales"] = blocks[..., 0]
        else:
            tensors[name] = array
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})


DECODER_TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FAMILIES = {
    "bert": Row(
        hf.BertModel,
        hf.BertConfig(**SIZES, **TEXT),
        ["query", "value", "dense"],
    ),
    "roberta": Row(
        hf.RobertaModel,
        hf.RobertaConfig(**SIZES, **TEXT, layer_norm_eps=1e-5),
        r".*attention\.(self\.(query|key)|output\.dense)",
        hf.RobertaForSequenceClassification,
        zero=("token_type",),  # KerasHub has none, as RoBERTa's is 0.
    ),
    "xlm_roberta": Row(
        hf.XLMRobertaModel,
        hf.XLMRobertaConfig(**SIZES, **TEXT, layer_norm_eps=1e-5),
        ["query", "value", "attention.output.dense", "intermediate.dense"],
        hf.XLMRobertaForSequenceClassification,
    ),
    "distilbert": Row(
        hf.DistilBertModel,
        hf.DistilBertConfig(
            dim=16, n_layers=2, n_heads=4, hidden_dim=24, **TEXT
        ),
        ["q_lin", "v_lin", "out_lin", "lin1", "lin2"],
        hf.DistilBertForSequenceClassification,
    ),
    "albert": Row(
        hf.AlbertModel,
        hf.AlbertConfig(
            **{**SIZES, "num_hidden_layers": 4},
            **TEXT,
            embedding_size=8,
            num_hidden_groups=2,
            inner_group_num=2,
        ),
        ["query", "value", "attention.dense", "ffn", "ffn_output"],
        hf.AlbertForSequenceClassification,
    ),
    "esm": Row(
        hf.EsmModel,
        hf.EsmConfig(
            **SIZES,
            **TEXT,
            pad_token_id=1,
            mask_token_id=2,
            position_embedding_type="rotary",
        ),
        ["query", "key", "output.dense", "intermediate.dense"],
        hf.EsmForSequenceClassification,
        published=renamed(
            ("LayerNorm.gamma", "LayerNorm.weight"),
            ("LayerNorm.beta", "LayerNorm.bias"),
        ),
    ),
    "bart": Row(
        hf.BartModel,
        hf.BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            **TEXT,
        ),
        ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
        inputs="two texts",
        published=settings(num_hidden_layers=2),
    ),
    "t5gemma": Row(
        hf.T5GemmaModel,
        hf.T5GemmaConfig(
            encoder=dict(**SIZES, **TEXT, **GROUPED, query_pre_attn_scalar=4),
            decoder=dict(**SIZES, **TEXT, **GROUPED, query_pre_attn_scalar=4),
        ),
        DECODER_TARGETS,
        inputs="two texts",
    ),
    "gpt2": Row(
        hf.GPT2Model,
        hf.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32
        ),
        ["c_attn", "c_proj", "c_fc"],
    ),
    "llama": Row(
        hf.LlamaModel,
        hf.LlamaConfig(**SIZES, **TEXT, **GROUPED, tie_word_embeddings=False),
        DECODER_TARGETS,
        hf.LlamaForCausalLM,
    ),
    "mistral": Row(
        hf.MistralModel,
        hf.MistralConfig(**SIZES, **TEXT, **GROUPED, tie_word_embeddings=False),
        ["q_proj", "k_proj", "gate_proj"],
        hf.MistralForCausalLM,
    ),
    "mixtral": Row(
        hf.MixtralModel,
        hf.MixtralConfig(**SIZES, **TEXT, **GROUPED, num_local_experts=4),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        hf.MixtralForCausalLM,
    ),
    "smollm3": Row(
        hf.SmolLM3Model,
        hf.SmolLM3Config(
            **SIZES,
            **TEXT,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        DECODER_TARGETS,
        hf.SmolLM3ForCausalLM,
    ),
    "qwen2": Row(
        hf.Qwen2Model,
        hf.Qwen2Config(
            **SIZES, **TEXT, num_key_value_heads=2, tie_word_embeddings=True
        ),
        ["q_proj", "v_proj", "up_proj", "down_proj"],
        hf.Qwen2ForCausalLM,
    ),
    "qwen2_moe": Row(
        hf.Qwen2MoeModel,
        hf.Qwen2MoeConfig(
            **SIZES,
            **TEXT,
            num_key_value_heads=2,
            num_experts=4,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        [*DECODER_TARGETS, "shared_expert_gate"],
        hf.Qwen2MoeForCausalLM,
    ),
    "qwen3": Row(
        hf.Qwen3Model,
        # What KerasHub norms queries and keys with, whatever is in the config.
        hf.Qwen3Config(**SIZES, **TEXT, **GROUPED, rms_norm_eps=1e-5),
        DECODER_TARGETS,
        hf.Qwen3ForCausalLM,
    ),
    "qwen3_moe": Row(
        hf.Qwen3MoeModel,
        hf.Qwen3MoeConfig(
            **SIZES,
            **TEXT,
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        hf.Qwen3MoeForCausalLM,
        published=settings(num_experts=4),
    ),
    "qwen3_5": Row(
        hf.Qwen3_5TextModel,
        hf.Qwen3_5TextConfig(
            **SIZES,
            **TEXT,
            **LINEAR_ATTENTION,
        ),
        [*DECODER_TARGETS, "in_proj_qkv", "in_proj_a", "out_proj"],
        hf.Qwen3_5ForCausalLM,
        published=with_towers("qwen3_5"),
    ),
    "qwen3_5_moe": Row(
        hf.Qwen3_5MoeTextModel,
        hf.Qwen3_5MoeTextConfig(
            **{**SIZES, "intermediate_size": None},
            **TEXT,
            **LINEAR_ATTENTION,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        ["q_proj", "o_proj", "in_proj_z", "out_proj", "shared_expert_gate"],
        hf.Qwen3_5MoeForCausalLM,
        published=with_towers("qwen3_5_moe"),
    ),
    "gpt_oss": Row(
        hf.GptOssModel,
        hf.GptOssConfig(
            **SIZES,
            **TEXT,
            **GROUPED,
            num_local_experts=4,
            sliding_window=8,
            rope_parameters=dict(rope_type="default", rope_theta=150000.0),
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        hf.GptOssForCausalLM,
        published=quantized_experts,
        zero=("experts",),
    ),
    "gemma": Row(
        hf.GemmaModel,
        hf.GemmaConfig(**SIZES, **TEXT, num_key_value_heads=1, head_dim=4),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        hf.GemmaForCausalLM,
    ),
    "gemma2": Row(
        hf.Gemma2Model,
        hf.Gemma2Config(
            **SIZES,
            **TEXT,
            **GROUPED,
            query_pre_attn_scalar=4,
            sliding_window=8,
        ),
        DECODER_TARGETS,
        hf.Gemma2ForCausalLM,
    ),
    "gemma3": Row(
        hf.Gemma3TextModel,
        hf.Gemma3TextConfig(
            **SIZES,
            **TEXT,
            **GROUPED,
            query_pre_attn_scalar=4,
            sliding_window=8,
        ),
        DECODER_TARGETS,
        hf.Gemma3ForCausalLM,
    ),
    "gemma4": Row(
        hf.Gemma4TextModel,
        hf.Gemma4TextConfig(
            **SIZES,
            **TEXT,
            num_key_value_heads=2,
            head_dim=8,
            global_head_dim=8,
            vocab_size_per_layer_input=40,
            hidden_size_per_layer_input=4,
            num_kv_shared_layers=0,
        ),
        [*DECODER_TARGETS, "per_layer_input_gate", "per_layer_projection"],
        hf.Gemma4ForCausalLM,
    ),
    "metaclip2": Row(
        hf.MetaClip2Model,
        hf.MetaClip2Config(
            text_config=dict(**SIZES, **TEXT, eos_token_id=2),
            vision_config=dict(**SIZES, **IMAGE),
            projection_dim=12,
        ),
        ["q_proj", "v_proj", "out_proj", "fc1", "text_projection"],
        inputs="text and image",
    ),
    "vit": Row(
        hf.ViTModel,
        hf.ViTConfig(**SIZES, **IMAGE, layer_norm_eps=1e-6),
        ["q_proj", "v_proj", "o_proj", "fc1", "fc2"],
        hf.ViTForImageClassification,
        inputs="image",
    ),
    "deit": Row(
        hf.DeiTModel,
        hf.DeiTConfig(**SIZES, **IMAGE),
        ["q_proj", "k_proj", "o_proj", "fc1", "fc2"],
        hf.DeiTForImageClassificationWithTeacher,
        inputs="image",
    ),
    "dinov2": Row(
        hf.Dinov2Model,
        hf.Dinov2Config(**SIZES, **IMAGE, mlp_ratio=2),
        ["q_proj", "k_proj", "o_proj", "fc1", "fc2"],
        inputs="image",
    ),
    "dinov3": Row(
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig(**SIZES, **IMAGE, num_register_tokens=2),
        ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        inputs="image",
    ),
    "swin": Row(
        hf.SwinModel,
        hf.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=2,
        ),
        ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "reduction"],
        hf.SwinForImageClassification,
        inputs="image",
    ),
}


def both_models(family, folder):
    """Returns a random Hugging Face model, and what KerasHub makes of it."""
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    row = FAMILIES[family]
    outer = (row.saved_as or row.model)(row.config).eval()
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            if any(part in name for part in row.zero):
                parameter.zero_()
            # KerasHub converts Mistral through float16.
            parameter.copy_(parameter.half().float())
    outer.save_pretrained(folder)
    row.published(folder)
    backbone = keras_hub.models.Backbone.from_preset(
        str(folder), dtype="float32"
    )
    if row.saved_as is None:
        return outer, backbone
    return getattr(outer, outer.base_model_prefix), backbone


def with_peft(model, targets, config_class=peft.VeraConfig, **config):
    """Returns the model with an adapter of PEFT that has random vectors."""
    config = {"r": 5, "init_weights": True, **config}
    peft_model = peft.get_peft_model(
        model, config_class(target_modules=targets, **config)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_(0, 0.5, generator=generator)
    return peft_model.eval()


def images():
    rng = np.random.default_rng(1)
    return rng.normal(size=(2, 16, 16, 3)).astype("float32")


def tokens():
    return np.random.default_rng(1).integers(3, 40, (2, 6)).astype("int32")


def other_tokens():
    return np.random.default_rng(2).integers(3, 40, (2, 5)).astype("int32")


def with_ends(ids):
    """Ends each text with token 2, where the text tower of CLIP looks."""
    return np.concatenate([ids, np.full((2, 1), 2, "int32")], axis=1)


def hidden_states(model):
    """Returns what the Hugging Face model makes of the inputs."""
    x = {}
    inputs = inputs_of(model)
    if "image" in inputs:
        channels_first = images().transpose(0, 3, 1, 2).copy()
        x["pixel_values"] = torch.from_numpy(channels_first)
    if "text" in inputs:
        ids = with_ends(tokens()) if "image" in inputs else tokens()
        x["input_ids"] = torch.from_numpy(ids).long()
    if inputs == "two texts":
        x["decoder_input_ids"] = torch.from_numpy(other_tokens()).long()
    with torch.no_grad():
        output = model(**x)
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if name in output:
            return output[name].numpy()


def inputs_of(model):
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for row in FAMILIES.values():
        if type(row.config) is type(base.config):
            return row.inputs
    raise AssertionError(f"no family for {type(base)}")


def keras_hidden_states(model):
    """Returns the same of a KerasHub backbone or task."""
    inputs = model.input
    if not isinstance(inputs, dict):
        return ops.convert_to_numpy(model(images(), training=False))
    x = {}
    for name in inputs:
        ids = other_tokens() if "decoder" in name else tokens()
        if len(inputs) == 2 and "images" in inputs:
            ids = with_ends(ids)
        if name in ("images", "pixel_values"):
            x[name] = images()
        elif name.endswith("token_ids"):
            x[name] = ids
        elif name == "segment_ids":
            x[name] = np.zeros_like(ids)
        elif name == "position_ids":
            x[name] = np.tile(np.arange(ids.shape[1], dtype="int32"), (2, 1))
        else:
            x[name] = np.ones_like(ids)
    output = model(x, training=False)
    for name in ("sequence_output", "decoder_sequence_output", "text_logits"):
        if isinstance(output, dict) and name in output:
            output = output[name]
    return ops.convert_to_numpy(output)
