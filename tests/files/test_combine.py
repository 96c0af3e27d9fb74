"""Weighted sums of adapters, checked against NumPy in float64."""

import adapter_files
import banks
import keras
import numpy as np
import peft
import pytest
from helpers import adapted
from helpers import largest_difference
from helpers import predict
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from peft_families import both_models
from peft_families import with_peft

import keras_vera
from keras_vera.files.combined import _nearest

pytestmark = pytest.mark.in_turn

X = np.random.default_rng(7).normal(size=(4, 5)).astype("float32")
TOKENS = np.random.default_rng(8).integers(0, 9, (4, 5))
EXTENSION = ".vera.safetensors"


def make_model(structure="dense", rank=6, targets=None, vera=True):
    """An embedding, a convolution and dense layers of several sizes."""
    keras.utils.set_random_seed(0)
    x = keras.Input((5,), dtype="int32")
    y = keras.layers.Embedding(9, 4, name="table")(x)
    y = keras.layers.Conv1D(3, 2, name="conv")(y)
    y = keras.layers.EinsumDense("abc,dec->abde", (4, 2, 3), name="einsum")(y)
    y = keras.layers.Flatten()(y)
    backbone = keras.Model(x, keras.layers.Dense(7, name="wide")(y))
    head = keras.layers.Dense(2, name="head")
    model = keras.Model(x, head(backbone(x)))
    if vera:
        targets = targets or ["table", "conv", "einsum", "wide"]
        keras_vera.enable_vera(
            backbone, rank=rank, targets=targets, structure=structure
        )
    return model


def write(model, folder, names, change=None):
    """Saves random adapters; returns their files and their updates."""
    files, updates = {}, {}
    for seed, name in enumerate(names):
        banks.randomize(model, seed + 1)
        if change is not None:
            change(model, seed)
        files[name] = str(folder / f"{name}{EXTENSION}")
        keras_vera.save_adapter(model, files[name])
        updates[name] = updates_of(model)
    return files, updates


def updates_of(model):
    """What the adapter adds to each kernel, in float64 from its parts."""
    found = []
    for layer in adapted(model):
        structure = layer._vera_layout.structure
        pair = structure.as_matrices(*layer.projection_slices())
        a, b_matrix, d, b = (
            ops.convert_to_numpy(x).astype("float64")
            for x in (*pair, layer.vera_lambda_d, layer.vera_lambda_b)
        )
        factor_a, factor_b = structure.factors
        found.append(factor_a * factor_b * ((a * d) @ (b_matrix * b)))
    return found


def weighted(updates, weights):
    return [
        sum(w * x for w, x in zip(weights, layer))
        for layer in zip(*updates.values())
    ]


def loaded(file, structure="dense"):
    model = make_model(vera=False)
    keras_vera.load_adapter(model, file)
    return model


def relative_errors(received, expected):
    return [
        np.linalg.norm(x - y) ** 2 / np.linalg.norm(y) ** 2
        for x, y in zip(received, expected)
    ]


RANKS = {"table": 6, "conv": 3, "einsum": 5, "wide": 6}


@pytest.mark.parametrize(
    ("structure", "targets"),
    [
        ("dense", None),
        ("dense", RANKS),
        ("blocks2", None),
        ("blocks2", RANKS),
    ],
)
def test_exact_sums(structure, targets, tmp_path):
    model = make_model(structure, targets=targets)
    files, updates = write(model, tmp_path, "abc")
    weights = [1.5, -0.7, 0.25]
    result = tmp_path / f"sum{EXTENSION}"
    lost = keras_vera.combine(
        dict(zip(files.values(), weights)), result, head=files["b"]
    )
    assert set(lost.values()) == {0.0} and len(lost) == 4
    expected = weighted(updates, weights)
    model = loaded(result)
    for x, y in zip(updates_of(model), expected):
        np.testing.assert_allclose(x, y, atol=2e-6 * np.abs(y).max())
        assert np.abs(y).max() > 0.1
    # The kernels themselves, as the model uses them.
    base = make_model(vera=False)
    outputs = predict(model, TOKENS)
    for layer, change in zip(adapted(model), expected):
        own = next(x for x in base._flatten_layers() if x.name == layer.name)
        contraction = layer._vera_layout.contraction
        kernel = own.embeddings if layer.name == "table" else own.kernel
        kernel.assign(
            kernel
            + contraction.kernel_tensor(
                ops.convert_to_tensor(change.astype("float32"))
            )
        )
    _, entries = adapter_files.read(tmp_path / f"b{EXTENSION}")
    head = base.layers[-1]
    head.kernel.assign(entries["layers/dense/kernel"])
    head.bias.assign(entries["layers/dense/bias"])
    assert largest_difference(predict(base, TOKENS), outputs) < 1e-5
    # It is an adapter like any other.
    keras_vera.save_adapter(model, tmp_path / f"again{EXTENSION}")
    keras_vera.combine(
        {tmp_path / f"again{EXTENSION}": 2.0},
        tmp_path / f"twice{EXTENSION}",
        head=tmp_path / f"again{EXTENSION}",
    )
    for x, y in zip(
        updates_of(loaded(tmp_path / f"twice{EXTENSION}")), expected
    ):
        np.testing.assert_allclose(x, 2 * y, atol=4e-6 * np.abs(y).max())


