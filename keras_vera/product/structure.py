"""How A and B are laid out, and the products that the arithmetic is made of.

T: tokens, m: inputs, n: outputs, r: rank. Both structures use the leading
rows of the stored A and the leading columns of the stored B, whatever m and n
are, so that one pair serves all layers. What `down` returns, [T, r] in the
dense structure, goes to `scale`, `up` and `m_of_tokens` as it is.
"""

import math
from dataclasses import dataclass

import numpy as np
from keras import ops


@dataclass(frozen=True)
class Dense:
    """The pair of the paper. A: [m, r], B: [r, n]."""

    m: int
    n: int
    rank: int
    one_hot: bool = False  # Whether an input picks one row of A.
    blocks = 1

    @property
    def width(self):
        """The entries of a row of A, or of a column of B, that are stored."""
        return self.rank

    @property
    def depth(self):
        """The terms in the sum for one entry of `A B`."""
        return self.rank

    @property
    def factors(self):
        """The Kaiming factors of A and B (section 3.3 of the paper)."""
        # Of a one-hot input, one entry is added up.
        fan_in = 1 if self.one_hot else self.m
        return math.sqrt(2 / fan_in), math.sqrt(2 / self.rank)

    def narrow(self, a, b_matrix):
        """Returns what this rank uses of a pair of a higher rank."""
        return a[:, : self.rank], b_matrix[: self.rank]

    def down(self, x, a):
        """Returns `x A`."""
        return ops.matmul(x, a)

    def rows(self, a, indices):
        """Returns `x A` for x that are one-hot; indices: [T]."""
        return ops.take(a, indices, axis=0)

    def full_a(self, a):
        """Returns A as one matrix, for `from_full_a`."""
        return a

    def from_full_a(self, h):
        """Returns what `down` would, from x multiplied by `full_a`."""
        return h

    def up(self, h, b_matrix):
        """Returns `h B`."""
        return ops.matmul(h, b_matrix)

    def down_transposed(self, v, a):
        """Returns `v A^T`."""
        return ops.matmul(v, ops.transpose(a))

    def up_transposed(self, g, b_matrix):
        """Returns `g B^T`."""
        return ops.matmul(g, ops.transpose(b_matrix))

    def scale(self, h, d):
        """Returns `h * d`; d: [r], or [examples, r] in a mixed batch."""
        return by_example(h, d)

    def scale_rows(self, a, d):
        """Returns `A * d`."""
        return a * d

    def product(self, a, b_matrix):
        """Returns `A B`: [m, n]."""
        return ops.matmul(a, b_matrix)

    def as_matrices(self, a, b_matrix):
        """Returns A and B as they stand in the formula: [m, r], [r, n]."""
        return a, b_matrix

    def m_of_tokens(self, u, g):
        """Returns M = `u^T g`, with u = x A and g: [T, n]."""
        # XLA would turn `transpose(u)` into a slow `A^T x^T`.
        return ops.einsum("tr,tn->rn", u, g)

    def m_of_kernel(self, a, kernel_gradient):
        """Returns M = `A^T G`, with G = x^T g: [m, n]."""
        return ops.matmul(ops.transpose(a), kernel_gradient)

    def sums(self, m_matrix, b_matrix, d, b):
        """Returns `sum_j B_kj b_j M_kj`: [r] and `sum_k d_k B_kj M_kj`: [n]."""
        bm = b_matrix * m_matrix
        return ops.matmul(bm, b), ops.matmul(d, bm)


@dataclass(frozen=True)
class Explicit(Dense):
    """A dense pair that comes as it is used, with all factors in it."""

    @property
    def factors(self):
        return 1.0, 1.0


