import collections
import threading

import numpy as np
from keras import ops
from keras import tree

from keras_vera import _bank_mix
from keras_vera import _keras
from keras_vera._adapter_format import check_file_dtype
from keras_vera._adapter_format import check_filepath
from keras_vera._bank_files import BankFiles
from keras_vera._bank_files import Folder
from keras_vera._bank_generate import Generator
from keras_vera._bank_generate import can_generate
from keras_vera._bank_model import BankModel
from keras_vera._bank_model import join_ids
from keras_vera._checks import check_integer


class AdapterBank:
    """Many adapters on one base model, used and trained in one batch.

    A batch in which every example has its own adapter costs two shared matrix
    products and a gather of vectors for each adapted layer, however many
    adapters there are: `y = x W + b[ids] * ((x A * d[ids]) B)`. The bank holds
    `d` and `b` of every adapted layer, stacked, and of every adapter its own
    task head, if `model` has one that trains.

    Heads are `Dense` layers. Adapters may have fewer classes than the head of
    `model`; the logits of the classes that an adapter has not are -1e9.

    With a `folder`, which holds an adapter file for each name, the bank may
    be much larger than the device's memory: adapters are read when a batch
    needs them, and the least recently used make room. Every change is
    written to the folder at once.

    Several threads may use one bank; its methods wait for each other. What
    the other methods do to `bank.model` and `model` directly is not guarded.

    Args:
        model: A model on which `keras_vera.enable_vera` was called. It stays
            usable; its own vectors are no adapter of the bank. The first axis
            of what its adapted layers receive must be that of the examples.
        capacity: Positive integer, the number of adapters in the device's
            memory. See `grow`.
        folder: `str` or `pathlib.Path`, a folder of adapter files that is the
            bank; made if it does not exist. Defaults to `None`: all adapters
            are in the device's memory.

    Attributes:
        model: A `keras.Model` with the inputs of `model` and `adapter_ids`,
            int32 of shape `(batch,)`: in a dict, under this key; else as the
            last of a list or tuple, `[x, adapter_ids]`. Its trained variables
            are the bank's, so `compile` and `fit` train adapters, each by its
            own examples; those absent from a batch do not move, nor does the
            optimizer's state for them. Ids without an adapter are an error:
            at once in arrays and in eager calls, at the end of `fit`,
            `evaluate` or `predict` in datasets, which a compiled function
            reads. Their outputs are NaN and they train nothing, also in
            functions that you compile yourself.

    Example:

    ```python
    keras_vera.enable_vera(classifier, rank=256)
    bank = keras_vera.AdapterBank(classifier, capacity=100)
    bank.add("ann")
    bank.load("bob", "bob.vera.safetensors")
    bank.model.compile(
        optimizer=keras_vera.vera_optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    bank.fit(texts, labels, adapters=["ann", "bob", "ann"])
    bank.predict(texts, adapters=["bob", "ann", None])  # None: the base
    bank.save("ann", "ann.vera.safetensors")
    ```
    """

    def __init__(self, model, capacity, folder=None):
        capacity = check_integer("capacity", capacity, 1)
        self._files = BankFiles(model)
        self._folder = None if folder is None else Folder(folder)
        self._base = model
        files = self._files
        self.model = BankModel(
            model, files.variables, files.fresh, files.layers, capacity
        )
        self.model.set_classes([0], [files.classes])
        # Slots by name, least recently used first; and the classes of each.
        self._slots = collections.OrderedDict()
        self._classes = {}
        self._free = list(range(capacity, 0, -1))
        names = () if folder is None else self._folder.names()
        # In the order of adding; in a folder, also of what is not in a slot.
        self._names = dict.fromkeys(sorted(names))
        self._fitting = frozenset()
        self._generator = Generator(model)
        self._lock = threading.RLock()

    # ---- Names.

    @property
    def capacity(self):
        return self.model.slots - 1

    @property
    def names(self):
        """The names of all adapters, a list."""
        with self._lock:
            return list(self._names)

    def __len__(self):
        return len(self._names)

    def __contains__(self, name):
        return name in self._names

    def __iter__(self):
        return iter(self.names)

    def add(self, name, classes=None, like=None):
        """Adds a fresh adapter: `b` is 0, and the head is that of the model.

        With `like`, it starts warm instead, as others are: a copy of one, or
        the mean of several, of their vectors and of their heads.

        Args:
            name: String, not in the bank yet.
            classes: Positive integer, how many of the head's classes the
                adapter has. Defaults to `None`: all, or as many as `like`.
            like: String or list of strings, adapters of the bank, all of the
                same number of classes. Defaults to `None`: fresh.
        """
        with self._lock:
            self._check_new(name)
            if like is not None:
                names = [like] if isinstance(like, str) else list(like)
                adapters = self._read(names)
                self._put(name, *_bank_mix.mean(adapters, names, classes))
                return
            if classes is None:
                classes = self._files.classes
            else:
                classes = check_integer(
                    "classes", classes, 1, self._files.classes
                )
            self._put(name, self._files.fresh, classes)

    def load(self, name, filepath):
        """Loads an adapter file, made by `save` or `keras_vera.save_adapter`.

        Args:
            name: String, not in the bank yet.
            filepath: `str` or `pathlib.Path`.

        Raises:
            keras_vera.AdapterFileError: If the file is damaged or belongs to
                another base, or to another rank, seed or set of layers. The
                bank is then as it was.
        """
        with self._lock:
            self._check_new(name)
            self._put(name, *self._files.read(filepath))

    def save(self, name, filepath, dtype="float32"):
        """Saves an adapter as `keras_vera.save_adapter` does.

        Args:
            name: String, an adapter of the bank.
            filepath: `str` or `pathlib.Path`. Must end in `.vera.safetensors`.
            dtype: How floats are stored; see `keras_vera.save_adapter`.
                Defaults to `"float32"`.
        """
        filepath = check_filepath(filepath)
        check_file_dtype(dtype)
        with self._lock:
            self._check_known([name], base=False)
            (slot,) = self._bring([name])
            (arrays,) = self.model.read([slot])
            self._files.write(filepath, arrays, self._classes[name], dtype)

    def remove(self, name):
        """Removes an adapter; from a bank with a folder, also its file."""
        with self._lock:
            self._check_known([name], base=False)
            self._check_not_fitting(name)
            if self._folder is not None:
                self._folder.remove(name)
            del self._names[name]
            self._vacate(name)

    def rename(self, name, new_name):
        """Gives an adapter another name.

        Args:
            name: String, an adapter of the bank.
            new_name: String, not in the bank yet.
        """
        with self._lock:
            self._check_known([name], base=False)
            self._check_new(new_name)
            self._check_not_fitting(name)
            if self._folder is not None:
                self._folder.rename(name, new_name)
            self._names = {
                new_name if other == name else other: None
                for other in self._names
            }
            if name in self._slots:
                self._slots[new_name] = self._slots.pop(name)
                self._classes[new_name] = self._classes.pop(name)

    def grow(self, capacity):
        """Makes room for more adapters; those that there are stay.

        Args:
            capacity: Integer, larger than the present capacity.
        """
        with self._lock:
            old = self.capacity
            capacity = check_integer("capacity", capacity, old + 1)
            self._check_not_fitting(None)
            self.model.grow(capacity)
            self._free[:0] = range(capacity, old, -1)

    def ids(self, adapters):
        """Returns the `adapter_ids` of names, for `bank.model`.

        Args:
            adapters: List of names; `None` stands for the base model.

        Returns:
            An int32 NumPy array.
        """
        if self._folder is not None:
            raise ValueError(
                "A bank with a folder gives no ids, since its adapters come "
                "and go. Use `bank.predict`, `bank.fit` or `bank.generate` "
                "with names."
            )
        with self._lock:
            return self._bring(adapters)

    # ---- Using and training adapters.

    def predict(self, x, adapters, batch_size=32, **kwargs):
        """Predicts for each example with its own adapter.

        Args:
            x: Inputs of `model`: arrays, or what its preprocessor takes.
            adapters: List with a name for each example; `None` stands for the
                base model.
            batch_size: Positive integer. Defaults to `32`.
            **kwargs: Further arguments of `keras.Model.predict`.

        Returns:
            NumPy array(s) of predictions.
        """
        check_integer("batch_size", batch_size, 1)
        x = self._preprocessed(x)[0]
        adapters = _check_count(adapters, x)
        kwargs = {"verbose": 0, **kwargs}
        with self._lock:
            self._check_known(adapters)
            outputs = []
            for part, size in self._parts(adapters, batch_size):
                ids = self._bring(adapters[part])
                inputs = join_ids(tree.map_structure(lambda v: v[part], x), ids)
                outputs.append(
                    self.model.predict(inputs, batch_size=size, **kwargs)
                )
        return tree.map_structure(lambda *ys: np.concatenate(ys), *outputs)

    def evaluate(self, x, y, adapters, **kwargs):
        """Evaluates each example with its own adapter.

        Args:
            x: As in `predict`.
            y: Targets, an array.
            adapters: As in `predict`; no more of them than `capacity`.
            **kwargs: Further arguments of `keras.Model.evaluate`.

        Returns:
            As `keras.Model.evaluate`.
        """
        x, y, weights = self._preprocessed(x, y)
        adapters = _check_count(adapters, x)
        if weights is not None:
            kwargs["sample_weight"] = weights
        with self._lock:
            inputs = join_ids(x, self._bring(adapters))
            return self.model.evaluate(inputs, y, **kwargs)

    def fit(self, x, y=None, *, adapters, **kwargs):
        """Trains many adapters, each by its own examples.

        Call `bank.model.compile` first. In arrays, examples are shuffled as
        in every `fit`; no two adapters influence each other.

        Args:
            x: As in `predict`.
            y: Targets, an array.
            adapters: List with a name for each example, of no more different
                adapters than `capacity`. `None` stands for the base model,
                which does not train.
            **kwargs: Further arguments of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.
        """
        x, y, weights = self._preprocessed(x, y)
        adapters = _check_count(adapters, x)
        if weights is not None:
            kwargs["sample_weight"] = weights
        with self._lock:
            self._check_not_fitting(None)
            inputs = join_ids(x, self._bring(adapters))
            self._fitting = frozenset(adapters) - {None}
            try:
                history = self.model.fit(inputs, y, **kwargs)
                if self._folder is not None:
                    self._write(sorted(self._fitting))
                return history
            except BaseException:
                if self._folder is not None:
                    # What the folder holds is the bank.
                    for name in self._fitting:
                        self._vacate(name)
                raise
            finally:
                self._fitting = frozenset()

    def generate(self, prompts, adapters, **kwargs):
        """Generates for each prompt with its own adapter.

        Args:
            prompts: As in `generate` of the KerasHub `CausalLM` that the bank
                was made on: a list of strings, or a dict of arrays.
            adapters: List with a name for each prompt; `None` stands for the
                base model.
            **kwargs: Further arguments of `CausalLM.generate`, such as
                `max_length`.

        Returns:
            As `CausalLM.generate`.
        """
        if not can_generate(self._base):
            raise ValueError(
                "`generate` needs a bank on a `keras_hub.models.CausalLM`. "
                f"Received: a bank on a {type(self._base).__name__}"
            )
        if not isinstance(prompts, (list, dict)):
            raise ValueError(
                "`prompts` must be a list of strings or a dict of arrays. "
                f"Received: prompts of type {type(prompts).__name__}"
            )
        adapters = _check_count(adapters, prompts)
        with self._lock:
            self.model.check_base()
            _keras.synchronize(self.model)
            rows = self.model.rows(self._bring(adapters))
            return self._generator.generate(rows, prompts, **kwargs)

    # ---- Adapters from others.

    def _combine(self, weights, name, method, head):
        """Adds the combination of adapters; see `keras_vera.combine`."""
        with self._lock:
            self._check_new(name)
            adapters = dict(zip(weights, self._read(list(weights))))
            *adapter, lost = _bank_mix.combination(
                self._files, adapters, weights, method, head
            )
            self._put(name, *adapter)
            return lost

    def _read(self, names):
        """Returns the arrays and the classes of each of some adapters."""
        self._check_known(names, base=False)
        found = []
        for name in names:
            # One by one: there may be more than fit on the device.
            if self._folder is not None and name not in self._fitting:
                found.append(self._files.read(self._folder.file(name)))
            else:
                (slot,) = self._bring([name])
                found.append((self.model.read([slot])[0], self._classes[name]))
        return found

    # ---- Slots.

    def _put(self, name, arrays, classes):
        """Adds an adapter that is not in the bank."""
        if self._folder is not None:
            self._files.write(self._folder.file(name), arrays, classes)
        elif not self._free:
            raise ValueError(
                f"The bank is full, with {self.capacity} adapters. Call "
                f"`bank.grow(capacity)` or `bank.remove(name)`. Received: "
                f"name={name!r}"
            )
        else:
            self._fill([name], [(arrays, classes)])
        self._names[name] = None

    def _bring(self, adapters):
        """Returns the slots of adapters, which it brings to the device."""
        self._check_known(adapters)
        wanted = dict.fromkeys(name for name in adapters if name is not None)
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
        missing = [name for name in wanted if name not in self._slots]
        if missing:
            if len({*wanted, *self._fitting}) > self.capacity:
                raise ValueError(
                    f"{len(wanted)} different adapters do not fit into a bank "
                    f"with capacity={self.capacity} at once. Call "
                    "`bank.grow(capacity)`, or use fewer at a time."
                )
            # All files before any change.
            adapters_read = [
                self._files.read(self._folder.file(name)) for name in missing
            ]
            leaving = [
                name
                for name in self._slots
                if name not in wanted and name not in self._fitting
            ]
            for name in leaving[: len(missing) - len(self._free)]:
                self._vacate(name)
            self._fill(missing, adapters_read)
        slots = [0 if name is None else self._slots[name] for name in adapters]
        return np.array(slots, "int32")

    def _fill(self, names, adapters):
        slots = [self._free.pop() for _ in names]
        arrays, classes = zip(*adapters)
        self.model.write(slots, arrays, list(classes))
        self._slots.update(zip(names, slots))
        self._classes.update(zip(names, classes))

    def _vacate(self, name):
        slot = self._slots.pop(name, None)
        if slot is not None:
            del self._classes[name]
            self.model.set_classes([slot], [0])
            self._free.append(slot)

    def _write(self, names):
        slots = [self._slots[name] for name in names]
        for name, slot in zip(names, slots):
            (arrays,) = self.model.read([slot])
            self._files.write(
                self._folder.file(name), arrays, self._classes[name]
            )

    def _parts(self, adapters, batch_size):
        """Yields slices whose adapters fit on the device, and batch sizes."""
        if self._folder is None:
            yield slice(0, len(adapters)), batch_size
            return
        # So many examples always fit.
        room = self.capacity - len(self._fitting)
        size = max(1, min(batch_size, room))
        start, held = 0, set()
        for i in range(0, len(adapters), size):
            names = set(adapters[i : i + size]) - {None}
            if held and len(held | names) > room:
                yield slice(start, i), size
                start, held = i, set()
            held |= names
        yield slice(start, len(adapters)), size

    def _preprocessed(self, x, y=None):
        """Returns x, y and weights as `model` itself would be given them."""
        weights = None
        if getattr(self._base, "preprocessor", None) is not None:
            data = self._base.preprocess_samples(x, y)
            if isinstance(data, tuple):
                x, y, weights = (*data, None, None)[:3]
            else:
                x = data
        return tree.map_structure(_as_numpy, (x, y, weights))

    # ---- Checks.

    def _check_new(self, name):
        if not isinstance(name, str) or not name:
            raise ValueError(
                "`name` must be a string that is not empty. "
                f"Received: name={name!r}"
            )
        if name in self._names:
            raise ValueError(
                f"The bank has an adapter named {name!r} already. Call "
                "`bank.remove(name)` first, or take another name."
            )

    def _check_known(self, adapters, base=True):
        """Raises for names that are not in the bank; `None` is the base."""
        unknown = [
            name
            for name in dict.fromkeys(adapters)
            if name not in self._names and not (base and name is None)
        ]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(
                f"The bank has no adapter named {shown}; it has "
                f"{len(self._names)}, see `bank.names`."
            )

    def _check_not_fitting(self, name):
        """Raises inside `fit`, from a callback: for its adapters, or at all."""
        if self._fitting and (name is None or name in self._fitting):
            raise ValueError("Adapters cannot change while `fit` trains them.")


def _check_count(adapters, x):
    """Returns `adapters` as a list, or raises unless it has one per example."""
    if isinstance(adapters, str) or not hasattr(adapters, "__len__"):
        raise ValueError(
            "`adapters` must be a list with a name for each example. "
            f"Received: adapters={adapters!r}"
        )
    first = x if _is_texts(x) else tree.flatten(x)[0]
    if len(adapters) != len(first) or not len(adapters):
        raise ValueError(
            "`adapters` must have one name for each example, at least one. "
            f"Received: {len(adapters)} names for {len(first)} examples"
        )
    return list(adapters)


def _is_texts(x):
    return isinstance(x, list) and all(isinstance(text, str) for text in x)


def _as_numpy(x):
    if x is None or isinstance(x, np.ndarray):
        return x
    return ops.convert_to_numpy(x)
