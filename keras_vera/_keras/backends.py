"""The backends of Keras on which models train."""

import keras

_NAMES = ("tensorflow", "jax", "torch")

if keras.backend.backend() not in _NAMES:
    raise ImportError(
        f"keras_vera works on the backends {', '.join(_NAMES)}. Received: "
        f"'{keras.backend.backend()}'. Set the environment variable "
        "KERAS_BACKEND before Keras is imported."
    )
