import hashlib

import numpy as np
from keras import ops

from keras_vera import _keras

_SAMPLES = 1024


def kernel_fingerprint(kernel):
    """Returns a short hash that tells one base kernel from another.

    It covers 1,024 evenly spaced entries: training, merging or another
    checkpoint changes nearly all entries, and no more is read from the device.

    Args:
        kernel: A variable or tensor of any floating-point dtype.

    Returns:
        A string of 16 hexadecimal digits.
    """
    size = int(np.prod(kernel.shape))
    flat = ops.reshape(kernel, (size,))
    count = min(size, _SAMPLES)
    # In integers: rounding must not decide which entries are meant.
    indices = np.arange(count) * (size - 1) // max(count - 1, 1)
    sample = _keras.to_numpy(ops.take(flat, indices.astype("int32"), axis=0))
    sample = np.ascontiguousarray(sample.astype("<f4"))
    return hashlib.sha256(sample).hexdigest()[:16]
