"""The adapter file as bytes; `docs/adapter-format.md` specifies it, and
`saved.py` says what is in it."""

import collections
import hashlib
import json
import math
import os

import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16.
import numpy as np
import safetensors
import safetensors.numpy

from keras_vera import _keras
from keras_vera.files import hub_paths
from keras_vera.files.disk import EXTENSION as EXTENSION
from keras_vera.files.disk import AdapterFileError as AdapterFileError
from keras_vera.files.disk import errors_about
from keras_vera.files.disk import opened
from keras_vera.files.disk import write_files
from keras_vera.product.projection import EXPLICIT

FORMAT_VERSION = 1
_HEADER = "keras_vera"
_HEADER_KEYS = {
    "rank": int,
    "seed": (int, type(None)),
    "structure": str,
    "d_initial": float,
    "dropout": float,
    "targets": (str, list, type(None)),
    "bases": list,
    "layers": list,
    "projection_sha256": str,
}
# These are left out where they are empty.
_OPTIONAL_KEYS = ("outside", "trained", "unsaved")
# Of the fingerprint of each layer that a file relies on and does not hold.
UNSAVED_DIGITS = 12
_LAYER_KEYS = ("kernel_shape", "kernel_dtype", "kernel_fingerprint")
_OFFSET = "output_offset"  # Follows these, where it is not 0.
_VECTOR = "vera_lambda_d"
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_LARGEST_INDEX = 100_000_000  # As in safetensors.
_NO_SHA256 = "0" * 64
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Names of safetensors and of NumPy.
_DTYPES = {f"{k}{8 * n}": f"{k.lower()}{n}" for k in "IU" for n in (1, 2, 4, 8)}
_DTYPES.update(_FLOATS, F64="float64", BOOL="bool")


def check_filepath(filepath):
    hub_paths.check_is_here(
        "filepath",
        filepath,
        "Write a file here and upload it with `keras_vera.upload_adapter`.",
    )
    filepath = os.fsdecode(filepath)
    if not filepath.endswith(EXTENSION):
        raise ValueError(
            f"`filepath` must end in `{EXTENSION}`. "
            f"Received: filepath={filepath}"
        )
    return filepath


def check_file_dtype(dtype):
    if dtype not in _FLOATS.values():
        raise ValueError(
            f"`dtype` must be one of {', '.join(map(repr, _FLOATS.values()))}."
            f" Received: dtype={dtype!r}"
        )


def in_dtype(name, array, dtype):
    """Returns a float array as files store it, or raises if it is too large."""
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array.astype("float64")).all():
        raise ValueError(
            f"'{name}' holds NaN or infinity as {dtype}; an adapter file "
            "holds finite numbers only. If training diverged, lower the "
            "learning rate; if a number is too large for float16, save with "
            "dtype='bfloat16'."
        )
    return array


def write(filepath, header, tensors):
    """Writes a file in one step: all of it, or none of it.

    Args:
        filepath: String, the file to make or to replace.
        header, tensors: As in `encoded`.
    """
    write_files({filepath: encoded(header, tensors)})


def encoded(header, tensors):
    """Returns the bytes of an adapter file.

    Args:
        header: Dict of what JSON can hold.
        tensors: Dict of NumPy arrays by entry name.
    """
    # A layer's path is in the names of its entries, in the same order.
    layers = [
        [layer[key] for key in _LAYER_KEYS]
        + ([layer[_OFFSET]] if layer[_OFFSET] else [])
        for _, layer in sorted(header["layers"].items())
    ]
    header = {**header, "layers": layers, "sha256": _NO_SHA256}
    for name in _OPTIONAL_KEYS:
        if not header.get(name):
            header.pop(name, None)
    if not _may_embed(layers):
        header.pop("embeddings", None)
    # One entry: safetensors writes several in an order that varies.
    metadata = {_HEADER: json.dumps(header, separators=(",", ":"))}
    content = safetensors.numpy.save(tensors, metadata=metadata)
    digest = hashlib.sha256(content).hexdigest().encode()
    place = _place_of_sha256(content)
    return content[:place] + digest + content[place + len(digest) :]


