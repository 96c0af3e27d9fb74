"""The arithmetic of VeRA, with the letters and shapes of the paper.

    y = x W + b * ((x A * d) B)

x: [T, m], W: [m, n], A: [m, r], d: [r], B: [r, n], b: [n]
(Kopiczko et al., 2024, arXiv 2310.11454, equation 2). A and B come with
unit-variance entries; the Kaiming factors `sqrt(2 / m)` of A and `sqrt(2 / r)`
of B (section 3.3) are applied here, so that a narrow layer that shares the
pair with a wide one has the factor of its own m.

The gradients come from one small matrix. With the upstream gradient g: [T, n]
and M = (x A)^T g = A^T (x^T g): [r, n],

    grad_d_k = sum_j B_kj b_j M_kj          grad_b_j = sum_k d_k B_kj M_kj

so that of all activations only x is kept for the backward pass. W, A and B
are constants: no gradient reaches them.
"""

from dataclasses import dataclass

from keras import backend
from keras import ops

from keras_vera import _keras
from keras_vera.product.custom_gradient import call_with_gradient
from keras_vera.product.custom_gradient import computed_again
from keras_vera.product.custom_gradient import sums_in_bfloat16
from keras_vera.product.plan import Plan
from keras_vera.product.structure import by_example


def folded_product(x, kernel, pair, d, b, layout, plan):
    """Returns `x (W + (A * d) B * b)`, base and adapter in one product.

    Args:
        x: Tensor, the layer's input.
        kernel: Tensor, the layer's frozen kernel, in the dtype of `x`.
        pair: The tensors `(A, B)`, of the layer's m and n.
        d: Float32 tensor of shape `(rank,)`.
        b: Float32 tensor of shape `(n,)`.
        layout: A `Layout`.
        plan: A `Plan`.

    Returns:
        A tensor in the dtype of `x`.
    """
    product = _FoldedProduct(layout, plan)
    return call_with_gradient(product, (x, d, b), (kernel, *pair))


def adapter_product(x, pair, d, b, layout, plan):
    """Returns what the adapter adds, `b * ((x A * d) B)`, without W.

    In a mixed batch, where each example has its own adapter, these are two
    shared matrix products, and products with the vectors of the example,
    however many adapters there are. The backend then differentiates it: there
    is no one M, since each example has its own d and b.

    Args:
        x: Tensor, the layer's input. In a mixed batch, its first axis is that
            of the examples, or has as many rows for each (windows, beams),
            one after the other.
        pair: The tensors `(A, B)`, of the layer's m and n.
        d: Float32 tensor of shape `(rank,)`, or `(examples, rank)`.
        b: Float32 tensor of shape `(n,)`, or `(examples, n)`.
        layout: A `Layout`.
        plan: A `Plan`.

    Returns:
        A tensor in the dtype of `x`.
    """
    product = _AdditiveProduct(layout, plan)
    if is_mixed(d):
        return product.forward((), x, d, b, *pair)[0]
    return call_with_gradient(product, (x, d, b), pair)


def lookup_product(indices, pair, d, b, layout, dtype):
    """Returns what the adapter of an embedding adds, `b * ((A[i] * d) B)`.

    Args:
        indices: Integer tensor, of any shape.
        pair, d, b, layout: As in `adapter_product`.
        dtype: String, the compute dtype.

    Returns:
        A tensor of shape `(*indices.shape, n)`, of type `dtype`.
    """
    product = _Lookup(layout, dtype)
    if is_mixed(d):
        return product.forward((), d, b, indices, *pair)[0]
    return call_with_gradient(product, (d, b), (indices, *pair))


def reverse_lookup_product(x, pair, d, b, layout):
    """Returns what the adapter adds to `x W^T`: `((x * b) B^T * d) A^T`.

    For few tokens or mixed batches; the backend differentiates it.

    Args:
        x: Tensor of shape `(..., n)`.
        pair, d, b, layout: As in `adapter_product`.

    Returns:
        A tensor of shape `(..., m)`, in the dtype of `x`.
    """
    structure = layout.structure
    v = ops.reshape(x, (-1, structure.n))
    y = _transposed(v, *pair, d, b, structure)
    return ops.reshape(y, (*ops.shape(x)[:-1], structure.m))


def convolution_product(x, pair, d, b, layout, convolve):
    """Returns what the adapter of a convolution adds, `b * ((x A * d) B)`.

    `x A` is a convolution with A as its kernel. For few positions or mixed
    batches; the backend differentiates it.

    Args:
        x: Tensor, the layer's input.
        pair, d, b, layout: As in `adapter_product`.
        convolve: Function that takes `x` and a kernel, whose last axis may
            have any size, and returns a tensor with the channels last.

    Returns:
        A tensor with the channels last, in the dtype of `x`.
    """
    contraction, structure = layout.contraction, layout.structure
    a, b_matrix = pair
    factor_a, _ = structure.factors
    a = structure.full_a(ops.cast(a, x.dtype))
    a = ops.reshape(a, (*contraction.input_dims, a.shape[-1]))
    h = convolve(x * factor_a, a)
    positions = ops.shape(h)[:-1]
    h = structure.from_full_a(ops.reshape(h, (-1, a.shape[-1])))
    z = _up(h, b_matrix, d, b, structure, x.dtype)
    return ops.reshape(z, (*positions, structure.n))


