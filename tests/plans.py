"""Every way to compute an adapted layer, forced; and full A and B."""

import contextlib
import itertools
from unittest import mock

import numpy as np

from keras_vera.layers import _vera_layer
from keras_vera.product.plan import Plan

ALL = [
    Plan(folded, kept, m_from_kernel)
    for folded, kept, m_from_kernel in itertools.product(
        [True, False], repeat=3
    )
    if folded or not kept
]
# Each choice, once.
DIFFERENT = [
    Plan(folded=True, kept=True, m_from_kernel=False),
    Plan(folded=True, kept=False, m_from_kernel=True),
    Plan(folded=False, kept=False, m_from_kernel=True),
]


@contextlib.contextmanager
def forced(plan):
    """Makes every adapted layer compute as `plan` says, if it is not None."""
    if plan is None:
        yield
        return
    with mock.patch.object(_vera_layer, "choose_plan", lambda *_: plan):
        yield


def full_pair(a, b_matrix, m, n, rank, blocks):
    """Returns what the docstring of `Blocks` says, as A: [m, r], B: [r, n].

    The channels that d does not reach are left out. Written index by index,
    without the reshaping that the package does.

    Args:
        a: Array, the stored A, `[>= m, width]`.
        b_matrix: Array, the stored B, `[width, >= n]`.
    """
    if blocks == 1:
        return a[:m], b_matrix[:, :n]
    common = -(-rank // blocks**2)
    channels = blocks**2 * common
    full_a, full_b = np.zeros((m, channels)), np.zeros((channels, n))
    input_block, output_block = -(-m // blocks), -(-n // blocks)
    # Channels by block of B, then block of A, then the common ones.
    order = np.ndindex(blocks, blocks, common)
    for channel, (q, p, k) in enumerate(order):
        for i in range(m):
            if i // input_block == p:
                full_a[i, channel] = a[i, q * common + k]
        for j in range(n):
            if j // output_block == q:
                full_b[channel, j] = b_matrix[p * common + k, j]
    reached = [k * channels // rank for k in range(rank)]
    return full_a[:, reached], full_b[reached]
