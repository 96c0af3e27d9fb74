"""The Keras model of an `AdapterBank`, with an adapter for each example."""

import contextlib
from types import MappingProxyType

import keras
import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera._bank_scope import mixed_batch
from keras_vera._row_optimizer import reset_rows
from keras_vera._row_optimizer import train_rows
from keras_vera.layers._in_place import is_adapted

IDS = "adapter_ids"


class BankModel(keras.Model):
    """The base model with one input more, `adapter_ids`.

    It holds the numbers of all adapters, stacked: for each entry of an
    adapter file a variable of shape `(slots, *shape)`. Slot 0 is the base
    model and is never trained.
    """

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
            name: _new_stack(name, variable, fresh[name], slots)
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
            _raise_unless(known, ids)
        elif _keras.can_assign_traced():
            strays = ops.sum(ops.cast(ops.logical_not(known), "int32"))
            self._strays.assign_add(strays)
        with mixed_batch(self.rows(slots, classes)):
            outputs = self.base(inputs)
        # What no adapter has computed must not look like an answer.
        return keras.tree.map_structure(
            lambda y: _nan_unless(known, y), outputs
        )

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

    def fit(self, x=None, *args, **kwargs):
        with self._checked_ids(x):
            return super().fit(x, *args, **kwargs)

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
        if isinstance(x, dict):
            ids = x.get(IDS)
        elif isinstance(x, (list, tuple)) and len(x) > 1:
            ids = x[-1]
        else:
            return
        if isinstance(ids, (np.ndarray, list)) or ops.is_tensor(ids):
            ids = np.asarray(ops.convert_to_numpy(ids))
            classes = ops.convert_to_numpy(self._classes)
            known = (ids >= 0) & (ids < len(classes))
            known &= classes[np.where(known, ids, 0)] > 0
            _raise_unless(known, ids)

    # ---- Slots.

    def write(self, slots, adapters, classes):
        """Fills slots, and forgets how their former adapters were trained.

        Args:
            slots: List of integers.
            adapters: List of dicts of arrays, by entry name.
            classes: List of integers.
        """
        _keras.synchronize(self)
        count = len(slots)
        # A power of 2, so that backends compile few sizes.
        padded = 1 << (count - 1).bit_length()
        index = np.array([*slots, *[slots[-1]] * (padded - count)])[:, None]
        for name, stack in self._stacks.items():
            rows = [adapter[name] for adapter in adapters]
            rows = np.stack([*rows, *[rows[-1]] * (padded - count)])
            rows = ops.convert_to_tensor(rows, dtype=stack.dtype)
            stack.assign(ops.scatter_update(stack, index, rows))
        self.set_classes(slots, classes)
        if getattr(self, "optimizer", None) is not None:
            reset_rows(self.optimizer, slots)

    def set_classes(self, slots, classes):
        """Says what slots hold; 0 classes: nothing."""
        _keras.synchronize(self)
        values = ops.convert_to_numpy(self._classes).copy()
        values[slots] = classes
        self._classes.assign(values)

    def read(self, slots):
        """Returns the adapters in `slots`, each a dict of NumPy arrays."""
        _keras.synchronize(self)
        stacks = {
            name: ops.convert_to_numpy(
                ops.take(stack, np.asarray(slots, "int32"), axis=0)
            )
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
                grown = _new_stack(name, stack, self._fresh[name], slots)
                _copy_rows(stack, grown)
                self._untrack_variable(stack)
                self._stacks[name] = grown
        self._post_build()
        _keras.reset_compiled([self])
        if was_built:
            train_rows(self.optimizer)
            self.optimizer.build(self.trainable_variables)
            for before, after in zip(state, self.optimizer.variables):
                _copy_rows(before, after)


def split_ids(inputs):
    """Returns the inputs of the base model, and the ids."""
    if isinstance(inputs, dict) and IDS in inputs:
        inputs = dict(inputs)
        ids = inputs.pop(IDS)
        return inputs, ids
    if isinstance(inputs, (list, tuple)) and len(inputs) > 1:
        *inputs, ids = inputs
        return inputs[0] if len(inputs) == 1 else inputs, ids
    raise ValueError(
        f"The inputs must be those of the base model and `{IDS}`: a dict with "
        f"the key '{IDS}', or a list or tuple that ends with the ids. "
        f"Received: inputs of type {type(inputs).__name__}"
    )


def join_ids(x, ids):
    """Undoes `split_ids`."""
    if isinstance(x, dict):
        return {**x, IDS: ids}
    return [*x, ids] if isinstance(x, (list, tuple)) else [x, ids]


def _raise_unless(known, ids):
    known = ops.convert_to_numpy(known)
    if not known.all():
        ids = np.unique(ops.convert_to_numpy(ids)[~known])
        raise ValueError(
            f"`{IDS}` must be ids of adapters in the bank, as `bank.ids` "
            f"gives them. Received: {ids[:5].tolist()}"
        )


def _new_stack(name, variable, fresh, slots):
    *folders, last = name.split("/")
    with contextlib.ExitStack() as scopes:
        # The path is that of the entry: `vera_optimizer` goes by it.
        for folder in folders:
            scopes.enter_context(keras.name_scope(folder))
        return keras.Variable(
            np.repeat(fresh[None], slots, axis=0),
            dtype=variable.dtype,
            trainable=True,
            autocast=False,
            name=last,
        )


def _copy_rows(before, after):
    if tuple(before.shape) == tuple(after.shape):
        after.assign(ops.convert_to_tensor(before))
    else:
        rows = ops.convert_to_tensor(after)[before.shape[0] :]
        after.assign(
            ops.concatenate([ops.convert_to_tensor(before), rows], axis=0)
        )


def _nan_unless(known, y):
    if not keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(y.dtype)
    ):
        return y
    known = ops.reshape(known, (-1, *[1] * (len(y.shape) - 1)))
    return ops.where(known, y, ops.cast(float("nan"), y.dtype))
