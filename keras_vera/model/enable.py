import contextlib
from collections.abc import Iterator

import keras

from keras_vera import _keras
from keras_vera._types import Ranks
from keras_vera._types import Targets
from keras_vera.layers import _base_scope
from keras_vera.model.adaptation import Adaptation
from keras_vera.model.adaptation import base_paths
from keras_vera.model.adaptation import base_values
from keras_vera.model.adaptation import check_adapted
from keras_vera.model.adaptation import check_base_is_clean
from keras_vera.model.adaptation import check_layer
from keras_vera.model.adaptation import check_mergeable
from keras_vera.model.adaptation import check_model
from keras_vera.model.adaptation import check_no_lora
from keras_vera.model.adaptation import find_bases
from keras_vera.model.adaptation import parts_of_bases
from keras_vera.model.adaptation import restore
from keras_vera.model.adaptation import warn_about_quantized_logits
from keras_vera.model.targets import resolve_targets
from keras_vera.model.train_targets import resolve_train
from keras_vera.product.checks import check_d_initial
from keras_vera.product.checks import check_dropout
from keras_vera.product.checks import check_integer
from keras_vera.product.checks import check_plan
from keras_vera.product.projection import SharedProjection


def enable_vera(
    model: keras.Layer,
    rank: int = 256,
    seed: int = 0,
    targets: Targets | Ranks = "attention-qv",
    exclude: Targets | None = None,
    train: Targets | None = None,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    structure: str = "dense",
    plan: str = "auto",
) -> None:
    """Adapts layers of a built model with VeRA, in place.

    A target layer `y = x W` becomes `y = x W + b * ((x A * d) B)`. `A` and `B`
    are random, frozen, made from `seed` and `rank`, and shared by all adapted
    layers; the vectors `d` and `b` are trained. `b` starts at 0, so the model
    gives exactly the outputs it gave before.

    Everything else in the base is frozen: kernels, biases, embeddings, norms
    and their statistics, whatever `trainable` is set to afterwards. Layers of
    the base that keep state, such as `BatchNormalization`, run in inference
    mode, and what a layer assigns to its variables in a call has no effect.
    (A layer with state of its own, above one that drops out or trains, has to
    be told that it trains: it computes as in training, by its batch if it
    does so, and its state stays as it was.) The base is the backbone
    of a KerasHub task (or of any model with a `backbone` attribute, or that
    has KerasHub backbones among its layers), otherwise the whole model. What
    lies outside the base, such as a new task head, stays as trainable as it
    was. To keep the head of your own model trainable, call `enable_vera` on
    the inner model below it.

    A model that was compiled stays compiled. Its optimizer stays, with its
    learning rate and what it excludes from weight decay; if it has started to
    train, it starts again with the new variables. Training steps that you
    compiled yourself (`jax.jit`, `tf.function`) have to be made again. A
    model of a `tf.distribute` strategy is adapted in this strategy.

    Args:
        model: A built `keras.Model` or layer.
        rank: Positive integer, the length of every `d` for which `targets`
            says nothing else. Defaults to `256`.
        seed: Integer in `[0, 2**64)`, makes `A` and `B`. Defaults to `0`.
        targets: Which layers to adapt: a role, a layer name, a regular
            expression that matches a whole `layer.path`, a function that takes
            a layer and returns a boolean, or a list of these. Where no layer
            has the name, the attribute that holds a layer counts, and where no
            `layer.path` matches, the path in a weights file. A dict of ranks
            by these gives layers a rank of their own (`None` for `rank`; of
            several that match a layer, the last one counts). The roles are
            `"attention-qv"`, the query and value projections, as in the paper
            (a kernel that makes query, key and value at once, as a whole);
            `"attention"`, all projections of attention layers; `"mlp"`, the
            linear layers that widen and narrow again; `"all-linear"`;
            `"conv"`; and `"embedding"`, with the output projection of those
            that are tied. Defaults to `"attention-qv"`.
        exclude: Which of these layers to leave out, given as `targets`, but
            not as a dict. Defaults to `None`.
        train: What of the base trains in full beside the vectors, such as
            the head of a flat model: given as `targets`, but not as a dict,
            and over layers of any type, each with all layers below it. The
            roles `"norm"` (the scales and offsets of all normalization
            layers) and `"bias"` (every bias, also of adapted layers) cost a
            few kilobytes. It is saved with the vectors, kept by `merge` and
            undone by `disable_vera`. Defaults to `None`.
        d_initial: Float other than 0, every entry of `d` at the start.
            Defaults to `0.1`.
        dropout: Float in `[0, 1)`, the rate of dropout on the inputs of the
            adapters while training. Defaults to `0.0`.
        structure: `"dense"`, the random matrices of the paper, or `"blocks"`:
            block-diagonal ones, 16 times cheaper to compute with; see
            `keras_vera.SharedProjection`. Defaults to `"dense"`.
        plan: How the adapted layers are computed, which changes no result:
            `"folded"` makes the adapted kernel once for all tokens and again
            for the backward pass, `"folded-kept"` keeps it in between,
            `"additive"` adds the adapter's own product, and `"auto"` takes
            the cheapest, by counted flops and bytes. Sizes that TensorFlow
            does not know when it traces, such as the batch in `fit`, count as
            32 there. Defaults to `"auto"`.

    Raises:
        ValueError: If an argument makes no sense, a target matches nothing,
            or the model is not built, or has VeRA or LoRA already. The model
            is then as it was.

    Example:

    ```python
    classifier = keras_hub.models.TextClassifier.from_preset(
        "roberta_base_en", num_classes=2
    )
    keras_vera.enable_vera(classifier, rank=256)
    classifier.compile(
        optimizer=keras_vera.vera_optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    classifier.fit(sentences, labels)
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454)
    """
    _base_scope.check_outside(model)
    check_model(model)
    _keras.check_all_here("enable_vera", model.variables)
    rank = check_integer("rank", rank, 1)
    bases = find_bases(model)
    paths = base_paths(model, bases)
    check_no_lora(model, paths.values())
    ranks = resolve_targets(targets, exclude, rank, paths)
    for path in ranks:
        check_layer(paths[path], path)
    layers = [paths[path] for path in ranks]
    trained = resolve_train(
        train, layers, paths, _keras.structural_paths(model)
    )
    warn_about_quantized_logits(model)
    Adaptation(
        projection=SharedProjection(seed, max(ranks.values()), structure),
        targets=targets,
        d_initial=check_d_initial(d_initial),
        dropout=check_dropout(dropout),
        bases=bases,
        layers=layers,
        trained=trained,
        plan=check_plan(plan),
        ranks=list(ranks.values()),
    ).apply(model)


