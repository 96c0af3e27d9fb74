"""What the entries of a combination of adapters are, by `combine`.

With weights w_i, the sum of the updates of a layer, `f * (A * d_i) (B * b_i)`,
is `f * A (B * P)` with the products `P = sum_i w_i d_i b_i^T`: [r, n]. If P has
rank 1, one d and b give it.
"""

import math

import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera.files.format import AdapterFileError
from keras_vera.layers._contraction import Contraction
from keras_vera.product.checks import check_finite
from keras_vera.product.projection import EXPLICIT
from keras_vera.product.projection import SharedProjection
from keras_vera.product.projection import pair_sha256

_VECTORS = ("vera_lambda_d", "vera_lambda_b")
_MATRICES = ("vera_kernel_a", "vera_kernel_b")
# The share of a squared norm that is rounding of float32.
_ROUNDING = 1e-13


def combined(header, tensors, weights, method, head, matrices=None):
    """Returns header and entries of a combination, and what is lost.

    Args:
        header: Dict, what the adapters have in common.
        tensors: Dict of dicts of arrays, the entries of each adapter by name.
        weights: Dict of floats by name of adapter.
        method, head: As in `combine`.
        matrices: The pair A and B, where it is explicit and not in `tensors`.
    """
    tensors = {x: dict(entries) for x, entries in tensors.items()}
    if header["structure"] == EXPLICIT and matrices is None:
        both = [[x.pop(name) for name in _MATRICES] for x in tensors.values()]
        matrices = both[0]
    w = np.array([weights[x] for x in tensors])
    ds, bs = (
        {
            path: np.stack(
                [x.pop(_entry_name(path, vector)) for x in tensors.values()]
            ).astype("float64")
            for path in header["layers"]
        }
        for vector in _VECTORS
    )
    result = _combined_others(header, tensors, weights, head)
    pair = _Pair(header, ds, bs, matrices)
    products, vectors, lost = {}, {}, {}
    for path in header["layers"]:
        d, b = ds[path], bs[path]
        products[path] = np.einsum("i,ik,ij->kj", w, d, b)
        mean = method == "average"
        vectors[path] = (w @ d, w @ b) if mean else _nearest(w, d, b)
        lost[path] = pair.distance(path, products[path], *vectors[path])
    if method == "exact":
        if max(lost.values()) > _ROUNDING:
            header, matrices = pair.with_sums(products)
            vectors = {
                path: (np.ones(header["rank"]), np.ones(product.shape[1]))
                for path, product in products.items()
            }
        lost = dict.fromkeys(lost, 0.0)
    for path, both in vectors.items():
        for vector, values in zip(_VECTORS, both):
            result[_entry_name(path, vector)] = values.astype("float32")
    for name, array in result.items():
        check_finite(name, array)
    if matrices is not None:
        result.update(zip(_MATRICES, matrices))
    result = {k: np.ascontiguousarray(v) for k, v in result.items()}
    return header, result, lost


