"""Text and audio backbones of KerasHub, as small as they build."""

from functools import partial

import keras_hub
from backbone_entry import Entry
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net
from keras_hub.src.models.rqvae.rqvae_backbone import RQVAEBackbone

# Qwen3.5 pads every text to chunks of 64 tokens and unrolls each token, which
# takes a minute to compile. The size of a chunk does not change the result.
qwen3_5_gated_delta_net._chunk_gated_delta_rule = partial(
    qwen3_5_gated_delta_net._chunk_gated_delta_rule, chunk_size=4
)

BATCH, LENGTH, SOURCE_LENGTH = 2, 5, 6
VOCABULARY = 13

# What they are fed.
TOKENS = {"token_ids": ((BATCH, LENGTH), VOCABULARY)}
MASKED = {**TOKENS, "padding_mask": ((BATCH, LENGTH), "mask")}
SEGMENTED = {**TOKENS, "segment_ids": ((BATCH, LENGTH), 2)}
MASKED_SEGMENTED = {**MASKED, **SEGMENTED}
DECODER = {f"decoder_{name}": spec for name, spec in MASKED.items()}
SEQ2SEQ = {
    "encoder_token_ids": ((BATCH, SOURCE_LENGTH), VOCABULARY),
    "encoder_padding_mask": ((BATCH, SOURCE_LENGTH), "mask"),
    **DECODER,
}

