from typing import Any

import keras

from keras_vera.layers._kinds import EmbeddingKind
from keras_vera.layers._standalone import StandaloneVeRA
from keras_vera.product.projection import SharedProjection


@keras.saving.register_keras_serializable(package="keras_vera")
class VeRAEmbedding(StandaloneVeRA, EmbeddingKind, keras.layers.Embedding):
    """A `keras.layers.Embedding` layer with a VeRA adapter.

    `output = W[i] + b * ((A[i] * d) B)`

    `W` (`embeddings`, of shape `(input_dim, output_dim)`) is frozen, `A` and
    `B` are the frozen random matrices of the shared `projection`, and only the
    vectors `d` (`vera_lambda_d`) and `b` (`vera_lambda_b`) are trained. `b`
    starts at 0, so the layer starts as its base layer. An embedding is the
    product of one-hot vectors with `W`, so this is the formula of the paper;
    since one row of `A` is read and no sum over rows is made, the Kaiming
    factor of `A` has a fan-in of 1. `A` gets `input_dim` rows.

    Args:
        input_dim: Positive integer, size of the vocabulary.
        output_dim: Positive integer, dimension of the embedding.
        rank: Positive integer, the length of `d`. Defaults to the rank of
            `projection`, or to `256`.
        projection: A `keras_vera.SharedProjection`, the same for all layers
            of a model. Defaults to one of its own, with seed 0.
        d_initial: Float other than 0, every entry of `d` at the start.
            Defaults to `0.1`.
        dropout: Float in `[0, 1)`, the rate at which whole inputs of the
            adapter drop out while training. Defaults to `0.0`.
        plan: How the output is computed, which changes no result; see
            `keras_vera.enable_vera`. Defaults to `"auto"`.
        **kwargs: As for `keras.layers.Embedding`, without `lora_rank`.

    Input shape:
        Integer tensor of any shape.

    Output shape:
        Tensor of shape `(*input_shape, output_dim)`.

    Example:

    ```python
    projection = keras_vera.SharedProjection(rank=64)
    model = keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            keras_vera.layers.VeRAEmbedding(1000, 16, projection=projection),
            keras_vera.layers.VeRADense(8, projection=projection),
        ]
    )
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2.
    """

    vera_plain_class = keras.layers.Embedding

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        rank: int | None = None,
        projection: SharedProjection | None = None,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        plan: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_dim, output_dim, **kwargs)
        self._init_vera(rank, projection, d_initial, dropout, plan)
