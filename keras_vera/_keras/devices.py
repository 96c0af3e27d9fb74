"""Where variables are, of several devices."""

import contextlib
from types import SimpleNamespace

import keras

_BACKEND = keras.backend.backend()


def strategy_of(layer):
    """Returns the `tf.distribute` strategy that made a layer, or `None`."""
    if _BACKEND != "tensorflow" or not layer.variables:
        return None
    variable = layer.variables[0].value
    strategy = getattr(variable, "distribute_strategy", None)
    # What TensorFlow has where there is no strategy is one as well.
    is_default = type(strategy).__name__ == "_DefaultDistributionStrategy"
    return None if is_default else strategy


def strategy_scope(layer):
    """Makes variables where those of `layer` are.

    TensorFlow demands it. On JAX, whoever has left the scope of a distribution
    gets variables on one device alone, which no compiled function takes beside
    those of the layer: they are made on all of its devices, as a whole.
    """
    strategy = strategy_of(layer)
    if strategy is not None:
        return strategy.scope()
    if _BACKEND == "jax" and keras.distribution.distribution() is None:
        devices = _several_devices_of(layer)
        if devices:
            return keras.distribution.DataParallel(devices=devices).scope()
    return contextlib.nullcontext()


def is_in_other_strategy(layer):
    """Says whether a distribution is active that did not make this layer."""
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        active, own = tf.distribute.get_strategy(), strategy_of(layer)
        if isinstance(active, tf.distribute.OneDeviceStrategy) and own is None:
            return False  # Its variables do not know it.
        return tf.distribute.has_strategy() and active is not own
    if _BACKEND != "jax" or keras.distribution.distribution() is None:
        return False
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    here = set(mesh.devices.flat)
    return any(value.sharding.device_set != here for value in _arrays_of(layer))


def check_made_here(variable, owner):
    """Raises for a variable that is older than the distribution it is used in.

    That is in compiled functions, which take no variables of one device there.
    Relies on `_layout`, which Keras sets where a distribution is active.
    """
    if _BACKEND != "jax" or variable._layout is not None:
        return
    distribution = keras.distribution.distribution()
    if (
        distribution is not None
        and distribution.device_mesh.devices.size > 1
        and is_tracing_jax()
    ):
        raise ValueError(
            f"Layer '{owner.name}' is used with the distribution "
            f"{distribution!r}, but was made and adapted without it, on one "
            "device. Call `keras.distribution.set_distribution(...)` first, "
            "or make the model, call `enable_vera` and train in "
            "`with distribution.scope():`."
        )


def is_tracing_jax():
    """Says whether JAX is tracing a function just now."""
    if _BACKEND != "jax":
        return False
    # `jax.core` has no name for it.
    from jax._src.core import trace_state_clean

    return not trace_state_clean()


def check_layout(path, shape):
    """Raises if a variable cannot have the layout that a `LayoutMap` says.

    Args:
        path: String, the path of a variable that is to be made.
        shape: Tuple of integers.
    """
    distribution = keras.distribution.distribution()
    if _BACKEND == "jax" and distribution is not None:
        stand_in = SimpleNamespace(path=path, shape=shape, _layout=None)
        _check_layout(path, shape, distribution.get_variable_layout(stand_in))


def _check_layout(path, shape, layout):
    # A layout of JAX itself has no axes by name.
    axes = getattr(layout, "axes", ())
    sizes = {}
    if layout is not None and getattr(layout, "device_mesh", None) is not None:
        mesh = layout.device_mesh
        sizes = dict(zip(mesh.axis_names, mesh.shape))
    problem = None
    if len(axes) > len(shape):
        problem = f"has {len(axes)} axes, but the variable has {len(shape)}"
    else:
        for size, axis in zip(shape, axes):
            parts = sizes.get(axis, 1)
            if size % parts:
                problem = (
                    f"cuts {size} numbers into {parts} parts, which does not "
                    "divide"
                )
    if problem is not None:
        raise ValueError(
            f"The layout of '{path}' in the `LayoutMap` {problem}. Received: "
            f"{tuple(axes)} for a variable of shape {tuple(shape)}, on a mesh "
            f"of {sizes}. Name an axis of the mesh, or `None`, for each axis "
            "of the variable; `keras_vera.layout_map` makes layouts that fit."
        )


class VariableOfParts(keras.Variable):
    """A variable whose initializer can make any part of it alone.

    Its initializer is called as others are, or has its method `part` called
    with a tuple of slices, one for each axis, and returns a NumPy array. On
    JAX, where a distribution shards the variable, no more of it is made in a
    process than its devices hold, one part after the other. (Keras would
    compile the initializer, with all numbers in the program.)

    Relies on `_initialize_layout` and `_initialize_with_initializer`.
    """

    def _initialize_with_initializer(self, initializer):
        if _BACKEND == "jax":
            self._initialize_layout()
            if self._layout is not None:
                _check_layout(self.path, self._shape, self._layout)
                layout = getattr(self._layout, "backend_layout", self._layout)
                self._value = _array_of_parts(
                    initializer.part, self._shape, self._dtype, layout
                )
                return
        super()._initialize_with_initializer(initializer)


