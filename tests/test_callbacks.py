import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import largest_difference
from helpers import predict
from keras import ops

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]


def make_model(targets="all-linear"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    keras_vera.enable_vera(model, rank=4, targets=targets)
    model.compile(keras_vera.vera_optimizer(), "mse", metrics=["mae"])
    return model


@pytest.fixture
def data(rng):
    return rng.normal(size=(24, 6)), rng.normal(size=(24, 3))


def fit(model, data, epochs, callbacks=(), **kwargs):
    x, y = data
    return model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=(x[:8], y[:8]),
        callbacks=list(callbacks),
        **kwargs,
    )


def vectors(model):
    return [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]


def assert_same_vectors(model, expected):
    for vector, value in zip(vectors(model), expected, strict=True):
        np.testing.assert_array_equal(vector, value)


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch, batch=None):
        super().__init__()
        self.epoch, self.batch = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.current = epoch
        if epoch == self.epoch and self.batch is None:
            raise KeyboardInterrupt

    def on_train_batch_end(self, batch, logs=None):
        if (self.current, batch) == (self.epoch, self.batch):
            raise KeyboardInterrupt


def test_every_epoch_is_kept(tmp_path, data):
    after = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            after.append(vectors(self.model))

    model = make_model()
    checkpoint = keras_vera.callbacks.AdapterCheckpoint(
        tmp_path / "new" / "{epoch:02d}-{val_loss:.2f}.vera.safetensors"
    )
    fit(model, data, 3, [Keep(), checkpoint])
    files = sorted((tmp_path / "new").iterdir())
    assert [f.name[:3] for f in files] == ["01-", "02-", "03-"]
    for file, expected in zip(files, after, strict=True):
        keras_vera.load_adapter(model, file)
        assert_same_vectors(model, expected)


def test_best_epoch_is_kept(tmp_path, data, capsys):
    path = tmp_path / "best.vera.safetensors"
    best, worst = [], []

    class Worsen(keras.callbacks.Callback):
        """Spoils the model from the third epoch on."""

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                best.extend(vectors(self.model))
            if epoch >= 2:
                logs["val_mae"] = 1e9
                worst.extend(vectors(self.model))
            else:
                logs["val_mae"] = 1.0 - 0.1 * epoch

    model = make_model()
    checkpoint = keras_vera.callbacks.AdapterCheckpoint(
        path, monitor="val_mae", mode="min", save_best_only=True, verbose=1
    )
    fit(model, data, 4, [Worsen(), checkpoint])
    assert capsys.readouterr().out.count("saving model to") == 2
    keras_vera.load_adapter(model, path)
    assert_same_vectors(model, best)


def test_batches_are_kept(tmp_path, data):
    model = make_model()
    checkpoint = keras_vera.callbacks.AdapterCheckpoint(
        tmp_path / "{batch}.vera.safetensors", save_freq=2
    )
    fit(model, data, 2, [checkpoint])
    assert len(list(tmp_path.iterdir())) == 3


def test_wrong_ending_is_refused():
    with pytest.raises(ValueError, match="must end in `.vera.safetensors`"):
        keras_vera.callbacks.AdapterCheckpoint("best.weights.h5")


@pytest.mark.parametrize("save_freq, batch", [("epoch", None), (1, 1)])
@pytest.mark.parametrize("new_process", [False, True])
def test_interrupted_training_ends_as_uninterrupted(
    tmp_path, data, save_freq, batch, new_process
):
    epochs = 4
    whole = make_model()
    # Saving by batches repeats the epoch, so its batches are all alike.
    if batch is not None:
        data = tuple(np.tile(part[:8], (3, 1)) for part in data)
    fit(whole, data, epochs)

    def backup():
        return keras.callbacks.BackupAndRestore(
            tmp_path / "backup", save_freq=save_freq
        )

    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, epochs, [backup(), Interrupt(2, batch)])
    if new_process:
        model = make_model()
    fit(model, data, epochs, [backup()])
    if batch is None:
        assert_same_vectors(model, vectors(whole))
    else:
        # Two batches of the third epoch were made before the interruption.
        longer = make_model()
        fit(longer, data, 2)
        x, y = data
        for _ in range(2 + 3 + 3):
            longer.train_on_batch(x[:8], y[:8])
        assert_same_vectors(model, vectors(longer))
    keras_vera.disable_vera(model)
    keras_vera.disable_vera(whole)
    for mine, theirs in zip(model.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_model_checkpoint_loses_nothing(tmp_path, data):
    model = make_model()
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.weights.h5", save_weights_only=True
    )
    fit(model, data, 2, [checkpoint])
    expected, outputs = vectors(model), predict(model, data[0])
    fit(model, data, 2)
    model.load_weights(tmp_path / "2.weights.h5")
    assert_same_vectors(model, expected)
    np.testing.assert_array_equal(predict(model, data[0]), outputs)


def test_early_stopping_restores_best_weights(data):
    kept = []

    class Script(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["val_loss"] = [3.0, 1.0, 2.0, 2.5][epoch]
            kept.append(vectors(self.model))

    model = make_model()
    base = [ops.convert_to_numpy(x._kernel) for x in adapted(model)]
    stop = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    fit(model, data, 4, [Script(), stop])
    assert len(kept) == 4
    assert_same_vectors(model, kept[1])
    assert largest_difference(kept[1][0], kept[3][0]) > 0
    for layer, kernel in zip(adapted(model), base, strict=True):
        np.testing.assert_array_equal(layer._kernel, kernel)
