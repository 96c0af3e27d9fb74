"""What stands in for downloads and data when the pages' code runs.

Presets are tiny models of the same classes, with tokenizers of a few letters;
the Hugging Face Hub is a folder. What not all of them need is imported late:
`.ci/try_wheel.py` runs in an environment with little in it.
"""

import io

import keras_hub
import numpy as np
from helpers import spoil
from hub_models import randomize

import keras_vera

ROWS = 4
TEXTS = ["a b c d", "d c b", "b d a c", "a a d"]
NAMES = ["ann", "bob"] * 2
LABELS = np.arange(ROWS) % 2


def data():
    """Returns the names that pages use without making them."""
    rng = np.random.default_rng(0)
    return {
        "sentences": TEXTS,
        "texts": TEXTS,
        "labels": LABELS,
        "names": NAMES,
        "val_texts": TEXTS,
        "val_labels": LABELS,
        "val_names": NAMES,
        "images": rng.normal(size=(ROWS, 32, 32, 3)).astype("float32"),
        "image_labels": LABELS,
    }


def pretrained(backbone):
    """Returns the backbone with its weights, the same ones every time."""
    randomize(backbone)
    return backbone


def roberta(preset, **kwargs):
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=13,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )
    return pretrained(backbone)


def text_classifier(preset, num_classes):
    tokens = ["<s>", "<pad>", "</s>", "<mask>", "a", "Ġb", "Ġc", "Ġd", "d"]
    tokens += ["b", "c", "Ġ", "Ġa"]
    tokenizer = keras_hub.tokenizers.RobertaTokenizer(
        {token: i for i, token in enumerate(tokens)},
        ["Ġ a", "Ġ b", "Ġ c", "Ġ d"],
    )
    preprocessor = keras_hub.models.RobertaTextClassifierPreprocessor(
        tokenizer, sequence_length=6
    )
    return keras_hub.models.RobertaTextClassifier(
        roberta(preset), num_classes=num_classes, preprocessor=preprocessor
    )


def causal_lm(preset):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=9,
        model_type="char",
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
    )
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=9,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        head_dim=4,
    )
    return keras_hub.models.GemmaCausalLM(
        pretrained(backbone),
        keras_hub.models.GemmaCausalLMPreprocessor(
            keras_hub.tokenizers.GemmaTokenizer(model.getvalue()),
            sequence_length=6,
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
    return keras_hub.models.ResNetImageClassifier(
        pretrained(backbone), num_classes=num_classes
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
