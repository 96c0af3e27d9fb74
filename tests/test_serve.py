"""The replica of `examples/serve.py`, without a server."""

import asyncio
import pathlib
import runpy
import sys
import threading

import numpy as np
import pytest
from helpers import largest_difference
from helpers import predict

import keras_vera

pytestmark = pytest.mark.in_turn

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "serve.py"
TEXTS = ["a b c", "d e f", "g"]


@pytest.fixture(scope="module")
def example():
    """The script, as a dict, with arguments for a small base."""
    before, sys.argv = sys.argv, ["serve.py", "--rank", "4"]
    names = runpy.run_path(str(SCRIPT), run_name="example")
    names["args"] = names["parse_arguments"]()
    sys.argv = before
    return names


@pytest.fixture(scope="module")
def files(example, tmp_path_factory):
    """Files of two adapters, and what each gives alone; `None`: the base."""
    folder = tmp_path_factory.mktemp("adapters")
    model = example["make_model"](example["args"])
    outputs, files = {None: predict(model, TEXTS)}, {}
    rng = np.random.default_rng(0)
    for name in ("ann", "bob"):
        for v in model.trainable_variables:
            v.assign(rng.normal(0, 0.5, v.shape))
        files[name] = folder / f"{name}.vera.safetensors"
        keras_vera.save_adapter(model, files[name])
        outputs[name] = predict(model, TEXTS)
    return files, outputs


@pytest.fixture(scope="module")
def model(example):
    return example["make_model"](example["args"])


@pytest.fixture
def replica(example, model, tmp_path):
    folder = tmp_path / "users"
    with pytest.raises(FileNotFoundError, match="users"):
        example["Replica"](model, folder, capacity=2)
    folder.mkdir()
    return example["Replica"](model, folder, capacity=2)


def ask(replica, *pairs):
    """Returns statuses and bodies of requests of `(user, text)`."""
    requests = [{"user": user, "text": text} for user, text in pairs]
    return replica.answers(requests)


def test_users_come_change_and_go(replica, files):
    files, outputs = files
    content = {name: file.read_bytes() for name, file in files.items()}
    assert replica.handle("GET", "/users", b"") == (200, {"users": []})
    assert replica.handle("PUT", "/users/a/b", content["ann"])[0] == 200
    assert replica.handle("PUT", "/users/eve", content["bob"])[0] == 200
    assert replica.handle("PUT", "/users/eve", b"no file")[0] == 400
    assert replica.handle("GET", "/users", b"")[1]["users"] == ["a/b", "eve"]

    def assert_answers(**users):
        pairs = [(user, text) for user in users for text in TEXTS]
        pairs += [(None, text) for text in TEXTS]
        answers = ask(replica, *pairs)
        for i, (user, text) in enumerate(pairs):
            status, body = answers[i]
            expected = outputs[users.get(user)][TEXTS.index(text)]
            assert status == 200
            assert largest_difference(body["scores"], expected) < 1e-4

    assert_answers(**{"a/b": "ann", "eve": "bob"})
    assert replica.handle("PUT", "/users/eve", content["ann"])[0] == 200
    assert_answers(**{"a/b": "ann", "eve": "ann"})
    assert replica.handle("DELETE", "/users/a/b", b"")[0] == 200
    assert replica.handle("DELETE", "/users/a/b", b"")[0] == 404
    assert_answers(eve="ann")
    assert replica.handle("GET", "/nowhere", b"")[0] == 404


def test_each_request_has_its_own_error(replica, files):
    files, outputs = files
    for name in ("ann", "bob"):
        replica.put(name, files[name].read_bytes())
    damaged = pathlib.Path(replica.bank._register.folder.file("eve"))
    damaged.write_bytes(b"damaged")
    requests = [
        {"user": "ann", "text": TEXTS[0]},
        {"user": "nobody", "text": TEXTS[0]},
        {"user": "ann", "text": 7},
        {"user": "", "text": TEXTS[0]},
        {"user": ["ann"], "text": TEXTS[0]},
        {"text": TEXTS[0]},
        None,
        {"user": "eve", "text": TEXTS[0]},
        {"user": "bob", "text": TEXTS[1]},
    ]
    answers = replica.answers(requests)
    statuses = [200, 404, 422, 400, 400, 400, 400, 500, 200]
    assert [status for status, _ in answers] == statuses
    for row, name, text in ((0, "ann", 0), (8, "bob", 1)):
        scores = answers[row][1]["scores"]
        assert largest_difference(scores, outputs[name][text]) < 1e-4


def test_a_folder_that_is_away(replica, files):
    files, _ = files
    replica.put("ann", files["ann"].read_bytes())
    folder = pathlib.Path(replica.bank._register.folder.path)
    assert replica.health()[0] == 200
    folder.rename(folder.with_name("away"))
    answers = ask(replica, ("ann", TEXTS[0]), (None, TEXTS[0]))
    assert [status for status, _ in answers] == [503, 200]
    assert replica.health()[0] == replica.users()[0] == 503
    assert replica.put("bob", files["bob"].read_bytes())[0] == 503
    assert replica.remove("ann")[0] == 503
    folder.with_name("away").rename(folder)
    assert ask(replica, ("ann", TEXTS[0]))[0][0] == replica.health()[0] == 200


def test_what_comes_while_a_batch_is_computed_is_the_next(example):
    computed, may_go = [], threading.Event()

    def compute(requests):
        assert may_go.wait(60)
        computed.append(requests)
        return [f"answer {10 // x}" for x in requests]

    async def ask_all():
        batches = example["Batches"](compute, 4)

        async def ask(*requests):
            return await batches.answers(list(requests))

        tasks = [asyncio.create_task(ask(1))]
        while batches._waiting or not batches._turn.locked():
            await asyncio.sleep(0)
        # It is being computed; those come meanwhile.
        tasks += [asyncio.create_task(ask(x)) for x in (2, 0, 3)]
        tasks += [asyncio.create_task(ask(5, 10, 1, 2, 5))]
        while len(batches._waiting) < 8:
            await asyncio.sleep(0)
        may_go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *failed, last = asyncio.run(ask_all())
    assert computed == [[1], [2, 0, 3, 5], [10, 1, 2, 5]]
    assert first == ["answer 10"]
    # As would be those of a batch of Ray's, whose answer is an exception.
    assert all(isinstance(error, ZeroDivisionError) for error in failed)
    assert isinstance(last, ZeroDivisionError)
