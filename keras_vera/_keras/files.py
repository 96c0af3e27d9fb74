"""Keras' own files: loading, names of classes, and places in them."""

import sys

import keras
from keras.src.backend.common import global_state
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import object_registration
from keras.src.saving import saving_lib

# The functions of Keras that give a model other weights.
_LOADERS = {
    keras.Layer.set_weights.__code__,
    saving_lib._load_state.__code__,
    legacy_h5_format._set_weights.__code__,
}


def is_loading_weights():
    """Returns whether an assignment comes from a function that loads weights.

    Keras says nowhere that it loads; but its functions are on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _LOADERS:
            return True
        frame = frame.f_back
    return False


def share_registered_name(plain_class, new_class):
    """Lets files name a class as they name the one it takes the place of."""
    names = object_registration.GLOBAL_CUSTOM_NAMES
    if plain_class in names:
        names[new_class] = names[plain_class]


def is_saving_or_loading():
    """Says whether a `.keras` file is written or read.

    Copies and pickles are such files, too. `clone_model`, `to_json` and HDF5
    files of the older form share no objects.
    """
    return objects_being_loaded() is not None


def serve_legacy_files(weights_of):
    """Lets HDF5 files of the older form hold what `weights_of` returns.

    Keras asks one function for the variables of a layer, in their order in
    such files, and uses their `shape`, `path` and `assign` and their values.

    Args:
        weights_of: Function that takes a layer and returns a list of what is
            used as variables, or `None` for Keras' own list.
    """
    plain = legacy_h5_format._legacy_weights

    def legacy_weights(layer):
        weights = weights_of(layer)
        return plain(layer) if weights is None else weights

    legacy_h5_format._legacy_weights = legacy_weights


def objects_being_loaded():
    """Returns the dict that `load_model` shares objects by, or `None`."""
    return global_state.get_global_attribute("shared_objects/id_to_obj_map")


def hidden_group(store, create=False):
    """Returns the HDF5 group for what plain Keras must not see, or `None`.

    It lies beside the group of a layer's own variables in a weights file,
    where Keras looks at nothing. Stores of another kind have none.
    """
    variables = getattr(store, "_h5_entry_group", None)
    parent = getattr(variables, "parent", None)
    if parent is None:
        return None
    if create:
        return parent.require_group("keras_vera")
    if "keras_vera" not in parent:
        return None
    return saving_lib.safe_get_h5_group(parent, "keras_vera")


def hidden_array(group, name):
    return saving_lib.safe_get_h5_dataset(group, name)[()]
