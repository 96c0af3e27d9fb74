"""Reads mutated adapter files; counts what happens.

A reader may do one of two things with a file that is not what was written:
raise `AdapterFileError`, or (which no mutation here should reach, as a
checksum covers every byte) accept it. Anything else, another exception or a
dead process, is a finding.

    python benchmarks/fuzz_adapter_file.py --files 1000000
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
import random
import struct
import tempfile
import time

import numpy as np

from keras_vera import AdapterFileError
from keras_vera import __main__ as command
from keras_vera.files import format as adapter_format


def original(folder):
    """Returns the bytes of a small adapter: two layers, a head, A and B.

    A part of the base trains, and there are layers outside it.
    """
    path = os.path.join(folder, "original.vera.safetensors")
    rng = np.random.default_rng(0)
    layer = {
        "kernel_shape": [8, 6],
        "kernel_dtype": "float32",
        "kernel_fingerprint": "0123456789abcdef",
        "output_offset": 0,
    }
    header = {
        "format_version": adapter_format.FORMAT_VERSION,
        "rank": 4,
        "seed": None,
        "structure": "explicit",
        "d_initial": 0.1,
        "dropout": 0.0,
        "targets": "attention-qv",
        "bases": ["backbone"],
        "layers": {
            "backbone/query": layer,
            "backbone/value": {**layer, "output_offset": 6},
        },
        "projection_sha256": "0" * 64,
        "outside": ["backbone/added"],
        "trained": ["backbone/norm/gamma", "backbone/norm/beta"],
        "unsaved": ["0123456789ab" * 3, "ba9876543210"],
    }
    shapes = {"head/kernel": (6, 3), "backbone/added/bias": (3,)}
    shapes.update(dict.fromkeys(header["trained"], (6,)))
    shapes.update(vera_kernel_a=(8, 4), vera_kernel_b=(4, 12))
    for path_of_layer in header["layers"]:
        for name, size in (("vera_lambda_d", 4), ("vera_lambda_b", 6)):
            shapes[f"{path_of_layer}/{name}"] = (size,)
    tensors = {
        name: rng.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }
    adapter_format.write(path, header, tensors)
    return pathlib.Path(path).read_bytes()


def flip_bits(content, rng):
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def set_bytes(content, rng):
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] = rng.choice(
            b'\0\xff0129-.{}[]",:\\eE' + bytes([rng.randrange(256)])
        )


def truncate(content, rng):
    del content[rng.randrange(len(content)) :]


def delete(content, rng):
    start = rng.randrange(len(content))
    del content[start : start + rng.randint(1, 64)]


def repeat(content, rng):
    start, place = rng.randrange(len(content)), rng.randrange(len(content))
    content[place:place] = content[start : start + rng.randint(1, 64)]


def lie_about_the_header(content, rng):
    length = rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, None])
    if length is None:
        length = rng.randrange(2 * len(content))
    content[:8] = struct.pack("<Q", length)


def change_a_number(content, rng):
    """Changes one number of the header, such as a shape or an offset."""
    (length,) = struct.unpack("<Q", content[:8])
    index = content[8 : 8 + length].decode()
    places = [i for i, c in enumerate(index) if c.isdigit()]
    place = rng.choice(places)
    value = rng.choice(["-1", "0", "1e999", "4294967296", "9" * 30, "null"])
    index = index[:place] + value + index[place + 1 :]
    content[:] = (
        struct.pack("<Q", len(index))
        + index.encode()
        + bytes(content[8 + length :])
    )


def change_the_index(content, rng):
    """Replaces a value of the outer header by one of another type."""
    (length,) = struct.unpack("<Q", content[:8])
    index = json.loads(bytes(content[8 : 8 + length]))
    name = rng.choice(list(index))
    value = rng.choice([None, [], {}, "x", -1, 2**70, [[[]]], True])
    if isinstance(index[name], dict) and rng.random() < 0.7:
        index[name][rng.choice(list(index[name]))] = value
    else:
        index[name] = value
    text = json.dumps(index).encode()
    content[:] = (
        struct.pack("<Q", len(text)) + text + bytes(content[8 + length :])
    )


def change_the_header(content, rng):
    """Changes what the package itself says of a file, as JSON in JSON.

    The checksum is made to fit, so that a reader has to notice by the rest.
    """
    (length,) = struct.unpack("<Q", content[:8])
    index = json.loads(bytes(content[8 : 8 + length]))
    header = json.loads(index["__metadata__"]["keras_vera"])
    name = rng.choice([*_PATHS, *_PATHS, *header])
    value = header.get(name)
    if name in _PATHS and rng.random() < 0.7:
        value = [*value]
        place = rng.randrange(len(value) + 1)
        value[place : place + rng.randrange(2)] = [rng.choice(_VALUES)]
    else:
        value = rng.choice(_VALUES)
    header[name] = value
    index["__metadata__"]["keras_vera"] = json.dumps(
        header, separators=(",", ":")
    )
    text = json.dumps(index).encode()
    content[:] = sealed(
        struct.pack("<Q", len(text)) + text + bytes(content[8 + length :]),
        header,
    )


def sealed(content, header):
    """Returns the bytes with the checksum that belongs to them."""
    digest = header.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64:
        return content
    digest = digest.encode()
    blank = content.replace(digest, b"0" * 64, 1)
    right = hashlib.sha256(blank).hexdigest().encode()
    return content.replace(digest, right, 1)


_PATHS = ("bases", "outside", "trained", "unsaved")
_VALUES = [
    None,
    [],
    {},
    "",
    "x",
    "backbone",
    "backbone/query",
    "backbone/query/vera_lambda_d",
    "backbone/norm/gamma",
    "../../etc",
    "/" * 1000,
    "a" * 12,
    "\0",
    "\ud800",
    -1,
    2**70,
    1.5,
    True,
    [[]],
    ["x", 1],
]
MUTATIONS = [
    change_the_header,
    flip_bits,
    set_bytes,
    truncate,
    delete,
    repeat,
    lie_about_the_header,
    change_a_number,
    change_the_index,
]


def read(path):
    try:
        adapter_format.read(path)
        return "read"
    except AdapterFileError:
        return "refused"
    except Exception as error:
        return f"ANOTHER ERROR, {type(error).__name__}"


def inspect(path, outcome):
    """Says what `python -m keras_vera inspect` does with a file."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            code = command.main(["inspect", path, "--verify"]) or 0
        except SystemExit as error:
            code = error.code
        except Exception as error:
            return f"ANOTHER ERROR, {type(error).__name__}"
    if (code == 0) != outcome.endswith("read"):
        return f"ANOTHER CODE, {code}"
    with contextlib.suppress(UnicodeEncodeError):
        output.getvalue().encode()
        return f"code {code}"
    return "NOT PRINTABLE"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    counts, inspected = collections.Counter(), collections.Counter()
    start = time.perf_counter()
    # In memory where there is such a folder.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        unchanged = original(folder)
        path = os.path.join(folder, "mutated.vera.safetensors")
        for _ in range(args.files):
            content = bytearray(unchanged)
            mutation = rng.choice(MUTATIONS)
            mutation(content, rng)
            with open(path, "wb") as file:
                file.write(content)
            outcome = read(path)
            if outcome == "read":
                same = content == unchanged
                outcome = "unchanged, read" if same else "CHANGED, READ"
                if mutation is change_the_header:
                    # Its checksum fits: such a file may say something else.
                    outcome = "sealed, read"
            counts[mutation.__name__, outcome] += 1
            # It reads the same file, and shows what of the header is right.
            if mutation is change_the_header:
                inspected[inspect(path, outcome)] += 1
    for (mutation, outcome), count in sorted(counts.items()):
        print(f"{mutation:22}{outcome:24}{count:>10,}")
    for outcome, count in sorted(inspected.items()):
        print(f"{'inspect':22}{outcome:24}{count:>10,}")
    seconds = time.perf_counter() - start
    print(f"{sum(counts.values()):,} files in {seconds:.0f} s")


if __name__ == "__main__":
    main()
