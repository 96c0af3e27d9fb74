"""Adapter files for the slots of an `AdapterBank`."""

import keras
import numpy as np

from keras_vera import _keras
from keras_vera.bank import heads as bank_heads
from keras_vera.files import fit
from keras_vera.files import format as adapter_format
from keras_vera.files import saved
from keras_vera.files import unsaved
from keras_vera.files.disk import write_files
from keras_vera.layers import _base_scope
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._fingerprint import kernel_fingerprint
from keras_vera.layers._in_place import is_adapted
from keras_vera.model import adaptation
from keras_vera.product.checks import check_integer

# Backbones of KerasHub whose batch holds all examples twice, for guidance.
_STACKING = {"StableDiffusion3Backbone"}


class BankFiles:
    """What an adapter of a model consists of, and how files hold it.

    Everything that depends on the model is found once, so that a file costs
    no more than its own bytes.

    Attributes:
        variables: Dict of the model's own variables, by entry name.
        fresh: Dict of NumPy arrays, what an adapter holds before training.
        layers: Dict by layer of the entry names that it reads; see
            `BankModel`.
        classes: Integer, the classes of the model's head; 1 without a head.
        matrices: Dict of A and B by entry name, where no seed makes them.
    """

    def __init__(self, model):
        _base_scope.check_outside(model)
        layers = adaptation.check_adapted(model)
        adaptation.check_base_is_clean(model, layers)
        _check_no_rematerialization(model)
        _check_no_stacked_batches(model)
        _keras.synchronize(model)
        self._paths = _keras.structural_paths(model)
        _check_nothing_more_trains(self._paths)
        _check_no_biases(self._paths)
        self.variables = saved.trained_variables(self._paths)
        self._unsaved = unsaved.fingerprints(self._paths, self.variables)
        self._header = {
            **saved.make_header(model, self._paths),
            "unsaved": unsaved.as_header(self._unsaved),
        }
        self.matrices = saved.carried_matrices(layers)
        self._beginnings = {
            projection: projection.beginnings()
            for projection in dict.fromkeys(x.projection for x in layers)
        }
        self._expected = saved.expected_entries(self._paths)
        names = {id(v): name for name, v in self.variables.items()}
        self.layers, heads, self.fresh = {}, [], {}
        for layer in self._paths.values():
            if is_adapted(layer):
                _check_order_of_examples(layer)
                own = layer.vera_lambda_d, layer.vera_lambda_b
                d, b = (names[id(v)] for v in own)
                start = self._header["d_initial"]
                self.fresh[d] = np.full(own[0].shape, start, "float32")
                self.fresh[b] = np.zeros(own[1].shape, "float32")
                self.layers[layer] = d, b
                continue
            own = [v for v in _keras.own_variables(layer) if id(v) in names]
            if own:
                heads.append(layer)
                _check_head(layer, own)
                both = [names[id(v)] for v in own]
                for name, variable in zip(both, own):
                    self.fresh[name] = np.array(_keras.to_numpy(variable))
                self.layers[layer] = [*both, None, None][:2]
        for head in heads:
            bank_heads.make_head(head)
        self._heads = heads
        output = bank_heads.output_head(model, heads)
        for head in heads:
            classes = True if head is output else None
            self.layers[head] = (*self.layers[head], classes)
        self.classes = 1 if output is None else output.units
        # The entries of which an adapter may have the first columns only.
        self._output = self.layers[output][:2] if output is not None else ()

    def read(self, filepath, head=True):
        """Reads a file, once.

        Args:
            filepath: String or path.
            head: Boolean; without it, what is outside the base is that of a
                fresh adapter.

        Returns:
            Dict of arrays by entry name, padded; the number of classes; and
            the `disk.Version` of the file.
        """
        header, tensors, version = adapter_format.read_version(filepath)
        fit.popped_matrices(header, tensors, filepath)
        if not head:
            vectors = saved.without_head(header, tensors)
            fresh = saved.without_head(self._header, self.fresh)
            heads = {x: self.fresh[x] for x in self.fresh if x not in fresh}
            tensors = {**heads, **vectors}
        fit.check_fits(self._paths, header, filepath, self._header)
        classes = self._classes_of(tensors)
        expected = {
            name: ((*shape[:-1], classes), dtype)
            if name in self._output
            else (shape, dtype)
            for name, (shape, dtype) in self._expected.items()
        }
        fit.check_entries(expected, tensors, header, filepath)
        fit.check_ranges(self.variables, tensors, filepath)
        unsaved.check_unsaved(self._unsaved, header, filepath, head)
        arrays = {k: self._padded(k, array) for k, array in tensors.items()}
        return arrays, classes, version

    def encoded(self, arrays, classes, dtype="float32"):
        """Returns the bytes of the file of an adapter."""
        tensors = {
            name: saved.as_array(
                name,
                array[..., :classes] if name in self._output else array,
                dtype,
            )
            for name, array in arrays.items()
        }
        tensors.update(self.matrices)
        # The layout of memory is part of the file.
        tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
        return adapter_format.encoded(self._header, tensors)

    def write(self, filepath, arrays, classes, dtype="float32"):
        write_files({filepath: self.encoded(arrays, classes, dtype)})

    def checked_classes(self, classes):
        """Returns how many classes a new adapter has."""
        if classes is None:
            return self.classes
        if not self._output and self._heads:
            names = ", ".join(f"'{layer.name}'" for layer in self._heads)
            raise ValueError(
                "`classes` needs a head that gives the model's output, and "
                f"one alone; {names} may not be, or something comes after it "
                "that does more than scale and normalize. Received: "
                f"classes={classes}. Leave it out: adapters then have all "
                "outputs."
            )
        return check_integer("classes", classes, 1, self.classes)

    def check_base(self):
        """Raises if the base has other weights than when the bank was made.

        Two kernels are looked at, and where each A and B begin: weights that
        are loaded are others everywhere. What is not adapted any more, or
        anew, trains no adapters, and may be anything.
        """
        for projection, pair in self._beginnings.items():
            if not all(map(np.array_equal, projection.beginnings(), pair)):
                raise ValueError(
                    "The base has other random matrices than when its "
                    "`AdapterBank` was made. `set_weights` or a checkpoint of "
                    "another seed has brought them. Make the bank afterwards."
                )
        layers = self._header["layers"]
        # In one order, as processes gather together what they share.
        for path in sorted({min(layers), max(layers)}):
            layer = self._paths[path]
            if getattr(layer, "projection", None) not in self._beginnings:
                continue
            kernel = stored_kernel(layer)
            if kernel_fingerprint(kernel) != layers[path]["kernel_fingerprint"]:
                raise ValueError(
                    "The base has other weights than when its `AdapterBank` "
                    f"was made, such as in layer '{path}', and the adapters "
                    "do not belong to them. Load the weights first, and make "
                    "the bank afterwards."
                )

    @property
    def header(self):
        """The header that the model itself would give a file."""
        return self._header

    def _classes_of(self, tensors):
        for name in self._output:
            if name in tensors and tensors[name].ndim:
                size = tensors[name].shape[-1]
                if 1 <= size <= self.classes:
                    return size
        return self.classes

    def _padded(self, name, array):
        if name not in self._output:
            return array
        padded = self.fresh[name].copy()
        padded[..., : array.shape[-1]] = array
        return padded


