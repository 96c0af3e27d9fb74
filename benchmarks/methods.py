"""Ways to adapt the frozen matrices of a model, for `benchmarks/evidence.py`.

VeRA is the package's own. What it is compared with, and what might be added to
it, is here as functions from a frozen matrix `W` and some numbers that train
to the matrix that the layer then has, with which any of them is a few lines:

    LoRA            W + U V
    groups          W + (A d_g) B_g * b, a row of d for each group of columns
    output scale    s * W + (A d) B * b, with s from 1
"""

import dataclasses
import re

import keras
import numpy as np
from keras import ops

import keras_vera
from keras_vera import optimizers
from keras_vera.layers._rates import base_size

RATE_OF_SCALE = 0.05  # Of that of the vectors.


class Reparametrized(keras.Model):
    """A model some of whose matrices are functions of numbers that train.

    Args:
        model: Keras model, whose backbone is frozen.
        adapters: List of `Adapter`.
    """

    def __init__(self, model, adapters):
        super().__init__()
        self.model, self.adapters = model, adapters
        for number, adapter in enumerate(adapters):
            # Optimizers go by paths.
            adapter.make_weights(
                lambda *args, name, number=number, **options: self.add_weight(
                    *args, name=f"{name}_{number}", **options
                )
            )
        self.built = True

    def call(self, x, training=None):
        values = {id(v): (v, v.value) for v in self.model.variables}
        for adapter in self.adapters:
            values[id(adapter.kernel)] = adapter.kernel, adapter.value()
        with keras.StatelessScope(values.values()) as scope:
            y = self.model(x, training=training)
        # Seeds of dropout.
        for variable in self.model.non_trainable_variables:
            value = scope.get_current_value(variable)
            if value is not values[id(variable)][1]:
                variable.assign(value)
        return y


@dataclasses.dataclass(eq=False)
class Adapter:
    """What one matrix becomes: W as a VeRA layer sees it, with its A and B."""

    kernel: keras.Variable
    contraction: object
    a: np.ndarray
    b_matrix: np.ndarray
    size: float  # Of the outputs of `x W`, as `vera_optimizer` takes it.

    def rate_factor(self, variable):
        return 1.0

    def make_weights(self, add_weight):
        raise NotImplementedError

    def matrix(self, w):
        raise NotImplementedError

    def value(self):
        w = self.contraction.kernel_matrix(ops.convert_to_tensor(self.kernel))
        return self.contraction.kernel_tensor(self.matrix(w))


class LoRA(Adapter):
    def make_weights(self, add_weight):
        m, n = self.contraction.m, self.contraction.n
        # As in PEFT, with alpha = rank: the sweep of rates is over any other.
        self.u = add_weight((m, self.rank), "he_uniform", name="adapter_u")
        self.v = add_weight((self.rank, n), "zeros", name="adapter_v")

    def matrix(self, w):
        return w + ops.matmul(self.u, self.v)


class Groups(Adapter):
    def make_weights(self, add_weight):
        shape = self.groups, len(self.b_matrix)
        start = keras.initializers.Constant(0.1)
        self.d = add_weight(shape, start, name="adapter_d")
        self.b = add_weight((self.contraction.n,), "zeros", name="adapter_b")
        # As weights: XLA takes minutes over constants of this size.
        for name in ("a", "b_matrix"):
            value = getattr(self, name)
            weight = add_weight(
                value.shape,
                lambda shape, dtype, value=value: ops.cast(value, dtype),
                trainable=False,
                name=name,
            )
            setattr(self, name, weight)

    def rate_factor(self, variable):
        return self.size if variable is self.b else 1.0

    def matrix(self, w):
        n = self.contraction.n
        group = np.arange(n) * self.groups // n
        # One product, with each column of B scaled by the d of its group.
        columns = ops.take(ops.transpose(self.d), group, axis=1)
        right = ops.multiply(columns, self.b_matrix) * self.b
        return w + ops.matmul(self.a, right)


