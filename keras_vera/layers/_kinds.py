"""What each kind of Keras layer contributes to its adapted form.

A new layer type starts here: a mixin with the layer's `Contraction`, and a row
in `KINDS`.
"""

import keras

from keras_vera.layers._contraction import dense_contraction
from keras_vera.layers._contraction import einsum_contraction
from keras_vera.layers._vera_layer import VeRALayer


class DenseKind(VeRALayer):
    def _make_contraction(self):
        return dense_contraction(self._kernel.shape)


class EinsumDenseKind(VeRALayer):
    def _make_contraction(self):
        return einsum_contraction(
            self.equation, self.input_spec.ndim, self._kernel.shape
        )


KINDS = {
    keras.layers.Dense: DenseKind,
    keras.layers.EinsumDense: EinsumDenseKind,
}


def kind_of(layer_class):
    """Returns the mixin that adapts layers of `layer_class`, or `None`.

    A subclass with a `call` of its own computes something else than its base
    class, so its adapted form is unknown.
    """
    for keras_class, mixin in KINDS.items():
        if (
            issubclass(layer_class, keras_class)
            and layer_class.call is keras_class.call
        ):
            return mixin
    return None
