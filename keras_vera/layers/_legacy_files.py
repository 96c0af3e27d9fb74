"""HDF5 files of the older form, `model.save("model.h5")`.

They hold the merged model, as Keras' other files do, with the variables in
the order in which the plain model has them. An adapted model takes such a
file as its base.
"""

import warnings

from keras_vera import _keras
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._in_place import InPlaceVeRA


def plain_weights(layer):
    """Returns what stands for the weights of the plain layer, in their order.

    Returns:
        A list; or `None` where nothing is adapted or frozen by it.
    """
    layers = _keras.flatten_in_order(layer)
    if not any("vera_frozen" in vars(below) for below in layers):
        return None
    weights = [weight for below in layers for weight in _own_weights(below)]
    weights = list({id(_variable(w)): w for w in weights}.values())
    if not _was_trainable(layer):
        return weights
    first = [w for w in weights if _was_trainable(_variable(w))]
    return first + [w for w in weights if not _was_trainable(_variable(w))]


def _was_trainable(layer_or_variable):
    frozen = vars(layer_or_variable).get("vera_frozen", layer_or_variable)
    return frozen.trainable


def _own_weights(layer):
    is_adapted = isinstance(layer, InPlaceVeRA)
    trained = getattr(layer, "vera_trained", None)
    base = {}
    if is_adapted or trained is not None:
        base = layer.vera_adaptation.values_in_files()
    for variable in _keras.own_variables(layer):
        if is_adapted and variable.name.startswith("vera_"):
            continue
        if is_adapted and variable is stored_kernel(layer):
            yield _MergedKernel(layer)
        elif trained is not None and id(variable) in trained.ids:
            yield _TrainedWeight(layer, variable, base)
        elif id(variable) in base:
            yield _Weight(layer, variable, base)
        else:
            yield variable


def _variable(weight):
    return getattr(weight, "variable", weight)


class _Weight:
    """Stands for a variable, where Keras saves or loads its value."""

    def __init__(self, layer, variable, base=()):
        self.layer, self.variable, self.base = layer, variable, base
        self.path = variable.path
        self.shape = tuple(variable.shape)

    def __array__(self, dtype=None, copy=None):
        if id(self.variable) in self.base:
            return self.base[id(self.variable)]
        return _keras.to_numpy(self.variable)

    def assign(self, value):
        self.variable.assign(value)


class _MergedKernel(_Weight):
    def __init__(self, layer):
        super().__init__(layer, stored_kernel(layer))

    def __array__(self, dtype=None, copy=None):
        if self.layer.vera_adaptation.beside_base() is None:
            return _keras.to_numpy(self.layer.adapted_kernel())
        warnings.warn(
            "A quantized kernel takes no adapter, so this file holds the base "
            "model. Keep the adapter with `keras_vera.save_adapter`.",
            stacklevel=2,
        )
        return super().__array__()

    def assign(self, value):
        self.variable.assign(value)
        self.layer.become_base()


class _TrainedWeight(_Weight):
    def assign(self, value):
        self.variable.assign(value)
        self.layer.vera_trained.note(self.layer)


_keras.serve_legacy_files(plain_weights)
