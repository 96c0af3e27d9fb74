"""Adapting a built layer without replacing it: its class is exchanged.

Everything that holds the layer (graphs of Functional models, attributes,
lists, optimizers, files) goes on seeing the same object, of a class with the
same name. Wrapping or patching the layer breaks one of these.
"""

import functools
import json
import warnings

import numpy as np

from keras_vera import _keras
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._base_scope import suspended
from keras_vera.layers._fingerprint import kernel_fingerprint
from keras_vera.layers._kinds import kind_of
from keras_vera.layers._vera_layer import VeRALayer
from keras_vera.product.projection import EXPLICIT
from keras_vera.product.projection import pair_sha256

_VECTORS = ("vera_lambda_d", "vera_lambda_b")
# In a hidden group: the file holds the base where plain Keras looks.
_BESIDE = "beside_base"


class InPlaceVeRA:
    """Saving and loading of a layer that was adapted in place.

    Files of the model hold the merged kernel under the name that plain Keras
    expects, so they behave as the adapted model without this package. Weight
    files also hold the vectors, where plain Keras does not look; a file that
    is loaded into a model with the same base kernels gives back base and
    vectors as they were. So Keras' own checkpoints neither lose an adapter
    nor apply it twice.
    """

    # Whether the kernel holds an adapter that a weights file merged into it.
    vera_base_is_merged = False

    def set_adapter_bias(self, bias):
        """Gives the layer a bias that belongs to its adapter.

        Args:
            bias: Array of the shape of the layer's bias, or `None` for the
                base layer's own.
        """
        base_bias = self.vera_base_bias
        if base_bias is None and bias is not None:
            self.vera_base_bias = _keras.to_numpy(self.bias).copy()
        elif base_bias is not None and bias is None:
            bias = self.__dict__.pop("vera_base_bias")
        if bias is not None:
            self.bias.assign(bias)

    def get_config(self):
        # In Keras' own files; elsewhere `_frozen.py` says what is in a config.
        return {**super().get_config(), "trainable": False}

    @suspended()
    def save_own_variables(self, store):
        if self.vera_adaptation.beside_base() is not None:
            self.save_base_variables(base_store(self, store))
        else:
            # `self.kernel` is the merged one, and is what Keras saves.
            super().save_own_variables(store)
        if self.quantization_mode is not None:
            warnings.warn(
                "A quantized kernel takes no adapter, so this file holds the "
                "base model for all who load it, but for a model on which "
                "VeRA is enabled. Keep the adapter with "
                "`keras_vera.save_adapter`.",
                stacklevel=2,
            )
        group = new_group(self, store)
        if group is not None:
            group["identity"] = json.dumps(self._identity())
            for name in _VECTORS:
                group[name] = _keras.to_numpy(getattr(self, name))
            if _BESIDE in group and self.vera_base_bias is not None:
                group["bias"] = _keras.to_numpy(self.bias)

    @suspended()
    def load_own_variables(self, store):
        group = _keras.hidden_group(store)
        if group is not None and self._is_of_this_adapter(group):
            kernel = stored_kernel(self)
            base_kernel = _keras.to_numpy(kernel).copy()
            super().load_own_variables(store)
            kernel.assign(base_kernel)
            for name in _VECTORS:
                array = _keras.hidden_array(group, name)
                getattr(self, name).assign(array)
            if "bias" in group:
                # The file has that of the base where Keras looks.
                self.__dict__.pop("vera_base_bias", None)
                self.set_adapter_bias(_keras.hidden_array(group, "bias"))
            return
        super().load_own_variables(store)
        is_quantized = self.quantization_mode is not None
        self.become_base(holds_merged(store) and not is_quantized)

    def become_base(self, is_merged=False):
        """Takes the kernel and the bias that were loaded as the base.

        Args:
            is_merged: Whether the kernel holds an adapter.
        """
        self.__dict__.pop("vera_base_bias", None)
        self.reset_vectors()
        self.vera_base_is_merged = is_merged

    def _check_load_own_variables(self, store):
        # Keras counts all variables of the layer; files lack the adapter's.
        expected = len(_keras.own_variables(self)) - 2 - len(_VECTORS)
        if len(store.keys()) != expected:
            raise ValueError(
                f"Layer '{self.name}' expected {expected} variables, but "
                f"received {len(store.keys())} variables during loading."
            )

    def _identity(self):
        identity = {
            "kernel": kernel_fingerprint(stored_kernel(self)),
            "seed": self.projection.seed,
            "rank": self.projection.rank,
            "structure": self.projection.structure,
        }
        rank = self.vera_lambda_d.shape[0]
        if rank != self.projection.rank:
            identity["layer_rank"] = rank
        adaptation = getattr(self, "vera_adaptation", None)
        if adaptation is not None and adaptation.trained.names():
            identity["trained"] = adaptation.trained.names()
        projection = self.projection
        if projection.structure == EXPLICIT or not projection.is_made_of_seed(
            *projection.beginnings()
        ):
            identity["sha256"] = pair_sha256(*self.projection_slices())
        return identity

    def _is_of_this_adapter(self, group):
        if "identity" not in group:
            # The layer trains in full there.
            return False
        identity = _read_json(group, "identity")
        if "trained" in identity:
            # Files of before have numbers of the process in these names.
            names = map(_keras.without_number, identity["trained"])
            identity["trained"] = list(names)
        is_same = identity == self._identity()
        return is_same and is_beside_this_base(self, group)


