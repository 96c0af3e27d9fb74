"""Classes that take the place of others in objects that exist."""

import keras

from keras_vera._keras.files import share_registered_name


class _Unnoticed:
    """First before a class that notes its subclasses: it gets to know none."""

    def __init_subclass__(cls, **kwargs):
        pass


class _OfLayer(_Unnoticed):
    """What is made by way of the class of a layer is plain.

    So are unpickled ones: a class is pickled by the name that it shares.
    """

    def __new__(cls, *args, **kwargs):
        return plain_class_of(cls)(*args, **kwargs)

    @classmethod
    def from_config(cls, config):
        return plain_class_of(cls).from_config(config)

    def __reduce_ex__(self, protocol):
        function, *rest = super().__reduce_ex__(protocol)
        if getattr(function, "__self__", None) is type(self):
            function = getattr(plain_class_of(type(self)), function.__name__)
        return function, *rest


def class_like(plain_class, mixins, namespace=None):
    """Returns a class that takes the place of another in an object.

    Keras keys saved layers by class name and finds classes by module and
    name, or by the name they are registered by, so the new class goes by the
    plain one's.
    """
    namespace = {
        "__module__": plain_class.__module__,
        "__qualname__": plain_class.__qualname__,
        "__doc__": plain_class.__doc__,
        "vera_plain_class": plain_class,
        **(namespace or {}),
    }
    first = _OfLayer if issubclass(plain_class, keras.Layer) else _Unnoticed
    if not issubclass(plain_class, first):
        mixins = (first, *mixins)
    new_class = type(plain_class.__name__, (*mixins, plain_class), namespace)
    share_registered_name(plain_class, new_class)
    return new_class


def plain_class_of(layer_class):
    """Returns the class of a layer before any took its place."""
    while issubclass(layer_class, _OfLayer):
        layer_class = layer_class.vera_plain_class
    return layer_class
