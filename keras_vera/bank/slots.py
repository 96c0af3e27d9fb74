"""Which adapter of an `AdapterBank` is in which slot, and its folder."""

import collections
import contextlib

import numpy as np

from keras_vera.bank import mix
from keras_vera.bank.files import Folder
from keras_vera.product.checks import check_integer


class Slots:
    """The adapters of a bank by name: in slots of its model, and in a folder.

    Attributes:
        names: Dict with the names of all adapters, in the order of adding; in
            a folder, also of what is in no slot.
        files: The `BankFiles`.
        folder: The `Folder`, or `None`.
    """

    def __init__(self, model, files, folder):
        """
        Args:
            model: A `BankModel`.
            files: A `BankFiles`.
            folder: String, or `None`.
        """
        self._model = model
        self.files = files
        self.folder = None if folder is None else Folder(folder)
        # Slots by name, least recently used first; and the classes of each.
        self._slots = collections.OrderedDict()
        self._classes = {}
        self._free = list(range(self.capacity, 0, -1))
        names = () if folder is None else self.folder.names()
        self.names = dict.fromkeys(sorted(names))
        # What `fit` uses just now, and must stay where it is.
        self._held = frozenset()

    @property
    def capacity(self):
        return self._model.slots - 1

    @property
    def room(self):
        """How many examples, with any adapters, can be brought at once."""
        return max(1, self.capacity - len(self._held))

    def add(self, name, classes, like):
        """Adds an adapter that is fresh, or like others; see the bank."""
        self.check_new(name)
        if like is not None:
            names = [like] if isinstance(like, str) else list(like)
            self.put(name, *mix.mean(self.read(names), names, classes))
            return
        if classes is None:
            classes = self.files.classes
        else:
            classes = check_integer("classes", classes, 1, self.files.classes)
        self.put(name, self.files.fresh, classes)

    def combine(self, weights, name, method, head):
        """Adds the combination of adapters; see `keras_vera.combine`."""
        self.check_new(name)
        adapters = dict(zip(weights, self.read(list(weights))))
        *adapter, lost = mix.combination(
            self.files, adapters, weights, method, head
        )
        self.put(name, *adapter)
        return lost

    def put(self, name, arrays, classes):
        """Adds an adapter that is not in the bank."""
        if self.folder is not None:
            self.files.write(self.folder.file(name), arrays, classes)
        elif not self._free:
            raise ValueError(
                f"The bank is full, with {self.capacity} adapters. Call "
                f"`bank.grow(capacity)` or `bank.remove(name)`. Received: "
                f"name={name!r}"
            )
        else:
            self._fill([name], [(arrays, classes)])
        self.names[name] = None

    def remove(self, name):
        if self.folder is not None:
            self.folder.remove(name)
        del self.names[name]
        self._vacate(name)

    def rename(self, name, new_name):
        if self.folder is not None:
            self.folder.rename(name, new_name)
        self.names = {
            new_name if other == name else other: None for other in self.names
        }
        if name in self._slots:
            self._slots[new_name] = self._slots.pop(name)
            self._classes[new_name] = self._classes.pop(name)

    def grow(self, capacity):
        old = self.capacity
        self._model.grow(capacity)
        self._free[:0] = range(capacity, old, -1)

    def save(self, name, filepath, arrays=None, dtype="float32"):
        """Writes an adapter, or other arrays for it, to a file."""
        (slot,) = self.bring([name])
        if arrays is None:
            (arrays,) = self._model.read([slot])
        self.files.write(filepath, arrays, self._classes[name], dtype)

    def read(self, names):
        """Returns the arrays and the classes of each of some adapters."""
        self.check_known(names, base=False)
        found = []
        for name in names:
            # One by one: there may be more than fit on the device.
            if self.folder is not None and name not in self._held:
                found.append(self.files.read(self.folder.file(name)))
            else:
                (slot,) = self.bring([name])
                (arrays,) = self._model.read([slot])
                found.append((arrays, self._classes[name]))
        return found

    def bring(self, adapters):
        """Returns the slots of adapters, which it brings to the device.

        Args:
            adapters: List of names; `None` stands for the base model.
        """
        self.check_known(adapters)
        wanted = dict.fromkeys(name for name in adapters if name is not None)
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
        missing = [name for name in wanted if name not in self._slots]
        if missing:
            if len({*wanted, *self._held}) > self.capacity:
                raise ValueError(
                    f"{len(wanted)} different adapters do not fit into a bank "
                    f"with capacity={self.capacity} at once. Call "
                    "`bank.grow(capacity)`, or use fewer at a time."
                )
            # All files before any change.
            adapters_read = [
                self.files.read(self.folder.file(name)) for name in missing
            ]
            leaving = [
                name
                for name in self._slots
                if name not in wanted and name not in self._held
            ]
            for name in leaving[: len(missing) - len(self._free)]:
                self._vacate(name)
            self._fill(missing, adapters_read)
        slots = [0 if name is None else self._slots[name] for name in adapters]
        return np.array(slots, "int32")

    def have_room_for(self, names):
        """Says whether `names`, or all of the bank (`None`), fit at once."""
        names = {*self._or_all(names), *self._held} - {None}
        return len(names) <= self.capacity

    def ids(self, names):
        """Brings adapters to the device; returns their ids by name."""
        names = list(dict.fromkeys(self._or_all(names)))
        return {None: 0, **dict(zip(names, self.bring(names).tolist()))}

    def ids_for_fit(self, data, validation):
        """As `ids`, of all that a training uses.

        Args:
            data: The `Examples` or `Batches` that train.
            validation: The same to validate with, or `None`.
        """
        if data.names is None and not self.have_room_for(None):
            raise ValueError(
                "The slots of a bank stay as they are while `fit` trains, and "
                f"{len(self.names)} adapters do not fit into capacity="
                f"{self.capacity}. Pass the names that occur in the dataset "
                "as `adapters`, or call `bank.grow(capacity)`."
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
        return list(self.names) if names is None else names

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

    @contextlib.contextmanager
    def training(self, names):
        """Keeps adapters in their slots; afterwards they are in the folder.

        Args:
            names: The adapters that the training uses, which are in slots.
        """
        before = self._model.row_steps()
        self._held = frozenset(names)
        try:
            yield
            if self.folder is not None:
                moved = self._model.row_steps() != before
                for name in sorted(self._held):
                    # Others were there to be evaluated.
                    if moved[self._slots[name]]:
                        self.save(name, self.folder.file(name))
        except BaseException:
            if self.folder is not None:
                # What the folder holds is the bank.
                for name in self._held:
                    self._vacate(name)
            raise
        finally:
            self._held = frozenset()

    # ---- Slots.

    def _fill(self, names, adapters):
        slots = [self._free.pop() for _ in names]
        arrays, classes = zip(*adapters)
        self._model.write(slots, arrays, list(classes))
        self._slots.update(zip(names, slots))
        self._classes.update(zip(names, classes))

    def _vacate(self, name):
        slot = self._slots.pop(name, None)
        if slot is not None:
            del self._classes[name]
            self._model.set_classes([slot], [0])
            self._free.append(slot)

    # ---- Checks.

    def check_new(self, name):
        if not isinstance(name, str) or not name:
            raise ValueError(
                "`name` must be a string that is not empty. "
                f"Received: name={name!r}"
            )
        if name in self.names:
            raise ValueError(
                f"The bank has an adapter named {name!r} already. Call "
                "`bank.remove(name)` first, or take another name."
            )

    def check_known(self, adapters, base=True):
        """Raises for names that are not in the bank; `None` is the base."""
        unknown = [
            name
            for name in dict.fromkeys(adapters)
            if name not in self.names and not (base and name is None)
        ]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5]))
            raise ValueError(
                f"The bank has no adapter named {shown}; it has "
                f"{len(self.names)}, see `bank.names`."
            )

    def check_not_fitting(self, name=None):
        """Raises inside `fit`, from a callback: for its adapters, or at all."""
        if self._held and (name is None or name in self._held):
            raise ValueError("Adapters cannot change while `fit` trains them.")
