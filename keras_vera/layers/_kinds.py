"""What each kind of Keras layer contributes to its adapted form.

A new layer type starts here: a mixin with the layer's `Contraction` and what
its adapter adds, and a row in `KINDS`.
"""

import keras
from keras import ops

from keras_vera.layers._base_layer import kernel_shape
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._contraction import Contraction
from keras_vera.layers._contraction import count_tokens
from keras_vera.layers._contraction import dense_contraction
from keras_vera.layers._contraction import einsum_contraction
from keras_vera.layers._mixed_batch import rows_of
from keras_vera.layers._private_reads import check_read
from keras_vera.layers._private_reads import variable_of_base
from keras_vera.layers._vera_layer import VeRALayer
from keras_vera.layers._vera_layer import after_adapter
from keras_vera.product.arithmetic import adapter_product
from keras_vera.product.arithmetic import convolution_product
from keras_vera.product.arithmetic import folded_kernel
from keras_vera.product.arithmetic import folded_product
from keras_vera.product.arithmetic import lookup_product
from keras_vera.product.arithmetic import reverse_lookup_product


class _MatrixKind(VeRALayer):
    """A layer that multiplies by its kernel."""

    activation = after_adapter("activation")
    _kernel = variable_of_base("_kernel")
    quantized_kernel = variable_of_base("quantized_kernel")

    @property
    def kernel(self):
        if self._shows_adapter:
            return self._shown_kernel()
        check_read(self, "kernel")
        return super().kernel

    def call(self, inputs, training=None):
        if self._is_base:
            return super().call(inputs, training=training)
        # Keras lets sparse inputs into its layers.
        inputs = ops.convert_to_tensor(inputs, sparse=False)
        tokens = self._vera_layout.contraction.tokens(inputs.shape)
        if not self._is_folded(tokens, training):
            return self._added_call(inputs, training=training)
        kernel = ops.convert_to_tensor(stored_kernel(self))
        x = self._promoted(inputs, kernel.dtype)
        if x.dtype != kernel.dtype:
            # The base layer's product is in the wider one (`autocast=False`).
            return self._added_call(inputs, training=training)
        output = folded_product(
            x,
            kernel,
            self.projection_slices(),
            *self._vectors(),
            self._vera_layout,
            self._choose_plan(tokens),
        )
        if self.bias is not None:
            output = ops.add(output, self.bias)
        return self._activated(output)

    def _adapter_output(self, inputs, training):
        x = self._promoted(inputs, self.compute_dtype)
        return adapter_product(
            self._dropped(x, training),
            self.projection_slices(),
            *self._vectors_for(x),
            self._vera_layout,
            self._choose_plan(self._vera_layout.contraction.tokens(x.shape)),
        )


class DenseKind(_MatrixKind):
    def _make_contraction(self):
        return dense_contraction(kernel_shape(self))


class EinsumDenseKind(_MatrixKind):
    def _make_contraction(self):
        return einsum_contraction(
            self.equation, self.input_spec.ndim, kernel_shape(self)
        )


class EmbeddingKind(VeRALayer):
    """A table, `W[i]`: the product with one-hot inputs."""

    _embeddings = variable_of_base("_embeddings")

    @property
    def embeddings(self):
        if self._shows_adapter:
            return self._shown_kernel()
        check_read(self, "embeddings")
        return super().embeddings

    def _make_contraction(self):
        vocabulary, width = kernel_shape(self)
        return Contraction((vocabulary,), (width,), one_hot=True)

    def call(self, inputs):
        if self._is_base or self._is_folded(
            count_tokens(inputs.shape), inputs=0
        ):
            return super().call(inputs)
        return self._added_call(inputs)

    def _added_call(self, inputs, *args, **kwargs):
        if not hasattr(inputs, "flat_values"):
            return super()._added_call(inputs, *args, **kwargs)
        # Ragged, on TensorFlow.
        if rows_of(self) is not None:
            raise ValueError(
                f"The embedding '{self.name}' is called on ragged indices, "
                "which an `AdapterBank` cannot mix. Leave this layer out of "
                "`targets`, or pad the indices."
            )
        output = super()._added_call(inputs.flat_values, *args, **kwargs)
        return inputs.with_flat_values(output)

    def _adapter_output(self, inputs, training):
        indices = inputs
        if "int" not in keras.backend.standardize_dtype(indices.dtype):
            indices = ops.cast(indices, "int32")
        added = lookup_product(
            indices,
            self.projection_slices(),
            *self._vectors_for(indices),
            self._vera_layout,
            self.compute_dtype,
        )
        # A one-hot input drops out as a whole.
        kept = self._dropped(ops.ones_like(added[..., :1]), training)
        return added * kept

    def _activated(self, output, training=None):
        return output