def same_d(model, seed):
    for layer in adapted(model):
        layer.vera_lambda_d.assign(np.linspace(0.1, 0.9, 6))


def multiples_of_b(model, seed):
    for layer in adapted(model):
        n = layer.vera_lambda_b.shape[0]
        layer.vera_lambda_b.assign(np.linspace(-0.9, 0.8, n) * 2.0**seed)


@pytest.mark.parametrize("method", ["exact", "nearest"])
@pytest.mark.parametrize("change", [same_d, multiples_of_b])
def test_sums_that_vectors_give_stay_small(change, method, tmp_path):
    files, updates = write(make_model(), tmp_path, "ab", change)
    weights = [0.75, -2.0]
    result = tmp_path / f"sum{EXTENSION}"
    lost = keras_vera.combine(
        dict(zip(files.values(), weights)), result, method, head=files["a"]
    )
    assert max(lost.values()) < 1e-13
    header, entries = adapter_files.read(result)
    before, _ = adapter_files.read(tmp_path / f"a{EXTENSION}")
    assert (header["seed"], header["structure"]) == (0, "dense")
    assert "vera_kernel_a" not in entries and len(entries) == 10
    assert header["projection_sha256"] == before["projection_sha256"]
    for x, y in zip(updates_of(loaded(result)), weighted(updates, weights)):
        np.testing.assert_allclose(x, y, atol=2e-6 * np.abs(y).max())


@pytest.mark.parametrize("weight", [-1.0, 0.5, 3, 0])
@pytest.mark.parametrize("method", ["exact", "nearest"])
def test_one_adapter_scaled_and_negated(weight, method, tmp_path):
    files, updates = write(make_model(), tmp_path, "a")
    result = tmp_path / f"scaled{EXTENSION}"
    keras_vera.combine({files["a"]: weight}, result, method, head=files["a"])
    _, entries = adapter_files.read(result)
    _, before = adapter_files.read(tmp_path / f"a{EXTENSION}")
    for name, array in before.items():
        if name.endswith("vera_lambda_b"):
            array = array * weight
        np.testing.assert_allclose(entries[name], array, atol=1e-6)


def test_the_mean_of_the_vectors(tmp_path):
    files, updates = write(make_model(), tmp_path, "abc")
    weights = [0.5, 0.75, -0.25]
    result = tmp_path / f"mean{EXTENSION}"
    lost = keras_vera.combine(
        dict(zip(files.values(), weights)), result, method="average"
    )
    _, entries = adapter_files.read(result)
    each = [adapter_files.read(tmp_path / f"{x}{EXTENSION}")[1] for x in "abc"]
    for name, array in entries.items():  # Heads as well.
        mean = sum(w * x[name].astype("float64") for w, x in zip(weights, each))
        np.testing.assert_allclose(array, mean, atol=1e-6)
    errors = relative_errors(
        updates_of(loaded(result)), weighted(updates, weights)
    )
    received = sorted(lost.values())
    np.testing.assert_allclose(received, sorted(errors), rtol=1e-3)
    assert min(errors) > 0.05