# What they are built from. Widths differ, so that a kernel used the wrong way
# round does not fit.
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
HEADS = {**SIZES, "num_heads": 2, "dropout": 0.0}
BERT = {**HEADS, "max_sequence_length": 8}
CLIP = {
    **SIZES,
    "num_heads": 2,
    "embedding_dim": 8,
    "max_sequence_length": LENGTH,
}
# Fewer heads for keys and values, so that query and value differ in width.
GROUPED = {**SIZES, "num_query_heads": 2, "num_key_value_heads": 1}
EXPERTS = {**GROUPED, "num_experts": 3, "top_k": 2}
GEMMA = {**GROUPED, "head_dim": 6}
GEMMA4 = {**GEMMA, "image_size": 16, "sliding_window_pattern": 2}
QWEN3_5 = {
    "head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 3,
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
T5GEMMA_SIDE = {
    "intermediate_dim": 12,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "layer_types": SLIDING_THEN_FULL,
}
T5GEMMA = {
    "vocabulary_size": VOCABULARY,
    "sliding_window": 3,
    "encoder_hidden_dim": 8,
    "decoder_hidden_dim": 8,
    **{f"encoder_{name}": value for name, value in T5GEMMA_SIDE.items()},
    **{f"decoder_{name}": value for name, value in T5GEMMA_SIDE.items()},
}


def _without(arguments, *names):
    return {k: v for k, v in arguments.items() if k not in names}


def _make(name, arguments):
    return getattr(keras_hub.models, name.split(":")[0])(**arguments)


def _entries(modality, rows):
    return {
        name: Entry(partial(_make, name, arguments), inputs, modality)
        for name, (inputs, arguments) in rows.items()
    }


_TEXT = {
    # Encoders.
    "AlbertBackbone": (MASKED_SEGMENTED, BERT | {"embedding_dim": 6}),
    "BertBackbone": (MASKED_SEGMENTED, BERT),
    "DebertaV3Backbone": (MASKED, BERT | {"bucket_size": 4}),
    "DistilBertBackbone": (MASKED, BERT),
    "ElectraBackbone": (
        MASKED_SEGMENTED,
        _without(BERT, "vocabulary_size")
        | {"vocab_size": VOCABULARY, "embedding_dim": 6},
    ),
    "ESMBackbone": (TOKENS, BERT),
    "FNetBackbone": (SEGMENTED, _without(BERT, "num_heads")),
    "RobertaBackbone": (MASKED, BERT),
    "XLMRobertaBackbone": (MASKED, BERT),
    "RoformerV2Backbone": (SEGMENTED, HEADS | {"head_size": 4}),
    "XLNetBackbone": (MASKED_SEGMENTED, HEADS),
    "CLIPTextEncoder": (TOKENS, CLIP),
    "MetaCLIP2TextEncoder": (TOKENS, CLIP),
    "SigLIPTextEncoder": (TOKENS, CLIP | {"projection_dim": 10}),
    # Encoder-decoders.
    "BartBackbone": (SEQ2SEQ, BERT),
    "EdRecBackbone": (
        SEQ2SEQ,
        _without(HEADS, "vocabulary_size", "num_layers")
        | {"vocab_size": VOCABULARY, "num_layers_enc": 2, "num_layers_dec": 2},
    ),
    "T5Backbone": (SEQ2SEQ, HEADS | {"use_gated_activation": False}),
    "T5Backbone:gated": (SEQ2SEQ, HEADS),
    "T5GemmaBackbone": (SEQ2SEQ, T5GEMMA),
    "T5Gemma2Backbone": (SEQ2SEQ, T5GEMMA),
    # Decoders.
    "BloomBackbone": (MASKED, HEADS),
    "FalconBackbone": (MASKED, SIZES | {"num_attention_heads": 2}),
    "GemmaBackbone": (MASKED, GEMMA),
    "Gemma3Backbone:text": (
        MASKED,
        GEMMA | {"image_size": 16, "use_sliding_window_attention": True},
    ),
    "Gemma3nBackbone:text": (
        TOKENS | {"padding_mask": ((BATCH, LENGTH), "bool")},
        {
            "text_vocab_size": VOCABULARY,
            "text_hidden_size": 8,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "intermediate_size": [12, 12],
            "hidden_activation": "gelu_approximate",
            "layer_types": SLIDING_THEN_FULL,
            "sliding_window": 3,
            "rope_theta": 10000.0,
            "max_position_embeddings": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 3,
            "altup_num_inputs": 2,
            "laurel_rank": 2,
        },
    ),
    "Gemma4Backbone:text": (
        MASKED | {"position_ids": ((BATCH, LENGTH), "positions")},
        GEMMA4
        | {
            "num_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 3,
        },
    ),
    "Gemma4Backbone:moe": (
        MASKED | {"position_ids": ((BATCH, LENGTH), "positions")},
        GEMMA4
        | {
            "enable_moe_block": True,
            "num_experts": 3,
            "num_experts_per_token": 2,
            "expert_intermediate_dim": 10,
        },
    ),
    "GPT2Backbone": (MASKED, BERT),
    "GPTNeoXBackbone": (MASKED, BERT | {"rotary_percentage": 0.5}),
    "GptOssBackbone": (MASKED, EXPERTS),
    "LlamaBackbone": (MASKED, GROUPED),
    "LlamaBackbone:tied": (MASKED, GROUPED | {"tie_word_embeddings": True}),
    "Llama3Backbone": (MASKED, GROUPED),
    "MistralBackbone": (MASKED, GROUPED),
    "MixtralBackbone": (MASKED, EXPERTS),
    "OPTBackbone": (MASKED, BERT),
    "Phi3Backbone": (MASKED, GROUPED),
    "QwenBackbone": (MASKED, GROUPED),
    "QwenMoeBackbone": (
        MASKED,
        EXPERTS
        | {"moe_intermediate_dim": 10, "shared_expert_intermediate_dim": 14},
    ),
    "Qwen3Backbone": (MASKED, GEMMA),
    "Qwen3MoeBackbone": (MASKED, EXPERTS | {"moe_intermediate_dim": 10}),
    "Qwen3_5Backbone": (MASKED, GROUPED | QWEN3_5),
    "Qwen3_5MoeBackbone": (
        MASKED,
        _without(EXPERTS, "intermediate_dim")
        | QWEN3_5
        | {"moe_intermediate_dim": 10, "shared_expert_intermediate_size": 14},
    ),
    "RWKV7Backbone": (
        MASKED,
        {
            "vocabulary_size": VOCABULARY,
            "num_layers": 2,
            "hidden_size": 8,
            "head_size": 4,
            "intermediate_dim": 12,
            "gate_lora": 3,
            "mv_lora": 3,
            "aaa_lora": 3,
            "decay_lora": 3,
        },
    ),
    "SmolLM3Backbone": (
        MASKED,
        SIZES
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_layer_enabled_list": [True, False],
            "layer_types": ["attention", "attention"],
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 8,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    ),
}
_AUDIO = {
    "MoonshineBackbone": (
        {
            # Three strided convolutions leave two frames of it.
            "encoder_input_values": ((BATCH, 1280, 1), "float"),
            "encoder_padding_mask": ((BATCH, 1280), "bool"),
            "decoder_token_ids": ((BATCH, LENGTH), VOCABULARY),
            "decoder_padding_mask": ((BATCH, LENGTH), "bool"),
        },
        _without(SIZES, "num_layers")
        | {
            "filter_dim": 8,
            "encoder_num_layers": 2,
            "decoder_num_layers": 2,
            "encoder_num_heads": 2,
            "decoder_num_heads": 2,
        },
    ),
    "WhisperBackbone": (
        {"encoder_features": ((BATCH, SOURCE_LENGTH, 10), "float"), **DECODER},
        HEADS
        | {
            "num_mels": 10,
            "max_encoder_sequence_length": 6,
            "max_decoder_sequence_length": 5,
        },
    ),
}

TEXT = {
    **_entries("text", _TEXT),
    **_entries("audio", _AUDIO),
    "RQVAEBackbone": Entry(
        partial(
            RQVAEBackbone,
            input_dim=10,
            encoder_layer_dims=[12, 9],
            output_dim=8,
            decoder_layer_dims=[9, 12],
            num_embeddings=4,
            num_quantizers=2,
        ),
        ((BATCH, 10), "float"),
        "other",
    ),
}
