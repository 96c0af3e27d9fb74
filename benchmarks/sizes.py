"""Bytes of one adapter at real widths: ours, as LoRA, PEFT's, Keras' LoRA.

Files are saved and measured. The 32 blocks of Llama-7B do not fit a small
machine, so one and two of them are measured, and the difference is taken 31
times; sizes are linear in the blocks.

    python benchmarks/sizes.py
"""

import gc
import os
import tempfile

import keras_hub
import numpy as np
import peft
import transformers

import keras_vera

LLAMA_LINEAR = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_gate_dense",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]


def roberta():
    keras_model = keras_hub.models.RobertaBackbone(
        vocabulary_size=1000,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
    )
    config = transformers.RobertaConfig(vocab_size=1000)
    return keras_model, transformers.RobertaModel(config)


def vit():
    keras_model = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
    )
    return keras_model, transformers.ViTModel(transformers.ViTConfig())


def llama(layers):
    keras_model = keras_hub.models.LlamaBackbone(
        vocabulary_size=1000,
        num_layers=layers,
        num_query_heads=32,
        num_key_value_heads=32,
        hidden_dim=4096,
        intermediate_dim=11008,
    )
    config = transformers.LlamaConfig(vocab_size=1000, num_hidden_layers=layers)
    return keras_model, transformers.LlamaModel(config)


# Name: rank, targets here, those of Keras' LoRA, and of PEFT.
SETTINGS = {
    "RoBERTa-base, query and value": (
        1024,
        "attention-qv",
        None,
        ["query", "value"],
    ),
    "ViT-B, query and value": (256, "attention-qv", None, ["q_proj", "v_proj"]),
    "Llama-7B, all linear layers": (
        1024,
        "all-linear",
        LLAMA_LINEAR,
        r".*_proj",
    ),
}


def sizes(models, rank, targets, lora_targets, peft_targets):
    """Returns the trained numbers and the bytes of each kind of file."""
    keras_model, torch_model = models
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def size(name):
            return os.path.getsize(os.path.join(folder, name))

        keras_vera.enable_vera(keras_model, rank=rank, targets=targets)
        found["trained numbers"] = sum(
            int(np.prod(v.shape)) for v in keras_model.trainable_variables
        )
        name = "ours.vera.safetensors"
        for dtype in ("float32", "float16"):
            keras_vera.save_adapter(
                keras_model, os.path.join(folder, name), dtype=dtype
            )
            found[f"keras_vera, {dtype}"] = size(name)
        for as_lora in (True, 16):
            keras_vera.save_peft_adapter(keras_model, folder, as_lora=as_lora)
            name = "exact" if as_lora is True else f"rank {as_lora}"
            found[f"as LoRA, {name}"] = size("adapter_model.safetensors")
        keras_vera.disable_vera(keras_model)
        keras_model.enable_lora(8, target_layer_names=lora_targets)
        keras_model.save_lora_weights(os.path.join(folder, "keras.lora.h5"))
        found["Keras LoRA, rank 8"] = size("keras.lora.h5")
        adapted = peft.get_peft_model(
            torch_model, peft.VeraConfig(r=rank, target_modules=peft_targets)
        )
        name = "adapter_model.safetensors"
        adapted.save_pretrained(folder)
        found["PEFT VeRA"] = size(name)
        adapted.peft_config["default"].save_projection = False
        adapted.save_pretrained(folder)
        found["PEFT VeRA, no matrices"] = size(name)
    del models, keras_model, torch_model, adapted
    gc.collect()
    return found


def main():
    for name, settings in SETTINGS.items():
        if name.startswith("Llama"):
            one, two = (sizes(llama(n), *settings) for n in (1, 2))
            found = {key: one[key] + 31 * (two[key] - one[key]) for key in one}
        else:
            make = roberta if name.startswith("RoBERTa") else vit
            found = sizes(make(), *settings)
        print(f"\n{name}, VeRA of rank {settings[0]}")
        for key, value in found.items():
            print(f"  {key:24}{value:14,}")


if __name__ == "__main__":
    main()