@pytest.mark.parametrize("structure", ["dense", "blocks2"])
def test_the_nearest_vectors(structure, tmp_path):
    model = make_model(structure)
    files, updates = write(model, tmp_path, "ab")
    result = tmp_path / f"near{EXTENSION}"
    each = {files["a"]: 0.5, files["b"]: 0.5}
    lost = keras_vera.combine(each, result, method="nearest")
    errors = relative_errors(
        updates_of(loaded(result)), weighted(updates, [0.5, 0.5])
    )
    received = sorted(lost.values())
    np.testing.assert_allclose(received, sorted(errors), rtol=1e-3)
    assert len(errors) == 4 and min(errors) > 1e-3
    mean = keras_vera.combine(each, result, method="average")
    # Nearer on the whole.
    assert sum(lost.values()) < sum(mean.values())


@given(
    k=st.integers(1, 4),
    r=st.integers(1, 8),
    n=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["any", "same d", "same b", "zero"]),
)
def test_nearest_is_numpys_best(k, r, n, seed, kind):
    rng = np.random.default_rng(seed)
    w, d, b = (
        rng.normal(size=k),
        rng.normal(size=(k, r)),
        rng.normal(size=(k, n)),
    )
    if kind == "same d":
        d[:] = d[0]
    if kind == "same b":
        b[:] = b[0] * rng.normal(size=(k, 1))
    if kind == "zero":
        b[:] = 0
    total = np.einsum("i,ik,ij->kj", w, d, b)
    new_d, new_b = _nearest(w, d, b)
    left, sizes, right = np.linalg.svd(total)
    best = sizes[0] * np.outer(left[:, 0], right[0])
    error = np.linalg.norm(total - np.outer(new_d, new_b))
    assert error <= np.linalg.norm(total - best) + 1e-9
    # d keeps the size that it was trained at.
    size = np.abs(w) @ np.linalg.norm(d, axis=1) / np.abs(w).sum()
    if sizes[0] > 1e-9:
        np.testing.assert_allclose(np.linalg.norm(new_d), size)


def edit(file, change):
    header, entries = adapter_files.read(file)
    change(header, entries)
    adapter_files.write(file, header, entries)


def another_seed(header, entries):
    header["seed"] = 5


def another_base(header, entries):
    header["layers"][2][2] = "0" * 16


def another_rank(header, entries):
    header["rank"] = 7


def fewer_layers(header, entries):
    del header["layers"][0]
    names = sorted(x for x in entries if "vera_lambda" in x)
    for name in names[:2]:
        del entries[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_seed, "differ in seed"),
        (another_rank, "differ in rank"),
        (another_base, "differ in layer '"),
        (fewer_layers, "differ in layer '"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, tmp_path):
    files, _ = write(make_model(), tmp_path, "ab")
    edit(tmp_path / f"b{EXTENSION}", change)
    result = tmp_path / f"sum{EXTENSION}"
    result.write_bytes(b"old")
    with pytest.raises(keras_vera.AdapterFileError, match=message):
        keras_vera.combine({files["a"]: 0.5, files["b"]: 0.5}, result)
    assert result.read_bytes() == b"old"


@pytest.mark.parametrize("method", ["exact", "nearest", "average"])
def test_another_rank_of_a_layer_is_refused(method, tmp_path):
    files = {}
    for name, rank in (("a", 2), ("b", 4)):
        model = make_model(targets={"wide": 4, "einsum": rank})
        files.update(write(model, tmp_path, name)[0])
    with pytest.raises(
        keras_vera.AdapterFileError, match="differ in the rank of '.*'"
    ):
        keras_vera.combine(
            {files["a"]: 0.5, files["b"]: 0.5},
            tmp_path / f"sum{EXTENSION}",
            method,
        )


