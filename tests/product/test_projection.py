"""The numbers of A and B, and the one pair that the layers of a model share."""

import gc
import hashlib
import json
import weakref
from unittest import mock

import keras
import numpy as np
import pytest
from helpers import predict
from helpers import spoil
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_vera import SharedProjection
from keras_vera.layers import VeRADense
from keras_vera.product import random
from keras_vera.product.random import unit_uniform

MASK = 2**64 - 1


def philox4x64_10(counter, key):
    """Returns a block, written from Salmon et al., 2011: four 64-bit words."""
    c, k = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        p = 0xD2E7470EE14C6C93 * c[0]
        q = 0xCA5A826395121157 * c[2]
        c = [q >> 64 ^ c[1] ^ k[0], q & MASK, p >> 64 ^ c[3] ^ k[1], p & MASK]
        k[0] = k[0] + 0x9E3779B97F4A7C15 & MASK
        k[1] = k[1] + 0xBB67AE8584CAA73B & MASK
    return c


def reference(seed, stream, count, start=0):
    entries = []
    for i in range(start, start + count):
        block, half = divmod(i, 8)
        # NumPy's Philox counts first and makes the block afterwards.
        words = philox4x64_10(block + 1, (seed, stream))
        word = words[half // 2] >> 32 * (half % 2) & 0xFFFFFFFF
        integer = 2 * (word >> 8) + 1 - 2**24
        # 24 by 24 bits is exact in float64, so this rounds once.
        entries.append(integer * float(np.float32(3**0.5)) / 2**24)
    return np.array(entries, "float32")


def sha256(array):
    digest = hashlib.sha256(np.ascontiguousarray(array, "<f4"))
    return digest.hexdigest()[:32]


def pair(projection):
    return (
        ops.convert_to_numpy(projection.vera_kernel_a),
        ops.convert_to_numpy(projection.vera_kernel_b),
    )


def make_pair(m, n, **kwargs):
    projection = SharedProjection(**kwargs)
    projection.reserve(m, n)
    return pair(projection)


def make_model(projection):
    return keras.Sequential(
        [
            keras.Input((4,)),
            VeRADense(6, projection=projection),
            VeRADense(3, projection=projection),
            VeRADense(5, projection=projection),
        ]
    )


def pair_ids(model):
    return {id(v) for v in model.variables if v.name.startswith("vera_kernel_")}


def test_reference_gives_the_published_answer():
    # Random123's kat_vectors: philox4x64, 10 rounds, all zero.
    assert philox4x64_10(0, (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


# Made by `sha256(reference(seed, stream, count, start))`, the plain Python
# above; for the pairs, of `(seed, 0, m * rank)` and `(seed, 1, n * rank)`.
GOLDEN_SLICES = [
    # seed, stream, count, start
    (0, 0, 1000, 0, "afac6e9d55f29c3bdc8f879d2d1ae870"),
    (0, 1, 1000, 0, "eb08d97bf4fcdd7806acb98e3c63161d"),
    (42, 0, 77, 65531, "802ec4846f5b56e44384436444f10705"),
    (MASK, 1, 33, 2**40 + 5, "660c6610a8875481a1252621c386a48c"),
]
GOLDEN_PAIRS = [
    # seed, rank, m, n, of A, of B
    (
        0,
        4,
        5,
        3,
        "9378eec77a8166c78466bb22dd9a8d8e",
        "f505e74d9816afc680b4c5d18f9fcb1d",
    ),
    (
        0,
        256,
        64,
        300,
        "7c48804fd0a8d369d51b402697377791",
        "1ccf59cfc6289f0315f0115f1f87fb99",
    ),
    (
        MASK,
        3,
        7,
        5,
        "f5f9d07faca1a3f4aaad0829a503027e",
        "8d08a225d7cf6d57504aa30f6f6ef680",
    ),
]


@pytest.mark.parametrize("seed, stream, count, start, expected", GOLDEN_SLICES)
def test_golden_slices(seed, stream, count, start, expected):
    assert sha256(unit_uniform(seed, stream, count, start)) == expected


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def floatx(request):
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("seed, rank, m, n, hash_a, hash_b", GOLDEN_PAIRS)
def test_golden_pairs(seed, rank, m, n, hash_a, hash_b, floatx):
    a, b = make_pair(m, n, seed=seed, rank=rank)
    assert (a.shape, b.shape) == ((m, rank), (rank, n))
    assert sha256(a) == hash_a
    # B is filled by columns, so that more columns append entries.
    assert sha256(b.T) == hash_b


@given(
    seed=st.integers(0, MASK) | st.integers(MASK - 3, MASK),
    stream=st.integers(0, 3),
    start=st.integers(0, 100) | st.integers(2**32, 2**50),
    count=st.integers(0, 60),
    chunk=st.sampled_from([8, 10, 16, 1 << 16]),
)
def test_generator_is_the_reference(seed, stream, start, count, chunk):
    with mock.patch.object(random, "_CHUNK", chunk):
        entries = unit_uniform(seed, stream, count, start)
    assert entries.dtype == "float32"
    expected = reference(seed, stream, count, start)
    np.testing.assert_array_equal(entries, expected)


def test_chunks_join():
    # The size that is used, which the small ones above stand for.
    start = random._CHUNK - 20
    np.testing.assert_array_equal(
        unit_uniform(7, 0, start + 40)[start:], reference(7, 0, 40, start)
    )


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        min_size=2,
        max_size=4,
    ),
    rank=st.sampled_from([1, 3, 8]),
    structure=st.sampled_from(["dense", "blocks2"]),
)
def test_growth_appends(sizes, rank, structure):
    kwargs = {"seed": 5, "rank": rank, "structure": structure}
    growing = SharedProjection(**kwargs)
    for m, n in sizes:
        growing.reserve(m, n)
        m_max, n_max = np.max(sizes, axis=0)
        whole_a, whole_b = make_pair(m_max, n_max, **kwargs)
        a, b = pair(growing)
        assert a.shape[0] >= m and b.shape[1] >= n
        np.testing.assert_array_equal(a, whole_a[: a.shape[0]])
        np.testing.assert_array_equal(b, whole_b[:, : b.shape[1]])
    # No larger than its largest layer.
    width = rank if structure == "dense" else 2 * -(-rank // 4)
    assert (a.shape, b.shape) == ((m_max, width), (width, n_max))


def test_blocks_are_smaller_and_of_the_same_stream():
    # A stored row of 16 blocks has 1024 / 16 entries.
    a, b = make_pair(32, 48, seed=5, rank=1024, structure="blocks")
    assert (a.shape, b.shape) == ((32, 64), (64, 48))
    dense_a, dense_b = make_pair(32, 48, seed=5, rank=64)
    np.testing.assert_array_equal(a, dense_a)
    np.testing.assert_array_equal(b, dense_b)


@pytest.mark.parametrize(
    "value", ["block", "blocks1", "blocks0", "blocks-4", "blocks4.5", 4, None]
)
def test_unknown_structures_are_refused(value):
    with pytest.raises(ValueError, match="`structure` must be 'dense', ") as e:
        SharedProjection(structure=value)
    assert f"Received: structure={value!r}" in str(e.value)


def test_enough_space_changes_nothing():
    projection = SharedProjection(rank=2)
    projection.reserve(5, 7)
    a, b = projection.vera_kernel_a, projection.vera_kernel_b
    projection.reserve(5, 3)
    assert projection.vera_kernel_a is a and projection.vera_kernel_b is b
    projection.reserve(6, 7)
    assert projection.vera_kernel_a is not a and projection.vera_kernel_b is b


@pytest.mark.parametrize("chunk", [16, 1 << 16])
def test_parts_are_those_of_the_whole(monkeypatch, chunk):
    monkeypatch.setattr(random, "_CHUNK", chunk)
    whole = unit_uniform(5, 1, 9 * 7).reshape(9, 7)
    for rows in (slice(0, 9), slice(3, 8), slice(4, 4)):
        for columns in (slice(0, 7), slice(2, 5), slice(6, 7)):
            part = random.unit_uniform_rows(5, 1, 7, rows, columns)
            np.testing.assert_array_equal(part, whole[rows, columns])


def test_entries_are_uniform_with_unit_variance():
    for x in make_pair(400, 500, rank=64, seed=3):
        # Five standard errors of the mean, and of the variance: for uniform
        # entries, the standard deviation of the squares is sqrt(4 / 5).
        assert abs(x.mean(dtype="float64")) < 5 / np.sqrt(x.size)
        assert abs(x.var(dtype="float64") - 1) < 5 * np.sqrt(0.8 / x.size)
        assert np.abs(x).max() <= np.float32(np.sqrt(3))
        quarters = np.histogram(x, bins=4, range=(-(3**0.5), 3**0.5))[0]
        np.testing.assert_allclose(quarters / x.size, 0.25, atol=0.02)


def test_neighbours_are_uncorrelated():
    a, b = make_pair(400, 400, rank=16, seed=0)
    for x, y in [(a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a, b.T)]:
        assert abs(np.mean(x * y)) < 5 / np.sqrt(x.size)


def test_seed_stream_and_rank_change_the_entries():
    a, b = make_pair(6, 6, seed=0, rank=4)
    for seed in (1, 2**32, MASK):
        other_a, other_b = make_pair(6, 6, seed=seed, rank=4)
        assert not np.any(other_a == a) and not np.any(other_b == b)
    assert not np.any(a == b.T)
    wide_a, wide_b = make_pair(6, 6, seed=0, rank=5)
    assert not np.any(wide_a[1:, :4] == a[1:])
    assert not np.any(wide_b[:4, 1:] == b[:, 1:])


def test_pair_is_counted_once_and_never_trained():
    projection = SharedProjection(rank=2)
    model = make_model(projection)
    # Kernels, biases and vectors of three layers, and one pair.
    assert len(model.weights) == 3 * 4 + 2
    assert len({id(v) for v in model.weights}) == len(model.weights)
    dense = [(4, 6), (6, 3), (3, 5)]
    assert model.count_params() == (
        sum(m * n + n for m, n in dense)
        + sum(2 + n for _, n in dense)
        + 2 * (6 + 6)
    )
    expected = {id(projection.vera_kernel_a), id(projection.vera_kernel_b)}
    assert pair_ids(model) == expected
    for value in (False, True):
        model.trainable = value
        for layer in model.layers:
            layer.trainable = value
    assert not projection.vera_kernel_a.trainable
    assert not projection.vera_kernel_b.trainable
    trained = {id(v) for v in model.trainable_variables}
    assert trained.isdisjoint(expected)


def test_pair_is_named_and_float32():
    projection = SharedProjection(rank=2)
    make_model(projection)
    for name in ("vera_kernel_a", "vera_kernel_b"):
        variable = getattr(projection, name)
        assert variable.name == name
        assert variable.dtype == "float32"


@pytest.mark.parametrize("grow", ["reserve", "new layer", "new model"])
def test_growth_reaches_built_layers(grow, rng):
    projection = SharedProjection(rank=2)
    model = make_model(projection)
    spoil(model)
    x = rng.normal(size=(5, 4)).astype("float32")
    old = weakref.ref(projection.vera_kernel_a)
    before = ops.convert_to_numpy(model(x))
    if grow == "reserve":
        projection.reserve(20, 30)
    elif grow == "new layer":
        VeRADense(30, projection=projection).build((None, 20))
    else:
        layer = VeRADense(30, projection=projection)
        keras.Sequential([keras.Input((20,)), layer])
    assert projection.vera_kernel_a.shape == (20, 2)
    assert projection.vera_kernel_b.shape == (2, 30)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before)
    for layer in model.layers:
        assert layer.vera_kernel_a is projection.vera_kernel_a
        assert layer.vera_kernel_b is projection.vera_kernel_b
    assert len(model.weights) == 3 * 4 + 2
    assert pair_ids(model) == {
        id(projection.vera_kernel_a),
        id(projection.vera_kernel_b),
    }
    gc.collect()
    assert old() is None


def test_growth_in_a_compiled_model(rng):
    projection = SharedProjection(rank=2)
    model = make_model(projection)
    spoil(model)
    model.compile("sgd", "mse")
    x, y = rng.normal(size=(4, 4)), rng.normal(size=(4, 5))
    model.fit(x, y, verbose=0)
    before = predict(model, x)
    projection.reserve(20, 30)
    np.testing.assert_array_equal(predict(model, x), before)
    model.fit(x, y, verbose=0)
    assert np.abs(predict(model, x) - before).max() > 0


def test_pair_made_while_a_model_is_traced(rng):
    # `fit` builds an unbuilt model where no variable can have a value yet.
    projection = SharedProjection(rank=2, seed=9)
    model = keras.Sequential(
        [
            VeRADense(4, projection=projection),
            VeRADense(7, projection=projection),
        ]
    )
    model.compile("sgd", "mse")
    x, y = rng.normal(size=(4, 5)), rng.normal(size=(4, 7))
    model.fit(x, y, verbose=0)
    assert len(pair_ids(model)) == 2
    expected = make_pair(5, 7, seed=9, rank=2)
    for ours, theirs in zip(pair(projection), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["seed", "rank"])
@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 1.0, -1, "0", None, np.float32(2)]
)
def test_bad_arguments_are_named(name, value):
    message = rf"`{name}` must be an integer, .*Received: {name}="
    with pytest.raises(ValueError, match=message) as error:
        SharedProjection(**{name: value})
    assert repr(value) in str(error.value)
    assert f"of type {type(value).__name__}" in str(error.value)


