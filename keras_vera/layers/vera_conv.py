from typing import Any

import keras

from keras_vera.layers._kinds import ConvolutionKind
from keras_vera.layers._standalone import StandaloneVeRA
from keras_vera.product.projection import SharedProjection


class _VeRAConv(StandaloneVeRA, ConvolutionKind):
    """What the three public classes share: their arguments."""

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, ...],
        rank: int | None = None,
        projection: SharedProjection | None = None,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        plan: str = "auto",
        **kwargs: Any,
    ) -> None:
        # Of the convolution, which the classes below also inherit from.
        super().__init__(filters, kernel_size, **kwargs)  # type: ignore
        self._init_vera(rank, projection, d_initial, dropout, plan)


@keras.saving.register_keras_serializable(package="keras_vera")
class VeRAConv1D(_VeRAConv, keras.layers.Conv1D):
    """A `keras.layers.Conv1D` layer with a VeRA adapter.

    `output = activation(convolve(x, W + (A * d) B * b) + bias)`

    `W` (`kernel`) and `bias` are frozen. The kernel counts as a matrix of
    shape `(positions * channels, filters)`, for which `A` and `B` are the
    frozen random matrices of the shared `projection`, and only the vectors `d`
    (`vera_lambda_d`) and `b` (`vera_lambda_b`) are trained. `b` starts at 0,
    so the layer starts as its base layer. Strides, dilation, every kind of
    padding and groups are those of the base layer; with groups, all of them
    share `A`.

    Args:
        filters: Positive integer, channels of the output.
        kernel_size: Integer, or tuple of 1 integer.
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
        **kwargs: As for `keras.layers.Conv1D`, without `lora_rank`.

    Input shape:
        Tensor of shape `(batch_size, steps, channels)`, or
        `(batch_size, channels, steps)` with
        `data_format="channels_first"`.

    Output shape:
        As of `keras.layers.Conv1D`.

    Example:

    ```python
    projection = keras_vera.SharedProjection(rank=64)
    model = keras.Sequential(
        [
            keras.Input((32, 3)),
            keras_vera.layers.VeRAConv1D(
                16, 3, projection=projection, activation="relu"
            ),
            keras_vera.layers.VeRAConv1D(8, 3, projection=projection),
        ]
    )
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2.
    """

    vera_plain_class = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="keras_vera")
class VeRAConv2D(_VeRAConv, keras.layers.Conv2D):
    """A `keras.layers.Conv2D` layer with a VeRA adapter.

    `output = activation(convolve(x, W + (A * d) B * b) + bias)`

    `W` (`kernel`) and `bias` are frozen. The kernel counts as a matrix of
    shape `(positions * channels, filters)`, for which `A` and `B` are the
    frozen random matrices of the shared `projection`, and only the vectors `d`
    (`vera_lambda_d`) and `b` (`vera_lambda_b`) are trained. `b` starts at 0,
    so the layer starts as its base layer. Strides, dilation, every kind of
    padding and groups are those of the base layer; with groups, all of them
    share `A`.

    Args:
        filters: Positive integer, channels of the output.
        kernel_size: Integer, or tuple of 2 integers.
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
        **kwargs: As for `keras.layers.Conv2D`, without `lora_rank`.

    Input shape:
        Tensor of shape `(batch_size, height, width, channels)`, or
        `(batch_size, channels, height, width)` with
        `data_format="channels_first"`.

    Output shape:
        As of `keras.layers.Conv2D`.

    Example:

    ```python
    projection = keras_vera.SharedProjection(rank=64)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras_vera.layers.VeRAConv2D(
                16, 3, projection=projection, activation="relu"
            ),
            keras_vera.layers.VeRAConv2D(8, 3, projection=projection),
        ]
    )
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2.
    """

    vera_plain_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="keras_vera")
class VeRAConv3D(_VeRAConv, keras.layers.Conv3D):
    """A `keras.layers.Conv3D` layer with a VeRA adapter.

    `output = activation(convolve(x, W + (A * d) B * b) + bias)`

    `W` (`kernel`) and `bias` are frozen. The kernel counts as a matrix of
    shape `(positions * channels, filters)`, for which `A` and `B` are the
    frozen random matrices of the shared `projection`, and only the vectors `d`
    (`vera_lambda_d`) and `b` (`vera_lambda_b`) are trained. `b` starts at 0,
    so the layer starts as its base layer. Strides, dilation, every kind of
    padding and groups are those of the base layer; with groups, all of them
    share `A`.

    Args:
        filters: Positive integer, channels of the output.
        kernel_size: Integer, or tuple of 3 integers.
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
        **kwargs: As for `keras.layers.Conv3D`, without `lora_rank`.

    Input shape:
        Tensor of shape `(batch_size, depth, height, width, channels)`, or
        `(batch_size, channels, depth, height, width)` with
        `data_format="channels_first"`.

    Output shape:
        As of `keras.layers.Conv3D`.

    Example:

    ```python
    projection = keras_vera.SharedProjection(rank=64)
    model = keras.Sequential(
        [
            keras.Input((8, 32, 32, 3)),
            keras_vera.layers.VeRAConv3D(
                16, 3, projection=projection, activation="relu"
            ),
            keras_vera.layers.VeRAConv3D(8, 3, projection=projection),
        ]
    )
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2.
    """

    vera_plain_class = keras.layers.Conv3D
