import collections
import math
import os
import types
import warnings

import keras

from keras_vera import _keras
from keras_vera._types import FilePath
from keras_vera.bank.folder import Folder
from keras_vera.bank.model import BankModel
from keras_vera.bank.scores import Scores
from keras_vera.files.adapter import save_adapter
from keras_vera.files.format import check_filepath
from keras_vera.model.adaptation import check_no_bank
from keras_vera.product.checks import check_integer

__all__ = ["AdapterCheckpoint", "BestAdapters"]


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
    keras_vera.enable_vera(model)
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
        filepath: FilePath,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
    ) -> None:
        file = check_filepath(filepath)
        super().__init__(
            file + ".weights.h5",  # The ending that Keras checks for.
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=True,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
        )
        self.filepath = file

    def set_model(self, model):
        if isinstance(model, keras.Layer):
            check_no_bank(model)
        super().set_model(model)

    def _save_model(self, epoch, batch, logs):
        filepath = self._get_file_path(epoch, batch, logs)
        if self._should_save_model(epoch, batch, logs, filepath):
            os.makedirs(os.path.dirname(filepath) or ".", exist_ok=True)
            save_adapter(self.model, filepath)


class BestAdapters(keras.callbacks.Callback):
    """Keeps the best of each adapter of a bank, and stops each by itself.

    After each epoch, the validation examples of `fit` pass through the model
    once more, and every adapter that trains is evaluated on its own. At the
    end of training each goes back to its best epoch. With `validation_freq`
    in `fit`, this is so after the epochs that it means, and only these count.

    With `patience`, an adapter that has not improved for so many epochs is
    stopped: it and the optimizer's state for it do not move any more, while
    the others go on. When all have stopped, so does `fit`. With a loss that
    is a sum over examples, each adapter becomes what it becomes alone with
    `keras.callbacks.EarlyStopping`.

    Adapters that train without validation examples train to the last epoch,
    and stay as they are then; there is a warning. Validation examples of
    adapters that do not train, and of the base model, are left out.

    Args:
        monitor: String, `"loss"` or the name of a compiled metric. Defaults
            to `"loss"`.
        mode: One of `"auto"`, `"min"`, `"max"`: what an improvement is.
            Defaults to `"auto"`.
        min_delta: Float, the least change that is one. Defaults to `0`.
        patience: Integer, after how many epochs without improvement an
            adapter is stopped. Defaults to `None`: never.
        restore_best: Boolean, whether adapters go back to their best epoch at
            the end. Defaults to `True`.
        folder: `str` or `pathlib.Path`, where the best of each adapter is
            written as soon as there is one, as an adapter file for each name;
            an `AdapterBank` opens it. Defaults to `None`: nowhere.
        verbose: Integer, 1 to say which adapters stop. Defaults to `0`.

    Attributes:
        history: Dict by name of dicts by epoch, of all values of `monitor`.
        best: Dict by name of the best value.
        best_epochs: Dict by name of the epoch of the best value, from 0.
        stopped_epochs: Dict by name, only of those that were stopped.

    Example:

    ```python
    best = keras_vera.callbacks.BestAdapters(monitor="accuracy", patience=3)
    bank.fit(
        texts,
        labels,
        adapters=names,
        validation_data=(val_texts, val_labels, val_names),
        epochs=50,
        callbacks=[best],
    )
    print(best.best_epochs["ann"], best.best["ann"])
    ```
    """

    def __init__(
        self,
        monitor: str = "loss",
        mode: str = "auto",
        min_delta: float = 0,
        patience: int | None = None,
        restore_best: bool = True,
        folder: FilePath | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        if mode not in ("auto", "min", "max"):
            raise ValueError(
                "`mode` must be 'auto', 'min' or 'max'. "
                f"Received: mode={mode!r}"
            )
        if patience is not None:
            patience = check_integer("patience", patience, 0)
        self.monitor = monitor.removeprefix("val_")
        self.mode = mode
        self.min_delta = min_delta
        self.patience = patience
        self.restore_best = restore_best
        self.folder = None if folder is None else os.fspath(folder)
        self.verbose = verbose

    def set_model(self, model):
        if not isinstance(model, BankModel):
            raise ValueError(
                "`BestAdapters` is for `fit` of an `AdapterBank` or of its "
                f"`model`. Received: a {type(model).__name__}. Use "
                "`AdapterCheckpoint` and `keras.callbacks.EarlyStopping`."
            )
        super().set_model(model)

    def on_train_begin(self, logs=None):
        self.history = collections.defaultdict(dict)
        self.best, self.best_epochs, self.stopped_epochs = {}, {}, {}
        self._arrays, self._waits = {}, {}
        self._unwatched, self._has_warned = set(), False
        self._check_validation()
        self._names = self.model.adapters.by_slot()
        self._steps = self.model.row_steps()
        self._is_better = None
        if self.folder is not None:
            self._folder = self._checked_folder()
        # What cannot be evaluated is an error before anything trains.
        found = self._evaluate(steps=1)
        if any(self.monitor not in values for values in found.values()):
            values = next(iter(found.values()))
            raise ValueError(
                "`monitor` must be 'loss' or the name of a compiled metric, "
                f"one of {sorted(values)}. Received: monitor={self.monitor!r}"
            )
        self._is_better = _keras.comparison(
            self.model, self.monitor, self.mode, self.min_delta
        )

    def on_epoch_begin(self, epoch, logs=None):
        slots = [s for s, n in self._names.items() if n in self.stopped_epochs]
        if slots:
            self.model.stop_rows(slots)

    def on_epoch_end(self, epoch, logs=None):
        if not self.model.validation.is_due(epoch):
            return
        found = self._evaluate(steps=self.model.validation.steps)
        moved = self.model.row_steps() > self._steps
        trained = {s: n for s, n in self._names.items() if moved[s]}
        improved = {}
        for slot, name in trained.items():
            if slot not in found:
                self._unwatched.add(name)
            elif name not in self.stopped_epochs:
                value = found[slot][self.monitor]
                if self._has_improved(name, value, epoch):
                    improved[slot] = name
        self._warn_about_unwatched()
        self._keep(improved)
        if trained and self.stopped_epochs.keys() >= set(trained.values()):
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        if self.restore_best and self._arrays:
            slots = {name: slot for slot, name in self._names.items()}
            self.model.assign_rows(
                [slots[name] for name in self._arrays],
                list(self._arrays.values()),
            )
        self._arrays = {}

    def _has_improved(self, name, value, epoch):
        """Notes the value of an epoch, and whether the adapter stops."""
        self.history[name][epoch] = value
        # Nothing would be better than a value that is not a number.
        if not math.isnan(value) and self._is_better(
            value, self.best.get(name)
        ):
            self.best[name], self.best_epochs[name] = value, epoch
            self._waits[name] = 0
            return True
        self._waits[name] = self._waits.get(name, 0) + 1
        if self.patience is not None and self._waits[name] >= self.patience:
            self.stopped_epochs[name] = epoch
            if self.verbose:
                print(f"Epoch {epoch + 1}: {name!r} stops")
        return False

    def _keep(self, improved):
        """Keeps the present values of adapters, by slot."""
        if not improved:
            return
        arrays = self.model.read(list(improved))
        for name, values in zip(improved.values(), arrays):
            if self.restore_best:
                self._arrays[name] = values
            if self.folder is not None:
                file = self._folder.file(name)
                self.model.adapters.save(name, file, values)

    def _evaluate(self, steps):
        validation = self.model.validation
        scores = Scores(self.model)
        for batch in _keras.numpy_batches(
            validation.data, validation.batch_size, steps
        ):
            scores.add(*batch)
        return scores.results()

    def _warn_about_unwatched(self):
        if self._unwatched and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{len(self._unwatched)} adapters that train have no "
                f"validation examples ({sorted(self._unwatched)[:5]}), so "
                "they train to the last epoch and stay as they are then.",
                stacklevel=2,
            )

    def _check_validation(self):
        validation = self.model.validation
        if validation is None:
            raise ValueError(
                "`BestAdapters` needs validation examples. Pass `fit` "
                "`validation_data=(x, y, names)` or `validation_split`."
            )
        if isinstance(validation.data, types.GeneratorType):
            raise ValueError(
                "`BestAdapters` reads the validation examples after each "
                "epoch, and a generator gives them once. Pass "
                "`validation_data` as arrays or as a dataset."
            )

    def _checked_folder(self):
        folder, own = Folder(self.folder), self.model.adapters.folder
        if own is not None and os.path.samefile(folder.path, own.path):
            raise ValueError(
                "`folder` must not be the folder of the bank, which holds "
                f"what `fit` ends with. Received: folder={self.folder!r}"
            )
        return folder
