import hashlib

import numpy as np
from keras import ops

from keras_vera import _keras

_SAMPLES = 1024


def kernel_fingerprint(kernel):
    """Returns a short hash that tells one kernel, or variable, from another.

    It covers 1,024 evenly spaced entries: training, merging or another
    checkpoint changes nearly all entries, and no more is read from the device.

    Args:
        kernel: A variable or tensor of numbers.

    Returns:
        A string of 16 hexadecimal digits.
    """
    size = int(np.prod(kernel.shape))
    sample = kernel
    if size > _SAMPLES:
        # In integers: rounding must not decide which entries are meant.
        indices = np.arange(_SAMPLES) * (size - 1) // (_SAMPLES - 1)
        flat = ops.reshape(kernel, (size,))
        sample = ops.take(flat, indices.astype("int32"), axis=0)
    sample = _keras.to_numpy(sample)
    sample = np.ascontiguousarray(sample.astype("<f4"))
    return hashlib.sha256(sample).hexdigest()[:16]
