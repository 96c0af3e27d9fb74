"""What users do to a model, in any order, and what must hold after it.

A `World` holds the model, and beside it the truth in NumPy: what the base was
when it was adapted. Expected outputs come from a plain twin that is built
again and given these values, never from the code under test.
"""

import contextlib
import copy
import dataclasses
import pickle
import warnings

import keras
import numpy as np
from adapter_files import read
from habit_models import is_working_memory
from habit_models import randomize
from helpers import adapted
from helpers import backend
from helpers import spoil
from helpers import state
from keras import ops

import keras_vera

# Of float32 in models with normalization, and products in another order.
ROUNDING = 1e-4
# Of the same product by another function, as with `b = 0`.
STARTING = 2e-6


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclasses.dataclass
class Truth:
    """What an adapted model was when it was adapted."""

    adapter: object  # The `Enable` that did it.
    base: list  # The variables of the base,
    values: list  # and their values.
    variable_flags: list
    layers: list  # The layers of the base,
    types: list
    flags: list
    order: list  # Identities of all weights of the model.
    # Whether a weights file put another adapter into the base.
    may_refuse: bool = False


@dataclasses.dataclass
class File:
    """A file that was written, and the model at that time."""

    path: object
    truth: object
    outputs: np.ndarray
    values: list
    vectors: list
    saved: set  # Which of the values an adapter file holds.
    shape: tuple


class World:
    def __init__(self, recipe, folder):
        self.recipe, self.folder = recipe, folder
        self.x = recipe.x()
        self.added = 0
        self.quantized = False
        self.truth = self.adapter_file = self.weights_file = None
        self.off = False  # Whether something was toggled off since.
        self.scope = None  # The adapted outputs, within `base_model`.
        self.written = 0
        self.model, self.body = recipe.build()
        self.list_weights()

    def list_weights(self):
        """Lists the weights in an order that a twin has as well."""
        self.weights = list(self.model.weights)
        # What a user who builds the model again has before loading.
        self.start = self.values()

    # What a user sees.

    def outputs(self, model=None):
        model = model or self.model
        reset_states(model)
        y = ops.convert_to_numpy(model(self.x, training=False)).copy()
        reset_states(model)
        return y

    def adapted_outputs(self):
        return self.outputs() if self.scope is None else self.scope

    def values(self):
        return [value_of(w) for w in self.weights]

    def vectors(self):
        return [w for w in self.model.weights if "vera_lambda" in w.path]

    def path(self, ending):
        self.written += 1
        return self.folder / f"{self.written}{ending}"

    @property
    def shape(self):
        """What files of a model depend on, but for values."""
        return self.added, self.quantized

    # The truth.

    def base_layer(self, where):
        whole = where == "model" and self.recipe.outer != "task"
        return self.model if whole else self.body

    def describe(self, enable):
        base = self.base_layer(enable.where)
        layers = base._flatten_layers()
        weights = list(base.weights)
        return Truth(
            adapter=enable,
            base=weights,
            values=[value_of(w) for w in weights],
            variable_flags=[w.trainable for w in weights],
            layers=layers,
            types=[type(x) for x in layers],
            flags=[x.trainable for x in layers],
            order=[id(w) for w in self.model.weights],
        )

    def begin_adapted(self, truth):
        # A model above the one that is adapted keeps its own flag.
        self.truth, self.off = truth, not self.model.trainable
        self.start = self.values()

    def base_ids(self):
        return {id(w) for w in self.truth.base}

    def outside_layers(self):
        base = {id(x) for x in self.truth.layers}
        return [x for x in self.model._flatten_layers() if id(x) not in base]

    def outside_saved(self):
        """Returns the weights outside the base that a file has to hold."""
        saved = []
        for layer in self.outside_layers():
            own = layer._trainable_variables + layer._non_trainable_variables
            if any(w.trainable for w in own):
                saved += own
        base = self.base_ids()
        return [w for w in saved if id(w) not in base]

    def plain(self):
        """Returns a model, built again, with weights of its own."""
        model, body = self.recipe.build(seed=99)
        for number in range(self.added):
            model.add(added_layer(number))
        if self.quantized:
            quantize(model)
        return model, body

    def twin(self, values):
        """Returns a plain model, built again, with these weights."""
        model, body = self.plain()
        for weight, value in zip(model.weights, values, strict=True):
            weight.assign(value)
        if self.truth is not None:
            flags = {x.name: x.trainable for x in self.outside_layers()}
            for layer in model._flatten_layers():
                if layer is not model and not flags.get(layer.name, True):
                    layer.trainable = False
        return model, body

    def base_outputs(self):
        """Returns what the base gives, below the head of this moment."""
        was = dict(zip(map(id, self.truth.base), self.truth.values))
        values = [was.get(id(w), value_of(w)) for w in self.weights]
        return self.outputs(self.twin(values)[0])

    # What holds at any time.

    def check(self):
        if self.truth is None:
            extra = [w for w in self.model.weights if "vera_" in w.path]
            check(not extra, "plain model has vectors")
            return
        held = {id(w) for w in self.model.weights}
        for w in self.weights:
            check(id(w) in held, "weight is lost", kind(w))
        for w, value in zip(self.truth.base, self.truth.values):
            check(np.array_equal(value_of(w), value), "base moved", kind(w))
        base = self.base_ids()
        vectors = {id(w) for w in self.vectors()}
        outside = {id(w) for w in self.weights} - base
        trains = {id(w) for w in self.model.trainable_variables}
        for w in self.model.trainable_variables:
            allowed = id(w) in vectors | outside
            check(allowed, "trains and should not", kind(w))
        if not self.off:
            check(vectors <= trains, "vectors do not train")

    def check_plain_again(self, truth):
        """Checks that nothing but values is left of an adapter."""
        check(not adapted(self.model), "layers stay adapted")
        order = [id(w) for w in self.model.weights]
        check(order[: len(truth.order)] == truth.order, "order of weights")
        for layer, type_, flag in zip(truth.layers, truth.types, truth.flags):
            check(type(layer) is type_, "type of layer", type_.__name__)
            check(layer.trainable == flag, "flag of layer", type_.__name__)
        for w, flag in zip(truth.base, truth.variable_flags):
            check(w.trainable == flag, "flag of variable", kind(w))


