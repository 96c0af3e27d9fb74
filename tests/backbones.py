"""A tiny instance of every backbone that KerasHub makes public."""

import inspect

import keras_hub
from backbone_entry import Entry as Entry
from backbone_entry import make_backbone as make_backbone
from backbone_entry import make_inputs as make_inputs
from backbones_text import TEXT
from backbones_vision import VISION
from keras_hub.models import Backbone

# Keys are class names, or "Class:variant" for another shape of the same class.
ENTRIES = {**TEXT, **VISION}


def public_backbones():
    """Dict of name to class, for every architecture in `keras_hub.models`.

    A class with two public names is there once, under its own: ESM2Backbone
    is ESMBackbone.
    """
    backbones = [
        x
        for x in vars(keras_hub.models).values()
        if inspect.isclass(x) and issubclass(x, Backbone)
    ]
    return {x.__name__: x for x in backbones if not _is_abstract(x)}


def _is_abstract(backbone):
    """A base takes any `*args`; an architecture names its arguments."""
    parameters = inspect.signature(backbone.__init__).parameters.values()
    return any(p.kind == p.VAR_POSITIONAL for p in parameters)
