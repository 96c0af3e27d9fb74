"""What of a base trains beside the vectors, and how that is undone."""

import functools

from keras_vera import _keras
from keras_vera.layers._base_scope import suspended
from keras_vera.layers._in_place import base_store
from keras_vera.layers._in_place import holds_merged
from keras_vera.layers._in_place import is_beside_this_base
from keras_vera.layers._in_place import new_group


class TrainedInBase:
    """The variables of a base that train, and the values that the base has.

    A layer of which all trains also moves its state, such as the moving
    averages of `BatchNormalization`; it is saved and undone with the rest.

    Args:
        variables: Dict of lists of variables, by layer.
        targets: List of the layers that get adapters.
    """

    def __init__(self, variables=None, targets=()):
        self.variables = {
            layer: [*own, *_state_that_moves(layer, own, targets)]
            for layer, own in (variables or {}).items()
        }
        self.trained = frozenset(
            id(v) for own in (variables or {}).values() for v in own
        )
        self.ids = frozenset(
            id(v) for own in self.variables.values() for v in own
        )
        self._values = {}
        self._classes = []

    def names(self):
        """Returns what trains, in words that are the same in every build."""
        return [
            _keras.without_number(f"{type(layer).__name__}/{v.name}")
            for layer, own in self.variables.items()
            for v in own
        ]

    def begin(self, adaptation):
        """Lets the variables train, once everything else is frozen."""
        for layer, own in self.variables.items():
            for variable in own:
                if id(variable) in self.trained:
                    variable.trainable = True
            self.note(layer)
            self._classes.append((layer, type(layer)))
            layer.__class__ = _trained_class(type(layer))
            layer.vera_adaptation = adaptation

    def undo(self, give_back):
        """Ends it.

        Args:
            give_back: Whether the variables get the values of the base.
        """
        for layer, plain_class in self._classes:
            layer.__class__ = plain_class
            layer.__dict__.pop("vera_adaptation", None)
        if give_back:
            for variable, value in self.base_values():
                variable.assign(value)

    def note(self, layer, values=None):
        """Takes values as those that the base has; by default, the present."""
        own = self.variables[layer]
        if values is None:
            values = [_keras.to_numpy(v).copy() for v in own]
        self._values[layer] = values

    def values_of(self, layer):
        """Returns the values that the base has for a layer, as arrays."""
        return self._values[layer]

    def base_values(self):
        """Yields each variable and the value that the base has for it."""
        for layer, values in self._values.items():
            yield from zip(self.variables[layer], values)


def _state_that_moves(layer, own, targets):
    ids = {id(v) for v in own}
    in_full = all(id(v) in ids for v in _keras.trained_variables(layer))
    if not in_full or any(layer is target for target in targets):
        return []
    return _keras.untrained_variables(layer)


class _Trained:
    """Saving and loading of a layer of the base that trains.

    Files hold the trained values. Weight files also hold those of the base,
    where plain Keras does not look; beside a quantized base, it is the other
    way round.
    """

    @property
    def vera_trained(self):
        return self.vera_adaptation.trained

    @suspended()
    def save_own_variables(self, store):
        super().save_own_variables(base_store(self, store))
        group = new_group(self, store)
        if group is not None:
            for i, value in enumerate(self.vera_trained.values_of(self)):
                group[f"base_{i}"] = value
            if holds_merged(store):
                return
            for i, variable in enumerate(self.vera_trained.variables[self]):
                group[f"trained_{i}"] = _keras.to_numpy(variable)

    @suspended()
    def load_own_variables(self, store):
        super().load_own_variables(store)
        group = _keras.hidden_group(store)
        variables = self.vera_trained.variables[self]
        names = [f"base_{i}" for i in range(len(variables))]
        if (
            group is None
            or any(name not in group for name in names)
            or not is_beside_this_base(self, group)
        ):
            # This is the base from now on: the file is that of a plain model,
            # or of one in which this layer is adapted.
            self.vera_base_is_merged = holds_merged(store)
            self.vera_trained.note(self)
            return
        self.vera_base_is_merged = False
        values = [_keras.hidden_array(group, name) for name in names]
        self.vera_trained.note(self, values)
        if not holds_merged(store):
            for i, variable in enumerate(variables):
                variable.assign(_keras.hidden_array(group, f"trained_{i}"))


@functools.cache
def _trained_class(plain_class):
    return _keras.class_like(plain_class, (_Trained,))


def check_all_there(model, paths, plans):
    """Raises if a variable that trains is no longer in its layer."""
    own = {
        id(v) for layer in paths.values() for v in _keras.own_variables(layer)
    }
    lost = [
        layer.name
        for plan in plans
        for layer in plan.trained.variables
        if not all(id(v) in own for v in plan.trained.variables[layer])
    ]
    if lost:
        raise ValueError(
            f"What trains in the base of '{model.name}' is no longer in the "
            f"layers {lost}: `quantize`, for example, puts other variables "
            "in its place. Save the adapter before that."
        )
