"""A layer's product seen as a matrix product `[..., m] x [m, n]`."""

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
    summed_axes: tuple = ()  # Axes of the input that are only summed over.
    input_permutation: tuple | None = None
    kernel_permutation: tuple | None = None
    output_permutation: tuple | None = None

    @property
    def m(self):
        return math.prod(self.input_dims)

    @property
    def n(self):
        return math.prod(self.output_dims)

    def input_matrix(self, x):
        """Returns `x` as `[..., m]`."""
        if self.summed_axes:
            x = ops.sum(x, axis=self.summed_axes)
        if self.input_permutation:
            x = ops.transpose(x, self.input_permutation)
        if len(self.input_dims) == 1:
            return x
        kept = ops.shape(x)[: len(x.shape) - len(self.input_dims)]
        return ops.reshape(x, (*kept, self.m))

    def output_tensor(self, y):
        """Returns `y`, `[..., n]`, in the layout of the layer's output."""
        if len(self.output_dims) != 1:
            y = ops.reshape(y, (*ops.shape(y)[:-1], *self.output_dims))
        if self.output_permutation:
            y = ops.transpose(y, self.output_permutation)
        return y

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
    operands, output = equation.replace(" ", "").split("->")
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
