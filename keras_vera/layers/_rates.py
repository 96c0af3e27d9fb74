"""How fast the vectors of a layer train, for `vera_optimizer`."""

import math

import numpy as np
from keras import ops

from keras_vera.layers._base_layer import stored_kernel

# Of the paper. The learning rates of `vera_optimizer` are for it.
USUAL_D_INITIAL = 0.1
# Few kernels are larger. Smaller ones than 1 have yet to grow: a pooler that
# was never trained, or a projection that starts near 0.
_SMALLEST, _LARGEST = 1.0, 8.0


def rate_factor(layer, name):
    """Returns by how much the rate of a vector differs from the usual one.

    The layer depends on `d * b` alone, and the steps of Adam on their rates
    alone. So where `d` starts s times as high, its rate is s times as high,
    and that of `b` s times as low; and where the base's outputs are s times as
    large, the rate of `b` is: all else is then as it was.

    Args:
        layer: Adapted layer.
        name: String, `"vera_lambda_d"` or `"vera_lambda_b"`.
    """
    scale = abs(layer._vera_settings.d_initial) / USUAL_D_INITIAL
    return scale if name == "vera_lambda_d" else base_size(layer) / scale


def base_size(layer):
    """Returns how large the base's outputs are for inputs of size 1.

    That is their root mean square, without a bias, for inputs that are
    independent; for a table, that of its entries. Rounded to a power of 2, so
    that layers share few rates, and within 1 and 8.
    """
    quantized = layer.quantization_mode not in (None, "float8")
    size = (_measured_size if quantized else _kernel_size)(layer)
    if not _SMALLEST < size < math.inf:
        return _SMALLEST
    return min(2.0 ** round(math.log2(size)), _LARGEST)


def _kernel_size(layer):
    kernel = ops.convert_to_tensor(stored_kernel(layer))
    mean = float(ops.mean(ops.square(ops.cast(kernel, "float32"))))
    contraction = layer._vera_layout.contraction
    return math.sqrt(mean * (1 if contraction.one_hot else contraction.m))


def _measured_size(layer):
    """The same of a kernel that is packed: by what the base makes of inputs."""
    contraction = layer._vera_layout.contraction
    rng = np.random.default_rng(0)
    if contraction.one_hot:
        outputs = layer._base_output(rng.integers(contraction.m, size=64))
    else:
        x = rng.normal(size=(16, contraction.m)).astype(layer.compute_dtype)
        x = contraction.input_tensor(x, _shape_of(layer, len(x)))
        # The bias drops out.
        outputs = layer._base_output(x) - layer._base_output(-x)
        outputs = outputs / 2
    outputs = ops.cast(outputs, "float32")
    return math.sqrt(float(ops.mean(ops.square(outputs))))


def _shape_of(layer, tokens):
    """Returns the shape of an input of so many tokens."""
    contraction = layer._vera_layout.contraction
    if contraction.equation is None:
        return tokens, contraction.m
    ndim = layer.input_spec.ndim - len(contraction.summed_axes)
    kept = ndim - len(contraction.input_dims)
    sizes = [tokens, *[1] * (kept - 1), *contraction.input_dims]
    shape = [None] * ndim
    for size, axis in zip(sizes, contraction.input_permutation or range(ndim)):
        shape[axis] = size
    for axis in contraction.summed_axes:
        shape.insert(axis, 1)
    return shape
