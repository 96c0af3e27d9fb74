import math
import numbers
import re

import keras

from keras_vera import _keras
from keras_vera.layers._rates import rate_factor
from keras_vera.product.checks import check_integer

_VECTORS = r"(.*/)?vera_lambda_[db]"
_RATE = 0.01
_REST_RATE = 0.003
# The share of the steps in which the rates rise.
_WARMUP = 0.1
# How many adapted layers the default rate of vectors is for. Fewer want a
# higher one, up to that of the fewest; more have been seen to want the same.
_LAYERS, _FEWEST_LAYERS = 64, 8
# Up to how many inputs a head has the highest rate.
_INPUTS = 384


def vera_optimizer(
    vectors: keras.optimizers.Optimizer | float | str | None = None,
    rest: keras.optimizers.Optimizer | float | str | None = None,
    total_steps: int | None = None,
) -> keras.optimizers.MultiOptimizer:
    """Returns an optimizer with learning rates of their own for the vectors.

    Args:
        vectors: Float, the learning rate of Adam for vectors of a layer whose
            `d` starts with 0.1, and whose base gives outputs as large as its
            inputs. Where `d` starts s times as high, its rate is s times as
            high, and that of `b` s times as low; where the base's outputs are
            s times as large, the rate of `b` is, with s rounded to 1, 2, 4 or
            8. With these, all else trains in the same way. Or a Keras
            optimizer or its name, which trains `d` and `b` as it is, in every
            layer. Defaults to 0.01, or, with `total_steps`, to
            `0.3 / sqrt(total_steps)` within 0.005 and 0.05, in both cases
            times `sqrt(64 / layers)` where fewer than 64 adapted layers train
            together, and no more than for 8.
        rest: Float, the learning rate of Adam for all other trained variables,
            such as a task head. Or a Keras optimizer or its name. Defaults to
            0.003. With `total_steps`, biases, scales of norms, and kernels of
            `Dense` layers with up to 384 inputs have
            `0.18 / sqrt(total_steps)` within 0.003 and 0.01; with more inputs,
            half as much for about each doubling, but no less than 0.003.
        total_steps: Integer, how many steps will be made: epochs times
            batches. A rate, given or not, then rises to what it is in the
            first tenth of these, and falls to 0 by a cosine, where it stays.
            Defaults to `None`: rates stay as they are.

    Returns:
        A `keras.optimizers.MultiOptimizer`, for `model.compile`.

    Raises:
        ValueError: If a rate is not positive, `total_steps` is not a positive
            integer or there is no rate for it to change, or both optimizers
            are the same one.

    Example:

    ```python
    keras_vera.enable_vera(model)
    model.compile(
        optimizer=keras_vera.vera_optimizer(total_steps=1000),
        loss="sparse_categorical_crossentropy",
    )
    ```

    `docs/rates.md` says where the defaults come from, and
    `benchmarks/evidence.py` and `benchmarks/rates_of_formula.py` measure them.

    With optimizers of your own:

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
    if total_steps is not None:
        total_steps = check_integer("total_steps", total_steps, 1)
    by_layers, rest_rate = vectors is None, _default_rest_rate(total_steps)
    least_of_rest = _REST_RATE / rest_rate if rest is None else None
    vectors = _checked("vectors", vectors, _default_rate(total_steps))
    rest = _checked("rest", rest, rest_rate)
    rates = [x for x in (vectors, rest) if isinstance(x, float)]
    if total_steps is not None and not rates:
        raise ValueError(
            "`total_steps` is for learning rates that are given as numbers, "
            "and both `vectors` and `rest` are optimizers. Received: "
            f"total_steps={total_steps}. Give the optimizers schedules, or "
            "leave `total_steps` out."
        )
    if vectors is rest and not rates:
        raise ValueError(
            "`vectors` and `rest` must be two optimizers. "
            f"Received the same one twice: {vectors!r}"
        )
    by_start = isinstance(vectors, float)
    if isinstance(vectors, float):
        vectors = _adam(vectors, total_steps)
    if isinstance(rest, float):
        rest = _adam(rest, total_steps)
    by_variable = _ByVariable(rest, {_VECTORS: vectors})
    by_variable.by_start = by_start
    by_variable.by_layers = by_layers
    by_variable.least_of_rest = least_of_rest
    return MultiOptimizer(by_variable)


@_keras.named_in_files("keras.optimizers.OptimizerMap")
class _ByVariable(keras.optimizers.OptimizerMap):
    """Gives each variable an optimizer whose rate suits it.

    Files of a compiled model hold it as Keras' own class, which goes by the
    paths of the variables, to be loaded without this package.
    """

    by_start = by_layers = False  # How the rates of vectors go.
    # Of the rate of all else, if that goes by inputs.
    least_of_rest: float | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._layers_factor = 1.0
        # By whether it is for vectors, and the factor of its rate.
        self._scaled, self._paths = {}, {}
        # The factor and the shape of each variable, in order: of those that
        # are assigned, and what a file has. There, kernels, which say the
        # factors as well, are read later.
        self._assigned, self.recorded = [], []
        self._recorded_factors = {}
        # What the optimizers of a file are made of, in the order that they
        # have there: also of those that its model, merged, has no use for.
        self.recorded_optimizers = []

    def assign(self, variables):
        """Forgets all other variables, and makes what these need.

        Returns:
            List of optimizers, in the order that they have in a file.
        """
        layers = {id(x) for x in map(_layer_of, variables) if x is not None}
        few = min(max(len(layers), _FEWEST_LAYERS), _LAYERS)
        self._layers_factor = math.sqrt(_LAYERS / few) if self.by_layers else 1
        self._scaled, self._paths = {}, {}
        shapes = [list(v.shape) for v in variables]
        self._recorded_factors = {}
        if [shape for _, shape in self.recorded] == shapes:
            factors = (factor for factor, _ in self.recorded)
            self._recorded_factors = dict(zip(map(id, variables), factors))
        for of_vectors, factor in self.recorded_optimizers:
            self._scaled_for(of_vectors, factor)
        self.recorded, self.recorded_optimizers = [], []
        own = [getattr(self(v), "rate_factor", 1.0) for v in variables]
        self._assigned = [list(pair) for pair in zip(own, shapes)]
        return [*self.values(), *self._scaled.values(), self.default_optimizer]

    def __call__(self, variable):
        of_vectors = self[variable.path] is not self.default_optimizer
        with _keras.outside_of_tracing():
            factor = self._recorded_factors.get(id(variable))
            if factor is None and of_vectors:
                factor = self._factor_of_vector(variable)
            elif factor is None:
                factor = self._factor_of_rest(variable)
            key = of_vectors, f"{factor:g}"
            self._paths.setdefault(key, []).append(variable.path)
            return self._scaled_for(of_vectors, factor)

    def _scaled_for(self, of_vectors, factor):
        """Returns the optimizer of a rate, which it makes if need be."""
        (vectors,) = self.values()
        optimizer = vectors if of_vectors else self.default_optimizer
        key = of_vectors, f"{factor:g}"
        if factor != 1 and key not in self._scaled:
            self._scaled[key] = _scaled(optimizer, factor)
        return optimizer if factor == 1 else self._scaled[key]

    def _factor_of_vector(self, variable):
        layer = _layer_of(variable)
        if not self.by_start or layer is None:
            return 1
        return self._layers_factor * rate_factor(layer, variable.name)

    def _factor_of_rest(self, variable):
        """Heads of many inputs move their outputs more in a step."""
        shape = variable.shape
        if self.least_of_rest is None or len(shape) < 2:
            return 1
        if variable.name != "kernel" or len(shape) > 2:
            return self.least_of_rest
        halvings = max(0, round(math.log2(shape[0] / _INPUTS)))
        return max(0.5**halvings, self.least_of_rest)

    def get_config(self):
        ends = _ends(self._paths)
        by_path = {
            f"(.*/)?({'|'.join(map(re.escape, ends[key]))})": optimizer
            for key, optimizer in self._scaled.items()
            if key in ends
        }
        # One path must not match two keys.
        others = f"(?!(?:{'|'.join(by_path)})\\Z)" if by_path else ""
        (vectors,) = self.values()
        plain = keras.optimizers.OptimizerMap(
            self.default_optimizer, {others + _VECTORS: vectors, **by_path}
        )
        # Keras' own class leaves it alone.
        rates = {name: getattr(self, name) for name in _SETTINGS}
        rates["factors"] = self._assigned
        rates["optimizers"] = [
            [of_vectors, optimizer.rate_factor]
            for (of_vectors, _), optimizer in self._scaled.items()
        ]
        return {**plain.get_config(), "rates": rates}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Returns one that has yet to see its variables."""
        plain = keras.optimizers.OptimizerMap.from_config(
            config, custom_objects
        )
        vectors = next(x for key, x in plain.items() if key.endswith(_VECTORS))
        made = cls(plain.default_optimizer, {_VECTORS: vectors})
        vars(made).update({x: config["rates"][x] for x in _SETTINGS})
        return made