def test_bad_arguments_are_refused(tmp_path):
    files, _ = write(make_model(), tmp_path, "ab")
    a, b = files.values()
    result = tmp_path / f"sum{EXTENSION}"
    for arguments, message in (
        (({}, result), "`adapters` must be a dict"),
        (([a, b], result), "`adapters` must be a dict"),
        (({a: 1}, "new", "nearest", None, 3), "must be an `AdapterBank`"),
        (({a: "1"}, result), "must be finite numbers.*='1'"),
        (({a: True}, result), "must be finite numbers"),
        (({a: float("nan")}, result), "must be finite numbers"),
        (({a: 1}, result, "mean"), "`method` must be one of.*'mean'"),
        (({a: 1, b: 1}, result, "average"), "sum to 1.*whose sum is 2"),
        (({a: 1}, result, "exact", b), "`head` must be one of the keys"),
        (({a: 1, b: 1}, result), "bias' trained outside.*Pass `head`"),
        (({a: 1}, tmp_path / "x.safetensors"), "must end in"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_vera.combine(*arguments)
    with pytest.raises(keras_vera.AdapterFileError, match="No such file"):
        keras_vera.combine({a: 1, tmp_path / f"c{EXTENSION}": 1}, result)
    assert not result.exists()
    # Files of before, which do not say what is an embedding.
    for file in files.values():
        edit(type(tmp_path)(file), lambda header, _: header.pop("embeddings"))
    with pytest.raises(ValueError, match="which layers are embeddings"):
        keras_vera.combine({a: 0.5, b: 0.5}, result)
    assert not result.exists()
    keras_vera.combine({a: 0.5, b: 0.5}, result, "nearest")
    loaded(result)


def test_files_say_what_may_be_an_embedding(tmp_path):
    """Only where a kernel has two axes, so that others stay as small."""
    for targets in (["table"], ["wide"], ["conv", "einsum"]):
        model = make_model(targets=targets)
        files, updates = write(model, tmp_path, "ab")
        found, _ = adapter_files.read(tmp_path / f"a{EXTENSION}")
        paths = [x.path for x in adapted(model)]
        if targets == ["conv", "einsum"]:
            assert "embeddings" not in found
        else:
            assert len(found["embeddings"]) == (targets == ["table"])
        assert len(found["layers"]) == len(paths)
        result = tmp_path / f"sum{EXTENSION}"
        weights = [0.5, 0.5]
        keras_vera.combine(dict(zip(files.values(), weights)), result)
        for x, y in zip(updates_of(loaded(result)), weighted(updates, weights)):
            np.testing.assert_allclose(x, y, atol=2e-6 * np.abs(y).max())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 1.0)])
def test_what_trained_in_the_base_in_full_is_refused(weights, tmp_path):
    model = make_model(vera=False)
    keras_vera.enable_vera(model.layers[1], targets=["wide"], train="bias")
    files, _ = write(model, tmp_path, "ab")
    result = tmp_path / f"sum{EXTENSION}"
    with pytest.raises(ValueError, match="bias'.* trained in the base in full"):
        keras_vera.combine(dict(zip(files.values(), weights)), result)
    assert not result.exists()


def test_heads_of_other_sizes_need_a_choice(tmp_path):
    files, _ = write(make_model(), tmp_path, "ab")

    def wider(header, entries):
        name = next(x for x in entries if x.endswith("/kernel"))
        entries[name] = np.ones((7, 3), "float32")

    edit(tmp_path / f"b{EXTENSION}", wider)
    result = tmp_path / f"sum{EXTENSION}"
    each = {x: 0.5 for x in files.values()}
    with pytest.raises(ValueError, match="Pass `head`.*shapes"):
        keras_vera.combine(each, result)
    keras_vera.combine(each, result, head=files["a"])
    _, a = adapter_files.read(tmp_path / f"a{EXTENSION}")
    _, entries = adapter_files.read(result)
    for name in a:
        if "vera" not in name:
            np.testing.assert_array_equal(entries[name], a[name])


@pytest.mark.parametrize("bias", ["none", "vera_only"])
def test_adapters_that_came_from_peft(bias, tmp_path):
    """A and B are in the files, and layers begin anywhere in B."""
    _, backbone = both_models("gpt2", tmp_path / "base")
    model, _ = both_models("gpt2", tmp_path / "base")
    with_peft(model, ["c_attn", "c_fc"], bias=bias).save_pretrained(
        tmp_path / "peft"
    )
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    files, updates = write(backbone, tmp_path, "ab")
    weights = [0.25, 0.75] if bias == "vera_only" else [2.0, -0.5]
    result = tmp_path / f"sum{EXTENSION}"
    each = dict(zip(files.values(), weights))
    keras_vera.combine(each, result)
    if bias == "vera_only":
        with pytest.raises(ValueError, match="is a bias of the adapters"):
            keras_vera.combine({files["a"]: 2}, result, head=files["a"])
    keras_vera.disable_vera(backbone)
    keras_vera.load_adapter(backbone, result)
    for x, y in zip(updates_of(backbone), weighted(updates, weights)):
        np.testing.assert_allclose(x, y, atol=2e-6 * np.abs(y).max())
    # And from there as LoRA, of the rank that they had.
    keras_vera.save_peft_adapter(backbone, tmp_path / "lora", as_lora=True)
    model, _ = both_models("gpt2", tmp_path / "base")
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    assert with_adapter.peft_config["default"].r == 5