def test_limits():
    with pytest.raises(ValueError, match=f"`seed` must .*seed={2**64} "):
        SharedProjection(seed=2**64)
    with pytest.raises(ValueError, match="`rank` must .*rank=0 "):
        SharedProjection(rank=0)
    assert SharedProjection(seed=MASK, rank=1).seed == MASK
    assert SharedProjection(seed=0).seed == 0


def test_numpy_integers_are_integers():
    projection = SharedProjection(seed=np.uint64(MASK), rank=np.int32(3))
    assert json.loads(json.dumps(projection.get_config()))["seed"] == MASK
    assert type(projection.rank) is int


def test_config_round_trip():
    projection = SharedProjection(seed=2**63, rank=3, structure="blocks2")
    projection.reserve(4, 5)
    text = json.dumps(keras.saving.serialize_keras_object(projection))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert again is not projection
    assert (again.seed, again.rank) == (2**63, 3)
    assert again.structure == "blocks2"
    assert again.get_config() == projection.get_config()
    again.reserve(4, 5)
    for ours, theirs in zip(pair(again), pair(projection), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_config_is_the_same_before_and_after_building():
    # A config does not say how large the pair is: layers ask for that.
    projection = SharedProjection()
    before = projection.get_config()
    projection.reserve(2, 2)
    assert projection.get_config() == before