def disable_vera(model: keras.Layer) -> None:
    """Turns an adapted model back into its base model, exactly.

    The layers become the Keras layers that they were, with the kernels and
    the trainable flags that they had; the vectors are dropped.

    Args:
        model: A model on which, or on a part of which, `enable_vera` was
            called.

    Raises:
        ValueError: If the model is not adapted or a part of what was, or if
            a weights file merged an adapter into its base kernels.

    Example:

    ```python
    keras_vera.enable_vera(model)
    keras_vera.disable_vera(model)
    ```
    """
    _base_scope.check_outside(model)
    layers = check_adapted(model)
    parts_of_bases(model, _keras.flatten_layers(model))
    check_base_is_clean(model, layers)
    _keras.check_all_here("disable_vera", model.variables)
    restore(model, layers, merge=False)


def merge(model: keras.Layer) -> None:
    """Folds every adapter into its kernel and leaves plain Keras layers.

    `W + (A * d) B * b` is added in float32 and rounded once to the dtype of
    the kernel. The merged model costs what the base model costs.

    Args:
        model: A model on which, or on a part of which, `enable_vera` was
            called, or one that holds `keras_vera.layers`.

    Raises:
        ValueError: If the model is not adapted or a part of what was, or if
            its base is quantized: quantizing again would lose much of the
            adapter. The model is then as it was.

    Example:

    ```python
    keras_vera.load_adapter(classifier, "sst2.vera.safetensors")
    keras_vera.merge(classifier)
    classifier.save("merged.keras")
    ```
    """
    _base_scope.check_outside(model)
    layers = check_adapted(model)
    parts_of_bases(model, _keras.flatten_layers(model))
    check_mergeable(model, layers)
    _keras.check_all_here("merge", model.variables)
    restore(model, layers, merge=True)


@contextlib.contextmanager
def base_model(model: keras.Layer) -> Iterator[keras.Layer]:
    """Makes an adapted model give the outputs of its base, for a moment.

    Inside, `predict`, `evaluate`, calls of the model and functions that were
    compiled before give the outputs of the base, and nothing is compiled
    again. The adapters are back when the block ends, also by an exception. A
    task head outside the base keeps its trained values.

    In a training step, compiled or not, the block gives the base as a
    reference (for DPO, a KL term or distillation) at the cost of a plain
    model, and its outputs pass no gradient to the adapters. In a step that
    you compile yourself, enter the block inside of it: a function of JAX that
    was given the values of the adapter goes on using them.

    Inside, `save_adapter` and Keras' own saving save the adapter as it is.
    What would change the adapter is refused; after training, the block raises
    an error when it ends, and gives back the adapter as it was.

    Other threads are left alone, with one exception: on TensorFlow and JAX,
    outside of compiled functions, variables are assigned, so functions that
    other threads call on TensorFlow meanwhile give the base as well.

    Args:
        model: An adapted model.

    Raises:
        ValueError: If the model is not adapted, if a weights file merged an
            adapter into its base kernels, or if it was trained in the block.

    Example:

    ```python
    keras_vera.enable_vera(model)
    model.fit(x, y)
    outputs = model.predict(x)
    with keras_vera.base_model(model):
        base_outputs = model.predict(x)
    ```

    A step with a reference, such as in a `train_step`:

    ```python
    outputs = model(x, training=True)
    with keras_vera.base_model(model):
        reference = model(x)
    loss = dpo_loss(outputs, reference)
    ```
    """
    layers = check_adapted(model)
    check_base_is_clean(model, layers)
    values = base_values(model, layers)
    # At any d, the layer is its base while b is 0.
    others = [layer.vera_lambda_d for layer in layers]
    with _base_scope.base_scope(model, values, others):
        yield model
