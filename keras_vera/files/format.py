"""The adapter file as bytes; `docs/adapter-format.md` specifies it, and
`saved.py` says what is in it."""

import collections
import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile

import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16.
import numpy as np
import safetensors
import safetensors.numpy

from keras_vera.product.projection import EXPLICIT

EXTENSION = ".vera.safetensors"
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
_NO_SHA256 = "0" * 64
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Names of safetensors and of NumPy.
_DTYPES = {f"{k}{8 * n}": f"{k.lower()}{n}" for k in "IU" for n in (1, 2, 4, 8)}
_DTYPES.update(_FLOATS, F64="float64", BOOL="bool")


class AdapterFileError(OSError, ValueError):
    """An adapter file cannot be read or written, is damaged, or does not fit.

    Whatever is wrong with a file ends in this error; the model and an older
    file are then as they were.
    """


def check_filepath(filepath):
    filepath = os.fspath(filepath)
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
    if not np.isfinite(array.astype("float32")).all():
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
    content = content[:place] + digest + content[place + len(digest) :]
    write_files({filepath: content})


def write_files(contents):
    """Writes files, bytes by path; on `AdapterFileError`, none of them."""
    temporaries = {}
    try:
        for filepath, content in contents.items():
            with errors_about(filepath, "could not be written"):
                if os.path.isdir(filepath):
                    raise ValueError("it is a directory.")
                folder = os.path.dirname(filepath) or "."
                handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
                temporaries[filepath] = temporary
                _write_temporary(handle, temporary, content)
        for filepath in contents:
            with errors_about(filepath, "could not be written"):
                os.replace(temporaries[filepath], filepath)
                del temporaries[filepath]
    except BaseException:
        for temporary in temporaries.values():
            os.unlink(temporary)
        raise


def _write_temporary(handle, temporary, content):
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # `mkstemp` makes files that only the owner can read.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)


def read(filepath):
    """Returns the header and the entries of an adapter file, all checked.

    Args:
        filepath: String or path.

    Returns:
        The header, a dict, whose `"layers"` are a dict by structural path;
        and a dict of NumPy arrays by entry name, 16-bit floats as float32.

    Raises:
        AdapterFileError: If anything is wrong with the file.
    """
    header, _ = read_header(filepath)
    with errors_about(filepath, "is damaged"):
        content = read_bytes(filepath)
        place = _place_of_sha256(content, header["sha256"])
        blank = _NO_SHA256.encode()
        digest = hashlib.sha256(content[:place])
        digest.update(blank)
        digest.update(content[place + len(blank) :])
        if digest.hexdigest() != header["sha256"]:
            raise ValueError("its bytes do not give its SHA-256.")
        return header, decode(content)


def read_bytes(filepath):
    with _opened(filepath) as file:
        return file.read()


def _opened(filepath):
    # A pipe would be waited for without end.
    if not stat.S_ISREG(os.stat(filepath).st_mode):
        raise ValueError("it is not a regular file.")
    return open(filepath, "rb")


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
        filepath: String or path.

    Returns:
        The header, as `read` gives it; and a dict of `(dtype, shape)` by entry
        name, with the dtype as safetensors names it.

    Raises:
        AdapterFileError: If anything is wrong with what was read.
    """
    with errors_about(filepath, "is not an adapter file, or is damaged"):
        # Opened here first: safetensors does not say why it cannot.
        with _opened(filepath) as file:
            with safetensors.safe_open(filepath, framework="numpy") as content:
                metadata = content.metadata() or {}
                slices = {x: content.get_slice(x) for x in content.keys()}
                entries = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
            check_names(file)
        if _HEADER not in metadata:
            raise ValueError(
                "its metadata has no JSON object named 'keras_vera'."
            )
        header = parsed(metadata[_HEADER])
        _check_text(header)
        _check_header(header, entries)
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


def check_names(file):
    """Raises if a name occurs twice in the index of a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    parsed(file.read(length))


@contextlib.contextmanager
def errors_about(filepath, what):
    """Turns what goes wrong inside into an error that names the file."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"'{filepath}' {what}: {reason}") from error


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


def _check_header(header, entries):
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
    for name, (dtype, _) in entries.items():
        if dtype not in _DTYPES:
            raise ValueError(f"'{name}' has dtype {dtype}.")


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
