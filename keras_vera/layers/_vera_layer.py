import inspect
import threading
import weakref
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._base_scope import shows_base
from keras_vera.layers._mixed_batch import check_rows
from keras_vera.layers._mixed_batch import rows_of
from keras_vera.layers._private_reads import refusing_assignment
from keras_vera.layers._rates import USUAL_D_INITIAL
from keras_vera.product.arithmetic import Layout
from keras_vera.product.arithmetic import folded_kernel
from keras_vera.product.plan import choose_plan

# Its `layer` is the adapted layer of which only the base's output is wanted.
# (`torch.compile` follows a `threading.local`, but no `ContextVar`.)
_base_only = threading.local()

_VARIABLES = (
    "vera_kernel_a",
    "vera_kernel_b",
    "vera_lambda_d",
    "vera_lambda_b",
)
_ATTRIBUTES = (
    *_VARIABLES,
    "projection",
    "vera_output_offset",
    "_vera_settings",
    "_vera_plan",
    "_vera_layout",
    "_vera_seed_generator",
)


def _is_base_only(layer):
    return getattr(_base_only, "layer", None) is layer


def after_adapter(name):
    """Returns a property for what the base layer applies to its product.

    It is hidden while the base layer's output is computed, so that the
    adapter comes before it.
    """

    def of_class(layer):
        """A subclass may have it as a property, or for all of its layers."""
        # Classes may have been exchanged several times.
        plain_class = type(layer)
        while hasattr(plain_class, "vera_plain_class"):
            plain_class = plain_class.vera_plain_class
        if not hasattr(plain_class, name):
            return None
        return inspect.getattr_static(plain_class, name)

    def get(layer):
        if _is_base_only(layer):
            return None
        shared = of_class(layer)
        if hasattr(shared, "__set__") or (
            shared is not None and name not in vars(layer)
        ):
            is_bound = hasattr(shared, "__get__")
            return shared.__get__(layer, type(layer)) if is_bound else shared
        return _keras.stored_attribute(layer, name)

    def set(layer, value):
        shared = of_class(layer)
        if hasattr(shared, "__set__"):
            shared.__set__(layer, value)
        else:
            vars(layer)[name] = value

    return property(get, set)


@dataclass(frozen=True)
class _Settings:
    d_initial: float
    dropout: float


