"""A layer's product seen as a matrix product `[T, m] x [m, n]`."""

import math
from dataclasses import dataclass

from keras import ops


@dataclass(frozen=True)
class Contraction:
    """How input, kernel and output of a layer map to matrices.

    The contracted axes, in the kernel's order, make `m`; the kernel's other
    axes, in the kernel's order, make `n`. Every permutation is `None` where
    it would change nothing, so that a plain dense layer costs nothing extra.
    """

    input_dims: tuple  # The kernel's contracted dimensions.
    output_dims: tuple  # The kernel's other dimensions.
    equation: str | None = None  # Of `ops.einsum`; else it is `ops.matmul`.
    summed_axes: tuple = ()  # Axes of the input that are only summed over.
    input_permutation: tuple | None = None
    kernel_permutation: tuple | None = None
    output_permutation: tuple | None = None
    one_hot: bool = False  # Whether the input holds indices of kernel rows.

    @property
    def m(self):
        return math.prod(self.input_dims)

    @property
    def n(self):
        return math.prod(self.output_dims)

    @property
    def kernel_axes(self):
        """Which axes of the kernel are its inputs, and its outputs."""
        count = len(self.input_dims)
        order = self.kernel_permutation or tuple(
            range(count + len(self.output_dims))
        )
        return order[:count], order[count:]

    @property
    def reading(self):
        """All that `input_matrix` depends on."""
        return self.input_dims, self.summed_axes, self.input_permutation

    def product(self, x, kernel):
        """Returns what the base layer computes, in the base layer's way."""
        if self.equation is None:
            return ops.matmul(x, kernel)
        return ops.einsum(self.equation, x, kernel)

    def input_matrix(self, x):
        """Returns `x` as `[T, m]`."""
        if self.summed_axes:
            x = ops.sum(x, axis=self.summed_axes)
        if self.input_permutation:
            x = ops.transpose(x, self.input_permutation)
        return ops.reshape(x, (-1, self.m))

    def input_tensor(self, matrix, shape):
        """Undoes `input_matrix`; a sum is undone by repetition."""
        summed = [shape[axis] for axis in self.summed_axes]
        x = ops.reshape(matrix, (*self._kept(shape), *self.input_dims))
        if self.input_permutation:
            x = ops.transpose(x, _inverse(self.input_permutation))
        if summed:
            x = ops.expand_dims(x, self.summed_axes)
            x = ops.broadcast_to(x, shape)
        return x

    def output_tensor(self, matrix, shape):
        """Returns `matrix`, `[T, n]`, in the layout of the layer's output.

        Args:
            matrix: Tensor of shape `(T, n)`.
            shape: Tuple, the shape of the layer's input.
        """
        y = ops.reshape(matrix, (*self._kept(shape), *self.output_dims))
        if self.output_permutation:
            y = ops.transpose(y, self.output_permutation)
        return y

    def output_matrix(self, y):
        """Undoes `output_tensor`."""
        if self.output_permutation:
            y = ops.transpose(y, _inverse(self.output_permutation))
        return ops.reshape(y, (-1, self.n))

    def tokens(self, shape):
        """Returns T for an input of this shape."""
        return count_tokens(self._kept(shape))

    def _kept(self, shape):
        """Returns the dimensions of the input that the output has too."""
        left = [
            size
            for axis, size in enumerate(shape)
            if axis not in self.summed_axes
        ]
        permutation = self.input_permutation or range(len(left))
        count = len(left) - len(self.input_dims)
        return [left[axis] for axis in permutation][:count]

    def kernel_matrix(self, kernel):
        """Returns `kernel` as `[m, n]`."""
        if self.kernel_permutation:
            kernel = ops.transpose(kernel, self.kernel_permutation)
        return ops.reshape(kernel, (self.m, self.n))

    def kernel_tensor(self, matrix):
        """Returns `matrix`, `[m, n]`, in the layout of the kernel."""
        kernel = ops.reshape(matrix, self.input_dims + self.output_dims)
        if self.kernel_permutation:
            kernel = ops.transpose(kernel, _inverse(self.kernel_permutation))
        return kernel


def count_tokens(dims):
    """Returns the product of dimensions, some of which may be unknown.

    TensorFlow traces `fit` for batches of any size, and so do exports: what
    is unknown counts as 32, the batch size that Keras has by default.
    """
    return math.prod([x if isinstance(x, int) else 32 for x in dims])


def dense_contraction(kernel_shape):
    return Contraction(tuple(kernel_shape[:1]), tuple(kernel_shape[1:]))


def einsum_contraction(equation, input_ndim, kernel_shape):
    """Returns the `Contraction` of an `EinsumDense` equation.

    Args:
        equation: String, such as `"btd,dnh->btnh"` or `"...x,xy->...y"`.
        input_ndim: Integer, the input's number of axes, batch included.
        kernel_shape: Tuple of integers.

    Returns:
        A `Contraction`.

    Raises:
        ValueError: If an axis is shared by input, kernel and output, or if
            one operand names an axis twice: such a layer is not one matrix.
    """
    equation = equation.replace(" ", "")
    operands, output = equation.split("->")
    inputs, kernel = operands.split(",")
    for operand in (inputs, kernel, output):
        letters = operand.replace("...", "")
        repeated = sorted({c for c in letters if letters.count(c) > 1})
        if repeated:
            raise ValueError(
                f"VeRA cannot adapt the equation '{equation}': the axes "
                f"{repeated} occur twice in '{operand}'. Leave this layer out "
                "of `targets`."
            )
    input_axes = _axes(inputs, input_ndim)
    elided = [axis for axis in input_axes if isinstance(axis, int)]
    output_axes = _axes(output, len(output.replace("...", "")) + len(elided))
    kernel_axes = list(kernel)
    shared = sorted(set(kernel_axes) & set(input_axes) & set(output_axes))
    if shared:
        raise ValueError(
            f"VeRA cannot adapt the equation '{equation}': the axes {shared} "
            "are shared by input, kernel and output, so the layer holds one "
            "matrix for each of their indices. Leave it out of `targets`."
        )
    contracted = [axis for axis in kernel_axes if axis in input_axes]
    new = [axis for axis in kernel_axes if axis not in input_axes]
    kept = [axis for axis in output_axes if axis not in new]
    summed = [axis for axis in input_axes if axis not in kept + contracted]
    left = [axis for axis in input_axes if axis not in summed]
    dims = dict(zip(kernel_axes, kernel_shape))
    return Contraction(
        input_dims=tuple(dims[axis] for axis in contracted),
        output_dims=tuple(dims[axis] for axis in new),
        equation=equation,
        summed_axes=tuple(input_axes.index(axis) for axis in summed),
        input_permutation=_permutation(left, kept + contracted),
        kernel_permutation=_permutation(kernel_axes, contracted + new),
        output_permutation=_permutation(kept + new, output_axes),
    )


def _axes(operand, ndim):
    """Splits an operand into axes; elided ones are numbered."""
    if "..." not in operand:
        return list(operand)
    before, after = operand.split("...")
    elided = range(ndim - len(before) - len(after))
    return [*before, *elided, *after]


def _permutation(old, new):
    permutation = tuple(old.index(axis) for axis in new)
    return None if permutation == tuple(range(len(new))) else permutation


def _inverse(permutation):
    return tuple(permutation.index(i) for i in range(len(permutation)))
