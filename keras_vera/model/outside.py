"""What lies outside a base when it is adapted, and whether it has moved."""

import weakref

from keras_vera import _keras
from keras_vera.layers._fingerprint import kernel_fingerprint


class Outside:
    """Knows what may have trained outside a base, also if it no longer does.

    A head that has trained and is frozen then (training in stages) is part
    of what was trained. What a model did not hold yet when it was adapted
    counts as trained: its numbers are nowhere else.
    """

    def __init__(self):
        self._noted = {}

    def note(self, model, in_base):
        """Notes all variables of living models around a base.

        Args:
            model: The model that is adapted.
            in_base: List of the layers of the base.
        """
        base = {id(layer) for layer in in_base}
        for other in [model, *_keras.living_models()]:
            layers = _keras.flatten_layers(other)
            if base.isdisjoint(map(id, layers)):
                continue
            for layer in layers:
                if id(layer) not in base:
                    self._note(layer)

    def _note(self, layer):
        for variable in _keras.own_variables(layer):
            if id(variable) not in self._noted:
                value = kernel_fingerprint(variable)
                self._noted[id(variable)] = weakref.ref(variable), value

    def is_as_it_was(self, variable):
        """Says whether a variable was there, with the value that it has."""
        reference, value = self._noted.get(id(variable), (None, None))
        if reference is None or reference() is not variable:
            return False
        return kernel_fingerprint(variable) == value
