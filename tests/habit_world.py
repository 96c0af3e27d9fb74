"""What users do to a model, in any order, and what must hold after it.

A `World` holds the model, and beside it the truth in NumPy: what the base was
when it was adapted. Expected outputs come from a plain twin that is built
again and given these values, never from the code under test.
"""

import dataclasses
import warnings

import keras
import numpy as np
from helpers import adapted
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
    # What was there outside the base, by identity, and its values.
    outside: dict
    # Identities of what trains in the base, with the state that moves.
    trained: frozenset = frozenset()
    # Whether a weights file put another adapter into the base.
    may_refuse: bool = False
    # Whether it is not known what the base has where it trains.
    is_blind: bool = False


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
            outside={id(w): value_of(w) for w in self.model.weights},
        )

    def begin_adapted(self, truth):
        # A model above the one that is adapted keeps its own flag.
        self.truth, self.off = truth, not self.model.trainable
        self.start = self.values()

    def note_trained(self, train):
        """Notes what of the base trains: never more than `train` names."""
        base, trained = self.base_ids(), set()
        for layer in self.truth.layers:
            own = layer._trainable_variables
            ids = {id(w) for w in own if w.trainable and id(w) in base}
            for w in own:
                if id(w) in ids and "vera_" not in w.name:
                    allowed = may_train(layer, w, train)
                    check(allowed, "trains and should not", kind(w))
            plain = [w for w in own if "vera_" not in w.name]
            if ids and all(id(w) in ids for w in plain):
                if not any(x is layer for x in adapted(self.model)):
                    ids |= {id(w) for w in layer._non_trainable_variables}
            trained |= ids
        check(bool(trained) == (train is not None), "trains nothing", train)
        self.truth.trained = frozenset(trained)

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
            elif layer.trainable:
                saved += layer._non_trainable_variables
            elif not all(map(self.is_as_it_was, own)):
                saved += own
        base = self.base_ids()
        return [w for w in saved if id(w) not in base]

    def is_as_it_was(self, w):
        value = self.truth.outside.get(id(w))
        return value is not None and np.array_equal(value, value_of(w))

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
        trained = self.truth.trained
        for w, value in zip(self.truth.base, self.truth.values):
            same = id(w) in trained or np.array_equal(value_of(w), value)
            check(same, "base moved", kind(w))
        base = self.base_ids()
        vectors = {id(w) for w in self.vectors()}
        outside = {id(w) for w in self.weights} - base
        trains = {id(w) for w in self.model.trainable_variables}
        for w in self.model.trainable_variables:
            allowed = id(w) in vectors | outside | trained
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


def may_train(layer, variable, train):
    """Says whether `train` of `enable_vera` means a variable of a layer."""
    if variable.name == "bias":
        return "bias" in train or layer.name in train
    is_norm = "Normalization" in type(layer).__name__
    return is_norm and "norm" in train or layer.name in train


def added_layer(number):
    return keras.layers.Dense(2, name=f"added_{number}")


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