class _Pair:
    """A and B of each layer of some adapters, as files say how to make them.

    Args:
        header: Dict, what the adapters have in common.
        ds, bs: Dicts by layer of the vectors of all adapters.
        matrices: A and B, or `None` if a seed makes them.
    """

    def __init__(self, header, ds, bs, matrices):
        self._header = header
        self._sizes = {}
        for path, layer in header["layers"].items():
            n, size = bs[path].shape[1], math.prod(layer["kernel_shape"])
            if size % n:
                raise AdapterFileError(
                    f"The adapters are damaged: a kernel of shape "
                    f"{layer['kernel_shape']}, of '{path}', has no {n} outputs."
                )
            self._sizes[path] = size // n, n, ds[path].shape[1]
        if matrices is None:
            rows, columns, _ = map(max, zip(*self._sizes.values()))
            projection = SharedProjection(
                *(header[name] for name in ("seed", "rank", "structure"))
            )
            # Whatever distribution a model has: files are of one process.
            with _keras.on_one_device():
                projection.reserve(rows, columns)
        else:
            with _keras.on_one_device():
                projection = SharedProjection.from_matrices(*matrices)
        self._projection = projection
        self._grams = {}

    def distance(self, path, product, d, b):
        """Returns the share of the squared norm of an update that is lost.

        Args:
            path: String, a layer.
            product: Array of shape `(r, n)`, what stands for the products of
                d and b in the update.
            d, b: Arrays of shapes `(r,)` and `(n,)`.
        """
        a, b_matrix, _ = self._of(path)
        key = a.shape
        if key not in self._grams:
            self._grams[key] = a.T @ a

        def square(product):
            # The squared norm of `A C` is that of C, weighted by A^T A.
            columns = b_matrix * product
            return float(np.sum(columns * (self._grams[key] @ columns)))

        lost = square(product - np.outer(d, b))
        return max(lost, 0.0) / (square(product) or 1.0)

    def with_sums(self, products):
        """Returns a header and a pair for which all vectors are 1.

        A is that of the adapters, and each layer has columns of its own in B.
        With blocks, A depends on the inputs and the rank of a layer, and
        those that differ have channels of their own.
        """
        self._check_embeddings_known()
        by_layer = self._projection.blocks > 1
        keys = {
            path: (m, rank) if by_layer else None
            for path, (m, _, rank) in self._sizes.items()
        }
        parts = {
            key: self._of(path)[0]
            if by_layer
            else ops.convert_to_numpy(self._projection.vera_kernel_a)
            for path, key in keys.items()
        }
        widths = [part.shape[1] for part in parts.values()]
        starts = dict(zip(parts, np.cumsum([0, *widths])))
        width = sum(widths)
        a = np.zeros((max(map(len, parts.values())), width))
        for key, part in parts.items():
            start = starts[key]
            a[: len(part), start : start + part.shape[1]] = part
        columns, layers, offset = [], {}, 0
        for path, product in products.items():
            _, b_matrix, factor = self._of(path)
            rank, n = product.shape
            start = starts[keys[path]]
            own = np.zeros((width, n), "float32")
            own[start : start + rank] = factor * b_matrix * product
            columns.append(own)
            layer = self._header["layers"][path]
            layers[path] = {**layer, "output_offset": offset}
            offset += n
        pair = a.astype("float32"), np.concatenate(columns, axis=1)
        check_finite("vera_kernel_b", pair[1])
        return {
            **self._header,
            "rank": width,
            "seed": None,
            "structure": EXPLICIT,
            "projection_sha256": pair_sha256(*pair),
            "layers": layers,
        }, pair

    def _of(self, path):
        """Returns A, B and the Kaiming factors of a layer: a number."""
        m, n, rank = self._sizes[path]
        offset = self._header["layers"][path]["output_offset"]
        structure = self._projection.structure_of(
            Contraction((m,), (n,), one_hot=self._is_embedding(path)), rank
        )
        pair = structure.narrow(
            ops.convert_to_tensor(self._projection.vera_kernel_a)[:m],
            ops.convert_to_tensor(self._projection.vera_kernel_b)[
                :, offset : offset + n
            ],
        )
        a, b_matrix = (
            ops.convert_to_numpy(x).astype("float64")
            for x in structure.as_matrices(*pair)
        )
        return a, b_matrix, math.prod(structure.factors)

    def _is_embedding(self, path):
        return path in self._header.get("embeddings", ())

    def _check_embeddings_known(self):
        if (
            self._projection.structure != EXPLICIT
            and "embeddings" not in self._header
        ):
            raise ValueError(
                "The adapters were saved by a version of keras_vera that did "
                "not say which layers are embeddings, so that no matrices can "
                "be made for them. Load them into their model and save them "
                "again, or use another `method`."
            )


def _nearest(w, d, b):
    """Returns the vectors whose product is nearest to a sum of products.

    Args:
        w: Array of shape `(k,)`, the weights.
        d, b: Arrays of shapes `(k, r)` and `(k, n)`.

    Returns:
        Arrays of shapes `(r,)` and `(n,)`: the largest singular vectors of
        `sum_i w_i d_i b_i^T`, with d of the size and sign of the others.
    """
    q, s = np.linalg.qr(d.T)
    p, t = np.linalg.qr(b.T)
    left, sizes, right = np.linalg.svd((s * w) @ t.T)
    shares = np.abs(w) if w.any() else np.ones(len(w))
    shares = shares / shares.sum()
    mean, size = shares @ d, shares @ np.linalg.norm(d, axis=1)
    if not sizes[0] or not size:
        return mean, np.zeros(b.shape[1])
    new_d, new_b = q @ left[:, 0], p @ right[0]
    if new_d @ mean < 0:
        new_d, new_b = -new_d, -new_b
    return new_d * size, new_b * (sizes[0] / size)


def _combined_others(header, tensors, weights, head):
    """Returns the entries that are no vectors, such as heads and biases."""
    biases = {_entry_name(path, "bias") for path in header["layers"]}
    sums_to_one = is_one(sum(weights.values()))
    result = {}
    for name in sorted({name for x in tensors.values() for name in x}):
        is_bias = name in biases
        if head is not None and not is_bias:
            if name in tensors[head]:
                result[name] = tensors[head][name]
            continue
        arrays = [x.get(name) for x in tensors.values()]
        like = {None if x is None else (x.shape, x.dtype) for x in arrays}
        if len(like) > 1 or None in like or not sums_to_one:
            raise ValueError(
                f"'{name}' "
                + (
                    "is a bias of the adapters, which has a weighted mean "
                    "only, "
                    if is_bias
                    else "trained outside the base, such as a head, and has "
                    "no sum. Pass `head`, the adapter that it is taken from, "
                    "or let it be the weighted mean, "
                )
                + "where all adapters have it in the same shape and the "
                f"weights sum to 1. Received: weights "
                f"{list(weights.values())}, and shapes "
                f"{[getattr(x, 'shape', None) for x in arrays]}."
            )
        elif arrays[0].dtype.kind == "f":
            total = sum(w * x for w, x in zip(weights.values(), arrays))
            result[name] = np.asarray(total, arrays[0].dtype)
        elif all(np.array_equal(x, arrays[0]) for x in arrays):
            result[name] = arrays[0]
        else:
            raise ValueError(
                f"'{name}' holds numbers of type {arrays[0].dtype}, which "
                "have no mean. Pass `head`, the adapter that it is taken from."
            )
    return result


def is_one(total):
    return abs(total - 1) < 1e-6


def _entry_name(path, name):
    return f"{path}/{name}" if path else name