def read(filepath):
    """Returns the header and the entries of an adapter file, all checked.

    Args:
        filepath: String or path, also one of the Hub.

    Returns:
        The header, a dict, whose `"layers"` are a dict by structural path;
        and a dict of NumPy arrays by entry name, 16-bit floats as float32.

    Raises:
        AdapterFileError: If anything is wrong with the file.
    """
    header, tensors, _ = read_version(filepath)
    return header, tensors


def read_version(filepath):
    """As `read`, and the `Version` of the file, which is opened once."""
    local = hub_paths.local_file(filepath)
    with errors_about(filepath, "is not an adapter file, or is damaged"):
        with opened(local) as (file, version):
            header, _ = _header_in(file, version.size)
            file.seek(0)
            content = file.read()
    with errors_about(filepath, "is damaged"):
        place = _place_of_sha256(content, header["sha256"])
        blank = _NO_SHA256.encode()
        digest = hashlib.sha256(content[:place])
        digest.update(blank)
        digest.update(content[place + len(blank) :])
        if digest.hexdigest() != header["sha256"]:
            raise ValueError("its bytes do not give its SHA-256.")
        tensors = decode(content)
    names = _names_of_now({*tensors, *header["trained"]})
    header["trained"] = [names.get(x, x) for x in header["trained"]]
    return header, {names.get(x, x): tensors[x] for x in tensors}, version


def _names_of_now(entries):
    """Returns the names that entries of files of before have now.

    Such files name variables without a name as Keras does, by numbers of the
    process that wrote them.
    """
    unnamed = {}
    for entry in entries:
        path, slash, name = entry.rpartition("/")
        number = _keras.number_of_unnamed(name)
        if number is not None:
            unnamed.setdefault(path + slash, {})[number] = entry
    return {
        numbers[number]: f"{path}{_keras.UNNAMED}_{place}"
        for path, numbers in unnamed.items()
        for place, number in enumerate(sorted(numbers))
        if f"{path}{_keras.UNNAMED}_{place}" not in entries
    }


def decode(content):
    """Returns the entries of a safetensors file, 16-bit floats as float32."""
    tensors = {}
    # `safetensors.numpy.load` does not know bfloat16.
    for name, entry in safetensors.deserialize(content):
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"'{name}' has dtype {entry['dtype']}.")
        dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
        array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        if entry["dtype"] in _FLOATS:
            array = array.astype("float32")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds NaN or infinity.")
        tensors[name] = array
    return tensors


def read_header(filepath):
    """Reads what comes before the numbers, and checks it.

    Nothing of the size that a file claims is allocated before it is compared
    with the size that the file has.

    Args:
        filepath: String or path, also one of the Hub.

    Returns:
        The header, as `read` gives it; and a dict of `(dtype, shape)` by entry
        name, with the dtype as safetensors names it.

    Raises:
        AdapterFileError: If anything is wrong with what was read.
    """
    local = hub_paths.local_file(filepath)
    with errors_about(filepath, "is not an adapter file, or is damaged"):
        with opened(local) as (file, version):
            return _header_in(file, version.size)


def _header_in(file, size):
    """Returns what `read_header` does, of an open file of `size` bytes."""
    entries, metadata = read_index(file, size)
    text = metadata.get(_HEADER) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError("its metadata has no JSON object named 'keras_vera'.")
    header = parsed(text)
    _check_text(header)
    _check_header(header)
    paths = sorted(
        name[: -len(_VECTOR)].rstrip("/")
        for name in entries
        if name == _VECTOR or name.endswith("/" + _VECTOR)
    )
    _check_layers(header, paths)
    if not _may_embed(header["layers"]):
        header.setdefault("embeddings", [])
    layers = [
        dict(zip((*_LAYER_KEYS, _OFFSET), [*row, 0]))
        for row in header["layers"]
    ]
    header["layers"] = dict(zip(paths, layers))
    return header, entries


