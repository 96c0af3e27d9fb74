"""Keeps the base of an adapted model as it is, whatever is trained.

Frozen means the state as well: moving averages, power iterations, counters.
Layers that own state run in inference mode, as Keras' own frozen
`BatchNormalization` does, and what a layer assigns to a frozen variable in a
call has no effect. What slips through is noticed when an adapter is saved,
and undone when it is disabled.
"""

import functools
import inspect
import warnings

import keras

from keras_vera import _keras
from keras_vera.layers._in_place import holds_merged
from keras_vera.layers._kinds import kind_of

# What an instance of a frozen layer has beside its class.
_MARKS = "get_config", "load_own_variables", "train", "vera_base_is_merged"


class _Frozen:
    """What a layer or a variable was, and the bases that it is in.

    It is frozen in the same way for each of them: with the first, until the
    last is undone.
    """

    def __init__(self, layer_or_variable):
        self.bases = []
        self.trainable = layer_or_variable.trainable
        # Where the class was exchanged.
        self.plain_class = None
        # What a layer listed as trainable.
        self.moved = []
        # What a variable that is state holds in the base.
        self.value = None

    def note(self, variable):
        """Takes the value of a variable as the one that the base has."""
        self.value = _keras.to_numpy(variable).copy()

    def has_moved(self, variable):
        return self.value is not None and (
            _keras.to_numpy(variable).tobytes() != self.value.tobytes()
        )


def _frozen(layer_or_variable):
    return vars(layer_or_variable).get("vera_frozen")


