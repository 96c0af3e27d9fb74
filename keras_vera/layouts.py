"""Layouts for `keras.distribution.ModelParallel`, found by structure."""

import re

import keras

from keras_vera import _keras
from keras_vera._types import Ranks
from keras_vera._types import Targets
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._kinds import kind_of
from keras_vera.model.adaptation import base_paths
from keras_vera.model.adaptation import check_model
from keras_vera.model.adaptation import check_no_lora
from keras_vera.model.adaptation import find_bases
from keras_vera.model.roles import COLUMNS
from keras_vera.model.roles import cuts
from keras_vera.model.targets import resolve_targets
from keras_vera.product.checks import check_integer

_NUMBER = re.compile(r"_\d+$")


def layout_map(
    model: keras.Layer,
    mesh: keras.distribution.DeviceMesh,
    targets: Targets | Ranks = "attention-qv",
    exclude: Targets | None = None,
    axis: str = "model",
    kernels: keras.distribution.LayoutMap | None = None,
    capacity: int | None = None,
) -> keras.distribution.LayoutMap:
    """Returns the layouts of a model and of its adapters for model parallel.

    Kernels are cut as in Megatron: those of query, key and value, and those
    that widen in an MLP, by columns (whole heads, where the kernel has them);
    the output of attention, and what narrows again, by rows; embeddings by
    their vocabulary. So each pair needs one sum over the devices. What plays
    none of these roles is whole on every device, and so is what does not
    divide.

    Of the adapters, `A` is cut by rows, `B` by columns, and `b` as the outputs
    of its kernel. The axis of the rank is never cut: each device would compute
    a part of every sum over it.

    The names of repeated blocks, and the numbers that Keras puts behind names,
    may differ, so that `model` may be a small one of the same architecture,
    with fewer blocks of the same width, that fits one device. For a bank, it
    must be what the bank is made on: a task, not its backbone alone.

    Args:
        model: A built Keras or KerasHub model, not adapted.
        mesh: A `keras.distribution.DeviceMesh`.
        targets: As in `keras_vera.enable_vera`. Defaults to `"attention-qv"`.
        exclude: As in `keras_vera.enable_vera`. Defaults to `None`.
        axis: String, the axis of `mesh` that kernels are cut along. Defaults
            to `"model"`.
        kernels: A `keras.distribution.LayoutMap` for the model itself, such
            as `get_layout_map` of some KerasHub backbones gives; its layouts
            are taken instead. Defaults to `None`.
        capacity: Integer, the capacity of an `AdapterBank` on the model, whose
            adapters are cut by slots; `capacity + 1` must be a multiple of
            the devices along `axis`. Defaults to `None`: no bank, or one that
            is whole on every device.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: If an argument makes no sense, or a target matches nothing.

    Example:

    ```python
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(
        (1, len(devices)), ("batch", "model"), devices
    )
    small = keras_hub.models.LlamaBackbone(**{**config, "num_layers": 1})
    layouts = keras_vera.layout_map(small, mesh, targets="all-linear")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts)
    )
    model = keras_hub.models.LlamaCausalLM.from_preset("llama2_7b_en")
    keras_vera.enable_vera(model, targets="all-linear")
    ```

    Reference:

    - [Shoeybi et al., 2019](https://arxiv.org/abs/1909.08053), section 3
    """
    parts = _checked_parts(mesh, axis, kernels, capacity)
    check_model(model)
    check_no_lora(model, _keras.flatten_layers(model))
    paths = base_paths(model, find_bases(model))
    adapted = resolve_targets(targets, exclude, 1, paths)
    own = _of_model(model, paths, axis, parts, kernels)
    layouts = keras.distribution.LayoutMap(mesh)
    for key, axes in _of_pair(paths, adapted, axis, parts).items():
        layouts[key] = axes
    found = _of_vectors(paths, adapted, own)
    if kernels is None:
        found.update(own)
    else:
        for key in kernels:
            layouts[key] = kernels[key]
    if capacity is not None:
        for path in adapted:
            for name in ("vera_lambda_d", "vera_lambda_b"):
                found.setdefault(f"{path}/{name}", (axis, None))
    for key, axes in _by_pattern(found).items():
        layouts[key] = axes
    return layouts


def _of_model(model, paths, axis, parts, kernels):
    """Returns the axes of the variables of the model that are cut, by path."""
    found = {}
    if kernels is None:
        for path, cut in cuts(paths).items():
            found.update(_of_kernel(paths[path], cut, axis, parts))
        return found
    for variable in model.variables:
        layout = kernels[variable.path]
        if layout is not None:
            found[variable.path] = layout.axes
    return found


