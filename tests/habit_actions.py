"""What users do to a model in memory."""

import contextlib

import keras
import numpy as np
from habit_loops import loop
from habit_models import randomize
from habit_world import STARTING
from habit_world import Action
from habit_world import accepted
from habit_world import action
from habit_world import added_layer
from habit_world import check
from habit_world import close
from habit_world import equal
from habit_world import kind
from habit_world import quantize
from habit_world import refused
from habit_world import reset_states
from habit_world import value_of
from helpers import adapted
from helpers import backend
from helpers import spoil

import keras_vera

# Of the first dense layer, if there is one; the second has this position.
NAME = "dense_1"


@action
class Enable(Action):
    targets: object = "all-linear"
    where: str = "base"
    exclude: object = None
    train: object = None
    rank: int = 3
    seed: int = 0
    structure: str = "dense"
    dropout: float = 0.0
    plan: str = "auto"
    rounding = STARTING

    @property
    def reloading(self):
        """The rounding of a reload, as files do not hold the plan."""
        return 0.0 if self.plan == "auto" else STARTING

    @property
    def settings(self):
        pair = self.rank, self.seed, self.structure
        return self.targets, self.exclude, self.train, *pair

    def enable(self, model, body):
        keras_vera.enable_vera(
            model if self.where == "model" else body,
            rank=self.rank,
            seed=self.seed,
            targets=self.targets,
            exclude=self.exclude,
            train=self.train,
            structure=self.structure,
            dropout=self.dropout,
            plan=self.plan,
        )

    def do(self, world):
        def call():
            self.enable(world.model, world.body)

        if world.truth is not None:
            refused(world, call)
            return
        truth, optimizer = world.describe(self), optimizer_of(world.model)
        # Every model has linear layers; the rest may match nothing.
        must = self.targets == "all-linear" and self.exclude is None
        if accepted(world, call, must and self.train is None):
            world.begin_adapted(truth)
            world.note_trained(self.train)
            names = {layer.name for layer in adapted(world.model)}
            check(names, "nothing is adapted")
            if self.targets == NAME:
                check(names == {NAME}, "another name is adapted")
            kept = optimizer_of(world.model) is optimizer
            check(kept, "another optimizer object")


@action
class Spoil(Action):
    """Gives the vectors values that show."""

    seed: int = 1
    changes = True

    def do(self, world):
        spoil(world.model, self.seed)


@action
class Toggle(Action):
    layer: int = 0
    value: bool = True
    # PyTorch takes other products where nothing needs a gradient.
    rounding = 1e-6

    def do(self, world):
        layers = world.model._flatten_layers()
        layers[self.layer % len(layers)].trainable = self.value
        if not self.value:
            world.off = True
        elif self.layer == 0:
            world.off = False


@action
class Compile(Action):
    optimizer: str = "sgd"
    eager: bool = True
    jit: bool = False

    def do(self, world):
        made = {
            # Some of the models have gradients of some thousands.
            "sgd": lambda: keras.optimizers.SGD(0.05, clipnorm=1.0),
            "momentum": lambda: keras.optimizers.SGD(
                0.05, momentum=0.9, clipnorm=1.0
            ),
            "adamw": lambda: keras.optimizers.AdamW(0.01),
            "accumulating": lambda: keras.optimizers.Adam(
                0.01, gradient_accumulation_steps=2, use_ema=True
            ),
            "vera": keras_vera.vera_optimizer,
        }
        jit = self.jit and not self.eager and backend() == "jax"
        world.model.compile(
            made[self.optimizer](),
            "mse",
            run_eagerly=self.eager,
            jit_compile=jit,
        )


@action
class Train(Action):
    how: str = "fit"
    seed: int = 0
    changes = True

    def do(self, world):
        if not trains(world):
            return  # Plain Keras cannot.
        model = world.model
        if self.how == "loop":
            trained = bool(model.trainable_variables)
            if trained:
                loop(model, world.recipe.x(self.seed + 1), targets(world))
        else:
            compiled(world)
            trained = self.train(world)
        if world.truth is not None and trained and not world.off:
            check(self.moved(world), "no vector moves")

    def moved(self, world):
        now = [value_of(w) for w in world.vectors()]
        return any(
            not np.array_equal(x, y)
            for x, y in zip(now, self.before, strict=True)
        )

    def run(self, world):
        before = [value_of(w) for w in world.vectors()]
        object.__setattr__(self, "before", before)
        super().run(world)

    def train(self, world):
        batches = 1 if self.how == "batch" else 2
        x, y = world.recipe.x(self.seed + 1, batches), targets(world, batches)
        reset_states(world.model)
        if self.how == "fit":
            world.model.fit(x, y, batch_size=len(world.x), verbose=0)
        elif self.how == "checkpoint":
            self.train_with_checkpoint(world, x, y)
        else:
            world.model.train_on_batch(x, y)
        # Gradients of an accumulating optimizer wait for a second batch.
        return self.how != "batch"

    def train_with_checkpoint(self, world, x, y):
        path = world.path(".vera.safetensors")
        saves = world.truth is not None and world.model.trainable
        saves = saves and not world.truth.may_refuse
        callback = keras_vera.callbacks.AdapterCheckpoint(path)
        world.model.fit(
            x,
            y,
            batch_size=len(world.x),
            verbose=0,
            callbacks=[callback] if saves else [],
        )
        if saves:
            model, _ = world.twin(world.start)
            keras_vera.load_adapter(model, path)
            what = "checkpoint is not the model"
            rounding = world.truth.adapter.reloading
            close(world.outputs(model), world.outputs(), what, rounding)


