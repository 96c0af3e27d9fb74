"""The Keras model of an `AdapterBank`, with an adapter for each example."""

import contextlib
import dataclasses
import json
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera.bank.ids import IDS
from keras_vera.bank.ids import ids_in
from keras_vera.bank.ids import nan_unless
from keras_vera.bank.ids import raise_unless
from keras_vera.bank.ids import split_ids
from keras_vera.bank.row_optimizer import reset_rows
from keras_vera.bank.row_optimizer import row_steps
from keras_vera.bank.row_optimizer import stop_rows
from keras_vera.bank.row_optimizer import train_rows
from keras_vera.bank.stacks import copy_rows
from keras_vera.bank.stacks import new_stack
from keras_vera.bank.stacks import padded
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._mixed_batch import mixed_batch


@dataclasses.dataclass
class Validation:
    """What a running `fit` validates with; see `keras.Model.fit`."""

    data: Any
    batch_size: int | None
    steps: int | None
    frequency: int | list = 1  # In epochs, or which ones.

    def is_due(self, epoch):
        """Says whether `fit` validates after an epoch, counted from 0."""
        due, epoch = self.frequency, epoch + 1
        return epoch % due == 0 if isinstance(due, int) else epoch in due


class BankModel(keras.Model):
    """The base model with one input more, `adapter_ids`.

    It holds the numbers of all adapters, stacked: for each entry of an
    adapter file a variable of shape `(slots, *shape)`. Slot 0 is the base
    model and is never trained.

    Attributes:
        adapters: The `Slots` of the bank, which know the names.
        validation: The `Validation` of a running `fit`, or `None`.
    """

    # What takes a model, not a bank, goes by this.
    vera_is_bank = True
    adapters = None
    validation = None

    def __init__(self, base, variables, fresh, layers, capacity):
        """
        Args:
            base: The model, adapted.
            variables: Dict of the variables of `base` that an adapter has, by
                entry name.
            fresh: Dict of NumPy arrays, what a fresh adapter holds.
            layers: Dict by layer of the entry names that it reads, in the
                order that it expects; `None` stands for what it has not. The
                head whose columns are the classes ends with `True`.
            capacity: Integer, slots beside that of the base model.
        """
        super().__init__(name=f"{base.name}_bank", dtype=base.dtype_policy)
        self.base = base
        # Not dicts, in which Keras would look for layers of this model.
        self._fresh = MappingProxyType(fresh)
        self._reading = MappingProxyType(layers)
        self._projections = MappingProxyType(
            {x: x.projection for x in layers if is_adapted(x)}
        )
        slots = capacity + 1
        # 0 for a free slot; 1 where the model has no classes.
        self._classes = keras.Variable(
            np.zeros(slots, "int32"),
            dtype="int32",
            trainable=False,
            name="classes",
        )
        # How many examples of compiled functions had no adapter.
        self._strays = keras.Variable(
            0, dtype="int32", trainable=False, name="strays"
        )
        self._stacks = {
            name: new_stack(name, variable, fresh[name], slots)
            for name, variable in variables.items()
        }
        self.built = True
        self._post_build()

    @property
    def slots(self):
        return self._classes.shape[0]

    # ---- What trains are the stacks, whatever of the base trains elsewhere.

    @property
    def trainable_variables(self):
        stacks = {id(v) for v in self._stacks.values()}
        return [v for v in super().trainable_variables if id(v) in stacks]

    @property
    def non_trainable_variables(self):
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in trained]

    @property
    def trainable_weights(self):
        return self.trainable_variables

    @property
    def non_trainable_weights(self):
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.weights if id(v) not in trained]

    # ---- The forward pass.

    def call(self, inputs, training=None):
        self.check_base()
        inputs, ids = split_ids(inputs)
        if len(ids.shape) != 1:
            raise ValueError(
                f"`{IDS}` must have the shape (batch,). Received: shape="
                f"{tuple(ids.shape)}"
            )
        # Before the cast, which may wrap.
        known = ops.logical_and(ids >= 0, ids < self.slots)
        slots = ops.where(known, ops.cast(ids, "int32"), 0)
        classes = ops.take(self._classes, slots, axis=0)
        known = ops.logical_and(known, classes > 0)
        if not _keras.is_traced(known):
            raise_unless(known, ids)
        elif _keras.can_assign_traced():
            strays = ops.sum(ops.cast(ops.logical_not(known), "int32"))
            self._strays.assign_add(strays)
        with mixed_batch(self.rows(slots, classes)):
            outputs = self.base(inputs)
        # What no adapter has computed must not look like an answer.
        return keras.tree.map_structure(lambda y: nan_unless(known, y), outputs)

    def rows(self, ids, classes=None):
        """Returns what each layer reads, with one row for each of `ids`."""
        if classes is None:
            classes = ops.take(self._classes, ids, axis=0)

        def row(name):
            if name is True:
                return classes
            if name is None:
                return None
            return ops.take(self._stacks[name], ids, axis=0)

        return {
            layer: tuple(row(name) for name in names)
            for layer, names in self._reading.items()
        }

    def check_base(self):
        for layer, projection in self._projections.items():
            if not is_adapted(layer) or layer.projection is not projection:
                raise ValueError(
                    f"Model '{self.base.name}' is not adapted as it was when "
                    "its `AdapterBank` was made (`disable_vera`, `merge` or "
                    "`enable_vera` was called since). Make a new bank."
                )

    # ---- Training.

    def compile(self, optimizer="rmsprop", *args, **kwargs):
        """As `keras.Model.compile`; the optimizer trains rows.

        Adapters that are absent from a batch do not move, nor does the
        optimizer's state for them.
        """
        super().compile(train_rows(optimizer), *args, **kwargs)

    def fit(self, *args, **kwargs):
        given = _keras.bound_arguments(super().fit, args, kwargs)
        _check_callbacks(given.get("callbacks"))
        split = given.pop("validation_split", None)
        if split and given.get("validation_data") is None:
            names = ("x", "y", "sample_weight")
            train, given["validation_data"] = _keras.split_validation(
                *(given.get(name) for name in names), split
            )
            given.update(zip(names, train))
        data = given.get("validation_data")
        if isinstance(data, (list, tuple)):
            self._check_ids(data[0])
        if data is not None:
            self.validation = Validation(
                data,
                given.get("validation_batch_size") or given.get("batch_size"),
                given.get("validation_steps"),
                given.get("validation_freq", 1),
            )
        self.stop_rows(None)
        try:
            with self._checked_ids(given.get("x")):
                return super().fit(**given)
        finally:
            self.validation = None
            self.stop_rows(None)

    def evaluate(self, x=None, *args, **kwargs):
        with self._checked_ids(x):
            return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        with self._checked_ids(x):
            return super().predict(x, *args, **kwargs)

    def train_on_batch(self, x, *args, **kwargs):
        self._check_ids(x)
        return super().train_on_batch(x, *args, **kwargs)

    def test_on_batch(self, x, *args, **kwargs):
        self._check_ids(x)
        return super().test_on_batch(x, *args, **kwargs)

    def predict_on_batch(self, x):
        self._check_ids(x)
        return super().predict_on_batch(x)

    @contextlib.contextmanager
    def _checked_ids(self, x):
        """Raises for ids without an adapter: before, where `x` is of arrays;
        else afterwards, as no compiled function can raise on all backends."""
        self._check_ids(x)
        before = self._count_strays()
        with _keras.values_kept(self):
            yield
        found = self._count_strays() - before
        if found:
            raise ValueError(
                f"{found} examples had `{IDS}` without an adapter in the "
                "bank. They got NaN, and trained nothing. Take ids from "
                "`bank.ids`."
            )

    def _count_strays(self):
        _keras.synchronize(self)
        return int(ops.convert_to_numpy(self._strays))

    def _check_ids(self, x):
        ids = ids_in(x)
        if isinstance(ids, (np.ndarray, list)) or ops.is_tensor(ids):
            ids = np.asarray(ops.convert_to_numpy(ids))
            classes = ops.convert_to_numpy(self._classes)
            known = (ids >= 0) & (ids < len(classes))
            known &= classes[np.where(known, ids, 0)] > 0
            raise_unless(known, ids)

    def row_steps(self):
        """Returns how many steps the adapter in each slot has trained."""
        _keras.synchronize(self)
        steps = row_steps(getattr(self, "optimizer", None))
        return np.zeros(self.slots, "int32") if steps is None else steps

    def stop_rows(self, slots):
        """Makes adapters stay as they are in the running `fit`.

        Args:
            slots: List of integers; `None` lets all train again.
        """
        _keras.synchronize(self)
        stop_rows(getattr(self, "optimizer", None), slots)

    # ---- Keras' own files.

    def save(self, *args, **kwargs):
        # Before a file is opened.
        self.get_config()

    def get_config(self):
        raise NotImplementedError(
            "The model of an `AdapterBank` cannot be made again from a "
            "config, so it has no `.keras` file and no clone. Save adapters "
            "with `bank.save(name, filepath)`, the state of a training with "
            "`bank.model.save_weights`, and the base with its own methods."
        )

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["names"] = np.frombuffer(self._names().encode(), "uint8")

    def load_own_variables(self, store):
        names = bytes(np.array(store["names"])).decode()
        if names != self._names():
            raise ValueError(
                "A weights file of `bank.model` loads only into a bank with "
                "the same adapters in the same slots. Received: a file with "
                f"{names}; the bank has {self._names()}. Load "
                "adapter files with `bank.load(name, filepath)` instead."
            )
        # Without the names, as Keras asks for.
        super().load_own_variables(
            {key: store[key] for key in store.keys() if key != "names"}
        )

    def _names(self):
        names = self.adapters.by_slot()
        return json.dumps({slot: names[slot] for slot in sorted(names)})

    # ---- Slots.

    def write(self, slots, adapters, classes):
        """Fills slots, and forgets how their former adapters were trained.

        Args:
            slots: List of integers.
            adapters: List of dicts of arrays, by entry name.
            classes: List of integers.
        """
        self.assign_rows(slots, adapters)
        self.set_classes(slots, classes)
        if getattr(self, "optimizer", None) is not None:
            reset_rows(self.optimizer, slots)

    def assign_rows(self, slots, adapters):
        _keras.synchronize(self)
        index = np.array(padded(slots))[:, None]
        for name, stack in self._stacks.items():
            rows = np.stack(padded([adapter[name] for adapter in adapters]))
            rows = ops.convert_to_tensor(rows, dtype=stack.dtype)
            stack.assign(ops.scatter_update(stack, index, rows))

    def set_classes(self, slots, classes):
        """Says what slots hold; 0 classes: nothing."""
        _keras.synchronize(self)
        values = ops.convert_to_numpy(self._classes).copy()
        values[slots] = classes
        self._classes.assign(values)

    def read(self, slots):
        """Returns the adapters in `slots`, each a dict of NumPy arrays."""
        _keras.synchronize(self)
        index = np.array(padded(slots), "int32")
        stacks = {
            name: ops.convert_to_numpy(ops.take(stack, index, axis=0))
            for name, stack in self._stacks.items()
        }
        return [
            {name: rows[i] for name, rows in stacks.items()}
            for i in range(len(slots))
        ]

    def grow(self, capacity):
        """Adds slots; adapters and the optimizer's state for them stay."""
        _keras.synchronize(self)
        optimizer = getattr(self, "optimizer", None)
        was_built = getattr(optimizer, "built", False) and self.compiled
        state = optimizer.variables if was_built else []
        # The optimizer starts again, with some of these variables.
        state = [ops.copy(ops.convert_to_tensor(v)) for v in state]
        old, slots = self.slots, capacity + 1
        classes = ops.convert_to_numpy(self._classes)
        classes = np.concatenate([classes, np.zeros(slots - old, "int32")])
        with _keras.new_state_allowed(self):
            grown = keras.Variable(
                classes, dtype="int32", trainable=False, name="classes"
            )
            self._untrack_variable(self._classes)
            self._classes = grown
            for name, stack in dict(self._stacks).items():
                grown = new_stack(name, stack, self._fresh[name], slots)
                copy_rows(stack, grown)
                self._untrack_variable(stack)
                self._stacks[name] = grown
        self._post_build()
        _keras.reset_compiled([self])
        if was_built:
            train_rows(self.optimizer)
            self.optimizer.build(self.trainable_variables)
            for before, after in zip(state, self.optimizer.variables):
                copy_rows(before, after)


def _check_callbacks(callbacks):
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
