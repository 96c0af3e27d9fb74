"""Random small models, each described by a recipe that builds it again."""

import collections
import dataclasses

import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers
from keras import ops

BATCH, LENGTH, WIDTH, CLASSES = 4, 3, 4, 3
VOCABULARY = 7


@keras.saving.register_keras_serializable("habits")
class SelfAttention(layers.Layer):
    """Core attention where a model passes one tensor on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 2, dropout=0.1)

    def build(self, shape):
        self.attention.build(shape, shape)

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return x + self.attention(x, x)


@keras.saving.register_keras_serializable("habits")
class RunningMean(layers.Layer):
    """A user's own layer whose state moves while training."""

    def build(self, shape):
        self.mean = self.add_weight(
            name="mean", shape=shape[-1:], trainable=False
        )

    def compute_output_shape(self, shape):
        return shape

    def call(self, x, training=False):
        if training:
            axes = list(range(len(x.shape) - 1))
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axes))
        return x - self.mean


@keras.saving.register_keras_serializable("habits")
class Stack(keras.Model):
    """A subclassed model."""

    def __init__(self, inputs, stages, **kwargs):
        super().__init__(**kwargs)
        self.config = {"inputs": inputs, "stages": stages}
        self.stages = make_stages(inputs, stages)

    def build(self, shape):
        for stage in self.stages:
            if not stage.built:
                stage.build(shape)
            shape = stage.compute_output_shape(shape)
        self.built = True

    def call(self, x, training=None):
        # `stateless_call` hands it over.
        for stage in self.stages:
            x = stage(x, training=training)
        return x

    def get_config(self):
        return {**super().get_config(), **self.config}


