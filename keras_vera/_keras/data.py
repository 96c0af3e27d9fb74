"""The examples of `fit`, `evaluate` and `predict`, as Keras reads them."""

import itertools

import keras
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import array_slicing
from keras.src.trainers.data_adapters import data_adapter_utils


def data_kind(x):
    """Returns the library of a dataset, such as `"tf"`; else `None`."""
    for kind, is_kind in (
        ("tf", data_adapters.is_tf_dataset),
        ("torch", data_adapters.is_torch_dataloader),
        ("grain", data_adapters.is_grain_dataset),
    ):
        if is_kind(x):
            return kind
    return None


def numpy_batches(data, batch_size, steps):
    """Yields `(x, y, sample_weight)` of all that `evaluate` takes.

    Args:
        data: As `validation_data` of `keras.Model.fit`.
        batch_size: Integer or `None`, of batches that are made of arrays.
        steps: Integer, the largest number of batches, or `None`.
    """
    unpack = data_adapter_utils.unpack_x_y_sample_weight
    x, y, sample_weight = unpack(data)
    adapter = data_adapters.get_data_adapter(
        x, y, sample_weight, batch_size=batch_size or 32
    )
    try:
        for batch in itertools.islice(adapter.get_numpy_iterator(), steps):
            yield unpack(batch)
    finally:
        # The workers of a `PyDataset` read on, also after the last step.
        if getattr(adapter, "enqueuer", None) is not None:
            adapter.enqueuer.stop()


def split_validation(x, y, sample_weight, validation_split):
    """Splits arrays as `fit` does; both parts are `(x, y, sample_weight)`."""
    return array_slicing.train_validation_split(
        (x, y, sample_weight), validation_split=validation_split
    )


def in_order_of_metrics(model, values):
    """Returns a dict of values by name as `evaluate` returns them.

    Relies on the function that `evaluate` calls at its end.
    """
    return model._flatten_metrics_in_order(values)


def comparison(model, monitor, mode, min_delta):
    """Returns what says whether a metric is better than it was.

    `EarlyStopping` knows which metrics of the compiled model go up.
    """
    monitoring = keras.callbacks.EarlyStopping(
        f"val_{monitor}", min_delta=min_delta, mode=mode
    )
    monitoring.set_model(model)
    monitoring._set_monitor_op()
    return lambda value, best: bool(monitoring._is_improvement(value, best))
