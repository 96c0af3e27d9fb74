"""The updates of VeRA layers as the two matrices of LoRA.

VeRA of rank r adds `(A * d) (B * b)` to a kernel, so it is LoRA of rank r. The
best approximation of a lower rank is the truncated singular value
decomposition of that product. It is found from the factors: with the QR
decompositions `L = Q R` and `U^T = P S`, `L U = Q (R S^T) P^T`, and only the
small core in the middle is decomposed.
"""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera.layers import _base_scope
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._in_place import is_adapted
from keras_vera.model.enable import base_model
from keras_vera.peft.load import contraction_of
from keras_vera.product.checks import check_finite
from keras_vera.product.checks import check_integer


def check_as_lora(as_lora, batch):
    if not isinstance(as_lora, bool):
        try:
            check_integer("as_lora", as_lora, 1)
        except ValueError:
            raise ValueError(
                "`as_lora` must be `True` (LoRA of the adapter's own rank), "
                "the rank of LoRA, a positive integer, or `False` (VeRA). "
                f"Received: as_lora={as_lora!r}"
            ) from None
    if batch is not None and as_lora is False:
        raise ValueError(
            "`batch` is what the error of LoRA is measured on. Received: "
            "batch without as_lora; VeRA is saved exactly."
        )


def module_factors(layers):
    """Returns the update of a module, `L U`, exactly.

    Args:
        layers: List of the layers that the outputs of the module belong to,
            in their order. Those that are not adapted have no update.

    Returns:
        Float64 arrays of shapes `(m, r)` and `(r, n)`.
    """
    if len(layers) == 1:
        a, d, b_matrix = _layer_factors(layers[0])
        return a * d, b_matrix
    found = {id(x): _layer_factors(x) for x in layers if is_adapted(x)}
    every_a = [a for a, _, _ in found.values()]
    down = max(every_a, key=lambda a: a.shape[1])
    # All layers of a module share A, and so its rank, unless they cut
    # different channels out of blocks.
    is_shared = all(np.array_equal(a, down[:, : a.shape[1]]) for a in every_a)
    if not is_shared:
        down = np.concatenate(every_a, axis=1)
    columns, channel = [], 0
    for layer in layers:
        part = np.zeros((down.shape[1], contraction_of(layer).n))
        if is_adapted(layer):
            _, d, b_matrix = found[id(layer)]
            part[channel : channel + len(d)] = d[:, None] * b_matrix
            channel += 0 if is_shared else len(d)
        columns.append(part)
    return down, np.concatenate(columns, axis=1)


def _layer_factors(layer):
    """Returns A, d and `B * b` of a layer; the Kaiming factors are in d."""
    structure = layer._vera_layout.structure
    factor_a, factor_b = structure.factors
    a, b_matrix, d, b = (
        _keras.to_numpy(x).astype("float64")
        for x in (
            *structure.as_matrices(*layer.projection_slices()),
            layer.vera_lambda_d,
            layer.vera_lambda_b,
        )
    )
    for vector, values in (("vera_lambda_d", d), ("vera_lambda_b", b)):
        check_finite(f"{layer.path}/{vector}", values)
    return a, d * (factor_a * factor_b), b_matrix * b


def split(factors, parts):
    """Gives parts of layers factors of their own, as PEFT has them.

    Args:
        factors: Dict of the factors L and U of updates, by module.
        parts: Dict of tuples, the paths of parts by module; they share the
            outputs of the module equally.
    """
    found = {}
    for module, (down, up) in factors.items():
        names = parts.get(module, (module,))
        for name, own in zip(names, np.split(up, len(names), axis=1)):
            # An adapter from PEFT may have channels for other parts alone.
            kept = own.any(axis=1) | (len(names) == 1)
            kept[0] |= not kept.any()
            found[name] = down[:, kept], own[kept]
    return found


def joined(factors, parts):
    """Returns factors of whole modules from those of their parts."""
    factors = dict(factors)
    for module, names in parts.items():
        if names[0] not in factors:
            continue
        downs, ups = zip(*(factors.pop(name) for name in names))
        ranks = np.cumsum([0, *map(len, ups)])
        ends = np.cumsum([0, *(up.shape[1] for up in ups)])
        up = np.zeros((ranks[-1], ends[-1]))
        for i, own in enumerate(ups):
            up[ranks[i] : ranks[i + 1], ends[i] : ends[i + 1]] = own
        factors[module] = np.concatenate(downs, axis=1), up
    return factors


def truncated(factors, rank):
    """Returns the best approximation of updates of a lower rank.

    Args:
        factors: Dict of the factors L and U of updates, by module; float64
            arrays of shapes `(m, r)` and `(r, n)`.
        rank: Positive integer, or `True`, the rank that they have.

    Returns:
        A dict like `factors`, and a dict of the shares of the squared norms
        that these lack.
    """
    found = {
        module: _truncated(*pair, rank)
        if rank is not True and rank < pair[0].shape[1]
        else (pair, 0.0)
        for module, pair in factors.items()
    }
    pairs, lost = zip(*found.values())
    return dict(zip(found, pairs)), dict(zip(found, lost))


def _truncated(down, up, rank):
    q, r = np.linalg.qr(down)
    p, s = np.linalg.qr(up.T)
    left, sizes, right = np.linalg.svd(r @ s.T)
    squares = sizes**2
    lost = float(squares[rank:].sum() / (squares.sum() or 1.0))
    # Each factor takes half of the size.
    sizes = np.sqrt(sizes[:rank])
    k = len(sizes)
    return (q @ (left[:, :k] * sizes), (sizes[:, None] * right[:k]) @ p.T), lost


def output_errors(model, batch, modules, exact, others):
    """Returns how far the outputs go where layers have other updates.

    Args:
        model: The adapted model, whose base is not quantized.
        batch: Inputs of `model`.
        modules: Dict of lists of layers by module.
        exact: Dict of the factors of updates by module.
        others: Dict like `exact`, of the other updates.

    Returns:
        The largest difference that the others make to an output, and the
        largest that the adapter makes.
    """
    outputs = _outputs(model, batch)
    with _base_scope.resumed(), base_model(model):
        without = _outputs(model, batch)
    with other_updates(modules, exact, others):
        changed = _outputs(model, batch)
    return _largest(changed, outputs), _largest(without, outputs)


@contextlib.contextmanager
def other_updates(modules, exact, others):
    """Gives layers other updates for a moment; see `output_errors`."""
    kept = []
    try:
        for module, layers in modules.items():
            start = 0
            for layer in layers:
                contraction = contraction_of(layer)
                columns = slice(start, start + contraction.n)
                start += contraction.n
                if not is_adapted(layer):
                    continue
                more, less = (
                    down @ up[:, columns]
                    for down, up in (others[module], exact[module])
                )
                kernel = stored_kernel(layer)
                kept.append((kernel, _keras.to_numpy(kernel).copy()))
                # With the adapter it is the base with the other update.
                change = (more - less).astype("float32")
                kernel.assign(
                    ops.cast(kernel, "float32")
                    + contraction.kernel_tensor(ops.convert_to_tensor(change))
                )
        yield
    finally:
        for kernel, values in kept:
            kernel.assign(values)


def _outputs(model, batch):
    outputs = keras.tree.flatten(model(batch, training=False))
    return [np.array(_keras.to_numpy(ops.cast(x, "float32"))) for x in outputs]


def _largest(outputs, others):
    return max(float(np.abs(x - y).max()) for x, y in zip(outputs, others))