# ---- In a bank.


def test_combined_in_a_bank(tmp_path):
    files = banks.make_files(tmp_path, ["ann", "bob"])
    each = {"ann": 0.5, "bob": 0.5}
    bank = banks.make_bank(files, capacity=6)
    before = banks.stacks(bank)
    with pytest.raises(ValueError, match="does not go into a bank"):
        keras_vera.combine(each, "zoe", bank=bank)
    with pytest.raises(ValueError, match="no adapter named 'eve'"):
        keras_vera.combine({"eve": 1}, "zoe", "nearest", bank=bank)
    with pytest.raises(ValueError, match="already"):
        keras_vera.combine(each, "bob", "nearest", bank=bank)
    after = banks.stacks(bank)
    assert all((before[x] == after[x]).all() for x in before)
    assert bank.names == ["ann", "bob"]
    lost = keras_vera.combine(each, "zoe", "nearest", bank=bank)
    of_files = keras_vera.combine(
        {files[x]: 0.5 for x in files}, tmp_path / f"zoe{EXTENSION}", "nearest"
    )
    assert lost == pytest.approx(of_files) and min(lost.values()) > 1e-3
    keras_vera.combine({"ann": -2}, "less", head="ann", bank=bank)
    x = np.random.default_rng(3).normal(size=(2, 3, banks.INPUTS))
    x = x.astype("float32")
    files["zoe"] = tmp_path / f"zoe{EXTENSION}"
    files["less"] = tmp_path / f"less{EXTENSION}"
    keras_vera.combine({files["ann"]: -2}, files["less"], head=files["ann"])
    outputs = banks.alone(files, x)
    for name in ("zoe", "less"):
        np.testing.assert_allclose(
            bank.predict(x, adapters=[name] * 2),
            outputs[name],
            atol=banks.ROUNDING,
        )
    assert largest_difference(outputs["zoe"], outputs["less"]) > 1e-2


@pytest.mark.parametrize("folder", [False, True])
def test_a_warm_start(folder, tmp_path):
    files = banks.make_files(tmp_path, ["ann", "bob", "eve"])
    bank = keras_vera.AdapterBank(
        banks.make_classifier(),
        capacity=1 if folder else 6,
        folder=tmp_path / "bank" if folder else None,
    )
    for name, file in files.items():
        bank.load(name, file)
    bank.add("few", classes=2)
    for arguments, message in (
        ({"like": []}, "one at least"),
        ({"like": ["ann", "zed"]}, "no adapter named 'zed'"),
        ({"like": ["ann", "few"]}, "same number of classes"),
        ({"like": "ann", "classes": 2}, "same number of classes"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.add("new", **arguments)
    assert "new" not in bank
    if not folder:
        bank.remove("few")
    bank.add("copy", like="ann")
    bank.add("mean", like=["ann", "bob", "eve"])
    every = {}
    for name in ("ann", "bob", "eve", "copy", "mean"):
        file = tmp_path / f"out{EXTENSION}"
        bank.save(name, file)
        _, every[name] = adapter_files.read(file)
    for name, array in every["ann"].items():
        np.testing.assert_array_equal(every["copy"][name], array)
        three = [every[x][name] for x in ("ann", "bob", "eve")]
        np.testing.assert_allclose(
            every["mean"][name], np.mean(three, axis=0), atol=1e-6
        )
    if folder:
        bank.add("more", like="few")
        bank.save("more", tmp_path / f"more{EXTENSION}")
        _, entries = adapter_files.read(tmp_path / f"more{EXTENSION}")
        assert {x.shape[-1] for k, x in entries.items() if "head" in k} <= {2}