def folded_kernel(kernel, pair, d, b, layout):
    """Returns the merged kernel; of its gradient, d and b get theirs.

    For layers whose own operation takes it, whatever that is. The gradient G
    that reaches the kernel gives M = A^T G.
    """
    return call_with_gradient(_FoldedKernel(layout), (d, b), (kernel, *pair))


def is_mixed(d):
    """Whether each example has a d of its own."""
    return len(d.shape) == 2


def merged_kernel(kernel, pair, d, b, layout, dtype=None):
    """Returns `W + (A * d) B * b`, added in float32, in the dtype of `W`.

    Every merge, export, saved and folded kernel is made here.

    Args:
        kernel: Tensor, in the layer's own shape.
        pair: The tensors `(A, B)`, of the layer's m and n.
        d: Float32 tensor of shape `(rank,)`.
        b: Float32 tensor of shape `(n,)`.
        layout: A `Layout`.
        dtype: String, in which the product of A and B is computed. Defaults
            to float32.
    """
    exact = _vector_dtype(kernel)
    dtype = dtype or exact
    a, b_matrix = pair
    structure = layout.structure
    factor_a, factor_b = structure.factors
    d = ops.cast(d, exact) * (factor_a * factor_b)
    a = ops.cast(structure.scale_rows(ops.cast(a, exact), d), dtype)
    delta = structure.product(a, ops.cast(b_matrix, dtype))
    delta = ops.cast(delta, exact) * ops.cast(b, exact)
    delta = layout.contraction.kernel_tensor(delta)
    return ops.cast(ops.cast(kernel, exact) + delta, kernel.dtype)


@dataclass(frozen=True)
class Layout:
    """How the tensors of a layer are matrices: all that the arithmetic knows
    of the layer."""

    contraction: object
    structure: object


@dataclass(frozen=True)
class _FoldedProduct:
    """`x (W + (A * d) B * b)`: the base layer's own products, and one of A
    and B that does not grow with the tokens."""

    layout: Layout
    plan: Plan

    def forward(self, wanted, x, d, b, kernel, a, b_matrix):
        folded = self._folded(kernel, a, b_matrix, d, b)
        y = self.layout.contraction.product(x, folded)
        return y, (folded,) if self.plan.kept and wanted[0] else ()

    def backward(self, g, wanted, kept, once, x, d, b, kernel, a, b_matrix):
        contraction = self.layout.contraction
        grad_x = None
        g_matrix = contraction.output_matrix(g)
        if wanted[0]:
            if kept:
                (folded,) = kept
            else:
                again = computed_again(d, g)
                folded = self._folded(kernel, a, b_matrix, again, b)
            folded = contraction.kernel_matrix(folded)
            grad_x = ops.matmul(g_matrix, ops.transpose(folded))
            grad_x = contraction.input_tensor(grad_x, ops.shape(x))
        if not (wanted[1] or wanted[2]):
            return grad_x, None, None
        x_matrix = contraction.input_matrix(x)
        return grad_x, *_vector_gradients(
            x_matrix, g_matrix, a, b_matrix, d, b, self.layout, self.plan, once
        )

    def _folded(self, kernel, a, b_matrix, d, b):
        return merged_kernel(
            kernel, (a, b_matrix), d, b, self.layout, kernel.dtype
        )


@dataclass(frozen=True)
class _AdditiveProduct:
    """`b * ((x A * d) B)`, for few tokens."""

    layout: Layout
    plan: Plan

    def forward(self, wanted, x, d, b, a, b_matrix):
        contraction, structure = self.layout.contraction, self.layout.structure
        factor_a, _ = structure.factors
        # The factor comes first: x A would overflow in float16.
        h = contraction.input_matrix(x) * factor_a
        h = structure.down(h, ops.cast(a, x.dtype))
        z = _up(h, b_matrix, d, b, structure, x.dtype)
        return contraction.output_tensor(z, ops.shape(x)), ()

    def backward(self, g, wanted, kept, once, x, d, b, a, b_matrix):
        contraction, structure = self.layout.contraction, self.layout.structure
        g_matrix = contraction.output_matrix(g)
        grad_x = None
        if wanted[0]:
            grad_x = _transposed(g_matrix, a, b_matrix, d, b, structure)
            grad_x = contraction.input_tensor(grad_x, ops.shape(x))
        if not (wanted[1] or wanted[2]):
            return grad_x, None, None
        x_matrix = contraction.input_matrix(x)
        return grad_x, *_vector_gradients(
            x_matrix, g_matrix, a, b_matrix, d, b, self.layout, self.plan, once
        )


