"""Adapter files read and written from the words of docs/adapter-format.md,
without the package's own code."""

import hashlib
import json
import struct

import safetensors
import safetensors.numpy


def read(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["keras_vera"])
        return header, {k: file.get_tensor(k) for k in file.keys()}


def write(path, header, tensors):
    metadata = {"keras_vera": json.dumps(header, separators=(",", ":"))}
    content = safetensors.numpy.save(tensors, metadata=metadata)
    path.write_bytes(sealed(content))


def sealed(content):
    """Returns the bytes with the checksum that belongs to them."""
    (length,) = struct.unpack("<Q", content[:8])
    raw = content[8 : 8 + length]
    metadata = json.loads(raw).get("__metadata__", {})
    header = json.loads(metadata.get("keras_vera", "{}"))
    digest = header.get("sha256") if isinstance(header, dict) else None
    if not isinstance(digest, str) or len(digest) != 64:
        return content
    digest = digest.encode()
    blank = content.replace(digest, b"0" * 64, 1)
    right = hashlib.sha256(blank).hexdigest().encode()
    return content.replace(digest, right, 1)
