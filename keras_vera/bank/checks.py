"""What `fit` of `bank.model` is given."""

import dataclasses
from typing import Any

import keras


@dataclasses.dataclass
class Validation:
    """What a running `fit` validates with; see `keras.Model.fit`."""

    data: Any
    batch_size: int | None
    steps: int | None
    # After how many epochs, or after which ones.
    frequency: int | list = 1

    def is_due(self, epoch):
        """Says whether `fit` validates after an epoch, counted from 0."""
        if isinstance(self.frequency, int):
            return (epoch + 1) % self.frequency == 0
        return epoch + 1 in self.frequency


def check_callbacks(callbacks):
    callbacks = getattr(callbacks, "callbacks", callbacks) or []
    for callback in keras.tree.flatten(callbacks):
        if (
            isinstance(callback, keras.callbacks.ModelCheckpoint)
            and not callback.save_weights_only
        ):
            raise ValueError(
                "`ModelCheckpoint` cannot save the model of an `AdapterBank` "
                "as a whole. Pass it `save_weights_only=True`, or use "
                "`keras_vera.callbacks.BestAdapters`, which keeps the best "
                "of each adapter."
            )
