"""Vision, multimodal and diffusion backbones, as small as they build."""

from functools import partial

import keras_hub
from backbone_entry import Entry
from keras_hub.src.models.gemma3n.gemma3n_audio_encoder import (
    Gemma3nAudioEncoder,
)
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import (
    convert_arch_def_to_stackwise,
)
from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import (
    Qwen3_5VisionEncoder,
)
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

BATCH, LENGTH, SIZE, PATCH = 2, 6, 8, 4
VOCABULARY = 13


def _images(size=SIZE, *before):
    return ((BATCH, *before, size, size, 3), "float")


# Inputs.
IMAGES = {"images": _images()}
TOKENS = {"token_ids": ((BATCH, LENGTH), VOCABULARY)}
MASK = {"padding_mask": ((BATCH, LENGTH), "mask")}
# The tokens of one image, or of one clip, come first.
VISION_INDICES = {"vision_indices": ((BATCH, 4), "positions")}

# Constructor arguments. No two widths are equal, so that a kernel used the
# wrong way round does not fit.
SHAPE = {"image_shape": (SIZE, SIZE, 3)}
SIZES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8}
MLP = {**SIZES, "intermediate_dim": 12}
ONE_LAYER = MLP | {"num_layers": 1}
VIT = {**SHAPE, "patch_size": PATCH, **SIZES, "mlp_dim": 12}
ENCODER = {**SHAPE, "patch_size": PATCH, **MLP}
TEXT_ENCODER = {
    "vocabulary_size": VOCABULARY,
    "embedding_dim": 8,
    "max_sequence_length": LENGTH,
    **MLP,
}
DECODER = {
    "vocabulary_size": VOCABULARY,
    "image_size": SIZE,
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "head_dim": 6,
}
RESNET = {
    "input_conv_filters": [8],
    "input_conv_kernel_sizes": [3],
    # The first is fixed.
    "stackwise_num_filters": [64, 10],
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
    "block_type": "basic_block_vd",
}
HGNET = {
    "depths": [1, 1],
    "embedding_size": 8,
    "hidden_sizes": [12, 16],
    "stem_channels": [3, 4, 8],
    "hidden_act": "relu",
    "use_learnable_affine_block": True,
    "stackwise_stage_filters": [(8, 6, 12, 1, 1, 3), (12, 6, 16, 1, 1, 3)],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, True],
}
MIT = {
    "image_shape": (16, 16, 3),
    "layerwise_depths": [1, 1],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.0,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
    "hidden_dims": [8, 12],
}
VIT_DET = {
    "hidden_size": 8,
    "num_layers": 2,
    "intermediate_dim": 12,
    "num_heads": 2,
    "global_attention_layer_indices": [1],
    "patch_size": PATCH,
    "num_output_channels": 10,
    "window_size": 2,
}
DINO = {**ENCODER, "num_register_tokens": 1}
DINO_V2 = {**DINO, "position_embedding_shape": (SIZE, SIZE, 3)}
VIDEO_PRISM = {
    **SHAPE,
    "num_frames": 2,
    "patch_size": PATCH,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_heads": 2,
    "num_spatial_layers": 1,
    "num_temporal_layers": 1,
    "num_auxiliary_layers": 1,
}
VIDEO = {"pixel_values": _images(SIZE, 2)}
# The groups of its normalizations need multiples of 32.
VAE = {
    "encoder_num_filters": [32] * 4,
    "encoder_num_blocks": [1] * 4,
    "decoder_num_filters": [32] * 4,
    "decoder_num_blocks": [1] * 4,
    "sampler_method": "mode",
}


def _part(cls, arguments):
    """Function that makes a model or layer, and the parts in `arguments`."""
    return partial(_make, cls, arguments)


def _make(cls, arguments):
    if isinstance(cls, str):
        public = vars(keras_hub.layers) | vars(keras_hub.models)
        cls = public[cls]
    made = {
        k: v() if isinstance(v, partial) else v for k, v in arguments.items()
    }
    return cls(**made)


def _config(cls, arguments):
    return partial(lambda: _make(cls, arguments).get_config())


def _entries(modality, rows):
    return {
        name: Entry(_part(name.split(":")[0], arguments), inputs, modality)
        for name, (inputs, arguments) in rows.items()
    }