@dataclass(frozen=True)
class _Lookup:
    """`b * ((A[i] * d) B)`: x is one-hot, so that `x A` are rows of A."""

    layout: Layout
    dtype: str

    def forward(self, wanted, d, b, indices, a, b_matrix):
        structure = self.layout.structure
        factor_a, _ = structure.factors
        h = self._rows(indices, a, self.dtype) * factor_a
        z = _up(h, b_matrix, d, b, structure, self.dtype)
        return ops.reshape(z, (*ops.shape(indices), structure.n)), ()

    def backward(self, g, wanted, kept, once, d, b, indices, a, b_matrix):
        structure = self.layout.structure
        dtype = _summing_dtype(g)
        g = ops.reshape(ops.cast(g, dtype), (-1, structure.n))

        def gradients(indices, g):
            m_matrix = structure.m_of_tokens(self._rows(indices, a, dtype), g)
            return _gradients_from_m(m_matrix, b_matrix, d, b, structure)

        indices = ops.reshape(indices, (-1,))
        return _keras.summed_over_rows(gradients, indices, g)

    def _rows(self, indices, a, dtype):
        indices = ops.reshape(indices, (-1,))
        return self.layout.structure.rows(ops.cast(a, dtype), indices)


@dataclass(frozen=True)
class _FoldedKernel:
    """`W + (A * d) B * b`, as what another operation takes."""

    layout: Layout

    def forward(self, wanted, d, b, kernel, a, b_matrix):
        return merged_kernel(kernel, (a, b_matrix), d, b, self.layout), ()

    def backward(self, g, wanted, kept, once, d, b, kernel, a, b_matrix):
        structure = self.layout.structure
        g = self.layout.contraction.kernel_matrix(g)
        m_matrix = structure.m_of_kernel(ops.cast(a, g.dtype), g)
        return _gradients_from_m(m_matrix, b_matrix, d, b, structure)


def _up(h, b_matrix, d, b, structure, dtype):
    """Returns `b * ((h * d) B)`, with h = x A: [T, n]."""
    exact = _vector_dtype(h)
    _, factor_b = structure.factors
    h = structure.scale(ops.cast(h, exact), ops.cast(d, exact) * factor_b)
    z = structure.up(ops.cast(h, dtype), ops.cast(b_matrix, dtype))
    z = by_example(ops.cast(z, exact), ops.cast(b, exact))
    return ops.cast(z, dtype)


def _transposed(g, a, b_matrix, d, b, structure):
    """Returns `((g * b) B^T * d) A^T`: [T, m], with g: [T, n]."""
    dtype, exact = g.dtype, _vector_dtype(g)
    factor_a, factor_b = structure.factors
    v = ops.cast(by_example(ops.cast(g, exact), ops.cast(b, exact)), dtype)
    v = structure.up_transposed(v, ops.cast(b_matrix, dtype))
    d = ops.cast(d, exact) * (factor_a * factor_b)
    v = ops.cast(structure.scale(ops.cast(v, exact), d), dtype)
    return structure.down_transposed(v, ops.cast(a, dtype))


def _vector_gradients(x, g, a, b_matrix, d, b, layout, plan, once):
    """Returns the gradients of d and b, from M by the cheaper route."""
    structure = layout.structure
    dtype = _summing_dtype(x)

    def gradients(x, g):
        if plan.m_from_kernel:
            kernel_gradient = ops.matmul(ops.transpose(x), g)
            m_matrix = structure.m_of_kernel(
                ops.cast(a, dtype), kernel_gradient
            )
        else:
            # Query, key and value read the same x through the same rows of A.
            u = once(
                lambda: structure.down(x, ops.cast(a, dtype)),
                key=(
                    layout.contraction.reading,
                    structure.rank,
                    structure.blocks,
                ),
                tensor=a,
            )
            # On PyTorch, `ops.matmul` gives float32 for float64.
            m_matrix = structure.m_of_tokens(u, ops.cast(g, u.dtype))
        return _gradients_from_m(m_matrix, b_matrix, d, b, structure)

    return _keras.summed_over_rows(
        gradients, ops.cast(x, dtype), ops.cast(g, dtype)
    )


def _gradients_from_m(m_matrix, b_matrix, d, b, structure):
    """Returns the gradients of d and b."""
    exact = _vector_dtype(m_matrix)
    factor_a, factor_b = structure.factors
    # Here, as scaling x would be one more pass over all tokens.
    factor = factor_a * factor_b
    grad_d, grad_b = structure.sums(
        ops.cast(m_matrix, exact),
        ops.cast(b_matrix, exact),
        ops.cast(d, exact) * factor,
        ops.cast(b, exact),
    )
    return ops.cast(grad_d * factor, d.dtype), ops.cast(grad_b, b.dtype)


def _summing_dtype(x):
    """Sums over all tokens overflow in float16.

    In bfloat16, some products of TensorFlow on CPUs sum in bfloat16 as well,
    depending on the processor: counting by ones then ends at 256.
    """
    dtype = backend.standardize_dtype(x.dtype)
    is_inexact = dtype == "float16" or (
        dtype == "bfloat16" and sums_in_bfloat16()
    )
    return "float32" if is_inexact else x.dtype


def _vector_dtype(x):
    dtype = backend.standardize_dtype(x.dtype)
    return "float64" if dtype == "float64" else "float32"
