import threading
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_vera import _keras
from keras_vera._types import FilePath
from keras_vera.bank import rows
from keras_vera.bank import scores
from keras_vera.bank.batches import without_none
from keras_vera.bank.data import Batches
from keras_vera.bank.data import data_of
from keras_vera.bank.data import validation_of
from keras_vera.bank.files import BankFiles
from keras_vera.bank.generate import Generator
from keras_vera.bank.generate import check_can_generate
from keras_vera.bank.generate import padded_prompts
from keras_vera.bank.model import BankModel
from keras_vera.bank.names import count_examples
from keras_vera.bank.names import names_of
from keras_vera.bank.outputs import outputs_of
from keras_vera.bank.register import Register
from keras_vera.bank.slots import Slots
from keras_vera.files.format import check_file_dtype
from keras_vera.files.format import check_filepath
from keras_vera.product.checks import check_integer


class AdapterBank:
    """Many adapters on one base model, used and trained in one batch.

    A batch in which every example has its own adapter costs two shared matrix
    products and a gather of vectors for each adapted layer, however many
    adapters there are: `y = x W + b[ids] * ((x A * d[ids]) B)`. The bank holds
    `d` and `b` of every adapted layer, stacked, and of every adapter its own
    task head, if `model` has one that trains.

    Heads are `Dense` layers. Adapters may have fewer classes than the head of
    `model`; the logits of the classes that an adapter has not are -1e9.

    With a `folder`, which holds an adapter file for each name, the bank may be
    much larger than the device's memory: adapters are read when a batch needs
    them, and the least recently used make room. Every change is written to it
    at once, and what other processes write is noticed before each batch.

    Several threads may use one bank; its methods wait for each other. Direct
    use of `bank.model` and `model` is not guarded.

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

    Raises:
        ValueError: If `model` is not adapted, or has what a bank cannot hold
            (`docs/limits.md`), or if an argument makes no sense.

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
    bank.fit(texts, labels, adapters=names)  # such as ["ann", "bob", "ann"]
    bank.predict(texts[:3], adapters=["bob", "ann", None])  # None: the base
    bank.save("ann", "ann.vera.safetensors")
    ```
    """

    def __init__(
        self, model: keras.Model, capacity: int, folder: FilePath | None = None
    ) -> None:
        capacity = check_integer("capacity", capacity, 1)
        if isinstance(model, keras.Layer):
            _keras.check_all_here("AdapterBank", model.variables)
        files = self._files = BankFiles(model)
        self._base = model
        with _keras.strategy_scope(model):
            self.model = BankModel(
                model, files.variables, files.fresh, files.layers, capacity
            )
        self.model.set_classes([0], [files.classes])
        self._register = Register(folder)
        self._slots = Slots(self.model, files, self._register)
        self.model.adapters = self._slots
        self._generator = Generator(model)
        self._lock = threading.RLock()

    @property
    def capacity(self) -> int:
        """The number of adapters in the device's memory."""
        return self._slots.capacity

    @property
    def names(self) -> list[str]:
        """The names of all adapters, a list."""
        return self._register.names

    def __len__(self) -> int:
        return len(self._register.names)

    def __contains__(self, name: object) -> bool:
        return name in self._register

    def __iter__(self):
        return iter(self.names)

    def add(
        self,
        name: str,
        classes: int | None = None,
        like: str | Sequence[str] | None = None,
    ) -> None:
        """Adds a fresh adapter: `b` is 0, and the head is that of the model.

        With `like`, it starts warm instead, as others are: a copy of one, or
        the mean of several, of their vectors and of their heads.

        Args:
            name: String, not in the bank yet.
            classes: Positive integer, how many of the head's classes the
                adapter has. Defaults to `None`: all, or as many as `like`.
            like: String or list of strings, adapters of the bank, all of the
                same number of classes. Defaults to `None`: fresh.

        Raises:
            ValueError: If the name is taken or an argument makes no sense, if
                the bank is full, or if it is not known which head `classes`
                means.
        """
        with self._lock:
            self._slots.add(name, classes, like)

    def load(
        self,
        name: str,
        filepath: FilePath,
        head: bool = True,
        replace: bool = False,
    ) -> None:
        """Loads an adapter file, made by `save` or `keras_vera.save_adapter`.

        Args:
            name: String, not in the bank yet, unless with `replace`.
            filepath: As in `keras_vera.load_adapter`.
            head: Boolean, whether to load the task head as well. `False`
                gives the adapter that of the model. Defaults to `True`.
            replace: Boolean, whether an adapter that is there makes room for
                that of the file. Defaults to `False`.

        Raises:
            keras_vera.AdapterFileError: If the file is damaged or belongs to
                another base, or to another rank, seed or set of layers. The
                bank is then as it was.
        """
        with self._lock:
            self._register.check_new(name, replace)
            self._slots.check_not_fitting(name)
            self.model.check_base()
            arrays, classes, _ = self._files.read(filepath, head)
            self._slots.put(name, arrays, classes, replace)

    def save(
        self, name: str, filepath: FilePath, dtype: str = "float32"
    ) -> None:
        """Saves an adapter as `keras_vera.save_adapter` does.

        Args:
            name: String, an adapter of the bank.
            filepath: `str` or `pathlib.Path`. Must end in `.vera.safetensors`.
            dtype: How floats are stored; see `keras_vera.save_adapter`.
                Defaults to `"float32"`.

        Raises:
            ValueError: If the bank has no such adapter, or the base has other
                weights than when the bank was made, or a number is not finite.
            keras_vera.AdapterFileError: If the file cannot be written.
        """
        filepath = check_filepath(filepath)
        check_file_dtype(dtype)
        with self._lock:
            self._register.check_known([name], base=False)
            self._slots.save(name, filepath, dtype=dtype)

    def remove(self, name: str) -> None:
        """Removes an adapter; from a bank with a folder, also its file.

        Args:
            name: String, an adapter of the bank.

        Raises:
            ValueError: If the bank has no such adapter, or if `fit` trains it
                just then.
        """
        with self._lock:
            self._register.check_known([name], base=False)
            self._slots.check_not_fitting(name)
            self._slots.remove(name)

    def rename(self, name: str, new_name: str) -> None:
        """Gives an adapter another name.

        Args:
            name: String, an adapter of the bank.
            new_name: String, not in the bank yet.

        Raises:
            ValueError: If the bank has no such adapter, or has the new name,
                or if `fit` trains it just then.
        """
        with self._lock:
            self._register.check_known([name], base=False)
            self._register.check_new(new_name)
            self._slots.check_not_fitting(name)
            self._slots.rename(name, new_name)

    def grow(self, capacity: int) -> None:
        """Makes room for more adapters; those that there are stay.

        Args:
            capacity: Integer, larger than the present capacity.

        Raises:
            ValueError: If it is not larger, or if `fit` runs.
        """
        with self._lock:
            capacity = check_integer("capacity", capacity, self.capacity + 1)
            self._slots.check_not_fitting()
            self._slots.grow(capacity)

    def ids(self, adapters: Any) -> np.ndarray:
        """Returns the `adapter_ids` of names, for `bank.model`.

        Args:
            adapters: List of names; `None` stands for the base model.

        Returns:
            An int32 NumPy array.

        Raises:
            ValueError: If the bank has no such adapter, or has a folder.
        """
        self._register.check_no_folder()
        with self._lock:
            return self._slots.bring(names_of(adapters))

    def predict(
        self,
        x: Any,
        adapters: Any = None,
        batch_size: int = 32,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Predicts for each example with its own adapter.

        Args:
            x: Inputs of `model`: arrays, or what its preprocessor takes. Or a
                dataset whose batches end with names, `(x, names)` or `(x, y,
                names)`: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
                PyTorch `DataLoader`, a grain dataset, or a generator. An
                empty name there stands for the base model.
            adapters: List with a name for each example; `None` stands for the
                base model. NumPy arrays, pandas series and tensors of strings
                do as well. Not for a dataset.
            batch_size: Positive integer, for arrays. Defaults to `32`.
            return_exceptions: Boolean, whether an example whose adapter is
                not there or cannot be read, or whose text the preprocessor
                refuses, gets its exception, and the others their answers. Not
                for a dataset. Defaults to `False`: the first is raised.
            **kwargs: Further arguments of `keras.Model.predict`.

        Returns:
            NumPy array(s) of predictions. With `return_exceptions`, a list of
            those of each example, or its exception.

        Raises:
            ValueError: If the bank has no such adapter, or if an argument
                makes no sense.
            keras_vera.AdapterFileError: If a file in the folder cannot be read.
        """
        check_integer("batch_size", batch_size, 1)
        unread: dict | None = {} if return_exceptions else None
        if return_exceptions:
            data, refused = rows.readable_data(self._base, x, adapters)
        else:
            data = data_of(self._base, x, adapters=adapters, has_targets=False)
        with self._lock:
            if not (return_exceptions or isinstance(data, Batches)):
                self._register.check_known(data.names)
            outputs = outputs_of(
                self.model, self._slots, data, batch_size, unread, kwargs
            )
        if not return_exceptions:
            return outputs
        return rows.answers(outputs, data.names, refused, unread)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        adapters: Any = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Evaluates each example with its own adapter.

        Args:
            x: As in `predict`; a dataset has batches `(x, y, names)` or `(x,
                y, sample_weight, names)`.
            y: Targets, an array. Not for a dataset.
            adapters: As in `predict`.
            sample_weight: As in `keras.Model.evaluate`.
            **kwargs: Further arguments of `keras.Model.evaluate`. With more
                different adapters than `capacity`: `batch_size`, `steps`,
                `return_dict` and `verbose` only.

        Returns:
            As `keras.Model.evaluate`.

        Raises:
            ValueError: If the bank has no such adapter, or if an argument
                makes no sense.
            keras_vera.AdapterFileError: If a file in the folder cannot be read.
        """
        data = data_of(self._base, x, y, sample_weight, adapters)
        data.check_targets(self.model, "`y`")
        with self._lock:
            return scores.of_all(self.model, self._slots, data, kwargs)

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        adapters: Any = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains many adapters, each by its own examples.

        Call `bank.model.compile` first. No two adapters influence each other,
        but that Keras' losses divide by the number of examples in the batch
        unless they have `reduction="sum"`.
        `keras_vera.callbacks.BestAdapters` keeps the best of each.

        Args:
            x: As in `evaluate`.
            y: Targets, an array. Not for a dataset.
            adapters: List with a name for each example, of no more different
                adapters than `capacity`. `None` stands for the base model,
                which does not train. For a dataset, a list of all names that
                may occur in it; needed only where the bank has more adapters
                than `capacity`, as no slot is filled anew while `fit` runs.
            sample_weight: As in `keras.Model.fit`.
            validation_data: `(x, y, names)` or `(x, y, sample_weight,
                names)`, or a dataset of such batches. These adapters need
                slots, too. Defaults to `None`.
            **kwargs: Further arguments of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            keras_vera.AdapterFileError: In the end, if others changed or
                removed an adapter in the folder meanwhile. It stays as they
                left it; all others are trained and written.
            ValueError: If an argument makes no sense. In the end, if adapters
                hold NaN or infinity, in a bank with a folder. There they stay
                as they were; all others are trained and written.
        """
        data = data_of(self._base, x, y, sample_weight, adapters)
        data.check_targets(self.model, "`y`")
        validation = validation_of(self._base, validation_data, self.model)
        with self._lock:
            self._slots.check_not_fitting()
            ids = self._slots.ids_for_fit(data, validation)
            x, y, weights = data.joined(ids)
            if validation is not None:
                validation_data = without_none(validation.joined(ids))
            kwargs["validation_data"] = validation_data
            with self._slots.training(ids.keys() - {None}):
                return self.model.fit(x, y, sample_weight=weights, **kwargs)

    def generate(
        self,
        prompts: Any,
        adapters: Any,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generates for each prompt with its own adapter.

        Args:
            prompts: As in `generate` of the KerasHub `CausalLM` that the bank
                was made on: a list of strings, or a dict of arrays.
            adapters: List with a name for each prompt, as in `predict`.
            return_exceptions: As in `predict`. Defaults to `False`.
            **kwargs: Further arguments of `CausalLM.generate`, such as
                `max_length`.

        Returns:
            As `CausalLM.generate`. With `return_exceptions`, a list of what
            each prompt gets, or its exception.

        Raises:
            ValueError: If the bank has no such adapter, or if an argument
                makes no sense.
            keras_vera.AdapterFileError: If a file in the folder cannot be read.
        """
        check_can_generate(self._base, prompts)
        unread: dict | None = {} if return_exceptions else None
        if return_exceptions:
            prompts, refused = rows.readable_prompts(self._base, prompts)
        names = names_of(adapters, count_examples(prompts))
        padded, padded_names, cut = padded_prompts(prompts, names)
        with self._lock:
            self.model.check_base()
            _keras.synchronize(self.model)
            vectors = self.model.rows(self._slots.bring(padded_names, unread))
            outputs = self._generator.generate(vectors, padded, **kwargs)
        if not return_exceptions:
            return cut(outputs)
        return rows.answers(cut(outputs), names, refused, unread)