class ReversibleEmbeddingKind(EmbeddingKind):
    """A table that also projects onto its rows, `x W^T`, if it is tied."""

    logit_soft_cap = after_adapter("logit_soft_cap")

    def call(self, inputs, reverse=False):
        if self._is_base:
            is_plain = True
        elif reverse:
            is_plain = not self.tie_weights or self._is_folded(
                count_tokens(inputs.shape[:-1])
            )
        else:
            is_plain = self._is_folded(count_tokens(inputs.shape), inputs=0)
        if is_plain:
            return super(EmbeddingKind, self).call(inputs, reverse=reverse)
        return self._added_call(inputs, reverse=reverse)

    def quantized_call(self, inputs, reverse=False):
        if self._is_base or (reverse and not self.tie_weights):
            return super(VeRALayer, self).quantized_call(
                inputs, reverse=reverse
            )
        return self._added_call(inputs, reverse=reverse)

    def _adapter_output(self, inputs, training, reverse=False):
        if not reverse:
            return super()._adapter_output(inputs, training)
        x = ops.cast(inputs, self.reverse_dtype or self.compute_dtype)
        return reverse_lookup_product(
            self._dropped(x, training),
            self.projection_slices(),
            *self._vectors_for(x),
            self._vera_layout,
        )

    def _activated(self, output, reverse=False):
        soft_cap = self.logit_soft_cap
        if reverse and soft_cap is not None:
            output = ops.tanh(output / soft_cap) * soft_cap
        return output


