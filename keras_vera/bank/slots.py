"""Which adapter of an `AdapterBank` is in which slot."""

import collections
import contextlib
import itertools

import numpy as np

from keras_vera import _keras
from keras_vera.bank import mix
from keras_vera.bank.register import collected
from keras_vera.files.format import AdapterFileError


class Slots:
    """The adapters of a bank by name: in slots of its model, and in a folder.

    What the folder holds is the bank, whoever has written it: before adapters
    are used, their files are looked at, and read again if they are others.

    Attributes:
        files: The `BankFiles`.
        folder: The `Folder`, or `None`.
    """

    def __init__(self, model, files, register):
        """
        Args:
            model: A `BankModel`.
            files: A `BankFiles`.
            register: The `Register` of what the bank has.
        """
        self._model = model
        self.files = files
        self._register = register
        self.folder = register.folder
        # Slots by name, least recently used first; and of each its classes,
        # and the version of its file.
        self._slots = collections.OrderedDict()
        self._classes = {}
        self._versions = {}
        self._free = list(range(self.capacity, 0, -1))

    @property
    def capacity(self):
        return self._model.slots - 1

    @property
    def room(self):
        """How many examples, with any adapters, can be brought at once."""
        return max(1, self.capacity - len(self._register.held))

    def add(self, name, classes, like):
        """Adds an adapter that is fresh, or like others; see the bank."""
        self._register.check_new(name)
        if like is not None:
            names = [like] if isinstance(like, str) else list(like)
            self.put(name, *mix.mean(self.read(names), names, classes))
            return
        classes = self.files.checked_classes(classes)
        self.put(name, self.files.fresh, classes)

    def combine(self, weights, name, method, head):
        """Adds the combination of adapters; see `keras_vera.combine`."""
        self._register.check_new(name)
        adapters = dict(zip(weights, self.read(list(weights))))
        *adapter, lost = mix.combination(
            self.files, adapters, weights, method, head
        )
        self.put(name, *adapter)
        return lost

    def put(self, name, arrays, classes, replace=False):
        """Adds an adapter; with `replace`, also in the place of another."""
        self._model.check_base()
        self._check_weights()
        if self.folder is not None:
            content = self.files.encoded(arrays, classes)
            self._register.add(name, content, replace)
            return
        if name in self._slots:
            self._vacate(name)
        elif not self._free:
            raise ValueError(
                f"The bank is full, with {self.capacity} adapters. Call "
                f"`bank.grow(capacity)` or `bank.remove(name)`. Received: "
                f"name={name!r}"
            )
        self._fill([name], [(arrays, classes, None)])
        self._register.add(name)

    def remove(self, name):
        self._register.remove(name)
        self._vacate(name)

    def rename(self, name, new_name):
        self._register.rename(name, new_name)
        # Of one that others have removed.
        self._vacate(new_name)
        if name in self._slots:
            for table in (self._slots, self._classes, self._versions):
                table[new_name] = table.pop(name)

    def grow(self, capacity):
        old = self.capacity
        self._model.grow(capacity)
        self._free[:0] = range(capacity, old, -1)

    def save(self, name, filepath, arrays=None, dtype="float32"):
        """Writes an adapter, or other arrays for it, to a file."""
        # The base need not be adapted any more.
        self._check_weights()
        (slot,) = self.bring([name])
        if arrays is None:
            (arrays,) = self._model.read([slot])
        self.files.write(filepath, arrays, self._classes[name], dtype)

    def read(self, names):
        """Returns the arrays and the classes of each of some adapters."""
        self._register.check_known(names, base=False)
        found = []
        for name in names:
            # One by one: there may be more than fit on the device.
            if self.folder is not None and name not in self._register.held:
                found.append(self._read_file(name)[:2])
            else:
                (slot,) = self.bring([name])
                (arrays,) = self._model.read([slot])
                found.append((arrays, self._classes[name]))
        return found

    def bring(self, adapters, errors=None):
        """Returns the slots of adapters, which it brings to the device.

        Args:
            adapters: List of names; `None` stands for the base model.
            errors: Dict, which gets the error of each adapter that cannot be
                brought, by name; its slot is then that of the base model.
                Defaults to `None`: the first error is raised.
        """
        wanted = self._register.check_known(adapters, errors=errors)
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
        missing = [
            name
            for name, version in wanted.items()
            if name not in self._slots or self._versions[name] != version
        ]
        if missing:
            if len({*wanted, *self._register.held}) > self.capacity:
                raise ValueError(
                    f"{len(wanted)} different adapters do not fit into a bank "
                    f"with capacity={self.capacity} at once. Call "
                    "`bank.grow(capacity)`, or use fewer at a time."
                )
            # All files before any change.
            read = {}
            for name in missing:
                with collected(errors, name):
                    read[name] = self._read_file(name)
            for name in read:
                self._vacate(name)  # What was in the file before.
            leaving = [
                name
                for name in self._slots
                if name not in wanted and name not in self._register.held
            ]
            for name in leaving[: max(0, len(read) - len(self._free))]:
                self._vacate(name)
            if read:
                self._fill(list(read), list(read.values()))
        failed = errors or ()
        slots = [
            0 if name is None or name in failed else self._slots[name]
            for name in adapters
        ]
        return np.array(slots, "int32")

    def _read_file(self, name):
        self._model.check_base()
        while True:
            try:
                return self.files.read(self.folder.file(name))
            except AdapterFileError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            # Removed just now, or there is another already.
            self._register.check_known([name])

    def have_room_for(self, names):
        """Says whether `names`, or all of the bank (`None`), fit at once."""
        names = {*self._or_all(names), *self._register.held} - {None}
        return len(names) <= self.capacity

    def ids(self, names):
        """Brings adapters to the device; returns their ids by name."""
        wanted = list(dict.fromkeys(self._or_all(names)))
        errors = {} if names is None else None
        ids = dict(zip(wanted, self.bring(wanted, errors).tolist()))
        for name, error in (errors or {}).items():
            # Nobody asked for what others have removed just now.
            if name in self._register:
                raise error
            del ids[name]
        return {None: 0, **ids}

    def ids_for_fit(self, data, validation):
        """As `ids`, of all that a training uses.

        Args:
            data: The `Examples` or `Batches` that train.
            validation: The same to validate with, or `None`.
        """
        if data.names is None and not self.have_room_for(None):
            raise ValueError(
                "The slots of a bank stay as they are while `fit` trains, and "
                f"{len(self._register.names)} adapters do not fit into "
                f"capacity={self.capacity}. Pass the names that occur in the "
                "dataset as `adapters`, or call `bank.grow(capacity)`."
            )
        names = self._or_all(data.names)
        # A dataset does not say which names it has. Where not all have room,
        # it may have those that train.
        if validation is not None and (
            validation.names is not None or self.have_room_for(None)
        ):
            names = [*names, *self._or_all(validation.names)]
        return self.ids(names)

    def _or_all(self, names):
        return self._register.names if names is None else names

    def by_slot(self):
        """Returns the names of the adapters that are in slots, by slot."""
        return {slot: name for name, slot in self._slots.items()}

    def parts(self, adapters, batch_size):
        """Yields slices whose adapters fit on the device, and batch sizes."""
        if self.folder is None:
            yield slice(0, len(adapters)), batch_size
            return
        # So many examples always fit.
        room = self.room
        size = min(batch_size, room)
        start, held = 0, set()
        for i in range(0, len(adapters), size):
            names = set(adapters[i : i + size]) - {None}
            if held and len(held | names) > room:
                yield slice(start, i), size
                start, held = i, set()
            held |= names
        yield slice(start, len(adapters)), size

    def batches(self, data, kwargs):
        """Yields batches one after the other, each with its own adapters.

        A batch is `(parts, y, sample_weight)`. The adapters of a part are
        there until the next one is asked for.

        Args:
            data: The `Examples` or `Batches`.
            kwargs: Dict of further arguments that were given.
        """
        kwargs = dict(kwargs)
        kwargs.pop("verbose", None)
        steps = kwargs.pop("steps", None)
        size = kwargs.pop("batch_size", None) or 32
        if kwargs:
            raise ValueError(
                f"{len(self._register.names)} adapters in a bank with "
                f"capacity={self.capacity}, and batches that "
                "`keras.distribution` cannot cut, are used batch by batch, "
                f"without `{next(iter(kwargs))}`. Name no more adapters than "
                "fit, or leave it out."
            )
        batches = itertools.islice(data.batches(size, self), steps)
        for first in batches:
            return itertools.chain([first], batches)
        raise ValueError(
            "`x` must give one batch at least. Received: a dataset that gives "
            "none. A generator that was read before has to be made again."
        )

    @contextlib.contextmanager
    def training(self, names):
        """Keeps adapters in their slots; afterwards they are in the folder.

        Args:
            names: The adapters that the training uses, which are in slots.
        """
        self._model.check_base()
        self._check_weights()
        before = self._model.row_steps()
        self._register.held = {name: self._versions[name] for name in names}
        try:
            yield
            lost, broken = [], []
            if self.folder is not None:
                steps = self._model.row_steps() - before
                # Others were there to be evaluated.
                moved = [n for n in sorted(names) if steps[self._slots[n]]]
                lost, broken = self._write_trained(moved)
        except BaseException:
            if self.folder is not None:
                # What the folder holds is the bank.
                for name in self._register.held:
                    self._vacate(name)
            raise
        finally:
            self._register.held = {}
        texts = []
        if lost:
            texts.append(
                f"{len(lost)} adapters in '{self.folder.path}' were changed or "
                f"removed by others while `fit` trained them: {lost[:5]}. They "
                "stay as the others left them, and what they learned here is "
                "not kept. Train these again, from what the folder has now."
            )
        if broken:
            texts.append(
                f"{len(broken)} adapters hold NaN or infinity after the "
                f"training: {broken[:5]}. In '{self.folder.path}' they stay "
                "as they were. Look at the examples of these, or lower the "
                "learning rate."
            )
        if texts:
            raise (AdapterFileError if lost else ValueError)(
                " ".join([*texts, "All others are trained and written."])
            )

    def _write_trained(self, names):
        """Writes adapters to the folder.

        Returns:
            List of those that others have changed or removed; and of those
            that are no numbers any more. What they learned is not kept.
        """
        if not names:
            return [], []
        arrays = self._model.read([self._slots[name] for name in names])
        contents, broken = {}, []
        for name, own in zip(names, arrays):
            try:
                contents[name] = self.files.encoded(own, self._classes[name])
            except ValueError:  # They are checked for this alone.
                broken.append(name)
        new = self.folder.update(contents, self._versions)
        self._versions.update(new)
        lost = [name for name in contents if name not in new]
        for name in [*lost, *broken]:
            self._vacate(name)
        return lost, broken

    def _check_weights(self):
        _keras.synchronize(self._model)
        self.files.check_base()

    # ---- Slots.

    def _fill(self, names, adapters):
        slots = [self._free.pop() for _ in names]
        arrays, classes, versions = zip(*adapters)
        self._model.write(slots, arrays, list(classes))
        self._slots.update(zip(names, slots))
        self._classes.update(zip(names, classes))
        self._versions.update(zip(names, versions))

    def _vacate(self, name):
        slot = self._slots.pop(name, None)
        if slot is not None:
            del self._classes[name], self._versions[name]
            self._model.set_classes([slot], [0])
            self._free.append(slot)

    def check_not_fitting(self, name=None):
        """Raises inside `fit`, from a callback: for its adapters, or at all."""
        held = self._register.held
        if held and (name is None or name in held):
            raise ValueError("Adapters cannot change while `fit` trains them.")
