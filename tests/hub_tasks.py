"""A tiny task model of every type in KerasHub, with its preprocessor."""

from collections.abc import Callable
from dataclasses import dataclass

import hub_text
import keras
import keras_hub
import numpy as np
from backbones import ENTRIES
from backbones import make_backbone
from hub_text import SENTENCES

CLASSES = 3
ROWS = 4


@dataclass(frozen=True)
class Case:
    """A task model, and raw data as its users have it.

    Args:
        backbone: Key in `backbones.ENTRIES`.
        make: Function that takes the backbone and returns the task.
        data: `(x, y)` for `fit`; `None` where the preprocessor makes `y`.
        targets: What to adapt.
        head: Layers outside the backbone that have weights.
        prompt: What `generate` is given, if the task generates.
        rounding: Largest difference, relative too, that is rounding.
    """

    backbone: str
    make: Callable
    data: tuple
    targets: object = "attention-qv"
    head: tuple = ()
    prompt: object = None
    rounding: float = 3e-5


def make_task(case):
    """The task of `case`, the same one every time."""
    backbone = make_backbone(ENTRIES[case.backbone])
    return case.make(backbone)


def _bert(backbone):
    return keras_hub.models.BertMaskedLM(
        backbone,
        keras_hub.models.BertMaskedLMPreprocessor(
            hub_text.words(),
            sequence_length=6,
            mask_selection_rate=0.5,
            mask_selection_length=2,
        ),
    )


def _bart(backbone):
    return keras_hub.models.BartSeq2SeqLM(
        backbone,
        keras_hub.models.BartSeq2SeqLMPreprocessor(
            hub_text.byte_pairs(keras_hub.tokenizers.BartTokenizer),
            encoder_sequence_length=6,
            decoder_sequence_length=6,
        ),
    )


def _moonshine(backbone):
    tokenizer = hub_text.characters(
        keras_hub.tokenizers.MoonshineTokenizer,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
    )
    return keras_hub.models.MoonshineAudioToText(
        backbone,
        keras_hub.models.MoonshineAudioToTextPreprocessor(
            keras_hub.layers.MoonshineAudioConverter(),
            tokenizer,
            decoder_sequence_length=6,
        ),
    )


def _resnet(backbone):
    converter = keras_hub.layers.ResNetImageConverter(
        image_size=(8, 8), scale=1 / 255
    )
    return keras_hub.models.ResNetImageClassifier(
        backbone,
        CLASSES,
        keras_hub.models.ResNetImageClassifierPreprocessor(converter),
    )


def _deeplab(backbone):
    converter = keras_hub.layers.DeepLabV3ImageConverter(
        image_size=(16, 16), scale=1 / 255
    )
    return keras_hub.models.DeepLabV3ImageSegmenter(
        backbone,
        CLASSES,
        preprocessor=keras_hub.models.DeepLabV3ImageSegmenterPreprocessor(
            converter, resize_output_mask=True
        ),
    )


def _retinanet(backbone):
    converter = keras_hub.layers.RetinaNetImageConverter(
        image_size=(16, 16), scale=1 / 255
    )
    return keras_hub.models.RetinaNetObjectDetector(
        backbone,
        CLASSES,
        preprocessor=keras_hub.models.RetinaNetObjectDetectorPreprocessor(
            converter
        ),
        pre_logits_num_conv_layers=1,
        prediction_decoder=EveryBox(),
    )


class EveryBox(keras.layers.Layer):
    """Gives all boxes: a choice of some turns rounding into other boxes."""

    bounding_box_format = "yxyx"

    def call(self, boxes, classes, images=None):
        return {"boxes": boxes, "classes": classes}


def _stable_diffusion(backbone):
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    tokens += [*"abcd", *(f"{x}</w>" for x in "abcd"), "ab"]
    clip = keras_hub.models.CLIPPreprocessor(
        keras_hub.tokenizers.CLIPTokenizer(
            {token: i for i, token in enumerate(tokens)}, ["a b"]
        ),
        sequence_length=6,
    )
    return keras_hub.models.StableDiffusion3TextToImage(
        backbone,
        keras_hub.models.StableDiffusion3TextToImagePreprocessor(clip, clip),
    )


def _images(size):
    shape = (ROWS, size, size, 3)
    return np.random.default_rng(0).integers(256, size=shape).astype("float32")


BOXES = {
    "boxes": np.array([[[0, 0, 19, 20], [2, 0, 20, 18]]] * ROWS, "float32"),
    "labels": np.array([[0, 2]] * ROWS, "float32"),
}
AUDIO = np.random.default_rng(0).normal(size=(ROWS, 1600)).astype("float32")
CASES = {
    "masked lm": Case(
        "BertBackbone",
        _bert,
        (SENTENCES, None),
        # The table also makes the logits.
        targets=["attention-qv", "embedding"],
        head=("mlm_head",),
    ),
    "seq2seq lm": Case(
        "BartBackbone",
        _bart,
        (
            {"encoder_text": SENTENCES, "decoder_text": SENTENCES[::-1]},
            None,
        ),
        prompt={"encoder_text": SENTENCES, "decoder_text": SENTENCES},
    ),
    "image classifier": Case(
        "ResNetBackbone",
        _resnet,
        (_images(10), np.arange(ROWS) % CLASSES),
        targets="conv",
        head=("predictions",),
    ),
    "segmenter": Case(
        "DeepLabV3Backbone",
        _deeplab,
        (_images(20), np.eye(CLASSES)[_images(20)[..., 0].astype(int) % 3]),
        targets="conv",
        head=("segmentation_output",),
    ),
    "detector": Case(
        "RetinaNetBackbone",
        _retinanet,
        (_images(20), BOXES),
        targets="conv",
        head=("box_head", "classification_head"),
        # Boxes are exponentials of what the model gives.
        rounding=1e-3,
    ),
    "text to image": Case(
        "StableDiffusion3Backbone",
        _stable_diffusion,
        None,
        targets="attention",
        prompt=["a b", "d c"],
    ),
    "audio to text": Case(
        "MoonshineBackbone",
        _moonshine,
        ({"audio": AUDIO, "text": SENTENCES}, None),
        prompt={"audio": AUDIO, "text": SENTENCES},
    ),
}
