"""What the commands of `python -m keras_vera` do.

Each takes the parsed arguments and returns what it found, as JSON can hold
it; the lines that say so to people, an iterable; and the exit code.
"""

import math
import os

import numpy as np

from keras_vera.files import format as adapter_format
from keras_vera.files import hub_paths

_VECTORS = ("vera_lambda_d", "vera_lambda_b")
_SETTINGS = (
    "format_version",
    "rank",
    "seed",
    "structure",
    "projection_sha256",
    "d_initial",
    "dropout",
    "targets",
    "bases",
    "outside",
    "trained",
)
_KERNEL = ("kernel_shape", "kernel_dtype", "kernel_fingerprint")
_COMPARED = (*_KERNEL, "output_offset")


# ---- inspect


def inspect(args):
    header, entries = adapter_format.read_header(args.file)
    if args.verify:
        adapter_format.read(args.file)
    numbers = {name: math.prod(shape) for name, (_, shape) in entries.items()}
    vectors = sum(numbers[x] for x in numbers if _is_vector(x))
    found = {
        "file": args.file,
        "bytes": os.path.getsize(hub_paths.local_file(args.file)),
        **{name: header[name] for name in _SETTINGS},
        "made_by": {
            name: header.get(f"{name}_version")
            for name in ("keras_vera", "keras")
        },
        "vectors": vectors,
        "other_numbers": sum(numbers.values()) - vectors,
        "dtypes": sorted({dtype for dtype, _ in entries.values()}),
        "layers": {
            path: {name: layer[name] for name in _KERNEL}
            for path, layer in header["layers"].items()
        },
        "other_entries": {
            name: {"shape": list(shape), "dtype": dtype}
            for name, (dtype, shape) in sorted(entries.items())
            if not _is_vector(name)
        },
        "unsaved": [
            len(x) // adapter_format.UNSAVED_DIGITS for x in header["unsaved"]
        ],
        "verified": args.verify,
    }
    return found, _inspect_lines(found), 0


def _inspect_lines(found):
    layers, others = found["layers"], found["other_entries"]
    bases = ", ".join(path or "the model" for path in found["bases"])
    made_by = (f"{name} {x}" for name, x in found["made_by"].items())
    yield f"{found['file']}: {found['bytes']:,} bytes"
    for name, value in (
        ("format version", found["format_version"]),
        ("rank", found["rank"]),
        ("seed", found["seed"]),
        ("structure", found["structure"]),
        ("targets", found["targets"]),
        ("base", bases or "a model made of keras_vera.layers"),
        ("made by", ", ".join(made_by)),
        ("vectors", f"{found['vectors']:,} numbers in {len(layers)} layers"),
        ("other entries", f"{found['other_numbers']:,} numbers"),
        ("stored as", ", ".join(found["dtypes"])),
    ):
        yield f"  {name + ':':16}{value}"
    if found["trained"]:
        yield f"  trained in full, in the base: {', '.join(found['trained'])}"
    if found["unsaved"]:
        base, outside = found["unsaved"]
        yield (
            f"  fingerprints of {base} more layers of the base, and {outside} "
            "outside it"
        )
    yield "  layers, with shape, dtype and fingerprint of their base kernels:"
    for path, layer in layers.items():
        shape = "x".join(map(str, layer["kernel_shape"]))
        yield (
            f"    {_shown(path)}  {shape} {layer['kernel_dtype']} "
            f"{layer['kernel_fingerprint']}"
        )
    if others:
        yield "  other entries:"
    for name, entry in others.items():
        yield f"    {name}  {tuple(entry['shape'])} {entry['dtype']}"
    if found["verified"]:
        yield "  checked: header, sizes, checksum, all numbers are finite"
    else:
        yield "  checked: header and sizes; --verify reads the numbers"


# ---- diff


def diff(args):
    (a, in_a), (b, in_b) = (adapter_format.read(x) for x in (args.a, args.b))
    settings = {
        name: [a[name], b[name]] for name in _SETTINGS if a[name] != b[name]
    }
    both = [path for path in a["layers"] if path in b["layers"]]
    layers = {
        path: {
            **{
                name: [a["layers"][path][name], b["layers"][path][name]]
                for name in _COMPARED
                if a["layers"][path][name] != b["layers"][path][name]
            },
            "cosine": {
                vector: _cosine(
                    *(x[_entry_name(path, vector)] for x in (in_a, in_b))
                )
                for vector in _VECTORS
            },
        }
        for path in both
    }
    found = {
        "a": args.a,
        "b": args.b,
        "settings": settings,
        "layers": layers,
        "layers_in_a_only": [x for x in a["layers"] if x not in b["layers"]],
        "layers_in_b_only": [x for x in b["layers"] if x not in a["layers"]],
        "different_unsaved": a["unsaved"] != b["unsaved"],
        "different_entries": sorted(
            name
            for name in in_a.keys() | in_b.keys()
            if not _is_equal(in_a.get(name), in_b.get(name))
        ),
    }
    is_same = not (
        settings
        or found["different_unsaved"]
        or found["different_entries"]
        or found["layers_in_a_only"]
        or found["layers_in_b_only"]
        or any(len(layer) > 1 for layer in layers.values())
    )
    return found, _diff_lines(found, is_same), 0 if is_same else 1


