"""What stands in for downloads and data when the pages' code runs.

Presets are tiny models of the same classes, with tokenizers of a few letters;
the Hugging Face Hub is a folder. What not all of them need is imported late:
`.ci/try_wheel.py` runs in an environment with little in it.
"""

import hub_models
import hub_text
import keras
import keras_hub
import numpy as np
from helpers import spoil
from hub_models import randomize
from hub_text import SENTENCES

import keras_vera

ROWS = len(SENTENCES)
NAMES = ["ann", "bob"] * 2
LABELS = np.arange(ROWS) % 2


def data():
    """Returns the names that pages use without making them."""
    rng = np.random.default_rng(0)
    return {
        "sentences": SENTENCES,
        "texts": SENTENCES,
        "labels": LABELS,
        "names": NAMES,
        "val_texts": SENTENCES,
        "val_labels": LABELS,
        "val_names": NAMES,
        "images": rng.normal(size=(ROWS, 32, 32, 3)).astype("float32"),
        "image_labels": LABELS,
    }


def roberta(preset, **kwargs):
    return hub_models.make_backbone("roberta")


def text_classifier(preset, num_classes):
    preprocessor = keras_hub.models.RobertaTextClassifierPreprocessor(
        hub_text.byte_pairs(keras_hub.tokenizers.RobertaTokenizer),
        sequence_length=hub_models.LENGTH,
    )
    return keras_hub.models.RobertaTextClassifier(
        roberta(preset), num_classes=num_classes, preprocessor=preprocessor
    )


def causal_lm(preset):
    tokenizer = hub_text.characters(
        keras_hub.tokenizers.GemmaTokenizer,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
    )
    backbone = hub_models.gemma(vocabulary_size=tokenizer.vocabulary_size())
    randomize(backbone)
    return keras_hub.models.GemmaCausalLM(
        backbone,
        keras_hub.models.GemmaCausalLMPreprocessor(
            tokenizer, sequence_length=hub_models.LENGTH
        ),
    )


def image_classifier(preset, num_classes):
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    randomize(backbone)
    return keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=num_classes
    )


PRESETS = {
    "Backbone": roberta,
    "TextClassifier": text_classifier,
    "CausalLM": causal_lm,
    "ImageClassifier": image_classifier,
}


def install(monkeypatch, folder):
    """Makes everything stand in that would need a network."""
    monkeypatch.chdir(folder)
    for name, make in PRESETS.items():
        monkeypatch.setattr(
            getattr(keras_hub.models, name), "from_preset", make
        )
    from hub_stand_in import Hub

    Hub(folder / "hub").install(monkeypatch)


def make_peft_folder():
    """Saves an adapter of PEFT for the base that `roberta` makes."""
    backbone = roberta(None)
    keras_vera.enable_vera(backbone, rank=4)
    spoil(backbone)
    keras_vera.save_peft_adapter(backbone, "peft-adapter-folder")


def make_files(example):
    """Saves the adapters that a docstring's example has the names of."""
    bases = {
        "sst2": lambda: text_classifier(None, num_classes=2),
        "bob": lambda: text_classifier(None, num_classes=2),
        "french": lambda: roberta(None),
        "polite": lambda: roberta(None),
    }
    for seed, (name, make) in enumerate(bases.items()):
        file = f"{name}.vera.safetensors"
        if file in example:
            base = make()
            keras_vera.enable_vera(base)
            spoil(base, seed)
            keras_vera.save_adapter(base, file)
    if "peft-adapter-folder" in example:
        make_peft_folder()


def model():
    """Returns a plain model with attention, compiled."""
    inputs = keras.Input((4, 8))
    hidden = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = keras.layers.Dense(2, activation="softmax")(hidden)
    plain = keras.Model(inputs, outputs)
    plain.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return plain


def bank():
    """Returns a bank of the adapters of two users, compiled."""
    classifier = text_classifier(None, num_classes=2)
    keras_vera.enable_vera(classifier)
    found = keras_vera.AdapterBank(classifier, capacity=4)
    for name in NAMES[:2]:
        found.add(name)
    found.model.compile(
        keras_vera.vera_optimizer(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return found


# What examples in docstrings use without making it, made when they do.
GIVEN = {
    "keras_hub": lambda: keras_hub,
    "model": model,
    "x": lambda: np.random.default_rng(0).normal(size=(10, 4, 8)),
    "y": lambda: np.arange(10) % 2,
    "classifier": lambda: text_classifier(None, num_classes=2),
    "causal_lm": lambda: causal_lm(None),
    "inputs": lambda: causal_lm(None).preprocessor(SENTENCES)[0],
    "bank": bank,
    "dpo_loss": lambda: lambda outputs, reference: None,
    # Of a small Llama.
    "config": lambda: {**hub_models.TEXT, **hub_models.GROUPED},
}


def given(names):
    """Returns those of the names that are given."""
    made = {name: GIVEN[name]() for name in names if name in GIVEN}
    return data() | made