def read_index(file, size):
    """Reads the index of a safetensors file, which must tell every byte.

    `safetensors` itself would open the file once more, when it may be another.

    Args:
        file: What has a `read` method, at its beginning.
        size: Integer, the bytes of the file.

    Returns:
        Dict of `(dtype, shape)` by entry name; and the metadata.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _LARGEST_INDEX):
        raise ValueError(f"its index is said to have {length} bytes.")
    index = parsed(file.read(length))
    if not isinstance(index, dict):
        raise ValueError("its index is not a JSON object.")
    metadata = index.pop("__metadata__", None)
    parts = [_part(name, entry) for name, entry in index.items()]
    place = 0
    for start, end, name in sorted(parts):
        if start != place:
            raise ValueError(f"'{name}' does not begin where another ends.")
        place = end
    if place != size - 8 - length:
        raise ValueError(
            f"its entries have {place} bytes, and it has {size - 8 - length}."
        )
    return {
        name: (entry["dtype"], tuple(entry["shape"]))
        for name, entry in index.items()
    }, metadata


def _part(name, entry):
    """Returns where an entry begins and ends, and its name."""
    if isinstance(entry, dict) and sorted(entry) == sorted(_ENTRY_KEYS):
        dtype, shape, offsets = (entry[key] for key in _ENTRY_KEYS)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"'{name}' has dtype {dtype}.")
        if all(
            isinstance(numbers, list)
            and all(type(x) is int and x >= 0 for x in numbers)
            for numbers in (shape, offsets)
        ):
            size = np.dtype(_DTYPES[dtype]).itemsize * math.prod(shape)
            if len(offsets) == 2 and offsets[1] - offsets[0] == size:
                return *offsets, name
    raise ValueError(f"its index describes '{name}' as {entry!r}.")


def parsed(text):
    def distinct(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            name, count = counts.most_common(1)[0]
            raise ValueError(f"its header has {name!r} {count} times.")
        return found

    def refuse(constant):
        raise ValueError(f"its header holds {constant}.")

    return json.loads(text, object_pairs_hook=distinct, parse_constant=refuse)


def _check_text(header):
    """Raises for halves of characters, which JSON can hold and nobody print."""
    try:
        json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("its header has text that is no Unicode.") from None


def _check_header(header):
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object.")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"it has format version {header.get('format_version')!r}. This "
            f"version of keras_vera reads {FORMAT_VERSION}; install a newer "
            "one."
        )
    for name, kind in {**_HEADER_KEYS, "sha256": str}.items():
        if name not in header:
            raise ValueError(f"its header lacks '{name}'.")
        value = header[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"its header has {name}={value!r}.")
    if len(header["sha256"]) != len(_NO_SHA256):
        raise ValueError("its SHA-256 has another length.")
    for name in _OPTIONAL_KEYS:
        header.setdefault(name, [])
    for name in ("bases", "targets", "embeddings", *_OPTIONAL_KEYS):
        value = header.get(name, [])
        if (name != "targets" and not isinstance(value, list)) or (
            isinstance(value, list)
            and not all(isinstance(item, str) for item in value)
        ):
            raise ValueError(f"its header has {name}={value!r}.")
    unsaved = header["unsaved"]
    if len(unsaved) not in (0, 2) or any(
        len(x) % UNSAVED_DIGITS or not set(x) <= set("0123456789abcdef")
        for x in unsaved
    ):
        raise ValueError(f"its header has unsaved={unsaved!r}.")


def _check_layers(header, paths):
    rows = header["layers"]
    if len(rows) != len(paths):
        raise ValueError(
            f"its header describes {len(rows)} layers, and it has the vectors "
            f"of {len(paths)}."
        )
    for row in rows:
        fits = (
            isinstance(row, list)
            and list(map(type, row[:3])) == [list, str, str]
            and all(type(x) is int and 0 < x < 2**31 for x in row[3:])
            # A seed would make as many columns of B as an offset asks for.
            and len(row) <= len(_LAYER_KEYS) + (header["structure"] == EXPLICIT)
            and all(type(size) is int and size > 0 for size in row[0])
            and math.prod(row[0]) < 2**63
        )
        if not fits:
            raise ValueError(f"its header describes a layer as {row!r}.")


def _may_embed(rows):
    """Says whether a layer may be an embedding, by the axes of its kernel.

    Files tell what is one only where this does not; those of before, never.
    """
    return any(len(row[0]) == 2 for row in rows)


def _place_of_sha256(content, digest=_NO_SHA256):
    """Returns where the checksum stands in the bytes of a file."""
    length = 8 + int.from_bytes(content[:8], "little")
    # As JSON within JSON, which escapes the quotation marks.
    field = f'\\"sha256\\":\\"{digest}\\"'.encode()
    if content.count(field, 8, length) != 1:
        raise ValueError("its header does not say its SHA-256 once.")
    return content.index(field, 8, length) + field.index(digest.encode())
