"""Modules of Hugging Face that KerasHub made one layer of.

Each of Swin's query, key and value has a d and a b of its own there, and all
begin with the first row of B. In the one layer of KerasHub each gets channels
of its own, in which B is 0 outside the module's outputs; so both directions
are exact, at a multiple of the rank.
"""

import numpy as np

from keras_vera import _keras


def with_parts(modules, parts):
    """Returns the layers of all modules, those of `parts` included."""
    return modules | {
        part: modules[name] for name, names in parts.items() for part in names
    }


def join_parts(found, matrices, parts, modules):
    """Puts the entries of parts together, as one layer has them.

    Args:
        found: Dict of dicts of arrays, PEFT's entries by module.
        matrices: PEFT's A `(rank, m)` and B `(n, rank)`.
        parts: Dict of tuples, the paths of parts by module.
        modules: Dict of lists of layers by module.

    Returns:
        The entries and the matrices without parts, and for modules that had
        some the first row of B that they use.
    """
    joined = {name: ps for name, ps in parts.items() if set(ps) & set(found)}
    if not joined:
        return found, matrices, {}
    twice = set(joined) & set(found)
    if twice:
        raise ValueError(f"it holds the modules {twice} whole and in parts.")
    places = sorted(
        {
            place
            for names in joined.values()
            for place, part in enumerate(names)
            if part in found
        }
    )
    a, b_matrix = matrices
    rank = len(a)
    entries, starts = {}, {}
    for module, own in found.items():
        if not any(module in names for names in joined.values()):
            d = np.zeros(rank * len(places), "float32")
            d[:rank] = own["vera_lambda_d"]
            entries[module] = {**own, "vera_lambda_d": d}
    bands = [np.pad(b_matrix, [(0, 0), (0, rank * (len(places) - 1))])]
    rows = {}  # Where the band for parts of a size begins.
    for module, names in joined.items():
        own = [found.get(part) for part in names]
        n = next(len(x["vera_lambda_b"]) for x in own if x)
        if n not in rows:
            rows[n] = sum(map(len, bands))
            band = np.zeros((n * len(names), rank * len(places)), "float32")
            for channel, place in enumerate(places):
                band[
                    place * n : (place + 1) * n,
                    channel * rank : (channel + 1) * rank,
                ] = b_matrix[:n]
            bands.append(band)
        starts[module] = rows[n]
        entries[module] = _joined(own, places, rank, modules[module][0])
    return (
        entries,
        [np.tile(a, (len(places), 1)), np.concatenate(bands)],
        starts,
    )


def _joined(entries, places, rank, layer):
    """Returns the entries of one layer from those of its parts, or `None`."""
    n = next(len(x["vera_lambda_b"]) for x in entries if x)

    def collect(what, absent):
        return np.concatenate(
            [
                x[what] if x and what in x else absent(place)
                for place, x in enumerate(entries)
            ]
        )

    result = {
        "vera_lambda_d": np.concatenate(
            [
                entries[place]["vera_lambda_d"]
                if entries[place]
                else np.zeros(rank, "float32")
                for place in places
            ]
        ),
        "vera_lambda_b": collect(
            "vera_lambda_b", lambda _: np.zeros(n, "float32")
        ),
    }
    if any(x and "base_layer.bias" in x for x in entries):
        bias = _keras.to_numpy(layer.bias)
        result["base_layer.bias"] = collect(
            "base_layer.bias", lambda place: bias[place * n : (place + 1) * n]
        )
    return result


def split_parts(tensors, matrices, before, parts):
    """Gives parts of layers entries of their own, as PEFT has them.

    Args:
        tensors: Dict of arrays, PEFT's by name.
        matrices: The names of A and B in it.
        before: String, what stands before the paths of modules in names.
        parts: Dict of tuples, the paths of parts by module.

    Returns:
        The tensors, with a rank that is larger.
    """
    parts = {
        name: names
        for name, names in parts.items()
        if f"{before}{name}.vera_lambda_b" in tensors
    }
    if not parts:
        return tensors
    tensors = dict(tensors)
    a, b_matrix = (tensors.pop(name) for name in matrices)
    rank = len(a)
    # A part uses the first rows of B: those that it had in the layer.
    offsets = {0: 0}
    split = {}
    for module, names in parts.items():
        d, b, bias = (
            tensors.pop(f"{before}{module}.{what}", None)
            for what in ("vera_lambda_d", "vera_lambda_b", "base_layer.bias")
        )
        n = len(b) // len(names)
        for place, part in enumerate(names):
            own = slice(place * n, (place + 1) * n)
            channel = offsets.setdefault(place * n, len(offsets))
            split[f"{before}{part}.vera_lambda_d"] = d, channel
            tensors[f"{before}{part}.vera_lambda_b"] = b[own]
            if bias is not None:
                tensors[f"{before}{part}.base_layer.bias"] = bias[own]
    for name, array in tensors.items():
        if name.endswith(".vera_lambda_d"):
            split[name] = array, 0
    for name, (d, channel) in split.items():
        wide = np.zeros(rank * len(offsets), "float32")
        wide[channel * rank : (channel + 1) * rank] = d
        tensors[name] = wide
    # PEFT has as many rows as the largest module has outputs.
    n = max(len(x) for y, x in tensors.items() if y.endswith("vera_lambda_b"))
    shifted = [
        np.pad(b_matrix[offset:], [(0, min(offset, len(b_matrix))), (0, 0)])
        for offset in offsets
    ]
    wide = np.tile(a, (len(offsets), 1)), np.concatenate(shifted, axis=1)[:n]
    return {**dict(zip(matrices, wide)), **tensors}
