"""Files that are damaged or made to do harm: one error, and no harm."""

import contextlib
import json
import os
import pathlib
import struct
import tempfile
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from adapter_files import read
from adapter_files import sealed
from adapter_files import write
from helpers import state
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from test_adapter_file import make_model
from test_adapter_file import make_trained

import keras_vera
from keras_vera import AdapterFileError
from keras_vera.files import format as adapter_format

pytestmark = pytest.mark.in_turn


@pytest.fixture(scope="module")
def model():
    return make_trained(np.zeros((12, 5, 8), "float32"))


@pytest.fixture(scope="module")
def fresh():
    return make_model()


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "task.vera.safetensors"
    keras_vera.save_adapter(model, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    # In memory where that is possible: thousands of files.
    folder = tmp_path_factory.mktemp("hostile")
    return folder / "task.vera.safetensors"


def refused(path):
    with pytest.raises(AdapterFileError, match=str(path)):
        adapter_format.read(path)


def test_every_byte_counts(content, path):
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        refused(path)


def test_truncation_at_any_byte(content, path):
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


BYTES = st.tuples(st.integers(0, 2**20), st.integers(0, 255))


@given(
    changes=st.lists(BYTES, min_size=1, max_size=8),
    cut=st.integers(0, 64),
    inserted=st.binary(max_size=16),
)
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutations(content, path, changes, cut, inserted):
    mutated = bytearray(content)
    for place, value in changes:
        mutated[place % len(mutated)] = value
    place = changes[0][0] % len(mutated)
    mutated[place : place + cut] = inserted
    path.write_bytes(mutated)
    if bytes(mutated) == content:
        adapter_format.read(path)
    else:
        refused(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["blocks256", "blocks99999999", "../../x", "dense"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data())
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_headers_with_a_right_checksum(content, path, fresh, data):
    """Whoever makes a file to do harm can compute its checksum as well."""
    path.write_bytes(content)
    header, tensors = read(path)
    names = ("rank", "seed", "structure", "d_initial", "layers", "bases")
    more = ("dropout", "targets", "embeddings", "sha256")
    name = data.draw(st.sampled_from([*names, *more]))
    value = data.draw(JSON)
    if name == "layers" and data.draw(st.booleans()):
        row = data.draw(st.integers(0, len(header["layers"]) - 1))
        place = data.draw(st.integers(0, 3))
        header["layers"][row][place : place + 1] = [value]
    else:
        header[name] = value
    write(path, header, tensors)
    before = state(fresh)
    try:
        keras_vera.load_adapter(fresh, path)
    except AdapterFileError as error:
        assert str(path) in str(error)
        assert state(fresh) == before
    else:
        # Such as another d_initial, which is only where training started.
        keras_vera.disable_vera(fresh)
        assert state(fresh)[0] == before[0]


def raw(index, numbers=b""):
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\x89HDF\r\n\x1a\n" + bytes(1000),
        b"PK\x03\x04" + bytes(1000),
        struct.pack("<Q", 2**63) + bytes(100),
        struct.pack("<Q", 2**40) + b"{}",
        raw({"x": entry(shape=[2**40], offsets=[0, 2**42])}),
        raw({"x": entry(shape=[2**62, 2**62], offsets=[0, 4])}, bytes(4)),
        raw({"x": entry(shape=[-1], offsets=[4, 0])}, bytes(4)),
        raw({"x": entry(dtype="F9")}, bytes(4)),
        raw({"../../etc/passwd": entry()}, bytes(4)),
        raw(b'{"x":' * 500 + b"1" + b"}" * 500),
        raw(b"[" * 100_000),
        raw({"__metadata__": {"keras_vera": "[" * 100_000}}),
        raw({"__metadata__": {"keras_vera": "1" * 10_000}}),
        raw({"__metadata__": {"keras_vera": "{}"}}),
        raw({"__metadata__": {"keras_vera": "{"}}),
        raw({"__metadata__": {"format": "pt"}}),
        raw({}),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_foreign_and_lying_files(path, hostile):
    path.write_bytes(hostile)
    tracemalloc.start()
    refused(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_names_that_occur_twice(content, path):
    (length,) = struct.unpack("<Q", content[:8])
    index = content[8 : 8 + length].rstrip()
    first = index.index(b'"backbone/')
    end = index.index(b"}", first) + 1
    twice = index[:end] + b"," + index[first:end] + index[end:]
    path.write_bytes(sealed(raw(twice, content[8 + length :])))
    with pytest.raises(AdapterFileError, match="2 times"):
        keras_vera.load_adapter(make_model(), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(content, path, value):
    path.write_bytes(content)
    header, tensors = read(path)
    tensors["head/bias"] = np.full(3, value, "float32")
    write(path, header, tensors)
    with pytest.raises(AdapterFileError, match="'head/bias' holds NaN"):
        keras_vera.load_adapter(make_model(), path)


@pytest.mark.parametrize("dtype", ["int32", "float64", "bool"])
def test_numbers_of_another_kind(content, path, dtype):
    path.write_bytes(content)
    header, tensors = read(path)
    name = "backbone/layers/dense/vera_lambda_b"
    tensors[name] = np.ones(6, dtype)
    write(path, header, tensors)
    fresh = make_model()
    before = state(fresh)
    with pytest.raises(AdapterFileError, match=f"'{name}' has dtype {dtype}"):
        keras_vera.load_adapter(fresh, path)
    assert state(fresh) == before


def test_places_without_a_file(model, tmp_path):
    folder = tmp_path / "folder.vera.safetensors"
    folder.mkdir()
    absent = tmp_path / "absent.vera.safetensors"
    pipe = tmp_path / "pipe.vera.safetensors"
    os.mkfifo(pipe)
    for place, reason in (
        (folder, "not a regular file"),
        (pipe, "not a regular file"),
        (absent, "No such file"),
    ):
        with pytest.raises(AdapterFileError, match=f"{place}.*{reason}"):
            keras_vera.load_adapter(make_model(), place)
    with pytest.raises(AdapterFileError, match=str(folder)):
        keras_vera.save_adapter(model, folder)
    assert os.listdir(tmp_path / folder) == []
    assert len(os.listdir(tmp_path)) == 2


@contextlib.contextmanager
def ordinary_user():
    """Nothing is forbidden to root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission(model, content):
    if not hasattr(os, "geteuid"):
        pytest.skip("Windows has other permissions.")
    fresh = make_model()
    before = state(fresh)
    # Not below pytest's folder, which is closed to others as a whole.
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "task.vera.safetensors"
        path.write_bytes(content)
        path.chmod(0)
        path.parent.chmod(0o555)
        with ordinary_user():
            for call in (
                lambda: keras_vera.load_adapter(fresh, path),
                lambda: keras_vera.save_adapter(model, path),
            ):
                with pytest.raises(
                    AdapterFileError, match=f"{path}.*Permission denied"
                ):
                    call()
        path.chmod(0o600)
        path.parent.chmod(0o700)
        assert os.listdir(folder) == [path.name]
        assert path.read_bytes() == content
    assert state(fresh) == before


def test_full_disk(model, content, tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("No device is always full here.")
    path = tmp_path / "task.vera.safetensors"
    path.write_bytes(content)
    fdopen = os.fdopen

    def full(handle, mode):
        os.close(handle)
        return fdopen(os.open("/dev/full", os.O_WRONLY), mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(AdapterFileError, match="No space left"):
        keras_vera.save_adapter(model, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


def test_nothing_in_a_header_is_too_large(content, path):
    """A file of some kilobytes must not allocate gigabytes."""
    path.write_bytes(content)
    header, tensors = read(path)
    hostile = (
        {"rank": 2**40},
        {"structure": "blocks999999999"},
        {"layers": [[[2**31, 2**31], "float32", "0"]] * len(header["layers"])},
        # Columns of B that the layers do not use.
        {"layers": [[*row, 2**28] for row in header["layers"]]},
    )
    for change in hostile:
        write(path, {**header, **change}, tensors)
        fresh = make_model()
        tracemalloc.start()
        with pytest.raises(AdapterFileError):
            keras_vera.load_adapter(fresh, path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


def test_safetensors_of_another_library(path):
    path.write_bytes(safetensors.numpy.save({"x": np.ones(3, "float32")}))
    with pytest.raises(AdapterFileError, match="no JSON object"):
        keras_vera.load_adapter(make_model(), path)