def _of_pair(paths, adapted, axis, parts):
    """Returns the axes of A and B, as large as the layers need them."""
    contractions = [_contraction(paths[path]) for path in adapted]
    m, n = max(x.m for x in contractions), max(x.n for x in contractions)
    found = {}
    if m % parts == 0:
        found["(.*/)?vera_projection/vera_kernel_a"] = (axis, None)
    if n % parts == 0:
        found["(.*/)?vera_projection/vera_kernel_b"] = (None, axis)
    return found


def _of_vectors(paths, adapted, own):
    """Returns the axes of each b that goes with the outputs of its kernel."""
    found = {}
    for layer in (paths[path] for path in adapted):
        axes = own.get(stored_kernel(layer).path)
        cut = _output_axis(_contraction(layer), axes)
        if cut is not None:
            found[f"{layer.path}/vera_lambda_b"] = (cut,)
    return found


def _contraction(layer):
    return kind_of(type(layer))._make_contraction(layer)


def _of_kernel(layer, cut, axis, parts):
    """Yields the path and the axes of each variable of a layer that is cut."""
    kernel = stored_kernel(layer)
    contraction = _contraction(layer)
    inputs, outputs = contraction.kernel_axes
    where = (outputs if cut == COLUMNS else inputs)[0]
    if kernel.shape[where] % parts:
        return
    yield kernel.path, _axes_with(axis, where, len(kernel.shape))
    for variable in _keras.own_variables(layer):
        if variable is kernel:
            continue
        shape = tuple(variable.shape)
        if cut == COLUMNS and shape == contraction.output_dims:
            # A bias, of which each device needs that of its columns.
            yield variable.path, _axes_with(axis, 0, len(shape))
        if contraction.one_hot and shape == tuple(kernel.shape)[::-1]:
            # The other table of a `ReversibleEmbedding` that is not tied.
            yield variable.path, _axes_with(axis, 1, 2)


def _output_axis(contraction, axes):
    """Returns by what the outputs of a kernel are cut, as one vector, or
    `None`."""
    inputs, outputs = contraction.kernel_axes
    if axes is None or len(axes) != len(inputs) + len(outputs):
        return None
    first, *rest = (axes[where] for where in outputs)
    return first if not any(rest) else None


def _axes_with(axis, where, ndim):
    return tuple(axis if i == where else None for i in range(ndim))


def _by_pattern(layouts):
    """Returns layouts by regular expressions that know no numbers.

    Where paths that differ in numbers alone differ in layouts, they are
    matched with all numbers but that of the model.
    """
    by_pattern = {}
    for path, axes in layouts.items():
        by_pattern.setdefault(_pattern(path), []).append((path, axes))
    found = {}
    for pattern, members in by_pattern.items():
        if len({axes for _, axes in members}) == 1:
            found[pattern] = members[0][1]
            continue
        for path, axes in members:
            first, *rest = path.split("/")
            found["/".join([_pattern(first), *map(re.escape, rest)])] = axes
    return found


def _pattern(path):
    parts = [_NUMBER.sub("", part) for part in path.split("/")]
    return "/".join(rf"{re.escape(part)}(_\d+)?" for part in parts)


def _checked_parts(mesh, axis, kernels, capacity):
    """Returns the number of devices along `axis`."""
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "`mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: mesh={mesh!r} (of type {type(mesh).__name__})"
        )
    if axis not in mesh.axis_names:
        raise ValueError(
            f"`axis` must be one of the axes of `mesh`, {mesh.axis_names}. "
            f"Received: axis={axis!r}"
        )
    parts = dict(zip(mesh.axis_names, mesh.shape))[axis]
    if kernels is not None and not isinstance(
        kernels, keras.distribution.LayoutMap
    ):
        raise ValueError(
            "`kernels` must be a `keras.distribution.LayoutMap` or `None`. "
            f"Received: kernels={kernels!r}"
        )
    if capacity is not None:
        check_integer("capacity", capacity, 1)
        if (capacity + 1) % parts:
            raise ValueError(
                f"`capacity + 1` must be a multiple of {parts}, the devices "
                f"along {axis!r}, since slot 0 of a bank is the base model. "
                f"Received: capacity={capacity}. Take "
                f"{-(-(capacity + 1) // parts) * parts - 1}."
            )
    return parts
