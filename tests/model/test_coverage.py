"""Every backbone that KerasHub makes public, adapted: `docs/coverage.md`.

Each row of the table is a test here. `COVERAGE=write pytest --all` writes it.
"""

import os
import pathlib
import re
import warnings

import backbones
import numpy as np
import pytest
from backbones import ENTRIES
from gradients import compiled_outputs
from gradients import outputs
from gradients import squares_and_gradients
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import spoil
from keras import ops

import keras_vera
from keras_vera import _keras
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._kinds import kind_of
from keras_vera.model.adaptation import adapted_layers
from keras_vera.model.roles import ROLES
from keras_vera.model.roles import adaptable_layers

TABLE = pathlib.Path(__file__).parents[2] / "docs" / "coverage.md"
COVERAGE = os.environ.get("COVERAGE")
MISSING = "missing its entry in `tests/backbones.py`"
# A later KerasHub has more classes, which show up as missing.
NAMES = sorted(
    {*ENTRIES, *backbones.public_backbones()},
    key=lambda name: (name in ENTRIES and ENTRIES[name].modality, name),
)
# JAX and TensorFlow compile them for long.
LONG = {
    "BASNetBackbone",
    "BLIP2Backbone",
    "DFineBackbone",
    "FluxBackbone",
    "HGNetV2Backbone",
    "MoonshineBackbone",
    "SAMBackbone",
    "StableDiffusion3Backbone",
    "T5Backbone",
    "T5Backbone:gated",
    "WhisperBackbone",
}
# They read the size of images, or the number of steps, as numbers.
NOT_COMPILED = {"Qwen3_5Backbone:vision", "StableDiffusion3Backbone"}
# On PyTorch, KerasHub needs torchvision for it.
NEEDS_TORCHVISION = {"SAM3PromptableConceptBackbone"}
HEAD = """# Coverage

Every backbone class of KerasHub {version}, built tiny: how many of its layers
each role of `targets` means, and the numbers that train with `rank=4` where
all of them are adapted. A row passes if the adapted model starts exactly as
the base, one step moves all vectors and nothing else, and the saved, loaded
and merged models give the outputs of the trained one.
`tests/model/test_coverage.py` checks and writes this table.

{counts}

| backbone | reads | {roles} | trained | |
|---|---|{lines}|---|---|
"""


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Hundreds of programs are compiled here, each to run once."""
    if backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_same(received, expected, tolerance=0):
    """Asserts equality, to the bit where nothing but the model decides.

    XLA makes another program for another model, and on PyTorch the products
    of plain layers depend on where their inputs lie in memory.
    """
    if backend() != "tensorflow":
        tolerance = 1e-4
    for a, b in zip(received, expected, strict=True):
        scale = 1 + np.max(np.abs(b), initial=0)
        assert largest_difference(a, b) <= tolerance * scale


def count_layers(backbone):
    paths = _keras.structural_paths(backbone)
    adaptable = {
        path: layer
        for path, layer in adaptable_layers(paths).items()
        if layer.built
    }
    return {name: len(role(paths, adaptable)) for name, role in ROLES.items()}


def kernels_without_gradient(entry, x, jit):
    """Returns the paths of layers on which no output depends.

    Such as queries and keys of a single token. Their gradients are zero, or
    what rounding leaves of it.
    """
    plain = backbones.make_backbone(entry)
    outputs(plain, x, jit)
    _, gradients = squares_and_gradients(plain, x, jit)
    sizes = [np.max(np.abs(x), initial=0.0) for x in gradients]
    kept = {
        id(variable)
        for variable, size in zip(plain.trainable_variables, sizes)
        if size > 1e-6 * max(sizes)
    }
    return [
        path
        for path, layer in _keras.structural_paths(plain).items()
        if kind_of(type(layer))
        and layer.built
        and id(stored_kernel(layer)) not in kept
    ]


def cover(name, tmp_path):
    """Goes with a backbone through all that a user does; returns its row."""
    entry = ENTRIES[name]
    backbone = backbones.make_backbone(entry)
    x = backbones.make_inputs(entry)
    jit = name not in NOT_COMPILED
    base = outputs(backbone, x, jit)
    counts = count_layers(backbone)

    if counts["attention-qv"]:
        keras_vera.enable_vera(backbone, rank=4)
        assert_same(outputs(backbone, x, jit), base)
        keras_vera.disable_vera(backbone)
    else:
        with pytest.raises(ValueError, match="Roles that match layers"):
            keras_vera.enable_vera(backbone, rank=4)

    targets = [
        role for role in ("all-linear", "conv", "embedding") if counts[role]
    ]
    keras_vera.enable_vera(backbone, rank=4, targets=targets)
    adapted_outputs = compiled_outputs(backbone, jit)
    assert_same(adapted_outputs(x), base)
    layers = adapted(backbone)
    assert len(layers) == sum(counts[role] for role in targets)
    vectors = [v for x in layers for v in (x.vera_lambda_d, x.vera_lambda_b)]
    trainable = {id(v) for v in backbone.trainable_variables}
    assert trainable == {id(v) for v in vectors}

    spoil(backbone, scale=0.1)
    before = numpy_weights(backbone)
    start = adapted_outputs(x)
    loss, gradients = squares_and_gradients(backbone, x, jit)
    assert np.isfinite(loss)
    for variable, gradient in zip(backbone.trainable_variables, gradients):
        variable.assign(variable - 1e-2 * gradient)
    for weight, old in zip(backbone.weights, before):
        if id(weight) not in trainable:
            assert np.all(ops.convert_to_numpy(weight) == old), weight.path
    old = dict(zip(map(id, backbone.weights), before))
    resting = [
        path
        for path, layer in adapted_layers(backbone).items()
        for v in (layer.vera_lambda_d, layer.vera_lambda_b)
        if np.all(ops.convert_to_numpy(v) == old[id(v)])
    ]
    if resting:
        # Rightly so, where the kernel itself would not train either.
        useless = kernels_without_gradient(entry, x, jit)
        assert not [path for path in resting if path not in useless]
    trained = adapted_outputs(x)
    assert any(largest_difference(a, b) > 0 for a, b in zip(trained, start))

    keras_vera.save_adapter(backbone, tmp_path / "a.vera.safetensors")
    loaded = backbones.make_backbone(entry)
    if any(not layer.built for layer in loaded._flatten_layers()):
        outputs(loaded, x, jit)
    keras_vera.load_adapter(loaded, tmp_path / "a.vera.safetensors")
    assert_same(outputs(loaded, x, jit), trained)
    keras_vera.merge(backbone)
    assert not adapted(backbone)
    assert_same(outputs(backbone, x, jit), trained, tolerance=1e-4)

    cells = [
        f"`{name}`",
        entry.modality,
        *(str(counts[role] or "") for role in ROLES),
        f"{sum(int(np.prod(v.shape)) for v in vectors):,}",
        "pass",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.fixture(scope="module")
def table():
    rows = {}
    yield rows
    if COVERAGE == "write":
        TABLE.write_text(render(rows))


def render(rows):
    import keras_hub

    passed = {x.partition(":")[0] for x, row in rows.items() if "pass" in row}
    classes = {name.partition(":")[0] for name in rows}
    counts = (
        f"{len(passed)} of {len(classes)} classes pass, in "
        f"{len(rows)} configurations."
    )
    head = HEAD.format(
        version=keras_hub.__version__,
        counts=counts,
        roles=" | ".join(ROLES),
        lines="|".join("---" for _ in ROLES),
    )
    return head + "\n".join(rows.values()) + "\n"


def in_turn(name):
    mark = pytest.mark.in_turn
    return pytest.param(name, marks=mark("torch") if name in LONG else mark)


@pytest.mark.parametrize("name", [in_turn(name) for name in NAMES])
def test_backbone(name, tmp_path, table):
    if name not in ENTRIES:
        table[name] = f"| `{name}` |{' |' * (len(ROLES) + 2)} {MISSING} |"
        pytest.fail(f"{name} is {MISSING}")
    if name in NEEDS_TORCHVISION and backend() == "torch":
        pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = cover(name, tmp_path)
    table[name] = row
    if COVERAGE != "write":
        assert row in TABLE.read_text().splitlines()


def test_readme_counts():
    counts = re.search(r"\d+ of \d+ classes pass", TABLE.read_text())[0]
    readme = (TABLE.parents[1] / "README.md").read_text()
    assert counts.replace(" pass", "") in " ".join(readme.split())
