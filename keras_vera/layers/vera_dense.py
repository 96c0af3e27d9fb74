from typing import Any

import keras

from keras_vera.layers._kinds import DenseKind
from keras_vera.layers._standalone import StandaloneVeRA
from keras_vera.product.projection import SharedProjection


@keras.saving.register_keras_serializable(package="keras_vera")
class VeRADense(StandaloneVeRA, DenseKind, keras.layers.Dense):
    """A `keras.layers.Dense` layer with a VeRA adapter.

    `output = activation(x W + b * ((x A * d) B) + bias)`

    `W` (`kernel`, of shape `(m, n)`) and `bias` are frozen, `A` and `B` are
    the frozen random matrices of the shared `projection`, and only the vectors
    `d` (`vera_lambda_d`) and `b` (`vera_lambda_b`) are trained. `b` starts at
    0, so the layer starts as its base layer. To adapt the layers of a model
    that exists, see `keras_vera.enable_vera`.

    Args:
        units: Positive integer, dimensionality `n` of the output.
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
        **kwargs: As for `keras.layers.Dense`, without `lora_rank`.

    Input shape:
        N-D tensor of shape `(batch_size, ..., m)`.

    Output shape:
        N-D tensor of shape `(batch_size, ..., units)`.

    Example:

    ```python
    projection = keras_vera.SharedProjection(rank=64)
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras_vera.layers.VeRADense(
                32, projection=projection, activation="relu"
            ),
            keras_vera.layers.VeRADense(8, projection=projection),
        ]
    )
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2.
    """

    vera_plain_class = keras.layers.Dense

    def __init__(
        self,
        units: int,
        rank: int | None = None,
        projection: SharedProjection | None = None,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        plan: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(units, **kwargs)
        self._init_vera(rank, projection, d_initial, dropout, plan)