class VeRALayer:
    """What every adapted layer has, whatever Keras layer it is made of.

    A mixin that stands before the Keras layer. It holds the trained vectors
    `vera_lambda_d` and `vera_lambda_b`, always float32, and a reference to the
    `SharedProjection`, whose two variables it tracks (a sub-layer would show
    up in weight files and stop `Model.quantize`).

    A class for one kind of Keras layer adds `_make_contraction`, `call`, and
    `_adapter_output`, what the adapter adds to the base layer's output.
    """

    # The base layer's bias, where the adapter has one of its own.
    vera_base_bias = None

    def attach_vera(
        self,
        projection,
        d_initial=USUAL_D_INITIAL,
        dropout=0.0,
        plan="auto",
        output_offset=0,
        rank=None,
    ):
        """Adds the adapter to a built layer: the one place that does.

        Args:
            projection: A `SharedProjection`.
            d_initial: Float, every entry of d at the start.
            dropout: Float, the rate at which inputs of the adapter drop out.
            plan: String, how it is computed; see `choose_plan`.
            output_offset: Integer, the first column of B that it uses, other
                than 0 in a layer that is a part of one with a pair of its own.
            rank: Integer, the length of d, where it is less than the rank of
                the projection.
        """
        rank = projection.rank if rank is None else rank
        contraction = self._make_contraction()
        projection.register(self)
        with _keras.strategy_scope(self), _keras.new_state_allowed(self):
            _keras.check_layout(f"{self.path}/vera_lambda_d", (rank,))
            _keras.check_layout(f"{self.path}/vera_lambda_b", (contraction.n,))
            projection.reserve(contraction.m, contraction.n)
            self._vera_layout = Layout(
                contraction, projection.structure_of(contraction, rank)
            )
            self._vera_settings = _Settings(d_initial, dropout)
            self._vera_plan = plan
            self.projection = projection
            self.vera_output_offset = output_offset
            self.vera_lambda_d = self.add_weight(
                name="vera_lambda_d",
                shape=(rank,),
                initializer=keras.initializers.Constant(d_initial),
                dtype="float32",
                autocast=False,
            )
            self.vera_lambda_b = self.add_weight(
                name="vera_lambda_b",
                shape=(contraction.n,),
                initializer="zeros",
                dtype="float32",
                autocast=False,
            )
            # For `vera_optimizer`.
            self.vera_lambda_d.vera_layer = weakref.ref(self)
            self.vera_lambda_b.vera_layer = weakref.ref(self)
            self.vera_kernel_a = projection.vera_kernel_a
            self.vera_kernel_b = projection.vera_kernel_b
            self._vera_seed_generator = (
                keras.random.SeedGenerator() if dropout else None
            )

    def detach_vera(self):
        """Removes what `attach_vera` added; the kernel stays as it is."""
        for name in _ATTRIBUTES:
            if name in self.__dict__:
                _keras.remove_attribute(self, name)

    @property
    def weights(self):
        return self._plain_first(super().weights)

    @property
    def variables(self):
        return self._plain_first(super().variables)

    def _plain_first(self, variables):
        """Puts the adapter behind what the plain layer has, in its order."""
        adapter = {id(vars(self).get(name)) for name in _VARIABLES}
        return sorted(variables, key=lambda v: id(v) in adapter)

    def quantized_call(self, inputs, *args, **kwargs):
        # Keras calls this instead of `call` where the base is quantized.
        if self._is_base:
            return super().quantized_call(inputs, *args, **kwargs)
        return self._added_call(inputs, *args, **kwargs)

    def _added_call(self, inputs, *args, training=None, **kwargs):
        """Adds what the adapter adds to what the base layer computes."""
        added = self._adapter_output(inputs, training, *args, **kwargs)
        if training is not None and self._call_has_training_arg:
            kwargs["training"] = training
        base = self._base_output(inputs, *args, **kwargs)
        # Not `ops.add`, which takes an empty 2D tensor for a bias.
        output = base + ops.cast(added, base.dtype)
        _keras.copy_mask(base, output)
        return self._activated(output, *args, **kwargs)

    def _base_output(self, *args, **kwargs):
        """Returns what the base layer computes before its activation."""
        is_quantized = self.quantization_mode is not None
        call = super().quantized_call if is_quantized else super().call
        _base_only.layer = self
        try:
            return call(*args, **kwargs)
        finally:
            _base_only.layer = None

    def save_base_variables(self, store):
        """Saves as the plain layer does, which reads `kernel`."""
        _base_only.layer = self
        try:
            super().save_own_variables(store)
        finally:
            _base_only.layer = None

    def _activated(self, output, training=None):
        """Applies what comes after the adapter."""
        if self.activation is not None:
            output = self.activation(output)
        return output

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' is adapted with VeRA and cannot take LoRA as "
            "well. Call `keras_vera.merge(model)` to keep its adapter or "
            "`keras_vera.disable_vera(model)` to drop it first."
        )

    def base_values(self):
        """Yields the variables of the adapter that make the layer its base,
        and with which values."""
        yield self.vera_lambda_b, np.zeros(self.vera_lambda_b.shape, "float32")
        if self.vera_base_bias is not None:
            yield self.bias, self.vera_base_bias

    def reset_vectors(self):
        """Sets the vectors to their start, where the layer is its base.

        d is not set to 0: with d and b both 0 nothing would ever train.
        """
        self.vera_lambda_d.assign(
            ops.full(self.vera_lambda_d.shape, self._vera_settings.d_initial)
        )
        self.vera_lambda_b.assign(ops.zeros(self.vera_lambda_b.shape))

    def _choose_plan(self, tokens, inputs=None):
        is_quantized = self.quantization_mode is not None
        return choose_plan(
            tokens,
            self._vera_layout.structure,
            self.compute_dtype,
            # What is quantized cannot be folded.
            "additive" if is_quantized else self._vera_plan,
            inputs,
        )

    def _is_folded(self, tokens, training=None, inputs=None):
        """Whether the layer is its base layer with another kernel."""
        return (
            rows_of(self) is None
            and not self._drops_out(training)
            and self._choose_plan(tokens, inputs).folded
        )

    @property
    def _is_base(self):
        """Whether the base is wanted, without any product of the adapter."""
        return rows_of(self) is None and shows_base(self.vera_lambda_b)

    def _promoted(self, x, dtype):
        """Returns inputs in the dtype of their product with what has `dtype`.

        With `autocast=False`, floats come as they are.
        """
        standardize = keras.backend.standardize_dtype
        return ops.cast(
            x,
            keras.backend.result_type(standardize(x.dtype), standardize(dtype)),
        )

    def _drops_out(self, training):
        return self._vera_settings.dropout and _keras.is_training(training)

    def _dropped(self, x, training):
        """Drops inputs of the adapter, which the base keeps."""
        if not self._drops_out(training):
            return x
        return keras.random.dropout(
            x, self._vera_settings.dropout, seed=self._vera_seed_generator
        )

    def _vectors_for(self, x):
        """Returns d and b; in a mixed batch, those of each example."""
        rows = rows_of(self)
        if rows is None:
            return self._vectors()
        check_rows(self, x, rows[0])
        _keras.check_made_here(self.vera_lambda_b, self)
        return rows

    def _vectors(self):
        _keras.check_made_here(self.vera_lambda_b, self)
        return (
            ops.convert_to_tensor(self.vera_lambda_d),
            ops.convert_to_tensor(self.vera_lambda_b),
        )

    def projection_slices(self):
        """Returns the layer's rows of A and columns of B: the leading ones,
        where there is no offset. Where they are all, there is no copy."""
        _keras.check_not_sharded(self)
        a = ops.convert_to_tensor(self.vera_kernel_a)
        b_matrix = ops.convert_to_tensor(self.vera_kernel_b)
        m, n = self._vera_layout.contraction.m, self._vera_layout.contraction.n
        if a.shape[0] != m:
            a = a[:m]
        if b_matrix.shape[1] != n:
            offset = self.vera_output_offset
            b_matrix = b_matrix[:, offset : offset + n]
        structure = self._vera_layout.structure
        if structure.rank != self.projection.rank:
            a, b_matrix = structure.narrow(a, b_matrix)
        # Each device needs what goes with its part of the kernel.
        kernel = stored_kernel(self)
        inputs, outputs = self._vera_layout.contraction.kernel_axes
        return (
            _keras.cut_as(a, kernel, (inputs, ())),
            _keras.cut_as(b_matrix, kernel, ((), outputs)),
        )

    def adapted_kernel(self):
        """Returns the kernel with the adapter merged, as Keras' LoRA does."""
        return folded_kernel(
            ops.convert_to_tensor(stored_kernel(self)),
            self.projection_slices(),
            *self._vectors(),
            self._vera_layout,
        )

    @property
    def _shows_adapter(self):
        """Whether the kernel can be shown with the adapter in it."""
        return hasattr(self, "vera_lambda_d") and self.quantization_mode is None

    def shows_its_base(self):
        """Whether those who read the base's kernel now are right to do so."""
        return (
            not hasattr(self, "vera_lambda_d")
            or _is_base_only(self)
            or self._is_base
        )

    def _shown_kernel(self):
        """Returns the kernel for those who read it, also without a call."""
        if _is_base_only(self) or self._is_base:
            return stored_kernel(self)
        if rows_of(self) is not None:
            raise ValueError(
                f"The kernel of layer '{self.name}' is read without calling "
                "the layer, which works for one adapter, but not in an "
                "`AdapterBank`. Leave this layer out of `targets`."
            )
        return refusing_assignment(self.adapted_kernel(), self)

    def _replace_projection_variable(self, old, new):
        """Follows the projection when it grows."""
        for name in ("vera_kernel_a", "vera_kernel_b"):
            if getattr(self, name, None) is old:
                self._untrack_variable(old)
                with _keras.new_state_allowed(self):
                    setattr(self, name, new)
                self._post_build()