@dataclass(frozen=True)
class Blocks:
    """A and B block-diagonal, with s blocks each (Dao et al., 2022, Monarch).

    Input i is in block `i // ceil(m / s)` of A, output j in block
    `j // ceil(n / s)` of B. Between them the channels are permuted, such that
    each pair of blocks has the same number c of channels in common: r is
    rounded up to `s * s * c`, and the channels that d does not reach, spread
    evenly, carry nothing. The stored A is [m, s * c] and has for each input
    its row in its block, channels in the order (block of B, 0..c); the stored
    B is [s * c, n], channels in the order (block of A, 0..c).

    In the equations, i is a block of A and p an input in it, j a block of B
    and q an output in it, c one of the channels that they have in common, and
    k = (i, c) a channel of j. What does not grow with the tokens is one
    equation each, for graphs with few operations: TensorFlow takes a minute
    for them in a large model.
    """

    m: int
    n: int
    rank: int
    blocks: int
    one_hot: bool = False

    @property
    def width(self):
        return self.blocks * self.depth

    @property
    def depth(self):
        return -(-self.rank // self.blocks**2)

    @property
    def factors(self):
        # The fan-in of a block.
        s = self.blocks
        factor_a = 2 if self.one_hot else 2 * s / self.m
        return math.sqrt(factor_a), math.sqrt(2 * s / self.rank)

    def narrow(self, a, b_matrix):
        s, c = self.blocks, self.depth
        a = ops.reshape(a, (a.shape[0], s, -1))[:, :, :c]
        b_matrix = ops.reshape(b_matrix, (s, -1, b_matrix.shape[1]))[:, :c]
        return (
            ops.reshape(a, (a.shape[0], s * c)),
            ops.reshape(b_matrix, (s * c, b_matrix.shape[2])),
        )

    def down(self, x, a):
        u = ops.matmul(_split_columns(x, self.blocks), self._a(a))
        return self._exchange(u)

    def rows(self, a, indices):
        return self.from_full_a(
            self._full_rows(ops.take(a, indices, axis=0), indices)
        )

    def full_a(self, a):
        return self._full_rows(a, np.arange(self.m))

    def from_full_a(self, h):
        h = ops.reshape(h, (-1, self.blocks, h.shape[1] // self.blocks))
        return ops.transpose(h, (1, 0, 2))

    def up(self, h, b_matrix):
        z = ops.matmul(h, self._b(b_matrix))
        return _join_columns(z, self.n)

    def down_transposed(self, v, a):
        a = ops.transpose(self._a(a), (0, 2, 1))
        return _join_columns(ops.matmul(self._exchange(v), a), self.m)

    def up_transposed(self, g, b_matrix):
        b_matrix = ops.transpose(self._b(b_matrix), (0, 2, 1))
        return ops.matmul(_split_columns(g, self.blocks), b_matrix)

    def scale(self, h, d):
        if len(d.shape) == 1:
            return h * ops.expand_dims(self._channels(d), 1)
        examples = ops.shape(d)[0]
        d = self._channels(d)
        d = ops.transpose(ops.reshape(d, (examples, *d.shape[1:])), (1, 0, 2))
        tokens = ops.shape(h)[1] // examples
        by_examples = ops.reshape(
            h, (self.blocks, examples, tokens, h.shape[2])
        )
        return ops.reshape(by_examples * d[:, :, None, :], ops.shape(h))

    def scale_rows(self, a, d):
        s = self.blocks
        d = ops.reshape(self._channels(d), (s, 1, s, self.depth))
        a = _split(a, s) * ops.transpose(d, (2, 1, 0, 3))
        return _join(a, self.m, self.width)

    def product(self, a, b_matrix):
        a, b_matrix = _split(a, self.blocks), _split(b_matrix, self.blocks)
        product = ops.einsum("ipjc,icjq->ipjq", a, b_matrix)
        return _join(product, self.m, self.n)

    def as_matrices(self, a, b_matrix):
        a = self.full_a(a)
        own = self._b(b_matrix)
        # A channel of one block of B is 0 for the outputs of the others.
        own = ops.eye(self.blocks)[:, None, :, None] * own[:, :, None, :]
        b_matrix = ops.reshape(own, (-1, self._columns))[:, : self.n]
        # The channels that d reaches.
        positions = self._positions()
        return ops.take(a, positions, axis=1), ops.take(
            b_matrix, positions, axis=0
        )

    def m_of_tokens(self, u, g):
        return ops.einsum("jtk,jtq->jkq", u, _split_columns(g, self.blocks))

    def m_of_kernel(self, a, kernel_gradient):
        a, g = _split(a, self.blocks), _split(kernel_gradient, self.blocks)
        m_matrix = ops.einsum("ipjc,ipjq->jicq", a, g)
        return ops.reshape(m_matrix, (self.blocks, self.width, -1))

    def sums(self, m_matrix, b_matrix, d, b):
        bm = self._b(b_matrix) * m_matrix
        b = ops.reshape(_pad(b, self._columns, 0), (self.blocks, -1))
        of_channels = ops.reshape(ops.einsum("jkq,jq->jk", bm, b), (-1,))
        of_outputs = ops.einsum("jkq,jk->jq", bm, self._channels(d))
        return (
            ops.take(of_channels, self._positions()),
            _cut(ops.reshape(of_outputs, (-1,)), self.n, 0),
        )

    @property
    def _columns(self):
        return self.blocks * -(-self.n // self.blocks)

    def _positions(self):
        """Where the entries of d are among all channels."""
        channels = self.blocks**2 * self.depth
        return np.arange(self.rank) * channels // self.rank

    def _channels(self, d):
        """Returns d, [..., r], by (block of B, channels of that block)."""
        channels = self.blocks**2 * self.depth
        if channels != self.rank:
            source = np.full(channels, self.rank)
            source[self._positions()] = np.arange(self.rank)
            d = ops.take(_pad(d, self.rank + 1, -1), source, axis=-1)
        own = channels // self.blocks
        return ops.reshape(d, (*ops.shape(d)[:-1], self.blocks, own))

    def _exchange(self, u):
        """Permutes channels, [s, T, s * c], from A's order to B's or back."""
        s, c = self.blocks, self.depth
        u = ops.reshape(u, (s, -1, s, c))
        u = ops.transpose(u, (2, 1, 0, 3))
        return ops.reshape(u, (s, -1, s * c))

    def _full_rows(self, rows, indices):
        """Returns rows of A, [T, s * c], with zeros in the other blocks."""
        s, c = self.blocks, self.depth
        block = ops.cast(indices, "int32") // -(-self.m // s)
        own = ops.one_hot(block, s, dtype=rows.dtype)
        rows = ops.reshape(rows, (-1, s, 1, c)) * own[:, None, :, None]
        return ops.reshape(rows, (-1, s * s * c))

    def _a(self, a):
        """Returns A by blocks: [s, m / s, s * c]."""
        rows = self.blocks * -(-self.m // self.blocks)
        return ops.reshape(_pad(a, rows, 0), (self.blocks, -1, self.width))

    def _b(self, b_matrix):
        """Returns B by blocks: [s, s * c, n / s]."""
        return _split_columns(b_matrix, self.blocks)


def by_example(h, v):
    """Returns `h * v` for rows that all have one v, or each example its own.

    Args:
        h: Tensor of shape `(T, k)`.
        v: Tensor of shape `(k,)`, or `(examples, k)`: then the tokens of the
            examples follow each other in h, as many for each.
    """
    if len(v.shape) == 1:
        return h * v
    examples = ops.shape(v)[0]
    tokens = ops.shape(h)[0] // examples
    by_examples = ops.reshape(h, (examples, tokens, h.shape[1]))
    return ops.reshape(by_examples * v[:, None, :], ops.shape(h))


def _split(x, blocks):
    """Splits both axes of a matrix, filled up with 0: [blocks, rows of a
    block, blocks, columns of a block]."""
    rows, columns = (-(-size // blocks) for size in x.shape)
    x = _pad(_pad(x, blocks * rows, 0), blocks * columns, 1)
    return ops.reshape(x, (blocks, rows, blocks, columns))


def _join(x, rows, columns):
    """Undoes `_split`."""
    x = ops.reshape(x, (x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]))
    return _cut(_cut(x, rows, 0), columns, 1)


def _split_columns(x, blocks):
    """Returns [T, n] as [blocks, T, ceil(n / blocks)]."""
    columns = -(-x.shape[1] // blocks)
    x = ops.reshape(_pad(x, blocks * columns, 1), (-1, blocks, columns))
    return ops.transpose(x, (1, 0, 2))


def _join_columns(x, columns):
    """Undoes `_split_columns`."""
    full = x.shape[0] * x.shape[2]
    x = ops.reshape(ops.transpose(x, (1, 0, 2)), (-1, full))
    return _cut(x, columns, 1)


def _pad(x, size, axis):
    missing = size - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * len(x.shape)
    widths[axis] = (0, missing)
    return ops.pad(x, widths)


def _cut(x, size, axis):
    if x.shape[axis] == size:
        return x  # Nothing would be five operations in a graph of TensorFlow.
    return x[:size] if axis == 0 else x[:, :size]