def _check_nothing_more_trains(paths):
    names = [
        layer.name
        for plan in saved.adaptations(paths)
        for layer in plan.trained.variables
    ]
    if names:
        raise ValueError(
            "An `AdapterBank` cannot hold what trains in the base beside the "
            f"vectors: {names[:5]}, {len(names)} layers in all. Call "
            "`keras_vera.enable_vera` without `train`, on the part of the "
            "model below its head."
        )


def _check_no_biases(paths):
    for path, layer in paths.items():
        if getattr(layer, "vera_base_bias", None) is not None:
            raise ValueError(
                f"The adapter of the model brought layer '{path}' a bias of "
                "its own, as PEFT's `bias='vera_only'` does. An `AdapterBank` "
                "has no place for it, and its base would not be the base. "
                "Keep this adapter in a model of its own."
            )


def _check_no_rematerialization(model):
    if keras.backend.backend() != "torch":
        return
    for layer in _keras.flatten_layers(model):
        if _keras.is_rematerialized(layer):
            raise ValueError(
                f"Layer '{layer.name}' was made in a `keras.RematScope`. On "
                "PyTorch it runs again in the backward pass, when it is not "
                "known any more which example has which adapter. Build the "
                "model without the scope, or use another backend."
            )


def _check_no_stacked_batches(model):
    for layer in _keras.flatten_layers(model):
        names = {x.__name__ for x in type(layer).__mro__}
        if names & _STACKING:
            raise ValueError(
                f"Model '{layer.name}', a {type(layer).__name__}, computes two "
                "outputs for each example and puts those of all examples one "
                "after the other, so that an `AdapterBank` could not tell "
                "which rows have which adapter. Load adapters one by one."
            )


def _check_order_of_examples(layer):
    contraction = layer._vera_layout.contraction
    first, *_ = contraction.input_permutation or (0,)
    if first != 0 or 0 in contraction.summed_axes:
        raise ValueError(
            f"The output of layer '{layer.name}' does not begin with the axis "
            f"of the examples: its equation is '{layer.equation}'. An "
            "`AdapterBank` could not tell which rows have which adapter. "
            "Leave this layer out of `targets`."
        )


def _check_head(layer, variables):
    if not bank_heads.is_possible_head(layer) or len(variables) > 2:
        raise ValueError(
            f"Layer '{layer.name}', a {type(layer).__name__}, trains outside "
            "the base, and each adapter would have its own. An `AdapterBank` "
            "can hold `keras.layers.Dense` layers only, without LoRA and not "
            "quantized. Set `trainable = False` on this layer to share it."
        )
    if len(variables) == 1 and layer.use_bias:
        raise ValueError(
            f"Layer '{layer.name}' trains only in part. Set `trainable` of "
            "the whole layer."
        )
    for variable in variables:
        for option in ("regularizer", "constraint"):
            if getattr(variable, option, None) is not None:
                raise ValueError(
                    f"`{variable.name}_{option}` of layer '{layer.name}', "
                    "which trains outside the base, would be that of the "
                    "heads of all adapters together. Make the layer without "
                    "it, or set `trainable = False` on it to share it."
                )
