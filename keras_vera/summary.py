import io
import math

import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16.
import numpy as np
import rich.box
import rich.console
import rich.table

from keras_vera import _keras
from keras_vera._adaptation import adaptations
from keras_vera._adaptation import adapted_layers
from keras_vera._adaptation import base_paths
from keras_vera._adaptation import check_adapted
from keras_vera.layers._base_layer import kernel_shape
from keras_vera.layers._kinds import kind_of

_LORA_RANK = 8


def summary(model, line_length=None, print_fn=None):
    """Prints which layers of a model are adapted, and how many numbers train.

    Args:
        model: An adapted model.
        line_length: Integer, characters of a line. Defaults to the width that
            the table needs.
        print_fn: Function that takes the table as one string. Defaults to
            printing on the standard output.

    Raises:
        ValueError: If the model is not adapted.

    Example:

    ```python
    keras_vera.enable_vera(model, rank=64)
    keras_vera.summary(model)
    ```
    """
    check_adapted(model)
    layers = adapted_layers(model)
    table = rich.table.Table(box=rich.box.SQUARE, show_lines=False)
    for title, justify in (
        ("Adapted layer", "left"),
        ("Kernel shape", "left"),
        ("Rank", "right"),
        ("Trained #", "right"),
        ("Bytes", "right"),
        (f"LoRA {_LORA_RANK} would train #", "right"),
    ):
        table.add_column(title, justify=justify, overflow="fold")
    vectors = lora = 0
    for path, layer in layers.items():
        own, own_bytes = _size(_vectors(layer))
        own_lora = _lora_size(kernel_shape(layer))
        vectors += own
        lora += own_lora
        table.add_row(
            path,
            str(kernel_shape(layer)),
            str(layer.vera_lambda_d.shape[0]),
            f"{own:,}",
            f"{own_bytes:,}",
            f"{own_lora:,}",
        )
    in_base, outside = _others_that_train(model, layers)
    trained_bytes = vectors * 4 + _size(in_base + outside)[1]
    total, total_bytes = _size(model.weights)
    projection = next(iter(layers.values()))
    _, shared = _size([projection.vera_kernel_a, projection.vera_kernel_b])
    lines = [
        f"VeRA on '{model.name}': {len(layers)} adapted layers, "
        f"seed {projection.projection.seed}",
        table,
        f" Trained by VeRA: {vectors:,} ({_readable(vectors * 4)})",
        *_line_of_trained("in full in the base", in_base),
        *_line_of_trained("outside the base", outside, always=True),
        f" Adapter file: {_readable(trained_bytes)} and a header; the shared "
        f"random matrices ({_readable(shared)} in memory) are not saved",
        f" LoRA of rank {_LORA_RANK} on these layers would train {lora:,} "
        f"({_readable(lora * 4)})",
        f" All weights: {total:,} ({_readable(total_bytes)})",
    ]
    others = _matrices_of_other_layers(model, layers)
    if others:
        lines.append(
            f" Frozen matrices of layers that VeRA cannot adapt: {len(others)} "
            f"({', '.join(others[:8])}{', ...' if len(others) > 8 else ''})"
        )
    console = rich.console.Console(
        file=io.StringIO(), width=line_length or 160, highlight=False
    )
    for line in lines:
        console.print(line, markup=False)
    (print_fn or print)(console.file.getvalue().rstrip())


def _matrices_of_other_layers(model, layers):
    """Returns what no target can name, such as the kernels of experts."""
    adaptation = getattr(next(iter(layers.values())), "vera_adaptation", None)
    if adaptation is None:
        return []
    return [
        f"{path}/{variable.name} {tuple(variable.shape)}"
        for path, layer in base_paths(model, adaptation.bases).items()
        if kind_of(type(layer)) is None
        for variable in _keras.own_variables(layer)
        if id(variable) not in adaptation.trained.ids
        and sum(size > 1 for size in variable.shape) > 1
        and "float" in variable.dtype
    ]


def _others_that_train(model, layers):
    """Returns what trains beside the vectors: in the base, and outside."""
    plans = adaptations(layers.values())
    ids = {id_ for plan in plans for id_ in plan.trained.trained}
    vectors = {id(v) for layer in layers.values() for v in _vectors(layer)}
    in_base = [v for v in model.variables if id(v) in ids]
    outside = [
        v
        for v in model.trainable_variables
        if id(v) not in vectors and id(v) not in ids
    ]
    return in_base, outside


def _line_of_trained(where, variables, always=False):
    size, in_bytes = _size(variables)
    if size or always:
        yield f" Trained {where}: {size:,} ({_readable(in_bytes)})"


def _vectors(layer):
    return [layer.vera_lambda_d, layer.vera_lambda_b]


def _size(variables):
    """Returns the numbers in `variables` and their bytes."""
    sizes = [math.prod(v.shape) for v in variables]
    widths = [np.dtype(v.dtype).itemsize for v in variables]
    return sum(sizes), sum(s * w for s, w in zip(sizes, widths))


def _lora_size(kernel_shape):
    """Numbers in the two matrices that Keras' LoRA gives a kernel."""
    *first, last = kernel_shape
    return (math.prod(first) + last) * _LORA_RANK


def _readable(size):
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            break
        size /= 1000
    else:
        unit = "GB"
    return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
