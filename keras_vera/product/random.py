"""The numbers of A and B: the same on every backend and platform, for ever.

NumPy promises the raw output of a bit generator, not its distributions, so
the mapping from words to floats is our own and uses only exact integer
arithmetic and one correctly rounded float32 multiplication.
"""

import numpy as np

# float32(sqrt(3)) * 2**-24: maps an odd integer in (-2**24, 2**24) to a
# uniform value in (-sqrt(3), sqrt(3)), which has unit variance.
_SCALE = np.float32(float.fromhex("0x1.bb67aep+0") * 2.0**-24)
_WORDS_PER_BLOCK = 8  # One Philox4x64 block is four 64-bit words.
_CHUNK = 1 << 16  # Stays in cache.


def unit_uniform(seed, stream, count, start=0):
    """Returns entries `start` to `start + count` of a unit-variance stream.

    Entry `i` is made from 32-bit word `i` of the Philox4x64-10 stream with key
    `(seed, stream)` and a counter whose first block is number 1 (each 64-bit
    word gives its low half first), as the float
    `(2 * (word >> 8) + 1 - 2**24) * sqrt(3) / 2**24`.

    Args:
        seed: Integer in `[0, 2**64)`.
        stream: Integer, which of the matrices the stream fills.
        count: Integer, number of entries.
        start: Integer, index of the first entry.

    Returns:
        A float32 NumPy array of shape `(count,)`.

    Reference:

    - Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    blocks, skipped = divmod(start, _WORDS_PER_BLOCK)
    bits = np.random.Philox(
        counter=np.array([blocks, 0, 0, 0], dtype=np.uint64),
        key=np.array([seed, stream], dtype=np.uint64),
    )
    entries = np.empty(count, dtype=np.float32)
    filled = 0
    while filled < count:
        # A chunk ends on a whole 64-bit word, so that the next starts on one.
        size = min(_CHUNK - skipped, count - filled)
        words = bits.random_raw((skipped + size + 1) // 2)
        # "<" keeps the low half first on big-endian machines as well.
        words = words.astype("<u8", copy=False).view("<u4")
        words = words[skipped : skipped + size]
        integers = (words >> np.uint32(8)).astype(np.int32)
        integers *= 2
        integers += 1 - 2**24
        np.multiply(integers, _SCALE, out=entries[filled : filled + size])
        filled += size
        skipped = 0
    return entries


def unit_uniform_rows(seed, stream, width, rows, columns):
    """Returns a part of a matrix that a stream fills row by row.

    Args:
        seed, stream: As in `unit_uniform`.
        width: Integer, the entries of a whole row.
        rows: Slice with a start and a stop.
        columns: Slice with a start and a stop.

    Returns:
        A float32 NumPy array. No more than it, and some rows, is made.
    """
    count = rows.stop - rows.start
    if columns == slice(0, width):
        entries = unit_uniform(seed, stream, count * width, rows.start * width)
        return entries.reshape(count, width)
    part = np.empty((count, columns.stop - columns.start), np.float32)
    step = max(1, _CHUNK // width)
    for start in range(0, count, step):
        size = min(step, count - start)
        entries = unit_uniform(
            seed, stream, size * width, (rows.start + start) * width
        )
        part[start : start + size] = entries.reshape(size, width)[:, columns]
    return part
