"""The adapter file as bytes; `adapter_file.py` says what is in it."""

import json
import os
import tempfile

import safetensors
import safetensors.numpy

EXTENSION = ".vera.safetensors"
FORMAT_VERSION = 1
_HEADER = "keras_vera"
_HEADER_KEYS = (
    "rank",
    "seed",
    "d_initial",
    "dropout",
    "targets",
    "bases",
    "structure",
    "layers",
    "projection_sha256",
)


class AdapterFileError(ValueError):
    """An adapter file is damaged, or does not fit the model."""


def check_filepath(filepath):
    filepath = os.fspath(filepath)
    if not filepath.endswith(EXTENSION):
        raise ValueError(
            f"`filepath` must end in `{EXTENSION}`. "
            f"Received: filepath={filepath}"
        )
    return filepath


def write(filepath, header, tensors):
    """Writes a file in one step: all of it, or none of it.

    Args:
        filepath: String, the file to make or to replace.
        header: Dict of what JSON can hold.
        tensors: Dict of NumPy arrays by entry name.
    """
    # One entry: safetensors writes several in an order that varies.
    metadata = {_HEADER: json.dumps(header)}
    content = safetensors.numpy.save(tensors, metadata=metadata)
    folder = os.path.dirname(filepath) or "."
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # `mkstemp` makes files that only the owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, filepath)
    except BaseException:
        os.unlink(temporary)
        raise


def read(filepath):
    """Returns the header and the entries of an adapter file."""
    try:
        with safetensors.safe_open(filepath, framework="numpy") as file:
            raw = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise AdapterFileError(
            f"'{filepath}' is not an adapter file, or is damaged: {error}"
        ) from None
    try:
        header = json.loads(raw[_HEADER])
    except (KeyError, ValueError):
        header = None
    if not isinstance(header, dict):
        raise AdapterFileError(
            f"'{filepath}' is not an adapter file of keras_vera: its metadata "
            f"has no JSON object named '{_HEADER}'."
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise AdapterFileError(
            f"'{filepath}' has format version {header.get('format_version')}. "
            f"This version of keras_vera reads {FORMAT_VERSION}; install a "
            "newer one."
        )
    missing = [key for key in _HEADER_KEYS if key not in header]
    if missing:
        raise AdapterFileError(f"The header of '{filepath}' lacks {missing}.")
    return header, tensors