_SETTINGS = ("by_start", "by_layers", "least_of_rest")


@_keras.named_in_files("keras.optimizers.MultiOptimizer")
class MultiOptimizer(keras.optimizers.MultiOptimizer):
    """Gives variables rates that suit them and how many layers train.

    Optimizers are named after their class, which TensorFlow takes for a scope.
    """

    def build(self, var_list):
        if not self.built:
            self._inner_optimizers = self._optimizer_map.assign(var_list)
            for optimizer in self._inner_optimizers:
                optimizer.loss_scale_factor = self.loss_scale_factor
        super().build(var_list)
        for optimizer in self._inner_optimizers:
            if not optimizer.built:
                # Keras asks it of all, though some have no variables.
                optimizer.build([])

    def apply(self, grads, trainable_variables=None):
        """As one optimizer for all variables.

        Keras' own takes gradients of all variables alone, and raises where
        one of its optimizers has none, after others have made their step.
        """
        if trainable_variables is None or not len(grads):
            if not self.built or len(grads) != len(self._trainable_variables):
                return super().apply(grads)
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not self.built:
            self.build(variables)
        for optimizer, own in _keras.divided(self, grads, variables):
            if own:
                optimizer.apply_gradients(own)
            else:
                # So that schedules stay in step.
                optimizer.iterations.assign_add(1)
        self._iterations.assign_add(1)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        for optimizer in self.optimizers:
            optimizer.exclude_from_weight_decay(var_list, var_names)

    @classmethod
    def from_config(cls, config, custom_objects=None):
        by_variable = _ByVariable.from_config(
            config["optimizer_map"]["config"], custom_objects
        )
        return cls(**{**config, "optimizer_map": by_variable})