class OutputScale(Groups):
    def make_weights(self, add_weight):
        super().make_weights(add_weight)
        self.s = add_weight((self.contraction.n,), "ones", name="adapter_s")

    def rate_factor(self, variable):
        if variable is self.s:
            return RATE_OF_SCALE
        return super().rate_factor(variable)

    def matrix(self, w):
        return super().matrix(w) + w * (self.s - 1)


def _number(pattern, text):
    found = re.fullmatch(pattern, text)
    return int(found[1]) if found else None


def apply(method, model, targets, seed):
    """Returns the model to train, with the variables that are the method's.

    Args:
        method: String: `"head"`, `"full"`, `"lora8"`, `"vera256"`, and, with
            these endings, `"vera256-blocks"`, `"vera256-groups8"`,
            `"vera256-scale"`, `"vera256-norm"`, `"vera256-bias"`.
        model: KerasHub task.
        targets: String, as for `keras_vera.enable_vera`.
        seed: Integer, of A and B.
    """
    name, _, dial = method.partition("-")
    head = {id(v) for v in model.trainable_variables}
    head -= {id(v) for v in model.backbone.variables}
    if name == "full":
        pass
    elif name == "head":
        model.backbone.trainable = False
    elif name.startswith("lora"):
        rank = _number(r"lora(\d+)", name)
        model = _reparametrized(LoRA, model, targets, 1, seed, rank=rank)
    else:
        rank = _number(r"vera(\d+)", name)
        groups = _number(r"groups(\d+)", dial)
        if groups is not None:
            model = _reparametrized(
                Groups, model, targets, rank, seed, groups=groups
            )
        elif dial == "scale":
            model = _reparametrized(
                OutputScale, model, targets, rank, seed, groups=1
            )
        else:
            keras_vera.enable_vera(
                model,
                rank,
                targets=targets,
                seed=seed,
                structure=dial if dial.startswith("blocks") else "dense",
                train=dial if dial in ("norm", "bias") else None,
            )
    own = [v for v in model.trainable_variables if id(v) not in head]
    return model, own


def _reparametrized(kind, model, targets, size, seed, **settings):
    """Returns a model with adapters of one kind, where VeRA would have them,
    each with an A and a B of rank `size`."""
    keras_vera.enable_vera(model, size, targets=targets, seed=seed)
    places = [
        (
            layer,
            layer._vera_layout,
            base_size(layer),
            *layer.projection_slices(),
        )
        for layer in model._flatten_layers()
        if hasattr(layer, "vera_lambda_d")
    ]
    keras_vera.disable_vera(model)
    model.backbone.trainable = False
    adapters = []
    for layer, layout, size_of_base, a, b_matrix in places:
        m = layout.contraction.m
        adapter = kind(
            layer._kernel,
            layout.contraction,
            ops.convert_to_numpy(a) * (2 / m) ** 0.5,
            ops.convert_to_numpy(b_matrix) * (2 / size) ** 0.5,
            size_of_base,
        )
        vars(adapter).update(settings)
        adapters.append(adapter)
    return Reparametrized(model, adapters)


def optimizer(method, model, own, rate, rest, total_steps):
    """Returns what trains the method's variables with `rate`.

    Every rate has the warm-up and the decay of `vera_optimizer`.
    """
    if method.startswith("vera") and not isinstance(model, Reparametrized):
        # Norms and biases train as the head does.
        return keras_vera.vera_optimizer(rate, rest, total_steps)
    if not own:
        return optimizers._adam(rate, total_steps)
    by_path = keras.optimizers.OptimizerMap(optimizers._adam(rest, total_steps))
    factors = {v.path: 1.0 for v in own}
    for adapter in getattr(model, "adapters", []):
        for v in vars(adapter).values():
            if isinstance(v, keras.Variable) and v.path in factors:
                factors[v.path] = adapter.rate_factor(v)
    for factor in sorted(set(factors.values())):
        paths = [re.escape(path) for path, x in factors.items() if x == factor]
        by_path["|".join(paths)] = optimizers._adam(rate * factor, total_steps)
    return keras.optimizers.MultiOptimizer(by_path)
