import keras

_VECTORS = r"(.*/)?vera_lambda_[db]"


def vera_optimizer(
    vectors: keras.optimizers.Optimizer | str | None = None,
    rest: keras.optimizers.Optimizer | str | None = None,
) -> keras.optimizers.MultiOptimizer:
    """Returns an optimizer with a learning rate of their own for the vectors.

    The vectors of VeRA want a higher learning rate than a new task head, 3 to
    100 times as high; with one rate for both, one of the two trains badly.

    Args:
        vectors: Optimizer for the vectors `d` and `b`: a Keras optimizer or
            its name. Its learning rate may be a schedule. Defaults to Adam
            with a learning rate of 0.01.
        rest: Optimizer for all other trained variables, such as a task head.
            Defaults to Adam with a learning rate of 0.003.

    Returns:
        A `keras.optimizers.MultiOptimizer`, for `model.compile`.

    Example:

    ```python
    model.compile(
        optimizer=keras_vera.vera_optimizer(
            vectors=keras.optimizers.AdamW(
                keras.optimizers.schedules.CosineDecay(2e-2, 1000)
            ),
            rest=keras.optimizers.AdamW(1e-3),
        ),
        loss="sparse_categorical_crossentropy",
    )
    ```
    """
    if vectors is None:
        vectors = keras.optimizers.Adam(1e-2)
    if rest is None:
        rest = keras.optimizers.Adam(3e-3)
    vectors = keras.optimizers.get(vectors)
    rest = keras.optimizers.get(rest)
    if vectors is rest:
        raise ValueError(
            "`vectors` and `rest` must be two optimizers. "
            f"Received the same one twice: {vectors!r}"
        )
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(rest, {_VECTORS: vectors})
    )
