"""Datasets whose batches end with the names of adapters."""

import copy
import types

import keras
import numpy as np
from keras import tree

from keras_vera import _keras
from keras_vera.bank.ids import has_ids
from keras_vera.bank.ids import join_ids
from keras_vera.bank.names import are_names
from keras_vera.bank.names import names_of
from keras_vera.bank.names import preprocessed


def is_dataset(x):
    """Says whether `x` gives batches, not arrays of all examples."""
    return _keras.data_kind(x) is not None or isinstance(
        x, (keras.utils.PyDataset, types.GeneratorType)
    )


def without_none(batch):
    """Returns a batch without what it does not have, at its end."""
    while batch[-1] is None:
        batch = batch[:-1]
    return tuple(batch)


class NamedBatches:
    """Turns batches that end with names into batches of `bank.model`.

    It is part of data pipelines, which may call it in other threads and
    processes, or in a graph of `tf.data`.
    """

    def __init__(self, ids, preprocessor_of, has_targets=True):
        """
        Args:
            ids: Dict of ids by name, of all names that may occur; or a
                function that returns the ids of a list of names.
            preprocessor_of: The model whose preprocessor the data goes
                through, if it has one.
            has_targets: Boolean, whether batches must have targets.
        """
        self._ids = ids
        self._model = preprocessor_of
        if getattr(preprocessor_of, "preprocessor", None) is None:
            self._model = None
        self._has_targets = has_targets

    def __call__(self, *batch):
        if len(batch) == 1:
            # `tf.data` alone gives the parts one by one.
            (batch,) = batch
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            if has_ids(batch[0]) and not are_names(batch[1]):
                return tuple(batch)
        self.check(batch)
        x, *rest, names = batch
        y, sample_weight = (*rest, None, None)[:2]
        if _is_symbolic(names):
            ids = _symbolic_ids(self.ids_of, names)
            if self._model is not None:
                data = self._model.preprocess_samples(x, y, sample_weight)
                data = data if isinstance(data, tuple) else (data,)
                x, y, sample_weight = (*data, None, None)[:3]
        else:
            ids = self.ids_of(names)
            if self._model is not None:
                x = _uncollated(x, len(ids))
                x = tree.map_structure(_as_texts, x)
                x, y, sample_weight = preprocessed(
                    self._model, x, y, sample_weight
                )
        inputs = join_ids(x, ids)
        if isinstance(inputs, list):
            # TensorFlow would stack a list.
            inputs = tuple(inputs)
        return without_none((inputs, y, sample_weight))

    def check(self, batch):
        """Raises unless a batch, or what says its form, is as it must be."""
        least = 3 if self._has_targets else 2
        form = "`(x, y, names)` or `(x, y, sample_weight, names)`"
        if not self._has_targets:
            form = f"`(x, names)`, {form}"
        if not isinstance(batch, (tuple, list)) or not (
            least <= len(batch) <= 4
        ):
            received = f"a {type(batch).__name__}"
            if isinstance(batch, (tuple, list)):
                received += f" of {len(batch)} parts"
            raise ValueError(
                f"A dataset for a bank must give batches {form}, which end "
                "with the name of the adapter of each example. Received: "
                f"{received}"
            )
        dtype = getattr(batch[-1], "dtype", None)
        if dtype is not None and not are_names(batch[-1]):
            raise ValueError(
                f"A dataset for a bank must give batches {form}. Received: "
                f"numbers of dtype {getattr(dtype, 'name', dtype)} where the "
                "names should be."
            )

    def ids_of(self, names):
        names = names_of(names, argument="The names of a batch")
        if callable(self._ids):
            return self._ids(names)
        unknown = [name for name in names if name not in self._ids]
        if unknown:
            raise ValueError(
                f"A dataset has examples of {unknown[0]!r}, which is not in "
                "the bank, or not among the names that were given as "
                "`adapters`."
            )
        return np.array([self._ids[name] for name in names], "int32")

    def of(self, data):
        """Returns a dataset, mapped batch by batch."""
        kind = _keras.data_kind(data)
        if kind == "tf":
            spec = data.element_spec
            if not has_ids(_first(spec)) or are_names(spec[-1]):
                self.check(spec)
            return data.map(self)
        if kind == "torch":
            mapped = copy.copy(data)
            mapped.collate_fn = _Collate(data.collate_fn, self)
            return mapped
        if kind == "grain" and hasattr(data, "map"):
            return data.map(self)
        if isinstance(data, keras.utils.PyDataset):
            return _MappedDataset(data, self)
        if isinstance(data, types.GeneratorType):
            return (self(batch) for batch in data)
        raise ValueError(
            "A dataset for a bank must be a `tf.data.Dataset`, a "
            "`keras.utils.PyDataset`, a PyTorch `DataLoader`, a grain "
            "dataset with `map`, or a generator. "
            f"Received: {type(data).__name__}"
        )


class _Collate:
    """What a `DataLoader` calls; unlike a lambda, workers can take it."""

    def __init__(self, collate, function):
        self._collate, self._function = collate, function

    def __call__(self, rows):
        import torch

        return tree.map_structure(
            torch.as_tensor, self._function(self._collate(rows))
        )


class _MappedDataset(keras.utils.PyDataset):
    def __init__(self, dataset, function):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._dataset, self._function = dataset, function

    @property
    def num_batches(self):
        return self._dataset.num_batches

    def __getitem__(self, index):
        return self._function(self._dataset[index])

    def on_epoch_begin(self):
        self._dataset.on_epoch_begin()

    def on_epoch_end(self):
        self._dataset.on_epoch_end()


def _first(batch):
    return batch[0] if isinstance(batch, (tuple, list)) and batch else None


def _is_symbolic(names):
    # Only `tf.data` traces what maps its batches.
    return hasattr(names, "graph") and not hasattr(names, "numpy")


def _symbolic_ids(ids_of, names):
    import tensorflow as tf

    ids = tf.numpy_function(ids_of, [names], tf.int32)
    ids.set_shape(names.shape)
    return ids


def _uncollated(x, examples):
    """Returns texts in a list, and segments of texts in a tuple.

    PyTorch's default collate makes a tuple of the former, which would be the
    segments of one example, and a list of the latter.
    """
    if isinstance(x, list) and all(isinstance(part, tuple) for part in x):
        return tuple(_uncollated(part, examples) for part in x)
    is_texts = isinstance(x, tuple) and are_names(x) and len(x) == examples
    return list(x) if is_texts else x


def _as_texts(x):
    """Returns an array of strings as a list, which preprocessors take."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "USOT":
        return names_of(x, argument="Texts")
    return x
