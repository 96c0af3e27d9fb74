import io
import math
import re
from collections.abc import Callable

import keras
import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16.
import numpy as np
import rich.box
import rich.console
import rich.table

from keras_vera import _keras
from keras_vera.files.saved import saved_variables
from keras_vera.layers._base_layer import kernel_shape
from keras_vera.layers._in_place import is_adapted
from keras_vera.model.adaptation import adaptations
from keras_vera.model.adaptation import adapted_layers
from keras_vera.model.adaptation import base_paths
from keras_vera.model.adaptation import check_adapted
from keras_vera.model.adaptation import check_layer
from keras_vera.model.roles import adaptable_layers
from keras_vera.product.projection import EXPLICIT

_LORA_RANK = 8


def summary(
    model: keras.Layer,
    line_length: int | None = None,
    expand_repeated: bool = False,
    print_fn: Callable[[str], object] | None = None,
) -> None:
    """Prints which layers of a model are adapted, and how many numbers train.

    Layers of equal kernel shape and rank, at equal places of repeated blocks,
    share a row: `layer{,_1.._11}/query` stands for `layer/query`,
    `layer_1/query`, and so on. Its numbers are those of all of them together.

    Args:
        model: An adapted model.
        line_length: Integer, characters of a line. Defaults to the width that
            the table needs.
        expand_repeated: Boolean, whether every layer gets a row of its own.
            Defaults to `False`.
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
    vectors, vectors_bytes = _size(
        _trained_of(model, [v for x in layers.values() for v in _vectors(x)])
    )
    in_base, outside = _others_that_train(model, layers)
    lora = sum(_lora_size(kernel_shape(x)) for x in layers.values())
    total, total_bytes = _size(model.weights)
    lines = [
        f"VeRA on '{model.name}': {len(layers)} adapted layers, "
        f"{_origin(layers.values())}",
        _table(layers, expand_repeated),
        f" Trained by VeRA: {vectors:,} ({_readable(vectors_bytes)})",
        *_line_of_trained("in full in the base", in_base),
        *_line_of_trained("outside the base", outside, always=True),
        _file_line(model, layers),
        f" LoRA of rank {_LORA_RANK} on these layers would train {lora:,} "
        f"({_readable(lora * 4)})",
        f" All weights: {total:,} ({_readable(total_bytes)})",
    ]
    others = _matrices_of_other_layers(model, layers)
    if others:
        rows = _rows(others, expand_repeated)
        shown = rows if expand_repeated else rows[:8]
        names = [f"{path} {shape}" for path, shape, _ in shown]
        lines.append(
            f" Frozen matrices of layers that VeRA cannot adapt: {len(others)} "
            f"({', '.join(names)}{', ...' if len(rows) > len(shown) else ''})"
        )
    text = io.StringIO()
    console = rich.console.Console(
        file=text, width=line_length or 160, highlight=False
    )
    for line in lines:
        console.print(line, markup=False)
    (print_fn or print)(text.getvalue().rstrip())


def _table(layers, expand_repeated):
    table = rich.table.Table(box=rich.box.SQUARE, show_lines=False)
    for title, justify in (
        ("Adapted layers", "left"),
        ("Layers", "right"),
        ("Kernel shape", "left"),
        ("Rank", "right"),
        ("Trained #", "right"),
        ("Bytes", "right"),
        (f"LoRA {_LORA_RANK} would train #", "right"),
    ):
        table.add_column(title, justify=justify, overflow="fold")
    rows = {
        path: (kernel_shape(layer), layer.vera_lambda_d.shape[0])
        for path, layer in layers.items()
    }
    for path, (shape, rank), paths in _rows(rows, expand_repeated):
        size, size_bytes = _size(v for p in paths for v in _vectors(layers[p]))
        table.add_row(
            path,
            str(len(paths)),
            str(shape),
            str(rank),
            f"{size:,}",
            f"{size_bytes:,}",
            f"{_lora_size(shape) * len(paths):,}",
        )
    return table


def _rows(things, expand_repeated):
    """Returns rows of a name for paths, what they share, and the paths.

    Args:
        things: Dict of what is shown of each path; must be equal in a row.
        expand_repeated: Boolean, whether each path gets a row.
    """
    # A part of a path is a stem and the endings that follow it.
    rows = [
        ([_stem_and_ending(part) for part in path.split("/")], thing, [path])
        for path, thing in things.items()
    ]
    longest = max((len(parts) for parts, _, _ in rows), default=0)
    for place in range(0 if expand_repeated else longest):
        merged = {}
        for parts, thing, paths in rows:
            if place < len(parts):
                stem, endings = parts[place]
                others = (*parts[:place], stem, *parts[place + 1 :])
            else:
                endings, others = (), tuple(parts)
            first = merged.setdefault((others, thing), ([], parts, []))
            first[0].extend(endings)
            first[2].extend(paths)
        rows = []
        for (_, thing), (endings, parts, paths) in merged.items():
            if place < len(parts):
                parts = list(parts)
                parts[place] = parts[place][0], tuple(endings)
            rows.append((parts, thing, paths))
    return [
        ("/".join(stem + _braces(endings) for stem, endings in parts), *rest)
        for parts, *rest in rows
    ]


def _stem_and_ending(part):
    stem, ending = re.fullmatch(r"(.*?)((?:_\d+)?)", part).groups()
    return stem, (ending,)


def _braces(endings):
    """Returns endings as a shell would expand them: `{,_1.._3}`."""
    if len(endings) == 1:
        return endings[0]
    runs = []
    for ending in sorted(endings, key=lambda x: int(x[1:] or -1)):
        follows = runs and runs[-1][-1] and ending
        if follows and int(ending[1:]) == int(runs[-1][-1][1:]) + 1:
            runs[-1].append(ending)
        else:
            runs.append([ending])
    names = [
        f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(run)
        for run in runs
    ]
    return "{" + ",".join(names) + "}"


def _origin(layers):
    """Says what the random matrices were made from."""
    projections = {id(x.projection): x.projection for x in layers}
    seeds = sorted({p.seed for p in projections.values() if p.seed is not None})
    if not seeds:
        return "random matrices of its own"
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _file_line(model, layers):
    """Says what `save_adapter` would write; see there."""
    if not model.trainable:
        return " Adapter file: none while `model.trainable` is False"
    projections = {id(x.projection): x.projection for x in layers.values()}
    pair = [
        v
        for p in projections.values()
        for v in (p.vera_kernel_a, p.vera_kernel_b)
    ]
    _, shared = _size(pair)
    paths = _keras.structural_paths(model)
    saved = [
        *saved_variables(paths).values(),
        *(x.bias for x in layers.values() if x.vera_base_bias is not None),
    ]
    carried = any(p.structure == EXPLICIT for p in projections.values())
    # Half floats are stored as float32.
    size = _size(saved)[1] + sum(
        math.prod(v.shape) * 2
        for v in saved
        if np.dtype(v.dtype).itemsize == 2 and "float" in v.dtype
    )
    size += shared if carried else 0
    return (
        f" Adapter file: {_readable(size)} and a header; the shared random "
        f"matrices ({_readable(shared)} in memory) are "
        f"{'in it' if carried else 'not saved'}"
    )


def _trained_of(model, variables):
    trained = {id(v) for v in model.trainable_variables}
    return [v for v in variables if id(v) in trained]


def _matrices_of_other_layers(model, layers):
    """Returns the shapes by path of what no target can name, such as the
    kernels of experts."""
    adaptation = getattr(next(iter(layers.values())), "vera_adaptation", None)
    if adaptation is None:
        return {}
    paths = base_paths(model, adaptation.bases)
    adaptable = adaptable_layers(paths)
    return {
        f"{path}/{name}": tuple(variable.shape)
        for path, layer in paths.items()
        if not (is_adapted(layer) or _can_adapt(path, adaptable))
        for name, variable in _keras.named_own_variables(layer)
        if id(variable) not in adaptation.trained.ids
        and sum(size > 1 for size in variable.shape) > 1
        and "float" in variable.dtype
        and not variable.trainable
    }


def _can_adapt(path, adaptable):
    try:
        if path in adaptable:
            check_layer(adaptable[path], path)
            return True
    except ValueError:
        pass  # An equation that holds many matrices, as of experts.
    return False


def _others_that_train(model, layers):
    """Returns what trains beside the vectors: in the base, and outside."""
    plans = adaptations(layers.values())
    ids = {id_ for plan in plans for id_ in plan.trained.trained}
    vectors = {id(v) for layer in layers.values() for v in _vectors(layer)}
    in_base = _trained_of(model, [v for v in model.variables if id(v) in ids])
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
    variables = list(variables)
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