@_keras.read_from_files_as("keras.optimizers.MultiOptimizer")
class _InFiles:
    """Reads what files name as Keras' class, which may be either one."""

    @staticmethod
    def from_config(config, custom_objects=None):
        # The config of a function is its name.
        of_map = config["optimizer_map"]["config"]
        rates = of_map.get("rates") if isinstance(of_map, dict) else None
        is_file = _keras.objects_being_loaded() is not None
        if rates is None or (is_file and "factors" not in rates):
            return keras.optimizers.MultiOptimizer.from_config(
                config, custom_objects
            )
        made = MultiOptimizer.from_config(config, custom_objects)
        if is_file:
            by_variable = made._optimizer_map
            by_variable.recorded = rates["factors"]
            by_variable.recorded_optimizers = rates.get("optimizers", [])
        return made


def _ends(paths):
    """Returns ends of paths that tell apart which key they belong to.

    A loaded model may lack what its variables' paths began with.

    Args:
        paths: Dictionary of lists of paths.
    """
    parts = {key: [p.split("/") for p in own] for key, own in paths.items()}
    longest = max((len(x) for own in parts.values() for x in own), default=0)
    size = 2
    while True:
        ends = {
            # Without a second time, in order.
            key: list(dict.fromkeys("/".join(x[-size:]) for x in own))
            for key, own in parts.items()
        }
        different = len(set().union(*ends.values()))
        if different == sum(map(len, ends.values())) or size >= longest:
            return ends
        size += 1


def _layer_of(variable):
    """Returns the adapted layer whose vector it is, or `None`."""
    layer = getattr(variable, "vera_layer", lambda: None)()
    return layer if hasattr(layer, "vera_lambda_d") else None


def _default_rate(total_steps):
    """Returns the rate of the vectors: short runs want a higher one."""
    if total_steps is None:
        return _RATE
    return min(max(0.3 / math.sqrt(total_steps), 0.005), 0.05)


def _default_rest_rate(total_steps):
    """Returns the rate of all else: a new head has as few steps to learn."""
    if total_steps is None:
        return _REST_RATE
    # Heads of two layers do not stand more.
    return min(max(0.18 / math.sqrt(total_steps), 0.003), 0.01)


def _checked(name, value, default):
    """Returns an optimizer, or a learning rate as a `float`."""
    if value is None:
        return default
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not 0 < value < float("inf"):
            raise ValueError(
                f"`{name}` must be an optimizer or a positive learning rate. "
                f"Received: {name}={value!r}"
            )
        return float(value)
    return keras.optimizers.get(value)


def _adam(rate, total_steps):
    if total_steps is not None:
        warmup = max(1, round(_WARMUP * total_steps))
        rate = keras.optimizers.schedules.CosineDecay(
            # The first step counts.
            rate / warmup,
            max(1, total_steps - warmup),
            warmup_target=rate,
            warmup_steps=warmup,
        )
    return keras.optimizers.Adam(rate)


def _scaled(optimizer, factor):
    """Returns one like it, whose rates are `factor` times as high."""
    config = optimizer.get_config()
    rate = config["learning_rate"]
    if isinstance(rate, dict):
        # While a file is loaded, Keras makes what has one id once.
        rate.pop("shared_object_id", None)
        for name in ("initial_learning_rate", "warmup_target"):
            rate["config"][name] *= factor
    else:
        config["learning_rate"] = rate * factor
    # Variables of two optimizers must not have one path (`get_state_tree`).
    config["name"] = f"{config['name']}_{factor:g}"
    made = type(optimizer).from_config(config)
    _keras.copy_exclusions(optimizer, made)
    _keras.mix_in(_Scaled, made)
    made.rate_factor = factor
    return made


class _Scaled:
    """Before a Keras optimizer class: trains at a multiple of its rate.

    Callbacks such as `LearningRateScheduler` give one rate to all optimizers.
    All else, and files, have the rate with which it trains.
    """

    rate_factor = 1.0

    @property
    def learning_rate(self):
        return super().learning_rate / self.rate_factor

    @learning_rate.setter
    def learning_rate(self, value):
        if callable(value):
            raise ValueError(
                "`learning_rate` of an optimizer that `vera_optimizer` made "
                f"must be a number. Received: {value!r}. Give "
                "`vera_optimizer` an optimizer with this schedule."
            )
        keras.optimizers.Optimizer.learning_rate.fset(
            self, value * self.rate_factor
        )

    def _backend_update_step(self, grads, variables, learning_rate):
        del learning_rate  # The one that is shown.
        rate = self._get_current_learning_rate()
        super()._backend_update_step(grads, variables, rate)
