"""Numbers that train in RoBERTa-base, by method, and in Llamas.

Counted on one block with real widths, of which RoBERTa-base has 12.

    python benchmarks/counts.py
"""

import math

import keras_hub
import peft
import transformers

import keras_vera

BLOCKS = 12
WIDTHS = {"num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}
# Targets: of keras_vera, of Keras' LoRA, of PEFT.
TARGETS = {
    "query and value": ("attention-qv", ["query", "value"], ["query", "value"]),
    "all linear layers": (
        "all-linear",
        [
            *("query", "key", "value", "attention_output"),
            *("feedforward_intermediate_dense", "feedforward_output_dense"),
        ],
        ["query", "key", "value", "dense"],
    ),
}


def make_keras():
    return keras_hub.models.RobertaBackbone(
        vocabulary_size=9, num_layers=1, max_sequence_length=8, **WIDTHS
    )


def trained(variables):
    return BLOCKS * sum(math.prod(v.shape) for v in variables)


def of_vera(targets, rank):
    backbone = make_keras()
    keras_vera.enable_vera(backbone, rank=rank, targets=targets[0])
    return trained(backbone.trainable_variables)


def of_keras_lora(targets, rank):
    backbone = make_keras()
    backbone.enable_lora(rank, target_layer_names=targets[1])
    return trained(backbone.trainable_variables)


def of_peft(targets, config):
    config.target_modules = targets[2]
    model = transformers.RobertaModel(
        transformers.RobertaConfig(vocab_size=9, num_hidden_layers=1),
        add_pooling_layer=False,
    )
    model = peft.get_peft_model(model, config)
    return trained(p for p in model.parameters() if p.requires_grad)


METHODS = {
    "keras_vera, rank 256": lambda x: of_vera(x, 256),
    "keras_vera, rank 1024": lambda x: of_vera(x, 1024),
    "PEFT's VeRA, rank 256": lambda x: of_peft(x, peft.VeraConfig(r=256)),
    "PEFT's VeRA, rank 1024": lambda x: of_peft(x, peft.VeraConfig(r=1024)),
    "Keras' LoRA, rank 8": lambda x: of_keras_lora(x, 8),
    "PEFT's LoRA, rank 8": lambda x: of_peft(x, peft.LoraConfig(r=8)),
}


def table():
    rows = [f"| | {' | '.join(TARGETS)} |", f"|---|{'---|' * len(TARGETS)}"]
    for name, count in METHODS.items():
        counts = [f"{count(targets):,}" for targets in TARGETS.values()]
        rows.append(f"| {name} | {' | '.join(counts)} |")
    return "\n".join(rows)


# Blocks, width, that of the feed-forward layers; in all of them a head has 128.
LLAMAS = {"7B": (32, 4096, 11008), "13B": (40, 5120, 13824)}
LLAMA_VOCABULARY = 32_000


def of_llama(blocks, width, ffn, rank=1024):
    """Returns numbers of a Llama: trained, in A and B, in the base."""
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=1,
        num_layers=1,
        num_query_heads=width // 128,
        num_key_value_heads=width // 128,
        hidden_dim=width,
        intermediate_dim=ffn,
        dtype="bfloat16",
    )
    # Beside its block: embedding, norm and output projection.
    block = backbone.count_params() - 3 * width
    keras_vera.enable_vera(backbone, rank=rank, targets="all-linear")
    vectors = sum(math.prod(v.shape) for v in backbone.trainable_variables)
    shared = backbone.count_params() - block - 3 * width - vectors
    base = blocks * block + (2 * LLAMA_VOCABULARY + 1) * width
    return blocks * vectors, shared, base


def llama_table():
    rows = [
        "| rank 1024, all linear layers | trained | MB of vectors | MB of A "
        "and B | GB of the base in bfloat16, int8 |",
        "|---|---|---|---|---|",
    ]
    for name, sizes in LLAMAS.items():
        vectors, shared, base = of_llama(*sizes)
        rows.append(
            f"| Llama {name} | {vectors:,} | {4e-6 * vectors:.1f} | "
            f"{4e-6 * shared:.0f} | {2e-9 * base:.1f}, {1e-9 * base:.1f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
    print(llama_table())