GEMMA3_VISION = _part(
    "Gemma3VisionEncoder",
    MLP
    | {
        "hidden_dim": 10,
        "image_size": 16,
        "patch_size": PATCH,
        "output_dim": 8,
        "pool_size": 2,
    },
)
# A convolution, a separable one and attention.
MOBILENET_V5 = {
    **convert_arch_def_to_stackwise(
        [
            ["er_r1_k3_s2_e1_c8"],
            ["uir_r1_a3_k3_s2_e2_c16", "mqa_r1_h2_s1_d4_c16"],
        ]
    ),
    "image_shape": (16, 16, 3),
    "stem_size": 8,
}

_VISION = {
    # Convolutions.
    "ResNetBackbone": (_images(), RESNET),
    "ResNetBackbone:bottleneck_v2": (
        _images(),
        RESNET | {"block_type": "bottleneck_block", "use_pre_activation": True},
    ),
    "CSPNetBackbone": (
        _images(16),
        {
            "stem_filters": 8,
            "stem_kernel_size": 3,
            "stem_strides": 1,
            "stackwise_depth": [1, 1],
            "stackwise_strides": [1, 2],
            "stackwise_num_filters": [10, 12],
            "block_type": "dark_block",
            "stage_type": "csp",
            "block_ratio": [0.5],
            "stem_padding": "same",
        },
    ),
    "DenseNetBackbone": (
        _images(16),
        {"stackwise_num_repeats": [1, 1], "growth_rate": 4},
    ),
    "EfficientNetBackbone": (
        _images(),
        {
            "stackwise_width_coefficients": [1.0] * 4,
            "stackwise_depth_coefficients": [1.0] * 4,
            "stackwise_kernel_sizes": [3] * 4,
            "stackwise_num_repeats": [1] * 4,
            "stackwise_input_filters": [8] * 4,
            "stackwise_output_filters": [8] * 4,
            "stackwise_expansion_ratios": [2] * 4,
            "stackwise_squeeze_and_excite_ratios": [0.5] * 4,
            "stackwise_strides": [1] * 4,
            "stackwise_block_types": ["v1", "fused", "unfused", "cba"],
            "dropout": 0.0,
            "num_features": 16,
        },
    ),
    "HGNetV2Backbone": (_images(), SHAPE | HGNET),
    "MobileNetBackbone": (
        _images(),
        SHAPE
        | {
            "stackwise_expansion": [[12, 20]],
            "stackwise_num_blocks": [2],
            "stackwise_num_filters": [[8, 8]],
            "stackwise_kernel_size": [[3, 3]],
            "stackwise_num_strides": [[2, 1]],
            "stackwise_se_ratio": [[None, 0.5]],
            "stackwise_activation": [["relu", "hard_swish"]],
            "stackwise_padding": [[1, 1]],
            "input_num_filters": 8,
            "depthwise_filters": 8,
            "depthwise_stride": 1,
            "depthwise_residual": True,
            "squeeze_and_excite": 0.5,
            "output_num_filters": 16,
            "last_layer_filter": 16,
        },
    ),
    "MobileNetV5Backbone": (
        _images(16),
        MOBILENET_V5 | {"num_features": 10, "msfa_output_resolution": 2},
    ),
    "VGGBackbone": (
        _images(),
        SHAPE
        | {"stackwise_num_repeats": [1, 2], "stackwise_num_filters": [6, 8]},
    ),
    "XceptionBackbone": (
        _images(),
        {
            "stackwise_conv_filters": [[4, 6], [8, 8], [10]],
            "stackwise_pooling": [False, True, False],
        },
    ),
    # Segmentation and detection.
    "BASNetBackbone": (
        _images(32),
        {
            "image_encoder": _part(
                "ResNetBackbone",
                RESNET
                | {
                    "input_conv_filters": [4],
                    "stackwise_num_filters": [64, 8, 8, 8],
                    "stackwise_num_blocks": [1] * 4,
                    "stackwise_num_strides": [1, 2, 2, 2],
                },
            ),
            "num_classes": 4,
            "projection_filters": 4,
        },
    ),
    "DeepLabV3Backbone": (
        _images(16),
        {
            "image_encoder": _part("ResNetBackbone", RESNET),
            "spatial_pyramid_pooling_key": "P3",
            "low_level_feature_key": "P2",
            "upsampling_size": 2,
            "dilation_rates": [2],
            "projection_filters": 8,
        },
    ),
    "RetinaNetBackbone": (
        _images(16),
        {
            "image_encoder": _part("ResNetBackbone", RESNET),
            "min_level": 2,
            "max_level": 4,
            "use_p5": False,
        },
    ),
    "DFineBackbone": (
        _images(32),
        {
            "backbone": _part(
                "HGNetV2Backbone",
                HGNET | {"out_features": ["stage1", "stage2"]},
            ),
            "decoder_in_channels": [8, 8],
            "encoder_hidden_dim": 8,
            "num_labels": 4,
            "num_denoising": 0,
            "learn_initial_query": False,
            "num_queries": 5,
            "anchor_image_size": (32, 32),
            "feat_strides": [4, 8],
            "num_feature_levels": 2,
            "hidden_dim": 8,
            "encoder_in_channels": [12, 16],
            "encode_proj_layers": [1],
            "num_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "num_encoder_layers": 1,
            "hidden_expansion": 0.5,
            "depth_multiplier": 0.5,
            "eval_idx": -1,
            "num_decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 12,
            "decoder_n_points": [2, 2],
            "lqe_hidden_dim": 6,
            "num_lqe_layers": 2,
            "seed": 0,
        },
    ),
    "SAMBackbone": (
        IMAGES
        | {
            "points": ((BATCH, 3, 2), "float"),
            "labels": ((BATCH, 3), (-1, 0, 1)),
            "boxes": ((BATCH, 1, 2, 2), "float"),
            "masks": ((BATCH, 1, SIZE, SIZE, 1), "float"),
        },
        {
            "image_encoder": _part("ViTDetBackbone", SHAPE | VIT_DET),
            "prompt_encoder": _part(
                "SAMPromptEncoder",
                {
                    "hidden_size": 10,
                    "image_embedding_size": (2, 2),
                    "input_image_size": (SIZE, SIZE),
                    "mask_in_channels": 8,
                },
            ),
            "mask_decoder": _part(
                "SAMMaskDecoder",
                {
                    "hidden_size": 10,
                    "num_layers": 1,
                    "intermediate_dim": 12,
                    "num_heads": 2,
                    "embedding_dim": 8,
                    "iou_head_depth": 2,
                    "iou_head_hidden_dim": 6,
                },
            ),
        },
    ),
    # Transformers.
    "DeiTBackbone": (_images(), ENCODER),
    "ViTBackbone": (_images(), VIT),
    "ViTDetBackbone": (_images(), SHAPE | VIT_DET),
    "MiTBackbone": (_images(16), MIT),
    "SegFormerBackbone": (
        _images(16),
        {
            "image_encoder": _part("MiTBackbone", MIT),
            "projection_filters": 10,
        },
    ),
    "SwinTransformerBackbone": (
        _images(16),
        {
            "image_shape": (16, 16, 3),
            "embed_dim": 8,
            "depths": (2, 1),
            "num_heads": (2, 2),
            "window_size": 2,
            "patch_size": PATCH,
            "mlp_ratio": 1.5,
            "drop_path": 0.0,
        },
    ),
    "DINOV2Backbone": (IMAGES, DINO_V2),
    "DINOV2Backbone:swiglu": (IMAGES, DINO_V2 | {"use_swiglu_ffn": True}),
    "DINOV3Backbone": ({"pixel_values": _images()}, DINO),
    "DINOV3Backbone:gated": (
        {"pixel_values": _images()},
        DINO | {"use_gated_mlp": True},
    ),
    "DepthAnythingBackbone": (
        _images(24),
        {
            "image_encoder": _part(
                "DINOV2Backbone", DINO_V2 | {"image_shape": (24, 24, 3)}
            ),
            "reassemble_factors": [2, 1, 0.5],
            "neck_hidden_dims": [6, 10, 12],
            "fusion_hidden_dim": 8,
            "head_hidden_dim": 8,
            "head_in_index": -1,
            "feature_keys": ["stem", "stage1", "stage2"],
        },
    ),
    "CLIPVisionEncoder": (IMAGES, ENCODER),
    "MetaCLIP2VisionEncoder": (IMAGES, ENCODER),
    "SigLIPVisionEncoder": (IMAGES, ENCODER),
    "VideoPrismBackbone": (VIDEO["pixel_values"], VIDEO_PRISM),
}