class FrozenBase:
    """What is frozen of a model, and how to undo it.

    Args:
        bases: List of the layers that get frozen with all layers below.
        targets: List of the layers that get adapters.
        dropout: Float, the rate of dropout in the adapters.
        trained: Set of the ids of variables in the bases that train, and of
            the state that moves with them.
        outside: List of layers below the bases that are none of theirs.
    """

    def __init__(
        self, bases, targets, dropout=0.0, trained=frozenset(), outside=()
    ):
        # Those of now: what a base gets later, as by `Sequential.add`, is not
        # of the base.
        layers = [x for base in bases for x in _keras.flatten_layers(base)]
        left_out = {id(layer) for layer in outside}
        self.name = bases[0].name
        self.layers = list(
            {id(x): x for x in layers if id(x) not in left_out}.values()
        )
        self._targets = {id(layer) for layer in targets}
        self._dropout = dropout
        self._trained = trained
        # What may differ in the base when this is undone.
        self._changed = trained.union(
            id(v) for layer in targets for v in _keras.own_variables(layer)
        )
        # The layers and variables that it freezes.
        self._taken = []

    def check_others(self):
        """Raises if this changed the base of another model, or that this."""
        for layer in self.layers:
            for variable in _keras.own_variables(layer):
                frozen = _frozen(variable)
                for other in frozen.bases if frozen else ():
                    if id(variable) in self._changed | other._changed:
                        raise ValueError(
                            f"The layer '{layer.name}' is in the base of "
                            f"'{self.name}', and in that of '{other.name}', "
                            "which is adapted with VeRA already. What is "
                            "adapted or trained in one must not be in the "
                            "other. Leave the layer out of `targets` and "
                            "`train`, or call `keras_vera.merge` or "
                            f"`keras_vera.disable_vera` on '{other.name}' "
                            "first."
                        )

    def freeze(self, model):
        """Freezes the bases in `model`; on failure, call `undo`."""
        new = [layer for layer in self.layers if _frozen(layer) is None]
        in_inference = [layer for layer in new if self._wants_inference(layer)]
        state = [v for layer in new for v in self._state(layer)]
        for layer in self.layers:
            self._take(layer)
            for variable in _keras.own_variables(layer):
                self._guard(variable)
        for variable in state:
            if _frozen(variable).value is None:
                _frozen(variable).note(variable)
        for layer in new:
            _frozen(layer).moved = _keras.freeze_own_variables(
                layer, self._trained
            )
            if id(layer) not in self._targets and not self._owns_trained(layer):
                _mark_when_merged(layer)
            if isinstance(layer, keras.layers.TorchModuleWrapper):
                _keep_buffers(layer)
        for layer in in_inference:
            _frozen(layer).plain_class = type(layer)
            layer.__class__ = _inference_class(type(layer))
        self._set_flags(model)

    def undo(self, give_back):
        """Unfreezes what is in no other base.

        Args:
            give_back: Whether state gets the values that it had.
        """
        taken = [(x, _frozen(x)) for x in self._taken]
        for x, frozen in taken:
            frozen.bases.remove(self)
        thawed = [(x, frozen) for x, frozen in taken if not frozen.bases]
        for x, frozen in thawed:
            del vars(x)["vera_frozen"]
            if frozen.plain_class is not None:
                x.__class__ = frozen.plain_class
        if give_back:
            for x, frozen in taken:
                if frozen.has_moved(x):
                    x.assign(frozen.value)
            _keras.finalize_state(self.layers)
        for x, frozen in thawed:
            if not isinstance(x, keras.Layer):
                x.trainable = frozen.trainable
                continue
            for name in _MARKS:
                vars(x).pop(name, None)
            _keras.thaw_own_variables(x, frozen.moved)
            _keras.set_trainable(x, frozen.trainable)

    def moved_layers(self):
        """Returns the layers whose state is not what it was."""
        return [
            layer
            for layer in self.layers
            if any(
                _frozen(v) is not None and _frozen(v).has_moved(v)
                for v in _keras.own_variables(layer)
            )
        ]

    def _take(self, layer_or_variable):
        frozen = vars(layer_or_variable).setdefault(
            "vera_frozen", _Frozen(layer_or_variable)
        )
        if self not in frozen.bases:
            frozen.bases.append(self)
            self._taken.append(layer_or_variable)
        return frozen

    def _state(self, layer):
        """Returns the variables of a layer that training could move."""
        return [v for v in state_of(layer) if id(v) not in self._trained]

    def _guard(self, variable):
        frozen = self._take(variable)
        if frozen.plain_class is None and id(variable) not in self._trained:
            frozen.plain_class = type(variable)
            variable.__class__ = _guarded_class(type(variable))

    def _wants_inference(self, layer):
        """Whether a layer would compute by other state when it trains.

        Nothing that has to know of training may be in it: it would not be
        told. There, only the state itself stays.
        """
        return (
            id(layer) not in self._targets
            and _keras.takes_training(layer)
            and bool(self._state(layer))
            and not any(map(self._trains, _keras.flatten_layers(layer)))
        )

    def _trains(self, layer):
        """Whether a layer is another one in training, and may be so."""
        return (
            _keras.draws_random_numbers(layer)
            or (id(layer) in self._targets and self._dropout)
            or self._owns_trained(layer)
        )

    def _owns_trained(self, layer):
        own = _keras.own_variables(layer)
        return any(id(v) in self._trained for v in own)

    def _set_flags(self, model):
        in_base = {id(layer) for layer in self.layers}
        trained = {id(x) for x in self.layers if self._owns_trained(x)}
        shown = self._targets | trained
        for layer in _keras.flatten_layers(model):
            below = {id(below) for below in _keras.flatten_layers(layer)}
            # The flag of a layer hides the variables below it, so it is set
            # above every variable that trains; elsewhere in the base it is
            # off.
            if shown & below:
                flag = True
            elif id(layer) in in_base:
                flag = False
            else:
                continue
            frozen = self._take(layer)
            if id(layer) in in_base:
                _show_in_config(layer, frozen.trainable)
            _keras.set_trainable(layer, flag)


def _show_in_config(layer, flag):
    """Lets a config say whether the layer trains in the plain model.

    So that what `clone_model` makes, or what is made from a config, is the
    plain model. In Keras' own files the layer is frozen as it is here: the
    optimizer of the file would not fit a model in which more trains.
    """

    @functools.wraps(layer.get_config)
    def get_config():
        # Of the class that the layer has by then.
        config = type(layer).get_config(layer)
        # Keras' own kind of list refers to the layer, and with it to all that
        # is known of the base, which HDF5 files of the older form would copy.
        config = {
            key: list(value) if isinstance(value, list) else value
            for key, value in config.items()
        }
        if "trainable" in config and not _keras.is_saving_or_loading():
            config["trainable"] = flag
        return config

    vars(layer)["get_config"] = get_config


