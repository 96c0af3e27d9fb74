from dataclasses import dataclass

import keras
from keras import ops

from keras_vera import _keras
from keras_vera._arithmetic import Layout
from keras_vera._arithmetic import adapted_product
from keras_vera._arithmetic import adapter_product
from keras_vera._arithmetic import merged_kernel
from keras_vera._arithmetic import mixed_product
from keras_vera._bank_scope import check_rows
from keras_vera._bank_scope import rows_of
from keras_vera._plan import choose_plan

_ATTRIBUTES = (
    "vera_kernel_a",
    "vera_kernel_b",
    "vera_lambda_d",
    "vera_lambda_b",
    "projection",
    "vera_output_offset",
    "_vera_settings",
    "_vera_plan",
    "_vera_layout",
    "_vera_seed_generator",
)


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

    A class for one kind of Keras layer adds `_make_contraction`.
    """

    # The base layer's bias, where the adapter has one of its own.
    vera_base_bias = None

    def attach_vera(
        self,
        projection,
        d_initial=0.1,
        dropout=0.0,
        plan="auto",
        output_offset=0,
    ):
        """Adds the adapter to a built layer: the one place that does.

        Args:
            projection: A `SharedProjection`.
            d_initial: Float, every entry of d at the start.
            dropout: Float, the rate at which inputs of the adapter drop out.
            plan: String, how it is computed; see `choose_plan`.
            output_offset: Integer, the first column of B that it uses, other
                than 0 in a layer that is a part of one with a pair of its own.
        """
        contraction = self._make_contraction()
        projection.register(self)
        projection.reserve(contraction.m, contraction.n)
        with _keras.new_state_allowed(self):
            self._vera_layout = Layout(
                contraction, projection.structure_of(contraction)
            )
            self._vera_settings = _Settings(d_initial, dropout)
            self._vera_plan = plan
            self.projection = projection
            self.vera_output_offset = output_offset
            self.vera_lambda_d = self.add_weight(
                name="vera_lambda_d",
                shape=(projection.rank,),
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
    def kernel(self):
        """The kernel with the adapter merged, as Keras' LoRA shows it."""
        if not hasattr(self, "vera_lambda_d"):
            return super().kernel
        if rows_of(self) is not None:
            raise ValueError(
                f"The kernel of layer '{self.name}' is read without calling "
                "the layer, which works for one adapter, but not in an "
                "`AdapterBank`. Leave this layer out of `targets`."
            )
        return merged_kernel(
            ops.convert_to_tensor(self._kernel),
            self.projection_slices(),
            *self._vectors(),
            self._vera_layout,
        )

    def call(self, inputs, training=None):
        x = self._adapted_product(inputs, training)
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def quantized_call(self, *args, **kwargs):
        # Keras calls this instead of `call`, which would drop the adapter.
        raise ValueError(
            f"Layer '{self.name}' is adapted with VeRA and was quantized, "
            "which VeRA does not support yet. Call `keras_vera.merge(model)` "
            "before quantization."
        )

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' is adapted with VeRA and cannot take LoRA as "
            "well. Call `keras_vera.merge(model)` to keep its adapter or "
            "`keras_vera.disable_vera(model)` to drop it first."
        )

    def adapter_values(self):
        """Returns b, and the adapter's own bias or `None`, as arrays."""
        has_bias = self.vera_base_bias is not None
        bias = ops.convert_to_numpy(self.bias).copy() if has_bias else None
        return ops.convert_to_numpy(self.vera_lambda_b).copy(), bias

    def reset_vectors(self):
        """Sets the vectors to their start, where the layer is its base.

        d is not set to 0: with d and b both 0 nothing would ever train.
        """
        self.vera_lambda_d.assign(
            ops.full(self.vera_lambda_d.shape, self._vera_settings.d_initial)
        )
        self.vera_lambda_b.assign(ops.zeros(self.vera_lambda_b.shape))

    def _adapted_product(self, inputs, training):
        layout, settings = self._vera_layout, self._vera_settings
        kernel = ops.convert_to_tensor(self._kernel)
        pair = self.projection_slices()
        x = ops.cast(inputs, self.compute_dtype)
        rows = rows_of(self)
        if rows is not None:
            return self._mixed_product(x, kernel, pair, rows, training)
        plan = choose_plan(
            layout.contraction.tokens(inputs.shape),
            layout.structure,
            self.compute_dtype,
            self._vera_plan,
        )
        if settings.dropout and training:
            return layout.contraction.product(x, kernel) + adapter_product(
                self._dropped(x), pair, *self._vectors(), layout, plan
            )
        return adapted_product(x, kernel, pair, *self._vectors(), layout, plan)

    def _mixed_product(self, x, kernel, pair, rows, training):
        """The product where each example has an adapter of an `AdapterBank`."""
        layout = self._vera_layout
        d, b = rows
        check_rows(self, x, d)
        dropout = self._vera_settings.dropout and training
        return layout.contraction.product(x, kernel) + mixed_product(
            self._dropped(x) if dropout else x, pair, d, b, layout
        )

    def _dropped(self, x):
        """Drops inputs of the adapter, which the base keeps."""
        return keras.random.dropout(
            x, self._vera_settings.dropout, seed=self._vera_seed_generator
        )

    def _vectors(self):
        return (
            ops.convert_to_tensor(self.vera_lambda_d),
            ops.convert_to_tensor(self.vera_lambda_b),
        )

    def projection_slices(self):
        """Returns the layer's rows of A and columns of B: the leading ones,
        where there is no offset. Where they are all, there is no copy."""
        a = ops.convert_to_tensor(self.vera_kernel_a)
        b_matrix = ops.convert_to_tensor(self.vera_kernel_b)
        m, n = self._vera_layout.contraction.m, self._vera_layout.contraction.n
        if a.shape[0] != m:
            a = a[:m]
        if b_matrix.shape[1] != n:
            offset = self.vera_output_offset
            b_matrix = b_matrix[:, offset : offset + n]
        return a, b_matrix

    def _replace_projection_variable(self, old, new):
        """Follows the projection when it grows."""
        for name in ("vera_kernel_a", "vera_kernel_b"):
            if getattr(self, name, None) is old:
                self._untrack_variable(old)
                with _keras.new_state_allowed(self):
                    setattr(self, name, new)
                self._post_build()
