"""Weighted sums of the updates that adapters make."""

import numbers
from typing import Any

from keras_vera._types import FilePath
from keras_vera.files import format as adapter_format
from keras_vera.files.combined import combined
from keras_vera.files.combined import is_one
from keras_vera.files.format import AdapterFileError
from keras_vera.files.format import check_filepath
from keras_vera.files.unsaved import differ

_METHODS = ("exact", "nearest", "average")
# What the adapters must have in common.
_COMMON = (
    "rank",
    "seed",
    "structure",
    "projection_sha256",
    "bases",
    "outside",
)


def combine(
    adapters: dict[Any, float],
    destination: FilePath,
    method: str = "exact",
    head: FilePath | None = None,
    bank: Any = None,
) -> dict[str, float]:
    """Makes an adapter whose update is the weighted sum of those of others.

    Task arithmetic: weights that sum to 1 interpolate, `1` and `1` add what
    two adapters do, a negative weight takes it back. The update of a layer is
    `f * (A * d) (B * b)`; it goes with the product of `d` and `b`, so the sum
    of two has in general no one `d` and `b`. Three methods:

    - `"exact"`: the adapter makes the weighted sum, to float32 rounding. Where
      one `d` and `b` give it, the result is a file like the others: of one
      adapter with any weight, and where in each layer all `d`, or all `b`,
      are multiples of each other. Else it is one of the same rank with
      matrices of its own, `A` and the weighted sum of all `d * B * b`, which
      is as large as LoRA of that rank. It loads, trains, merges and exports
      like any other.
    - `"nearest"`: of the size of the others, with the `d` and `b` whose
      product is nearest to the sum of the products: exact where `"exact"`
      gives a small file, else an approximation.
    - `"average"`: the weighted mean of the `d` and that of the `b`, as
      checkpoints of one training are averaged. An approximation of the sum,
      for weights that sum to 1.

    Args:
        adapters: Dict of numbers, the weights, by adapter file (as in
            `load_adapter`, also on the Hub); with `bank`, by the names of its
            adapters. All must have the same rank, seed, structure, layers and
            base, and none of them may have trained parts of the base in full
            (`train`).
        destination: `str` or `pathlib.Path`, the file to write, which must
            end in `.vera.safetensors`; with `bank`, the name of the adapter
            to add to it.
        method: `"exact"`, `"nearest"` or `"average"`. Defaults to `"exact"`.
        head: One of the keys of `adapters`, whose head (whatever trained
            outside the base) the result gets. Defaults to `None`: the
            weighted mean of the heads, for weights that sum to 1.
        bank: An `AdapterBank` that holds the adapters and gets the result. A
            bank takes no adapters with other matrices than its model's.
            Defaults to `None`: files.

    Returns:
        A dict by path of layer of the share of the squared (Frobenius) norm
        of the weighted sum by which the update of the result differs from it:
        0 where it is exact.

    Raises:
        keras_vera.AdapterFileError: If a file cannot be read or written, is
            damaged, or does not fit the first.
        ValueError: If an argument makes no sense, or if the result cannot be
            what `method` says. Nothing is written then.

    Example:

    ```python
    keras_vera.combine(
        {"french.vera.safetensors": 1.0, "polite.vera.safetensors": 0.5},
        "both.vera.safetensors",
    )
    keras_vera.combine(
        {"ann": 0.5, "bob": 0.5}, "between", method="nearest", bank=bank
    )
    ```
    """
    weights = _checked(adapters, method, head)
    if bank is not None:
        if not hasattr(bank, "_slots"):
            raise ValueError(
                "`bank` must be an `AdapterBank`. "
                f"Received: bank={bank!r} (of type {type(bank).__name__})"
            )
        with bank._lock:
            return bank._slots.combine(weights, destination, method, head)
    destination = check_filepath(destination)
    files = {x: adapter_format.read(x) for x in weights}
    for filepath, (header, _) in files.items():
        _check_only_vectors(header, filepath)
    header = _common_header(files)
    tensors = {x: entries for x, (_, entries) in files.items()}
    header, result, lost = combined(header, tensors, weights, method, head)
    if head is not None and header["unsaved"] and files[head][0]["unsaved"]:
        # What a file does not hold outside the base depends on its head.
        outside = files[head][0]["unsaved"][1]
        header = {**header, "unsaved": [header["unsaved"][0], outside]}
    adapter_format.write(destination, header, result)
    return lost


def _checked(adapters, method, head):
    """Returns the weights as floats, or raises a `ValueError`."""
    if not isinstance(adapters, dict) or not adapters:
        raise ValueError(
            "`adapters` must be a dict of weights by adapter, with one at "
            f"least. Received: adapters={adapters!r}"
        )
    for name, weight in adapters.items():
        is_number = isinstance(weight, numbers.Real)
        if (
            not is_number
            or isinstance(weight, bool)
            or not -1e30 < weight < 1e30
        ):
            raise ValueError(
                "The weights in `adapters` must be finite numbers. Received: "
                f"adapters[{str(name)!r}]={weight!r}"
            )
    if method not in _METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, _METHODS))}. "
            f"Received: method={method!r}"
        )
    total = sum(adapters.values())
    if method == "average" and not is_one(total):
        raise ValueError(
            "`method='average'` needs weights that sum to 1. Received: "
            f"{list(adapters.values())}, whose sum is {total}. Use "
            "method='exact' or method='nearest' for other sums."
        )
    if head is not None and head not in adapters:
        raise ValueError(
            "`head` must be one of the keys of `adapters`. "
            f"Received: head={head!r}"
        )
    return {name: float(weight) for name, weight in adapters.items()}


def _common_header(files):
    """Returns the header of the first file, or raises if others differ.

    Args:
        files: Dict of headers and entries, by file.
    """
    (first, (header, entries)), *others = files.items()
    for filepath, (other, other_entries) in others:
        different = [name for name in _COMMON if other[name] != header[name]]
        different += [
            f"layer '{path}'"
            for path in {**header["layers"], **other["layers"]}
            if not _is_same_layer(
                header["layers"].get(path), other["layers"].get(path)
            )
        ]
        different += [
            f"the rank of '{name.rpartition('/')[0]}'"
            for name, d in entries.items()
            if name.endswith("vera_lambda_d")
            and name in other_entries
            and other_entries[name].shape != d.shape
        ]
        if differ(header, other):
            different.append("the base's weights without an adapter")
        if different:
            raise AdapterFileError(
                f"'{filepath}' does not fit '{first}': they differ in "
                f"{', '.join(different[:5])}. Adapters can be combined where "
                "rank, seed, structure, layers and the kernels of the base "
                "are the same."
            )
    return header


def _check_only_vectors(header, filepath):
    """Raises if the file holds new values of the base, not their changes."""
    trained = header["trained"]
    if trained:
        raise ValueError(
            f"'{filepath}' holds {trained[:5]}, {len(trained)} entries in "
            "all, which trained in the base in full, by `train` of "
            "`enable_vera`. The file has their values and not what was added "
            "to the base's, so their sum is not known. Adapters can be "
            "combined that were trained without `train`."
        )


def _is_same_layer(one, other):
    if one is None or other is None:
        return False
    # Kernels of another dtype cannot be compared, as when a file is loaded.
    names = ["kernel_shape", "output_offset"]
    if one["kernel_dtype"] == other["kernel_dtype"]:
        names.append("kernel_fingerprint")
    return all(one[name] == other[name] for name in names)
