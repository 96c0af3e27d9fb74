"""What the methods of an `AdapterBank` take: examples with names."""

import dataclasses
from typing import Any

import numpy as np
from keras import tree

from keras_vera.bank.batches import NamedBatches
from keras_vera.bank.batches import is_dataset
from keras_vera.bank.divided import is_divided
from keras_vera.bank.ids import has_ids
from keras_vera.bank.ids import join_ids
from keras_vera.bank.names import are_names
from keras_vera.bank.names import as_numpy
from keras_vera.bank.names import count_examples
from keras_vera.bank.names import names_of
from keras_vera.bank.names import preprocessed


@dataclasses.dataclass
class Examples:
    """Arrays, with a name for each example."""

    x: Any
    y: Any
    sample_weight: Any
    names: list

    def checked(self):
        """Returns itself, or raises unless all has a row for each example."""
        for what in ("x", "y", "sample_weight"):
            for array in tree.flatten(getattr(self, what)):
                shape = () if array is None else array.shape
                if array is not None and shape[:1] != (len(self.names),):
                    raise ValueError(
                        f"`{what}` must be arrays whose first axis is that of "
                        f"the examples. Received: a shape of {tuple(shape)} "
                        f"for {len(self.names)} examples. A list of numbers "
                        "is no array: pass `numpy.array(...)`."
                    )
        return self

    def check_targets(self, model, argument):
        """Raises if the loss of a `BankModel` needs targets."""
        if self.y is None and getattr(model, "loss", None) is not None:
            raise ValueError(
                f"{argument} must hold the targets of the examples, as the "
                "bank's model is compiled with a loss. Received: None"
            )

    def joined(self, ids):
        """Returns `(x, y, sample_weight)` for `bank.model`.

        Args:
            ids: Dict of ids by name.
        """
        found = np.array([ids[name] for name in self.names], "int32")
        return join_ids(self.x, found), self.y, self.sample_weight

    def is_divided(self, batch_size):
        """Says whether `keras.distribution` can cut all batches."""
        return is_divided(len(self.names), batch_size)

    def part(self, part, ids_of):
        """Returns the inputs for `bank.model` of a slice.

        Args:
            part: A slice.
            ids_of: Function of a list of names.
        """
        found = self._sliced(part)
        return join_ids(found.x, ids_of(found.names))

    def batches(self, size, slots):
        """Yields batches, of as many parts as `slots` need to bring them."""
        for start in range(0, len(self.names), size):
            batch = self._sliced(slice(start, start + size))
            parts = slots.parts(batch.names, size)
            inputs = (batch.part(part, slots.bring) for part, _ in parts)
            yield inputs, batch.y, batch.sample_weight

    def _sliced(self, part):
        parts = tree.map_structure(
            lambda v: None if v is None else v[part],
            (self.x, self.y, self.sample_weight),
        )
        return Examples(*parts, self.names[part])


@dataclasses.dataclass
class Batches:
    """A dataset whose batches end with names.

    Attributes:
        data: The dataset.
        names: List of the names that may occur; `None`: all of the bank.
        model: The model whose preprocessor the data goes through.
        has_targets: Boolean, whether batches must have targets.
    """

    data: Any
    names: list | None
    model: Any
    has_targets: bool = True

    def check_targets(self, model, argument):
        """Batches are checked when they are read."""

    def is_divided(self, batch_size):
        # Of a dataset, nobody knows.
        return is_divided(1, 1)

    def joined(self, ids):
        named = NamedBatches(ids, self.model, self.has_targets)
        return named.of(self.data), None, None

    def batches(self, size, slots):
        named = NamedBatches(slots.bring, self.model, self.has_targets)
        for batch in self.data:
            x, *targets = tree.map_structure(as_numpy, named(batch))
            y, sample_weight = (*targets, None, None)[:2]
            yield [x], y, sample_weight


def examples_of(x, y, sample_weight, adapters):
    """Returns the `Examples` of arrays, with their names checked."""
    names = names_of(adapters, count_examples(x))
    return Examples(x, y, sample_weight, names).checked()


def data_of(
    model, x, y=None, sample_weight=None, adapters=None, has_targets=True
):
    """Returns the `Examples` or `Batches` of the arguments of a method.

    Args:
        model: The model that the bank is for.
        x, y, sample_weight, adapters: As in `AdapterBank.fit`.
        has_targets: Boolean, whether batches must have targets.
    """
    if not is_dataset(x):
        return examples_of(*preprocessed(model, x, y, sample_weight), adapters)
    if y is not None or sample_weight is not None:
        raise ValueError(
            "`y` and `sample_weight` must be parts of the batches of a "
            "dataset, `(x, y, sample_weight, names)`. Received: them beside "
            f"a {type(x).__name__}"
        )
    names = None if adapters is None else names_of(adapters)
    return Batches(x, names, model, has_targets)


def validation_of(model, data, bank_model):
    """Returns the `Examples` or `Batches` of `validation_data`.

    `None` stands for none, and for what has ids already. Raises if the loss
    of `bank_model` needs targets that are not there.
    """
    if data is None:
        return None
    if is_dataset(data):
        return Batches(data, None, model)
    is_tuple = isinstance(data, (tuple, list))
    if is_tuple and 2 <= len(data) <= 3 and has_ids(data[0]):
        if not are_names(data[-1]):
            return None
    if not is_tuple or not 3 <= len(data) <= 4:
        received = f"{len(data)} parts" if is_tuple else f"a {type(data)}"
        raise ValueError(
            "`validation_data` must end with the name of the adapter of each "
            "example: `(x, y, names)` or `(x, y, sample_weight, names)`. "
            f"Received: {received}"
        )
    x, y, *weights, names = data
    data = preprocessed(model, x, y, *weights)
    what = "The names in `validation_data`"
    names = names_of(names, count_examples(data[0]), what)
    found = Examples(*data, names).checked()
    found.check_targets(bank_model, "`y` in `validation_data`")
    return found