def _diff_lines(found, is_same):
    if is_same:
        yield "The adapters are the same."
        return
    for name, (a, b) in found["settings"].items():
        yield f"{name}: {a} | {b}"
    if found["different_unsaved"]:
        yield "fingerprints of what the files do not hold differ"
    for which in "ab":
        for path in found[f"layers_in_{which}_only"]:
            yield f"only in {found[which]}: {_shown(path)}"
    if found["layers"]:
        yield "cosine of d, of b"
    for path, layer in found["layers"].items():
        cosines = (
            "     -" if x is None else f"{x:6.3f}"
            for x in layer["cosine"].values()
        )
        kernels = (
            f"  {name}: {layer[name][0]} | {layer[name][1]}"
            for name in _COMPARED
            if name in layer
        )
        yield f"  {' '.join(cosines)}  {_shown(path)}{''.join(kernels)}"
    for name in found["different_entries"]:
        if not _is_vector(name):
            yield f"differs: {name}"


def _cosine(a, b):
    """Returns the cosine of two vectors, `None` where there is none."""
    a, b = (x.astype("float64").reshape(-1) for x in (a, b))
    sizes = np.linalg.norm(a) * np.linalg.norm(b)
    if a.shape != b.shape or not sizes:
        return None
    return float(np.clip(a @ b / sizes, -1, 1))


def _is_equal(a, b):
    return a is not None and b is not None and np.array_equal(a, b)


# ---- convert


def convert(args):
    is_peft = args.to in ("peft", "lora")
    for name in ("preset", "task", "num_classes"):
        if getattr(args, name) is not None and not is_peft:
            raise ValueError(f"`--{name}` is for peft and lora.")
    if args.rank is not None and args.to != "lora":
        raise ValueError("`--rank` is for lora.")
    found = {"file": args.file, "to": args.to, "output": args.output}
    if is_peft:
        found.update(_to_peft(args))
        written = [
            os.path.join(args.output, name)
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ]
    else:
        _to_dtype(args)
        written = [args.output]
    found["bytes"] = sum(map(os.path.getsize, written))
    return found, _convert_lines(found), 0


def _convert_lines(found):
    yield f"{found['output']}: {found['bytes']:,} bytes"
    lost = found.get("lost", {}).values()
    if any(lost):
        yield (
            "  Share of the squared norm that is lost: "
            f"{min(lost):.4f} to {max(lost):.4f} in {len(lost)} modules"
        )


def _to_dtype(args):
    output = adapter_format.check_filepath(args.output)
    header, tensors = adapter_format.read(args.file)
    converted = {}
    for name, array in tensors.items():
        # A and B are always exact.
        if array.dtype == "float32" and not name.startswith("vera_kernel_"):
            array = adapter_format.in_dtype(name, array, args.to)
        converted[name] = array
    adapter_format.write(output, header, converted)


def _to_peft(args):
    hub_paths.check_is_here(
        "output",
        args.output,
        "Write a folder here and upload it with huggingface_hub.",
    )
    if args.preset is None:
        raise ValueError(
            "PEFT's names of modules, and its matrices, are found with the "
            "base model. Pass `--preset`, as in `--preset roberta_base_en`."
        )
    # All that is wrong with the file comes before a model is built.
    header, _ = adapter_format.read(args.file)
    try:
        import keras_hub
    except ImportError as error:
        raise ValueError(
            "PEFT's names of modules need KerasHub. Install it with "
            "`pip install keras_hub` or `pip install keras_vera[hub]`."
        ) from error
    from keras_vera.files.adapter import load_adapter
    from keras_vera.peft.save import save_peft_adapter

    task = args.task or "Backbone"
    model_class = getattr(keras_hub.models, task, None)
    if not hasattr(model_class, "from_preset"):
        raise ValueError(f"`--task`: keras_hub.models has no model '{task}'.")
    is_task = not issubclass(model_class, keras_hub.models.Backbone)
    if not is_task and header["bases"] != [""]:
        raise ValueError(
            f"'{args.file}' was saved from a task, with its backbone at "
            f"{header['bases']}. Pass `--task`, as in `--task CausalLM`."
        )
    if not is_task and args.num_classes is not None:
        raise ValueError(
            "`--num-classes` is for a classifier. Pass `--task` as well, as "
            "in `--task TextClassifier`."
        )
    kwargs = {"preprocessor": None} if is_task else {}
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    try:
        model = model_class.from_preset(args.preset, **kwargs)
    except TypeError as error:  # Arguments of the task's own class.
        raise ValueError(
            f"`--task {task}` could not be made, with {kwargs}: {error}. A "
            "classifier needs `--num-classes`."
        ) from error
    load_adapter(model, args.file)
    as_lora = args.to == "lora" and (True if args.rank is None else args.rank)
    is_hub, name = args.preset.startswith("hf://"), args.preset[len("hf://") :]
    report = save_peft_adapter(
        model, args.output, name if is_hub else None, as_lora=as_lora
    )
    return report or {}


# ----


def _is_vector(name):
    return name.rsplit("/", 1)[-1] in _VECTORS


def _entry_name(path, name):
    return f"{path}/{name}" if path else name


def _shown(path):
    return path or "the model"
