"""`python -m keras_vera inspect FILE` says what an adapter is."""

import argparse
import math
import os
import sys

from keras_vera import _adapter_format
from keras_vera._adapter_format import AdapterFileError

_VECTORS = ("vera_lambda_d", "vera_lambda_b")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m keras_vera")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect", help="say what an adapter file is, from its header"
    )
    command.add_argument("file", help="a *.vera.safetensors file")
    command.add_argument(
        "--verify",
        action="store_true",
        help="read the numbers as well, and check the checksum",
    )
    args = parser.parse_args(arguments)
    try:
        print("\n".join(_inspect(args.file, args.verify)))
    except AdapterFileError as error:
        sys.exit(str(error))


def _inspect(filepath, verify):
    header, entries = _adapter_format.read_header(filepath)
    if verify:
        _adapter_format.read(filepath)
    layers = header["layers"]
    vectors = [x for x in entries if x.rsplit("/", 1)[-1] in _VECTORS]
    others = sorted(entries.keys() - set(vectors))
    numbers = {name: math.prod(shape) for name, (_, shape) in entries.items()}
    trained = sum(numbers.values())
    of_vectors = sum(numbers[name] for name in vectors)
    dtypes = sorted({dtype for dtype, _ in entries.values()})
    bases = ", ".join(path or "the model" for path in header["bases"])
    yield f"{filepath}: {os.path.getsize(filepath):,} bytes"
    for name, value in (
        ("format version", header["format_version"]),
        ("rank", header["rank"]),
        ("seed", header["seed"]),
        ("structure", header["structure"]),
        ("targets", header["targets"]),
        ("base", bases or "a model made of keras_vera.layers"),
        ("made by", _makers(header)),
        ("vectors", f"{of_vectors:,} numbers in {len(layers)} layers"),
        ("other entries", f"{trained - of_vectors:,} numbers"),
        ("stored as", ", ".join(dtypes)),
    ):
        yield f"  {name + ':':16}{value}"
    yield "  layers, with shape, dtype and fingerprint of their base kernels:"
    for path, layer in layers.items():
        shape = "x".join(map(str, layer["kernel_shape"]))
        yield (
            f"    {path or 'the model'}  {shape} {layer['kernel_dtype']} "
            f"{layer['kernel_fingerprint']}"
        )
    if others:
        yield "  other entries:"
    for name in others:
        yield f"    {name}  {entries[name][1]} {entries[name][0]}"
    if verify:
        yield "  checked: header, sizes, checksum, all numbers are finite"
    else:
        yield "  checked: header and sizes; --verify reads the numbers"


def _makers(header):
    versions = (header.get(f"{x}_version") for x in ("keras_vera", "keras"))
    return "keras_vera {}, keras {}".format(*versions)


if __name__ == "__main__":
    main()
