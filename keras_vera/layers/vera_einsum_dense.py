from typing import Any

import keras

from keras_vera.layers._kinds import EinsumDenseKind
from keras_vera.layers._standalone import StandaloneVeRA
from keras_vera.product.projection import SharedProjection


@keras.saving.register_keras_serializable(package="keras_vera")
class VeRAEinsumDense(
    StandaloneVeRA, EinsumDenseKind, keras.layers.EinsumDense
):
    """A `keras.layers.EinsumDense` layer with a VeRA adapter.

    The kernel is seen as a matrix `W` of shape `(m, n)`: the axes that the
    equation contracts, in the kernel's order, make `m`, the other axes of the
    kernel make `n`. With it, as in `keras_vera.layers.VeRADense`,
    `output = activation(x W + b * ((x A * d) B) + bias)`.

    Args:
        equation: String, the einsum equation, such as `"btd,dnh->btnh"`. No
            axis may be shared by input, kernel and output.
        output_shape: Integer or tuple, the shape of the output without the
            batch axis.
        rank: Positive integer, the length of `d`. Defaults to the rank of
            `projection`, or to `256`.
        projection: A `keras_vera.SharedProjection`, the same for all layers
            of a model. Defaults to one of its own, with seed 0.
        d_initial: Float other than 0, every entry of `d` at the start.
            Defaults to `0.1`.
        dropout: Float in `[0, 1)`, the rate of dropout on the input of the
            adapter while training. Defaults to `0.0`.
        plan: How the output is computed, which changes no result; see
            `keras_vera.enable_vera`. Defaults to `"auto"`.
        **kwargs: As for `keras.layers.EinsumDense`, without `lora_rank`.

    Input shape:
        As in the equation.

    Output shape:
        As in the equation.

    Raises:
        ValueError: When it is built with an equation that is not one matrix
            product.

    Example:

    ```python
    query = keras_vera.layers.VeRAEinsumDense(
        "btd,dnh->btnh", output_shape=(None, 4, 16), rank=64, bias_axes="nh"
    )
    query(keras.random.normal((2, 10, 64))).shape  # (2, 10, 4, 16)
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2.
    """

    vera_plain_class = keras.layers.EinsumDense

    def __init__(
        self,
        equation: str,
        output_shape: int | tuple[int | None, ...],
        rank: int | None = None,
        projection: SharedProjection | None = None,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        plan: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(equation, output_shape, **kwargs)
        self._init_vera(rank, projection, d_initial, dropout, plan)