class _BaseStore:
    """A store that gets the base's values where Keras writes others."""

    def __init__(self, store, values):
        self._store, self._values = store, values

    def __setitem__(self, key, value):
        self._store[key] = self._values.get(id(value), value)

    def __getattr__(self, name):
        return getattr(self._store, name)


def base_store(layer, store):
    """Returns a store in which plain Keras finds the base, if it must.

    What is quantized takes no adapter, and its neighbors would be neither
    base nor adapted with theirs: what the adapter has is in the hidden group
    then, of every layer of one adaptation.
    """
    values = layer.vera_adaptation.values_in_files()
    return _BaseStore(store, values) if values else store


def new_group(layer, store):
    """Returns the hidden group of a layer in a file, or `None`."""
    group = _keras.hidden_group(store, create=True)
    beside = layer.vera_adaptation.beside_base()
    if group is not None and beside is not None and _BESIDE not in group:
        group[_BESIDE] = json.dumps(beside)
    return group


def is_beside_this_base(layer, group):
    """Whether an adapter that a file has beside its base is that of a layer."""
    if _BESIDE not in group:
        return True
    return _read_json(group, _BESIDE) == layer.vera_adaptation.beside_base()


def holds_merged(store):
    """Whether a file has the adapter of a layer where plain Keras looks."""
    group = _keras.hidden_group(store)
    return group is not None and _BESIDE not in group


def _read_json(group, name):
    return json.loads(np.asarray(_keras.hidden_array(group, name)).item())


def is_adapted(layer):
    return isinstance(layer, VeRALayer)


def adapt_layer(layer, projection, *settings):
    """Turns a built Keras layer into its adapted form, in place.

    If it fails half-way, `restore_layer` undoes it. The settings are those of
    `VeRALayer.attach_vera`.
    """
    layer.__class__ = _adapted_class(type(layer))
    layer.attach_vera(projection, *settings)


def restore_layer(layer, merge=False):
    """Turns an adapted layer back into the plain one, in place.

    Args:
        layer: An adapted layer; a public `VeRADense` or `VeRAEinsumDense`
            becomes the Keras layer that it extends.
        merge: Whether the kernel keeps the adapter.
    """
    if merge:
        stored_kernel(layer).assign(layer.adapted_kernel())
        layer.__dict__.pop("vera_base_bias", None)
    elif isinstance(layer, InPlaceVeRA):
        layer.set_adapter_bias(None)
    if hasattr(layer, "vera_lambda_d"):
        layer.detach_vera()
    layer.__dict__.pop("vera_base_is_merged", None)
    layer.__class__ = layer.vera_plain_class


@functools.cache
def _adapted_class(plain_class):
    """Returns the adapted form of a layer class, made once for each."""
    mixins = (InPlaceVeRA, kind_of(plain_class))
    return _keras.class_like(plain_class, mixins)