@keras.saving.register_keras_serializable("habits")
class Task(keras.Model):
    """A subclassed model that has a backbone, as those of KerasHub."""

    def __init__(self, backbone, head, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone
        self.head_layers = make_stages(None, head)
        self.head = head

    def call(self, x, training=None):
        x = self.backbone(x, training=training)
        for layer in self.head_layers:
            x = layer(x, training=training)
        return x

    def get_config(self):
        backbone = keras.saving.serialize_keras_object(self.backbone)
        head = list(self.head)
        return {**super().get_config(), "backbone": backbone, "head": head}

    @classmethod
    def from_config(cls, config):
        config["backbone"] = keras.saving.deserialize_keras_object(
            config["backbone"]
        )
        return cls(**config)


RNN = {"return_sequences": True, "unroll": True}
# Stages of the body keep the shape (batch, LENGTH, WIDTH).
BODY = {
    "dense": lambda n: layers.Dense(WIDTH, "tanh", name=n),
    "einsum": lambda n: layers.EinsumDense(
        "abc,cd->abd", (LENGTH, WIDTH), bias_axes="d", name=n
    ),
    "conv": lambda n: layers.Conv1D(WIDTH, 3, padding="same", name=n),
    "attention": lambda n: SelfAttention(name=n),
    "lstm": lambda n: layers.LSTM(WIDTH, **RNN, name=n),
    "stateful gru": lambda n: layers.GRU(WIDTH, **RNN, stateful=True, name=n),
    "batch norm": lambda n: layers.BatchNormalization(name=n),
    "layer norm": lambda n: layers.LayerNormalization(name=n),
    "dropout": lambda n: layers.Dropout(0.2, name=n),
    "running mean": lambda n: RunningMean(name=n),
    "spectral dense": lambda n: layers.SpectralNormalization(
        layers.Dense(WIDTH, name=f"{n}_inner"), name=n
    ),
    "conv block": lambda n: keras.Sequential(
        [
            layers.Conv1D(WIDTH, 3, padding="same", name=f"{n}_conv"),
            layers.BatchNormalization(name=f"{n}_norm"),
            layers.ReLU(name=f"{n}_relu"),
        ],
        name=n,
    ),
    "block": lambda n: keras.Sequential(
        [
            layers.Dense(6, "gelu", name=f"{n}_up"),
            layers.BatchNormalization(name=f"{n}_norm"),
            layers.Dense(WIDTH, name=f"{n}_down"),
        ],
        name=n,
    ),
}
AGAIN = "dense again"  # The first dense stage once more: it is shared.

# Stages of a head take and give (batch, features).
HEAD = {
    "dense": lambda n: layers.Dense(CLASSES, name=n),
    "hidden": lambda n: layers.Dense(WIDTH, "tanh", name=n),
    "batch norm": lambda n: layers.BatchNormalization(name=n),
    "bare batch norm": lambda n: layers.BatchNormalization(
        center=False, scale=False, name=n
    ),
    "running mean": lambda n: RunningMean(name=n),
    "dropout": lambda n: layers.Dropout(0.2, name=n),
    "spectral dense": lambda n: layers.SpectralNormalization(
        layers.Dense(WIDTH, name=f"{n}_inner"), name=n
    ),
}


# Of classes with the same names from Keras.
CLASSES_OF = {"hidden": "dense", "conv": "conv1d", "einsum": "einsum_dense"}


def make_stages(inputs, stages):
    """Returns the layers of a body, or of a head for `inputs=None`.

    They are named as Keras would after the first of each class: names of
    layers are positions of others in their list.
    """
    made, table = [], HEAD if inputs is None else BODY
    counts = collections.Counter()
    if inputs == "tokens":
        made.append(layers.Embedding(VOCABULARY, WIDTH, name="embedding"))
    first = None
    for stage in stages:
        if stage == AGAIN:
            if first is not None:
                made.append(first)
            continue
        kind = CLASSES_OF.get(stage, stage.replace(" ", "_"))
        counts[kind] += 1
        number = counts[kind] + (10 if inputs is None else 0)
        layer = table[stage](f"{kind}_{number}")
        if stage == "dense" and first is None:
            first = layer
        made.append(layer)
    if inputs is not None:
        made.append(layers.GlobalAveragePooling1D(name="pooling"))
        made.append(layers.Dense(CLASSES, name="last"))
    return made


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a model is built from.

    Args:
        style: String, how the body is written: `"sequential"`,
            `"functional"` or `"subclassed"`.
        inputs: String, `"vectors"` or `"tokens"`.
        stages: Tuple of names in `BODY`, or `AGAIN`.
        outer: String, how the head is put on the body: `"none"`,
            `"functional"`, `"sequential"`, `"same graph"` or `"task"`.
        head: Tuple of names in `HEAD`.
    """

    style: str = "sequential"
    inputs: str = "vectors"
    stages: tuple = ()
    outer: str = "none"
    head: tuple = ("dense",)

    def x(self, seed=0, batches=1):
        rng = np.random.default_rng(seed)
        shape = (BATCH * batches, LENGTH)
        if self.inputs == "tokens":
            return rng.integers(0, VOCABULARY, shape)
        return rng.normal(size=(*shape, WIDTH)).astype("float32")

    def build(self, seed=0):
        """Returns the model and its body, with random weights."""
        body = self._body()
        model = self._with_head(body)
        model(self.x())
        randomize(model.weights, seed)
        return model, body

    def _input(self):
        tokens = self.inputs == "tokens"
        shape = (LENGTH,) if tokens else (LENGTH, WIDTH)
        if "stateful gru" in self.stages:
            shape = {"batch_shape": (BATCH, *shape)}
        else:
            shape = {"shape": shape}
        return keras.Input(**shape, dtype="int32" if tokens else "float32")

    def _body(self):
        if self.style == "subclassed":
            return Stack(self.inputs, list(self.stages), name="body")
        if self.style == "sequential":
            stages = [x for x in self.stages if x != AGAIN]
            made = make_stages(self.inputs, stages)
            return keras.Sequential([self._input(), *made], name="body")
        y = x = self._input()
        for layer in make_stages(self.inputs, self.stages):
            y = layer(y)
        return keras.Model(x, y, name="body")

    def _with_head(self, body):
        if self.outer == "none":
            return body
        if self.outer == "task":
            return Task(body, list(self.head), name="task")
        head = make_stages(None, self.head)
        if self.outer == "sequential":
            return keras.Sequential([self._input(), body, *head], name="outer")
        if self.outer == "same graph" and self.style != "subclassed":
            x, y = body.inputs[0], body.outputs[0]
        else:
            x = self._input()
            y = body(x)
        for layer in head:
            y = layer(y)
        return keras.Model(x, y, name="outer")


def randomize(weights, seed):
    rng = np.random.default_rng(seed)
    for w in weights:
        if "variance" in w.path:
            value = rng.uniform(0.5, 1.5, w.shape)
        elif is_working_memory(w):
            continue
        else:
            value = rng.normal(0, 0.5, w.shape)
        w.assign(value.astype("float32"))


def is_working_memory(variable):
    """Says whether a variable moves in every call, and is no weight."""
    return "seed_generator" in variable.path or variable.name == "rnn_state"


def recipes():
    """Returns a Hypothesis strategy of recipes."""
    stage = st.sampled_from([*BODY, AGAIN])
    head = st.sampled_from(list(HEAD))
    return st.builds(
        Recipe,
        style=st.sampled_from(["sequential", "functional", "subclassed"]),
        inputs=st.sampled_from(["vectors", "tokens"]),
        stages=st.lists(stage, max_size=4).map(tuple),
        outer=st.sampled_from(
            ["none", "functional", "sequential", "same graph", "task"]
        ),
        head=st.lists(head, max_size=2).map(lambda x: (*x, "dense")),
    )