def placed(variable, value):
    """Returns a whole value, such as an array, where a variable has its own.

    No process has to wait for others.
    """
    layout = getattr(variable, "_layout", None)
    if _BACKEND != "jax" or layout is None:
        return value
    layout = getattr(layout, "backend_layout", layout)
    return _array_of_parts(
        lambda index: value[index], value.shape, value.dtype, layout
    )


def _array_of_parts(part, shape, dtype, sharding):
    import jax

    devices_of = {}
    where = sharding.addressable_devices_indices_map(tuple(shape))
    for device, index in where.items():
        bounds = tuple(
            axis.indices(size)[:2] for axis, size in zip(index, shape)
        )
        devices_of.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in devices_of.items():
        array = part(tuple(slice(*ends) for ends in bounds)).astype(dtype)
        arrays += [jax.device_put(array, device) for device in devices]
    return jax.make_array_from_single_device_arrays(
        tuple(shape), sharding, arrays
    )


def cut_as(matrix, variable, axes):
    """Returns a matrix that is cut over the devices as a variable is.

    In compiled functions of JAX, where the variable was made in a distribution.
    XLA would else decide by where the matrix comes from: it would cut the
    inputs of a layer as their columns of A are, send them whole again for the
    kernel, and do so in each layer.

    Relies on `_layout`, which Keras sets where a distribution is active.

    Args:
        matrix: Tensor.
        variable: A `keras.Variable`.
        axes: For each axis of `matrix`, a tuple of the axes of `variable` that
            it is made of, in their order; none, where it is not to be cut.
    """
    if _BACKEND != "jax" or not is_tracing_jax():
        return matrix
    from jax.lax import with_sharding_constraint
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec

    layout = variable._layout
    layout = getattr(layout, "backend_layout", layout)
    if not isinstance(layout, NamedSharding):
        return matrix
    spec = dict(enumerate(layout.spec))
    cuts = [[spec.get(axis) for axis in own] for own in axes]
    # Of several axes, a cut of the first alone is one of the whole.
    spec = [own[0] if own and not any(own[1:]) else None for own in cuts]
    return with_sharding_constraint(
        matrix, NamedSharding(layout.mesh, PartitionSpec(*spec))
    )


def summed_over_rows(function, *matrices):
    """Calls a function that is a sum over the rows of its arguments.

    Where `keras.distribution` cuts the examples, each device computes it of its
    own rows, and what is sent are the results: XLA would sum over the devices
    as soon as a product sums over rows, however large that product is.

    Args:
        function: Takes matrices of as many rows, whatever that number is, and
            returns a tuple of tensors. It must be additive.
        matrices: Tensors with as many rows, example by example.
    """
    distribution = keras.distribution.distribution()
    if _BACKEND != "jax" or distribution is None or not is_tracing_jax():
        return function(*matrices)
    mesh, axis = distribution.device_mesh, distribution.batch_dim_name
    parts = dict(zip(mesh.axis_names, mesh.shape))[axis]
    if parts == 1 or any(x.shape[0] % parts for x in matrices):
        return function(*matrices)
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec

    def by_device(x):
        free = [PartitionSpec.UNCONSTRAINED] * x.ndim
        where = NamedSharding(mesh.backend_mesh, PartitionSpec(axis, *free))
        x = x.reshape(parts, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, where)

    matrices = [by_device(x) for x in matrices]
    return tuple(x.sum(axis=0) for x in jax.vmap(function)(*matrices))


def _several_devices_of(layer):
    """Returns the devices of the first sharded variable, in their order."""
    from jax.sharding import NamedSharding

    for value in _arrays_of(layer):
        sharding = value.sharding
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
            return list(sharding.mesh.devices.flat)
    return None


def _arrays_of(layer):
    # In a step of Keras' trainer, variables have no values.
    values = [variable._value for variable in layer.variables]
    return [x for x in values if hasattr(x, "sharding")]


@contextlib.contextmanager
def on_one_device():
    """Makes variables on one device, whatever distribution is active."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def batch_divisor():
    """Returns what divides the examples of a batch in this process.

    `keras.distribution` cuts a batch into as many parts; TensorFlow and
    PyTorch take parts of different sizes.
    """
    distribution = keras.distribution.distribution()
    if _BACKEND != "jax" or distribution is None:
        return 1
    mesh = distribution.device_mesh
    parts = dict(zip(mesh.axis_names, mesh.shape))[distribution.batch_dim_name]
    return max(1, parts // distribution.num_processes)