_MULTIMODAL = {
    "SAM3PromptableConceptBackbone": (
        {
            "pixel_values": _images(16),
            "token_ids": ((BATCH, 4), VOCABULARY),
            "padding_mask": ((BATCH, 4), "bool"),
            "boxes": ((BATCH, 1, 5), "float"),
            "box_labels": ((BATCH, 1), 2),
        },
        {
            "vision_encoder": _part(
                "SAM3VisionEncoder",
                MLP
                | {
                    "image_shape": (16, 16, 3),
                    "patch_size": 8,
                    "fpn_hidden_dim": 8,
                    "fpn_scale_factors": [4.0, 2.0, 1.0, 0.5],
                    "pretrain_image_shape": (16, 16, 3),
                    "window_size": 2,
                    "global_attn_indexes": [1],
                },
            ),
            "text_encoder": _part(
                "SAM3TextEncoder",
                TEXT_ENCODER | {"num_layers": 1, "max_sequence_length": 4},
            ),
            "geometry_encoder": _part(
                "SAM3GeometryEncoder", ONE_LAYER | {"roi_size": 2}
            ),
            "detr_encoder": _part("SAM3DetrEncoder", ONE_LAYER),
            "detr_decoder": _part(
                "SAM3DetrDecoder",
                ONE_LAYER
                | {
                    "image_shape": (16, 16, 3),
                    "patch_size": 8,
                    "num_queries": 3,
                },
            ),
            "mask_decoder": _part(
                "SAM3MaskDecoder",
                {"num_upsampling_stages": 3, "hidden_dim": 8, "num_heads": 2},
            ),
        },
    ),
    "VideoPrismBackbone:text": (
        VIDEO | TOKENS | MASK,
        VIDEO_PRISM | {"vocabulary_size": VOCABULARY, "num_text_layers": 1},
    ),
    "CLIPBackbone": (
        IMAGES | TOKENS,
        {
            "vision_encoder": _part("CLIPVisionEncoder", ENCODER),
            "text_encoder": _part("CLIPTextEncoder", TEXT_ENCODER),
            "projection_dim": 10,
        },
    ),
    "MetaCLIP2Backbone": (
        IMAGES | TOKENS,
        {
            "vision_encoder": _part("MetaCLIP2VisionEncoder", ENCODER),
            "text_encoder": _part("MetaCLIP2TextEncoder", TEXT_ENCODER),
            "projection_dim": 10,
        },
    ),
    "SigLIPBackbone": (
        IMAGES | TOKENS,
        {
            "vision_encoder": _part("SigLIPVisionEncoder", ENCODER),
            "text_encoder": _part("SigLIPTextEncoder", TEXT_ENCODER),
        },
    ),
    "BLIP2Backbone": (
        IMAGES | TOKENS | {"padding_mask": ((BATCH, LENGTH), "bool")},
        {
            "vision_encoder": _part(
                "BLIP2VisionEncoder",
                MLP
                | {
                    "image_size": SIZE,
                    "patch_size": PATCH,
                    "use_patch_bias": True,
                    "use_class_token": True,
                    "use_mha_bias": True,
                    "use_mlp_bias": True,
                    "dropout_rate": 0.0,
                    "layer_norm_epsilon": 1e-6,
                    "initializer_range": 0.02,
                },
            ),
            "qformer": _part(
                "BLIP2QFormer",
                MLP
                | {
                    "hidden_dim": 10,
                    "num_query_tokens": 2,
                    "vision_dim": 8,
                    "cross_attention_frequency": 1,
                    "dropout": 0.0,
                    "layer_norm_epsilon": 1e-6,
                },
            ),
            "language_model": _part(
                "BLIP2CustomOPT",
                ONE_LAYER
                | {
                    "vocabulary_size": VOCABULARY,
                    "num_query_tokens": 2,
                    "dropout": 0.0,
                    "max_sequence_length": LENGTH + 2,
                    "qformer_hidden_dim": 10,
                },
            ),
        },
    ),
    "PaliGemmaBackbone": (
        IMAGES | TOKENS | MASK | {"response_mask": ((BATCH, LENGTH), 2)},
        DECODER
        | {
            "vit_patch_size": PATCH,
            "vit_num_heads": 2,
            "vit_hidden_dim": 10,
            "vit_num_layers": 1,
            "vit_intermediate_dim": 14,
        },
    ),
    "PARSeqBackbone": (
        IMAGES | TOKENS | MASK,
        {
            "image_encoder": _part(
                "ViTBackbone", VIT | {"use_class_token": False}
            ),
            "vocabulary_size": VOCABULARY,
            "max_label_length": LENGTH,
            "decoder_hidden_dim": 8,
            "num_decoder_layers": 1,
            "num_decoder_heads": 2,
            "decoder_mlp_dim": 12,
            "dropout_rate": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "Gemma3Backbone": (
        TOKENS
        | MASK
        | VISION_INDICES
        | {"images": _images(16, 1), "vision_mask": ((BATCH, LENGTH), "bool")},
        DECODER | {"image_size": 16, "vision_encoder": GEMMA3_VISION},
    ),
    "Gemma3nBackbone": (
        {
            # An image, two frames of a clip, tokens of both vocabularies.
            "token_ids": ((1, LENGTH), (1, 11, 12, 12, 14, 17)),
            "padding_mask": ((1, LENGTH), "bool"),
            "images": ((1, 1, 16, 16, 3), "float"),
            "input_features": ((1, 1, 16, 16), "float"),
            "input_features_mask": ((1, 1, 16), 1),  # 0: no padding.
        },
        {
            "text_vocab_size": 19,
            "image_token_id": 11,
            "audio_token_id": 12,
            "vision_vocab_offset": 13,
            "vision_vocab_size": 3,
            "audio_vocab_offset": 16,
            "audio_vocab_size": 3,
            "text_hidden_size": 8,
            "num_hidden_layers": 2,
            "pad_token_id": 0,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "intermediate_size": [12, 12],
            "hidden_activation": "gelu_approximate",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "rope_theta": 10000.0,
            "max_position_embeddings": LENGTH,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 4,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "vision_encoder_config": _config(
                "MobileNetV5Backbone", MOBILENET_V5 | {"use_msfa": False}
            ),
            "vision_hidden_size": 16,
            "audio_encoder_config": _config(
                Gemma3nAudioEncoder,
                {
                    "hidden_size": 10,
                    "input_feat_size": 16,
                    "sscp_conv_channel_size": [4, 6],
                    "sscp_conv_kernel_size": [(3, 3), (3, 3)],
                    "sscp_conv_stride_size": [(2, 2), (2, 2)],
                    "sscp_conv_group_norm_eps": 1e-5,
                    "num_hidden_layers": 1,
                    "rms_norm_eps": 1e-6,
                    "gradient_clipping": 1.0,
                    "residual_weight": 0.5,
                    "num_attention_heads": 2,
                    "attention_chunk_size": 2,
                    "num_attention_context_right": 1,
                    "num_attention_context_left": 3,
                    "attention_logit_cap": 50.0,
                    "conv_kernel_size": 3,
                    "reduction_factor": 1,
                },
            ),
            "audio_hidden_size": 10,
        },
    ),
    "Gemma4Backbone": (
        TOKENS
        | MASK
        | VISION_INDICES
        | {
            "position_ids": ((BATCH, LENGTH), "positions"),
            "pixel_values": ((BATCH, 1, 16, 48), "float"),
            "pixel_position_ids": ((BATCH, 1, 16, 2), 4),
            "vision_mask": ((BATCH, LENGTH), "mask"),
        },
        DECODER
        | {
            "image_size": 16,
            "sliding_window_pattern": 2,
            "vision_encoder": _part(
                "Gemma4VisionEncoder",
                ONE_LAYER
                | {
                    "image_size": 16,
                    "patch_size": PATCH,
                    "head_dim": 4,
                    "output_dim": 8,
                    "num_key_value_heads": 2,
                    "pool_size": 2,
                    "position_embedding_size": 4,
                },
            ),
        },
    ),
    "Gemma4Backbone:audio": (
        TOKENS
        | MASK
        | {
            "position_ids": ((BATCH, LENGTH), "positions"),
            "audio_mel": ((BATCH, 1, 16, 8), "float"),
            "audio_mel_mask": ((BATCH, 1, 16), "mask"),
            "audio_indices": ((BATCH, 4), "positions"),
            "audio_mask": ((BATCH, LENGTH), "mask"),
        },
        DECODER
        | {
            "sliding_window_pattern": 2,
            "num_audio_tokens_per_clip": 4,
            "audio_encoder": _part(
                "Gemma4AudioEncoder",
                {
                    "input_feat_size": 8,
                    "hidden_size": 12,
                    "num_heads": 2,
                    "num_layers": 1,
                    "chunk_size": 4,
                    "context_left": 5,
                    "context_right": 0,
                    "sscp_conv_channels": (4, 6),
                    "output_proj_dims": 10,
                    "output_dim": 8,
                },
            ),
        },
    ),
    "T5Gemma2Backbone:vision": (
        VISION_INDICES
        | {
            "encoder_token_ids": ((BATCH, LENGTH), VOCABULARY),
            "encoder_padding_mask": ((BATCH, LENGTH), "mask"),
            "decoder_token_ids": ((BATCH, 4), VOCABULARY),
            "decoder_padding_mask": ((BATCH, 4), "mask"),
            "images": _images(16, 1),
        },
        {"vocabulary_size": VOCABULARY}
        | {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {
                "hidden_dim": 8,
                "intermediate_dim": 12,
                "num_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 6,
                "layer_types": ["full_attention"],
            }.items()
        }
        | {"vision_encoder": GEMMA3_VISION},
    ),
    "Qwen3_5Backbone:vision": (
        {
            "token_ids": ((1, LENGTH), VOCABULARY),
            "padding_mask": ((1, LENGTH), "mask"),
            # One image of 2 x 4 patches, merged by 2 x 2. Its size is read as
            # numbers: this backbone does not run inside a compiled function.
            "pixel_values": ((1, 8, 2, PATCH, PATCH, 3), "float"),
            "image_grid_thw": ((1, 1, 3), (1, 2, 4)),
            "vision_indices": ((1, 2), "positions"),
        },
        {k: v for k, v in DECODER.items() if k != "image_size"}
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "partial_rotary_factor": 1.0,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 3,
            "mrope_section": [1, 1, 1],
            "vision_encoder": _part(
                Qwen3_5VisionEncoder,
                {
                    "depth": 1,
                    "hidden_size": 8,
                    "num_heads": 2,
                    "intermediate_size": 14,
                    "patch_size": PATCH,
                    "spatial_merge_size": 2,
                    "out_hidden_size": 8,
                    "num_position_embeddings": 4,
                },
            ),
        },
    ),
}

_DIFFUSION = {
    "FluxBackbone": (
        {
            "image": ((1, 4, 8), "float"),
            "image_ids": ((1, 4, 3), "float"),
            "text": ((1, 4, 10), "float"),
            "text_ids": ((1, 4, 3), "float"),
            "y": ((1, 14), "float"),
            "timesteps": ((1,), "float"),
            "guidance": ((1,), "float"),
        },
        {
            "input_channels": 8,
            "hidden_size": 16,
            "mlp_ratio": 1.5,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [2, 2, 4],
            "theta": 10000,
            "use_bias": True,
            "guidance_embed": True,
            "image_shape": (4, 8),
            "text_shape": (4, 10),
            "image_ids_shape": (4, 3),
            "text_ids_shape": (4, 3),
            "y_shape": (14,),
        },
    ),
    "StableDiffusion3Backbone": (
        {
            "images": ((1, 16, 16, 3), "float"),
            "latents": ((1, 2, 2, 16), "float"),
            "clip_l_token_ids": ((1, LENGTH), VOCABULARY),
            "clip_l_negative_token_ids": ((1, LENGTH), VOCABULARY),
            "clip_g_token_ids": ((1, LENGTH), VOCABULARY),
            "clip_g_negative_token_ids": ((1, LENGTH), VOCABULARY),
            "num_steps": ((1,), (2,)),
            "guidance_scale": ((1,), "float"),
        },
        {
            "mmdit_patch_size": 2,
            "mmdit_hidden_dim": 16,
            "mmdit_num_layers": 2,
            "mmdit_num_heads": 2,
            "mmdit_position_size": 4,
            "mmdit_qk_norm": "rms_norm",
            "mmdit_dual_attention_indices": (0,),
            "vae": _part(VAEBackbone, VAE),
            "clip_l": _part(
                "CLIPTextEncoder",
                TEXT_ENCODER | {"intermediate_output_index": -2},
            ),
            "clip_g": _part(
                "CLIPTextEncoder",
                TEXT_ENCODER
                | {"hidden_dim": 10, "embedding_dim": 10}
                | {"intermediate_output_index": -2},
            ),
            "image_shape": (16, 16, 3),
        },
    ),
}

VISION = {
    **_entries("vision", _VISION),
    **_entries("multimodal", _MULTIMODAL),
    **_entries("diffusion", _DIFFUSION),
}
