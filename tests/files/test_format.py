"""docs/adapter-format.md, held against the package, word for word."""

import hashlib
import pathlib
import re

import numpy as np
import pytest
from adapter_files import read
from adapter_files import sealed
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_vera import SharedProjection
from keras_vera.layers._contraction import dense_contraction
from keras_vera.layers._fingerprint import kernel_fingerprint
from keras_vera.product.arithmetic import Layout
from keras_vera.product.arithmetic import merged_kernel
from keras_vera.product.projection import pair_sha256

pytestmark = pytest.mark.in_turn

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapter-format.md").read_text(encoding="utf-8")
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def number():
    (code,) = re.findall("```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(code, names)
    return names["number"]


def test_vectors_of_the_page(number):
    rows = re.findall(r"^\| (\d+) \| ([01]) \([AB]\) \| (.*?) \|$", PAGE, re.M)
    assert len(rows) == 4
    for seed, stream, numbers in rows:
        for i, written in enumerate(numbers.split(", ")):
            assert np.float32(written) == number(int(seed), int(stream), i)


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**64 - 1),
    blocks=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=30, deadline=None)
def test_kernel_made_from_the_page_alone(number, m, n, rank, seed, blocks):
    rng = np.random.default_rng(0)
    kernel, d, b = (rng.normal(size=x) for x in ((m, n), rank, n))
    if blocks == 1:
        width, structure = rank, "dense"
    else:
        depth = -(-rank // blocks**2)
        width, structure = blocks * depth, f"blocks{blocks}"

    def rows(stream, count):
        numbers = [number(seed, stream, i) for i in range(count * width)]
        return np.array(numbers, "float32").reshape(count, width)

    stored_a, stored_b = rows(0, m), rows(1, n).T
    if blocks == 1:
        a, b_matrix, of_channels = stored_a, stored_b, d
    else:
        channels = blocks * width
        a, b_matrix = np.zeros((m, channels)), np.zeros((channels, n))
        of_channels = np.zeros(channels)
        for k in range(rank):
            of_channels[k * channels // rank] = d[k]
        for q in range(blocks):
            for p in range(blocks):
                for t in range(depth):
                    channel = q * width + p * depth + t
                    for i in range(m):
                        if i // -(-m // blocks) == p:
                            a[i, channel] = stored_a[i, q * depth + t]
                    for j in range(n):
                        if j // -(-n // blocks) == q:
                            b_matrix[channel, j] = stored_b[p * depth + t, j]
    factor = (2 * blocks / m) ** 0.5 * (2 * blocks / rank) ** 0.5
    expected = kernel + (a * of_channels) @ b_matrix * b * factor

    projection = SharedProjection(seed, rank, structure)
    projection.reserve(m, n)
    pair = projection.vera_kernel_a, projection.vera_kernel_b
    contraction = dense_contraction((m, n))
    merged = merged_kernel(
        ops.convert_to_tensor(kernel.astype("float32")),
        [ops.convert_to_tensor(x) for x in pair],
        *(ops.convert_to_tensor(x.astype("float32")) for x in (d, b)),
        Layout(contraction, projection.structure_of(contraction)),
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(merged), expected, rtol=1e-5, atol=1e-4
    )
    digest = hashlib.sha256(stored_a.astype("<f4").tobytes())
    digest.update(stored_b.T.astype("<f4").tobytes())
    assert pair_sha256(*pair) == digest.hexdigest()


NEWER = ("outside", "trained", "embeddings", "unsaved")


def test_files_are_as_the_page_says():
    for path in sorted(GOLDEN.glob("*.vera.safetensors")):
        content = path.read_bytes()
        assert sealed(content) == content
        header, tensors = read(path)
        for field in re.findall(r"^\| (`.*?) \|", PAGE, re.M):
            for name in re.findall("`(.*?)`", field):
                # These files are of before some fields.
                header.pop(name, *[None] * (name in NEWER))
        assert header == {}
        assert len(tensors) > 10


@pytest.mark.parametrize("shape", [(3, 4), (40, 60), (5, 7, 11), (129, 33)])
def test_fingerprint(shape, rng):
    kernel = rng.normal(size=shape).astype("float32")
    flat = kernel.ravel()
    if flat.size > 1024:
        flat = flat[[k * (flat.size - 1) // 1023 for k in range(1024)]]
    digest = hashlib.sha256(flat.astype("<f4").tobytes()).hexdigest()
    assert kernel_fingerprint(ops.convert_to_tensor(kernel)) == digest[:16]