class ConvolutionKind(VeRALayer):
    """A convolution, whose kernel is `[positions * channels, filters]`."""

    activation = after_adapter("activation")
    _kernel = variable_of_base("_kernel")

    @property
    def kernel(self):
        if self._shows_adapter:
            return self._shown_kernel()
        return super().kernel

    def _make_contraction(self):
        *input_dims, filters = kernel_shape(self)
        return Contraction(tuple(input_dims), (filters,))

    def call(self, inputs):
        if self._is_base or self._is_folded(
            self._positions(inputs), inputs=self._inputs
        ):
            return super().call(inputs)
        return self._added_call(inputs)

    def _is_folded(self, tokens, training=None, inputs=None):
        if self.groups > 1 and rows_of(self) is None:
            # `x A` would have to be made for each group.
            return not self._drops_out(training)
        return super()._is_folded(tokens, training, inputs)

    def _adapter_output(self, inputs, training):
        x = self._promoted(inputs, self.compute_dtype)
        x = self._dropped(x, training)
        pair, vectors = self.projection_slices(), self._vectors_for(x)
        if self.groups > 1:
            if rows_of(self) is not None:
                raise ValueError(
                    f"The convolution '{self.name}' has {self.groups} groups, "
                    "which an `AdapterBank` cannot mix. Leave this layer out "
                    "of `targets`."
                )
            kernel = ops.zeros(kernel_shape(self), self.compute_dtype)
            delta = folded_kernel(kernel, pair, *vectors, self._vera_layout)
            return self._convolve(x, delta)
        added = convolution_product(
            x,
            pair,
            *vectors,
            self._vera_layout,
            lambda x, kernel: self._channels_last(self._convolve(x, kernel)),
        )
        if self.data_format == "channels_first":
            added = ops.moveaxis(added, -1, 1)
        return added

    def _convolve(self, x, kernel):
        padding = self.padding
        if padding == "causal":
            x = ops.pad(x, self._compute_causal_padding())
            padding = "valid"
        return ops.conv(
            x,
            kernel,
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    def _channels_last(self, x):
        if self.data_format == "channels_first":
            x = ops.moveaxis(x, 1, -1)
        return x

    def _positions(self, inputs):
        shape = list(self.compute_output_shape(inputs.shape))
        del shape[-1 if self.data_format == "channels_last" else 1]
        return count_tokens(shape)

    @property
    def _inputs(self):
        """The inputs that `x A` multiplies: of blocks, the zeros as well."""
        structure = self._vera_layout.structure
        return structure.m * structure.blocks


KINDS = {
    keras.layers.Dense: DenseKind,
    keras.layers.EinsumDense: EinsumDenseKind,
    keras.layers.ReversibleEmbedding: ReversibleEmbeddingKind,
    keras.layers.Embedding: EmbeddingKind,
    keras.layers.Conv1D: ConvolutionKind,
    keras.layers.Conv2D: ConvolutionKind,
    keras.layers.Conv3D: ConvolutionKind,
}


# What a subclass may give another meaning without changing what the product
# is: how a layer is made, described, saved and masked.
_HARMLESS = {
    "__init__",
    "build",
    "build_from_config",
    "get_build_config",
    "get_config",
    "from_config",
    "save_own_variables",
    "load_own_variables",
    "_check_load_own_variables",
    "variable_serialization_spec",
    "get_weights",
    "set_weights",
    "count_params",
    "compute_mask",
    "supports_masking",
    "compute_output_shape",
    "compute_output_spec",
    "losses",
    "metrics",
    "add_loss",
    "add_metric",
    "enable_lora",
    "quantize",
    "_api_export_path",
    "_api_export_symbol_id",
}
# Of the names with two underscores, those that can.
_REACHING = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}
# Variables that Keras keeps in instances.
_STORED = {"_kernel", "_embeddings", "quantized_kernel"}


def family_of(layer_class):
    """Returns the Keras class that a layer class is made from, or `None`."""
    for keras_class in KINDS:
        if issubclass(layer_class, keras_class):
            return keras_class
    return None


def kind_of(layer_class):
    """Returns the mixin that adapts layers of `layer_class`, or `None`.

    A subclass that overrides what the product goes through computes something
    else than its Keras class, so its adapted form is unknown.
    """
    keras_class = family_of(layer_class)
    if keras_class is None or _overridden(layer_class, keras_class):
        return None
    return KINDS[keras_class]


def reason_against(layer):
    """Returns why VeRA cannot adapt a layer, for messages, or `None`."""
    layer_class = type(layer)
    keras_class = family_of(layer_class)
    if keras_class is None:
        supported = ", ".join(x.__name__ for x in KINDS)
        return f"VeRA adapts {supported} layers, and subclasses of them"
    names = _overridden(layer_class, keras_class)
    # Keras itself puts some of its methods into every layer.
    names += [
        name
        for name in vars(layer)
        if hasattr(keras_class, name) and name not in _HARMLESS
    ]
    if names:
        return (
            f"it overrides {', '.join(f'`{name}`' for name in names)} of "
            f"`keras.layers.{keras_class.__name__}`, so that VeRA cannot know "
            "what it computes with an adapted kernel"
        )
    if layer.built and not isinstance(stored_kernel(layer), keras.Variable):
        return "its kernel is not a `keras.Variable`"
    return None


def _overridden(layer_class, keras_class):
    """Returns what a subclass changes of what its product goes through."""
    own = {}
    for parent in layer_class.__mro__:
        is_keras = parent in keras_class.__mro__
        for name in vars(parent):
            own.setdefault(name, not is_keras)
    return sorted(
        name
        for name, is_own in own.items()
        if is_own
        and name not in _HARMLESS
        and (
            name in _REACHING
            or name in _STORED
            or (hasattr(keras_class, name) and not _is_special(name))
        )
    )


def _is_special(name):
    return name.startswith("__") and name.endswith("__")