@action
class Predict(Action):
    def do(self, world):
        expected = world.outputs()
        y = world.model.predict(world.x, verbose=0, batch_size=len(world.x))
        close(y, expected, "predict is not the model")


@action
class Evaluate(Action):
    def do(self, world):
        compiled(world)
        y = targets(world)
        expected = np.mean((world.outputs() - y) ** 2)
        loss = world.model.evaluate(
            world.x, y, verbose=0, batch_size=len(world.x)
        )
        close(loss, expected, "evaluate is not the model")


@action
class Quantize(Action):
    changes = True

    def do(self, world):
        # What `model.quantize` does to an adapted model is Keras' warning.
        if world.truth is not None or world.quantized:
            return
        try:
            world.quantized = True
            world.outputs(world.plain()[0])
        except Exception:
            world.quantized = False  # Plain Keras cannot.
            return
        quantize(world.model)
        world.list_weights()
        if world.model.compiled:
            # Plain Keras, too, keeps an optimizer of what trained before.
            Compile().do(world)


@action
class Disable(Action):
    changes = True

    def do(self, world):
        def call():
            keras_vera.disable_vera(world.model)

        if world.truth is None:
            refused(world, call)
            return
        truth, optimizer = world.truth, optimizer_of(world.model)
        outputs = world.base_outputs()
        sure = not truth.may_refuse and world.scope is None
        if accepted(world, call, must=sure):
            for w, value in zip(truth.base, truth.values):
                unknown = truth.is_blind and id(w) in truth.trained
                same = unknown or np.array_equal(value_of(w), value)
                check(same, "disabled is not the base", kind(w))
            if not truth.is_blind:
                equal(world.outputs(), outputs, "disabled is not the base")
            world.check_plain_again(truth)
            kept = optimizer_of(world.model) is optimizer
            check(kept, "another optimizer object")
            world.truth = None


@action
class Merge(Action):
    changes = True

    def do(self, world):
        def call():
            keras_vera.merge(world.model)

        if world.truth is None:
            refused(world, call)
            return
        outputs = world.adapted_outputs()
        sure = not world.quantized and world.scope is None
        if accepted(world, call, must=sure):
            close(world.outputs(), outputs, "merged is not adapted")
            world.check_plain_again(world.truth)
            world.truth = None


@action
class Base(Action):
    """Uses the base for a moment."""

    inner: Action = Predict()
    error: bool = False

    @property
    def changes(self):
        return self.inner.changes

    def do(self, world):
        def call():
            with keras_vera.base_model(world.model):
                pass

        if world.truth is None:
            refused(world, call)
            return
        truth, before = world.truth, [value_of(w) for w in world.vectors()]
        if truth.may_refuse:
            accepted(world, call, must=False)
            return
        adapted_outputs, base = world.outputs(), world.base_outputs()
        with contextlib.suppress(KeyboardInterrupt):
            with keras_vera.base_model(world.model):
                outputs = world.outputs()
                what = "base_model is not the base"
                close(outputs, base, what, STARTING)
                world.scope = adapted_outputs
                try:
                    self.inner.do(world)
                finally:
                    world.scope = None
                if self.error:
                    raise KeyboardInterrupt
        if world.truth is truth:
            for w, value in zip(world.vectors(), before, strict=True):
                check(np.array_equal(value_of(w), value), "vectors not back")
            equal(world.outputs(), adapted_outputs, "adapter is not back")


@action
class AddHead(Action):
    """Puts one more layer on a Sequential model."""

    changes = True

    def do(self, world):
        if not isinstance(world.model, keras.Sequential) or world.quantized:
            return
        layer = added_layer(world.added)
        world.model.add(layer)
        world.added += 1
        randomize(layer.weights, world.added)
        world.weights = world.weights + layer.weights
        world.start = world.start + [value_of(w) for w in layer.weights]
        # As in plain Keras, where an optimizer knows its variables.
        world.model.compiled = False


def targets(world, batches=1):
    rows = batches * len(world.x)
    size = (rows, world.outputs().shape[-1])
    return np.random.default_rng(5).normal(size=size).astype("float32")


def compiled(world):
    if not world.model.compiled:
        Compile().do(world)


def trains(world):
    """Says whether plain Keras trains such a model.

    On PyTorch it does not train a stateful RNN, on no backend all quantized
    layers.
    """
    if not world.quantized and "stateful gru" not in world.recipe.stages:
        return True
    twin, _ = world.plain()
    twin.compile("sgd", "mse", run_eagerly=True)
    try:
        twin.train_on_batch(world.x, targets(world))
    except Exception:
        return False
    return True


def optimizer_of(model):
    return getattr(model, "optimizer", None)
