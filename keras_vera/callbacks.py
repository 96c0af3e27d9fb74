import os

import keras

from keras_vera._adapter_format import check_filepath
from keras_vera.adapter_file import save_adapter


class AdapterCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the adapter during `fit`, as `ModelCheckpoint` saves models.

    Args:
        filepath: `str` or `pathlib.Path`. May hold named formatting options,
            such as `{epoch:02d}` and `{val_loss:.2f}`. Must end in
            `.vera.safetensors`.
        monitor: String, the metric that tells which adapter is best. Defaults
            to `"val_loss"`.
        verbose: Integer, 1 to say when a file is saved. Defaults to `0`.
        save_best_only: Boolean, whether to save only when `monitor` has
            improved. Defaults to `False`.
        mode: One of `"auto"`, `"min"`, `"max"`: what an improvement is.
            Defaults to `"auto"`.
        save_freq: `"epoch"`, or an integer number of batches. Defaults to
            `"epoch"`.
        initial_value_threshold: Float, what `monitor` has to beat first.
            Defaults to `None`.

    Example:

    ```python
    model.fit(
        x,
        y,
        validation_split=0.1,
        callbacks=[
            keras_vera.callbacks.AdapterCheckpoint(
                "best.vera.safetensors",
                monitor="val_accuracy",
                save_best_only=True,
            )
        ],
    )
    ```
    """

    def __init__(
        self,
        filepath,
        monitor="val_loss",
        verbose=0,
        save_best_only=False,
        mode="auto",
        save_freq="epoch",
        initial_value_threshold=None,
    ):
        filepath = check_filepath(filepath)
        super().__init__(
            filepath + ".weights.h5",  # The ending that Keras checks for.
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=True,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
        )
        self.filepath = filepath

    def _save_model(self, epoch, batch, logs):
        filepath = self._get_file_path(epoch, batch, logs)
        if self._should_save_model(epoch, batch, logs, filepath):
            os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
            save_adapter(self.model, filepath)
