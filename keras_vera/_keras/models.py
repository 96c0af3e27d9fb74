"""All living models, and what they have compiled."""

import functools
import gc
import weakref

import keras

from keras_vera._keras.optimizers import _reset_optimizer_of
from keras_vera._keras.structure import flatten_layers

# Compiled functions that models keep. KerasHub's Gemma 4 has one for
# generation with an assistant model.
COMPILED = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
    "_cached_spec_generate_fn",
)


def reset_compiled(layers):
    """Makes every living model that holds one of `layers` trace afresh.

    Compiled functions have the old layers and the old set of trainable
    variables baked in; so has a built optimizer, which starts again (its
    moments belong to variables that no longer train). Models do not know who
    contains them, hence the search.
    """
    holding, others = models_with(layers)
    for model in holding:
        for name in COMPILED:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        _reset_optimizer_of(model, others)
    if keras.backend.backend() == "torch":
        _track_parameters_again(layers, holding)


def models_with(layers):
    """Returns the living models that hold one of `layers`, and the others."""
    sought = {id(layer) for layer in layers}
    holding, others = [], []
    for model in living_models():
        below = flatten_layers(model)
        is_holding = not sought.isdisjoint(id(layer) for layer in below)
        (holding if is_holding else others).append(model)
    return holding, others


# How often parameters were made or removed.
_changes = 0


def _track_parameters_again(layers, models):
    """Lets PyTorch list the variables that there are now.

    `parameters()` lists what was there at build time. Layers do not know who
    contains them either, and only models are known, so that a layer above
    lists its variables again when it is asked.
    """
    global _changes
    _changes += 1
    for layer in [*layers, *models]:
        _track_variables(layer)


def _track_variables(layer):
    for below in flatten_layers(layer):
        if below.built and not _lists_present_variables(below):
            below._track_variables()
            # Not of the layer, which is to be as it was in the end.
            below.torch_params.vera_changes = _changes


def _lists_present_variables(layer):
    listed = getattr(layer, "torch_params", None)
    return getattr(listed, "vera_changes", 0) == _changes


def _list_parameters_anew():
    """Relies on `TorchLayer.named_parameters`, through which all go."""
    from keras.src.backend.torch.layer import TorchLayer

    plain = TorchLayer.named_parameters

    @functools.wraps(plain)
    def named_parameters(layer, *args, **kwargs):
        if not _lists_present_variables(layer):
            _track_variables(layer)
        return plain(layer, *args, **kwargs)

    TorchLayer.named_parameters = named_parameters


if keras.backend.backend() == "torch":
    _list_parameters_anew()


# Weak references to all models, by id: not a `WeakSet`, which asks models of
# users whether they are equal. The garbage collector, which knows them as
# well, does not list what `gc.freeze()` put aside.
_models: dict = {}


def living_models():
    models = [reference() for reference in list(_models.values())]
    # Keras leaves instances behind that it made and never initialized.
    return [m for m in models if m is not None and "_layers" in vars(m)]


def remember_model(model):
    """Makes `living_models` list a model that was not made by its class."""

    def forget(reference, key=id(model)):
        if _models.get(key) is reference:
            del _models[key]

    _models[id(model)] = weakref.ref(model, forget)


def _remember_all_models():
    """Relies on `keras.Model.__new__`, which makes every model, also those
    that are loaded, cloned and copied. Those made before are found once."""
    make_plain = keras.Model.__new__

    @functools.wraps(make_plain)
    def make(cls, *args, **kwargs):
        model = make_plain(cls, *args, **kwargs)
        remember_model(model)
        return model

    keras.Model.__new__ = staticmethod(make)
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    for candidate in gc.get_objects():
        if issubclass(type(candidate), keras.Model):
            remember_model(candidate)
    if frozen:
        gc.freeze()


_remember_all_models()