def _mark_when_merged(layer):
    """Lets a layer of the base know that a weights file has changed it.

    In the file it has an adapter, or is trained, and here it has none: what
    was trained there is a part of the base then.
    """

    @functools.wraps(layer.load_own_variables)
    def load_own_variables(store):
        type(layer).load_own_variables(layer, store)
        vars(layer)["vera_base_is_merged"] = holds_merged(store)

    vars(layer)["load_own_variables"] = load_own_variables


def _keep_buffers(layer):
    """Lets modules of PyTorch with buffers run in inference mode.

    Such as moving averages. What is below them, such as dropout, trains.
    """

    @functools.wraps(layer.train)
    def train(mode=True):
        type(layer).train(layer, mode)
        for module in layer.module.modules():
            if any(True for _ in module.buffers(recurse=False)):
                module.training = False
        return layer

    vars(layer)["train"] = train


def check_state_is_unmoved(model, bases):
    """Raises if a part of the base moved that no adapter file holds.

    Args:
        model: The model, for the message.
        bases: List of `FrozenBase`.
    """
    moved = [layer.name for base in bases for layer in base.moved_layers()]
    if moved:
        raise ValueError(
            f"The base of '{model.name}' is frozen, but the state of "
            f"{len(moved)} of its layers ({', '.join(sorted(moved)[:5])}) has "
            "moved since `enable_vera`. An adapter file does not hold it, so "
            "on the base model it would give other outputs. Do not write to "
            "the variables of these layers, or call `enable_vera` on a part "
            "of the model without them. `keras_vera.disable_vera(model)` "
            "gives the state back; weights that are loaded with "
            "`load_weights` or `set_weights` count as the base."
        )


def trained_variables(layer):
    """Returns what of a layer trains in the plain layer, frozen or not."""
    frozen = _frozen(layer)
    moved = [] if frozen is None else frozen.moved
    return _keras.trained_variables(layer) + moved


def state_of(layer):
    """Returns what a layer keeps beside what trains in the plain layer."""
    if kind_of(type(layer)) and layer.quantization_mode is not None:
        # A packed kernel and its scales.
        return []
    return _keras.untrained_variables(layer)


class _Guarded:
    """A frozen variable: what a layer assigns to it in a call is dropped.

    Outside of calls it takes what it is given, as when weights are loaded.
    What moves in every call, not only in training, is frozen as well: it is
    the same in `predict` as in `fit`. The states of a stateful RNN are no
    weights of their layer, and the seeds of random numbers have lists of
    their own; they go on moving. It stays frozen when its layer is set to be
    trainable, as another variable of the layer may train.
    """

    @property
    def trainable(self):
        return super().trainable

    @trainable.setter
    def trainable(self, value):
        super(_Guarded, type(self)).trainable.fset(self, False)

    def assign(self, value):
        if not _keras.is_in_call():
            value = super().assign(value)
            frozen = _frozen(self)
            if frozen.value is not None and _keras.is_loading_weights():
                frozen.note(self)
            return value
        if _keras.is_in_inference_call():
            warnings.warn(
                f"A layer assigns to '{self.path}' outside of training. The "
                "variable belongs to the frozen base of a model that is "
                "adapted with VeRA, so it keeps its value. If it must change, "
                "call `enable_vera` on a part of the model without it.",
                stacklevel=2,
            )
        return self.value


@functools.cache
def _guarded_class(plain_class):
    return _keras.class_like(plain_class, (_Guarded,))


class _Inference:
    """A layer with state that computes the same whether it trains or not."""


@functools.cache
def _inference_class(plain_class):
    plain_call = plain_class.call
    signature = inspect.signature(plain_call)

    @functools.wraps(plain_call)
    def call(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs)
        arguments.arguments["training"] = False
        return plain_call(*arguments.args, **arguments.kwargs)

    return _keras.class_like(plain_class, (_Inference,), {"call": call})
