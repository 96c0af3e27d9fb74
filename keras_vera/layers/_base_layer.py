"""What is read from a layer whether it is adapted or not."""

import keras

from keras_vera import _keras


def stored_kernel(layer):
    """Returns the variable that holds the kernel, packed if quantized so."""
    for flag in ("is_gptq_calibrated", "is_awq_calibrated"):
        if getattr(layer, flag, False):
            return _keras.stored_attribute(layer, "quantized_kernel")
    is_table = isinstance(layer, keras.layers.Embedding)
    return _keras.stored_attribute(
        layer, "_embeddings" if is_table else "_kernel"
    )


def kernel_shape(layer):
    """Returns the kernel's shape before any quantization."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.input_dim, layer.output_dim
    if layer.quantization_mode is None:
        return tuple(stored_kernel(layer).shape)
    if isinstance(layer, keras.layers.Dense):
        return layer.input_spec.axes[-1], layer.units
    # Where the stored kernel has another shape, Keras keeps this one.
    shape = getattr(layer, "original_kernel_shape", None)
    return tuple(stored_kernel(layer).shape if shape is None else shape)


def kernel_dtype(layer):
    """Returns the dtype of the kernel, or how it is quantized."""
    return layer.quantization_mode or layer.variable_dtype