class Action:
    """One thing that a user does.

    Unless it says that it changes the model, all weights and outputs stay.
    """

    changes = False
    # How far outputs may move where nothing is changed.
    rounding = 0.0

    def run(self, world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.changes:
                self.do(world)
            else:
                weights = list(world.weights)
                vectors = world.vectors()
                values = [value_of(w) for w in weights + vectors]
                outputs = world.outputs()
                self.do(world)
                for w, value in zip(weights + vectors, values):
                    kept = np.array_equal(value_of(w), value)
                    # Enabling again starts with vectors of its own.
                    gone = "vera_" in w.path and world.truth is None
                    check(kept or gone, "value moved", kind(w))
                close(world.outputs(), outputs, "outputs moved", self.rounding)
            world.check()


def action(cls):
    return dataclasses.dataclass(frozen=True)(cls)


@action
class Enable(Action):
    targets: object = "all-linear"
    where: str = "base"
    exclude: object = None
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
        return self.targets, self.exclude, self.rank, self.seed, self.structure

    def enable(self, model, body):
        keras_vera.enable_vera(
            model if self.where == "model" else body,
            rank=self.rank,
            seed=self.seed,
            targets=self.targets,
            exclude=self.exclude,
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
        if accepted(world, call, must):
            world.begin_adapted(truth)
            check(adapted(world.model), "nothing is adapted")
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
            "sgd": lambda: keras.optimizers.SGD(0.05),
            "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
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
        batches = 2 if self.how == "fit" else 1
        x, y = world.recipe.x(self.seed + 1, batches), targets(world, batches)
        reset_states(world.model)
        if self.how == "fit":
            world.model.fit(x, y, batch_size=len(world.x), verbose=0)
        else:
            world.model.train_on_batch(x, y)
        # Gradients of an accumulating optimizer wait for a second batch.
        return self.how == "fit"


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
class Save(Action):
    then: str = "fresh"

    def do(self, world):
        path = world.path(".vera.safetensors")

        def call():
            keras_vera.save_adapter(world.model, path)

        if world.truth is None:
            refused(world, call)
            check(not path.exists(), "refused and written")
            return
        outputs = world.adapted_outputs()
        sure = (
            world.model.trainable
            and not world.truth.may_refuse
            and world.scope is None
        )
        if not accepted(world, call, must=sure):
            check(not path.exists(), "refused and written")
            return
        saved = world.outside_saved()
        if world.scope is None:
            entries = read(path)[1].values()
            expected = [value_of(w) for w in world.vectors() + saved]
            same = sorted(map(content, entries)) == sorted(
                map(content, expected)
            )
            check(same, "file is not what trains")
        model, body = world.twin(world.start)
        # A layer that was added later would be adapted as well.
        alike = len(world.weights) == len(world.truth.order)
        if self.then == "adapted" and alike:
            world.truth.adapter.enable(model, body)
        keras_vera.load_adapter(model, path)
        rounding = world.truth.adapter.reloading
        what = "loaded is not saved"
        close(world.outputs(model), outputs, what, rounding)
        ids = {id(w) for w in saved}
        world.adapter_file = File(
            path=path,
            truth=world.truth,
            outputs=outputs,
            values=world.values(),
            vectors=[value_of(w) for w in world.vectors()],
            saved={i for i, w in enumerate(world.weights) if id(w) in ids},
            shape=world.shape,
        )


@action
class Load(Action):
    """Loads the adapter file into the model as it is now."""

    changes = True

    def do(self, world):
        file = world.adapter_file
        if file is None:
            return
        plain = world.truth is None
        truth = world.describe(file.truth.adapter) if plain else world.truth
        base = {id(w) for w in file.truth.base}
        fits = file.shape == world.shape and all(
            np.array_equal(value_of(w), value)
            for w, value in zip(world.weights, file.values)
            if id(w) in base
        )
        same = plain or (
            truth.adapter.settings == file.truth.adapter.settings
            and truth.adapter.where == file.truth.adapter.where
        )

        def call():
            keras_vera.load_adapter(world.model, file.path)

        # Flags outside the base say what a file has to hold.
        if not accepted(world, call, must=False):
            sure = fits and same and not plain
            sure = sure and not world.off and not truth.may_refuse
            check(not sure, "refuses its own file")
            return
        if plain:
            world.begin_adapted(truth)
        if fits and all(
            np.array_equal(value_of(w), value)
            for i, (w, value) in enumerate(zip(world.weights, file.values))
            if i not in file.saved
        ):
            rounding = file.truth.adapter.reloading
            what = "loaded is not saved"
            close(world.outputs(), file.outputs, what, rounding)


@action
class SaveWeights(Action):
    def do(self, world):
        path = world.path(".weights.h5")
        world.model.save_weights(path)
        outputs = world.outputs()
        if not (world.quantized and world.truth):
            twin, _ = world.twin(world.start)
            twin.load_weights(path)
            close(world.outputs(twin), outputs, "weights file is not the model")
        world.weights_file = File(
            path=path,
            truth=world.truth,
            outputs=outputs,
            values=world.values(),
            vectors=[value_of(w) for w in world.vectors()],
            saved=set(),
            shape=world.shape,
        )


@action
class LoadWeights(Action):
    changes = True

    def do(self, world):
        file = world.weights_file
        if file is None or file.shape != world.shape:
            return
        world.model.load_weights(file.path)
        if file.truth is world.truth:
            for w, value in zip(world.weights, file.values):
                if not is_working_memory(w):
                    back = np.array_equal(value_of(w), value)
                    check(back, "weights file moved", kind(w))
            for w, value in zip(world.vectors(), file.vectors, strict=True):
                check(np.array_equal(value_of(w), value), "vectors not loaded")
            equal(world.outputs(), file.outputs, "weights not loaded")
            return
        if not (world.quantized and file.truth):
            close(world.outputs(), file.outputs, "weights not loaded")
        if world.truth is not None:
            # The user gave the model another base.
            truth = world.truth
            truth.values = [value_of(w) for w in truth.base]
            truth.may_refuse = file.truth is not None
            world.start = world.values()


@action
class SaveModel(Action):
    ending: str = ".keras"

    def do(self, world):
        def saved(model):
            path = world.path(self.ending)
            model.save(path)
            return keras.saving.load_model(path, compile=False)

        if copied(world, saved) is None:
            return
        loaded = saved(world.model)
        check(not adapted(loaded), "saved model is adapted")
        if not (world.quantized and world.truth):
            what = "saved is not the model"
            close(world.outputs(loaded), world.outputs(), what)


@action
class Copy(Action):
    how: str = "clone"

    def do(self, world):
        make = {
            "clone": cloned,
            "deepcopy": copy.deepcopy,
            "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        }[self.how]
        expected = copied(world, make)
        if expected is None:
            return
        made = make(world.model)
        world.outputs(made)
        check(not adapted(made), "copy is adapted")
        extra = [w for w in made.weights if "vera_" in w.path]
        check(not extra, "copy has vectors")
        shapes = [tuple(w.shape) for w in made.weights]
        expected = [tuple(w.shape) for w in expected.weights]
        check(shapes == expected, "weights of a copy")
        if self.how != "clone":
            if not (world.quantized and world.truth):
                close(world.outputs(made), world.outputs(), "copy differs")
        elif world.truth is not None and not world.off:
            self.check_flags(world, made)

    def check_flags(self, world, made):
        truth = world.truth
        flags = dict(zip(map(id, truth.base), truth.variable_flags))
        for w, mine in zip(made.weights, world.weights):
            same = w.trainable == flags.get(id(mine), w.trainable)
            check(same, "flags of a clone", kind(mine))


def cloned(model):
    return keras.models.clone_model(model)


def copied(world, make):
    """Returns a copy of a plain twin, or `None` where Keras itself fails."""
    twin, _ = world.twin(world.start)
    try:
        made = make(twin)
        outputs = world.outputs(made)
        if make is not cloned:
            close(outputs, world.outputs(twin), "Keras' own copy differs")
    except Exception:
        return None
    return made


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
                same = np.array_equal(value_of(w), value)
                check(same, "disabled is not the base", kind(w))
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


def added_layer(number):
    return keras.layers.Dense(2, name=f"added_{number}")


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


def loop(model, x, y):
    """Takes one step of gradient descent, as a user writes it."""
    {"jax": jax_loop, "torch": torch_loop, "tensorflow": tensorflow_loop}[
        backend()
    ](model, x, y)


def jax_loop(model, x, y):
    import jax

    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss_of(trainable, rest):
        out, rest = model.stateless_call(trainable, rest, x, training=True)
        return ops.mean((out - y) ** 2), rest

    gradients, rest = jax.grad(loss_of, has_aux=True)(trainable, rest)
    for variable, gradient in zip(model.trainable_variables, gradients):
        variable.assign(variable.value - 0.05 * gradient)
    for variable, value in zip(model.non_trainable_variables, rest):
        variable.assign(value)


def tensorflow_loop(model, x, y):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    keras.optimizers.SGD(0.05).apply(gradients, variables)


def torch_loop(model, x, y):
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    optimizer.zero_grad()
    loss = torch.mean((model(x, training=True) - torch.as_tensor(y)) ** 2)
    loss.backward()
    optimizer.step()


def reset_states(model):
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            layer.reset_states()


def quantize(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")


def value_of(variable):
    return ops.convert_to_numpy(variable).copy()


def kind(variable):
    """Names a variable so that equal faults of two models look alike."""
    parts = variable.path.split("/")[-2:]
    return "/".join(p.lstrip("bodyhead_0123456789") or p for p in parts)


def content(array):
    return str(array.dtype), array.shape, array.tobytes()


def check(holds, *what):
    if not holds:
        raise Broken(": ".join(what))


def close(received, expected, what, rounding=ROUNDING):
    difference = np.max(np.abs(np.asarray(received) - expected))
    if not difference <= rounding * max(1, np.max(np.abs(expected))):
        raise Broken(f"{what} (by {difference:.2g})")


def equal(received, expected, what):
    close(received, expected, what, rounding=0.0)


def refused(world, call):
    check(not accepted(world, call, must=False), "does what makes no sense")


def accepted(world, call, must):
    """Says whether a call succeeds; one that fails has to change nothing."""
    before = state(world.model)
    try:
        call()
    except (ValueError, keras_vera.AdapterFileError) as error:
        same = state(world.model) == before
        check(same, "failed and changed the model", str(error)[:60])
        if must:
            raise Broken("refuses", str(error)[:60]) from error
        return False
    return True


def run(recipe, actions, folder):
    """Does one action after the other; an error says at which it came."""
    keras.utils.set_random_seed(0)
    step = 0
    try:
        world = World(recipe, folder)
        for step, action in enumerate(actions):
            action.run(world)
    except Exception as error:
        error.step = step
        raise
