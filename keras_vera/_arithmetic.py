"""The arithmetic of VeRA, with the letters and shapes of the paper.

    y = x W + b * ((x A * d) B)

x: [..., m], W: [m, n], A: [m, r], d: [r], B: [r, n], b: [n]
(Kopiczko et al., 2024, arXiv 2310.11454, equation 2). A and B come with
unit-variance entries; the Kaiming factors `sqrt(2 / m)` of A and `sqrt(2 / r)`
of B (section 3.3) are applied here, so that a narrow layer that shares the
pair with a wide one has the factor of its own m.
"""

import math

from keras import backend
from keras import ops


def kaiming_factor(fan_in):
    return math.sqrt(2.0 / fan_in)


def adapter_product(x, a, b_matrix, d, b):
    """Returns `b * ((x A * d) B)` in the dtype of `x`.

    The vectors are applied in float32, and so are their gradients summed.
    """
    dtype = backend.standardize_dtype(x.dtype)
    vector_dtype = _vector_dtype(dtype)
    m, r = a.shape
    # The factor comes first: x A would overflow in float16.
    h = ops.matmul(x * kaiming_factor(m), ops.cast(a, dtype))
    d = ops.cast(d, vector_dtype) * kaiming_factor(r)
    h = ops.cast(ops.cast(h, vector_dtype) * d, dtype)
    z = ops.cast(ops.matmul(h, ops.cast(b_matrix, dtype)), vector_dtype)
    return ops.cast(z * ops.cast(b, vector_dtype), dtype)


def merged_kernel(kernel, a, b_matrix, d, b):
    """Returns `W + (A * d) B * b`, added in float32, in the dtype of `W`.

    Every merge, export and saved kernel is made here.
    """
    dtype = backend.standardize_dtype(kernel.dtype)
    vector_dtype = _vector_dtype(dtype)
    m, r = a.shape
    a, b_matrix, d, b = (ops.cast(v, vector_dtype) for v in (a, b_matrix, d, b))
    factor = kaiming_factor(m) * kaiming_factor(r)
    delta = ops.matmul(a * (d * factor), b_matrix) * b
    return ops.cast(ops.cast(kernel, vector_dtype) + delta, dtype)


def _vector_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"
