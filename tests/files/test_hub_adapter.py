"""Adapters on the Hugging Face Hub, against a stand-in for it."""

import json
import os
import pathlib
import sys
import tempfile

import huggingface_hub
import keras
import numpy as np
import pytest
from helpers import numpy_weights
from helpers import spoil
from helpers import state
from hub_stand_in import Hub
from huggingface_hub import EvalResult

import keras_vera
from keras_vera.__main__ import main

pytestmark = pytest.mark.in_turn


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path / "hub").install(monkeypatch)


def make_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="one"),
            keras.layers.Dense(4, name="two"),
        ]
    )


def adapted_model():
    model = make_model()
    keras_vera.enable_vera(model, rank=3, seed=7, targets=".*(one|two)")
    spoil(model)
    return model


def card_of(files):
    """Returns the card as the real client reads it."""
    return huggingface_hub.ModelCard(files["README.md"].decode())


def make_file(tmp_path):
    file = tmp_path / "mine.vera.safetensors"
    keras_vera.save_adapter(adapted_model(), file)
    return file


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [
        ("hf://user/repo", "adapter.vera.safetensors", "main"),
        ("hf://user/repo/", "adapter.vera.safetensors", "main"),
        ("hf://user/repo/a/b.vera.safetensors", "a/b.vera.safetensors", "main"),
        ("hf://user/repo@v2", "adapter.vera.safetensors", "v2"),
        (
            "hf://user/repo@refs/pr/3/b.vera.safetensors",
            "b.vera.safetensors",
            "refs/pr/3",
        ),
        ("hf://user/repo@my%2Fbranch", "adapter.vera.safetensors", "my/branch"),
    ],
)
def test_save_and_load(hub, path, name, revision):
    model = adapted_model()
    keras_vera.save_adapter(model, path)
    (files,) = hub.commits
    assert sorted(files) == sorted(["README.md", name])
    assert (hub.folder / "user/repo" / revision / name).exists()
    assert hub.repos == {"user/repo": None}
    loaded = make_model()
    keras_vera.load_adapter(loaded, path)
    for x, y in zip(numpy_weights(loaded), numpy_weights(model)):
        assert x.tobytes() == y.tobytes()


def test_save_keeps_a_card_that_is_there(hub):
    keras_vera.save_adapter(adapted_model(), "hf://user/repo")
    card = hub.folder / "user/repo/main/README.md"
    card.write_text("---\nlicense: mit\n---\nMine.")
    keras_vera.save_adapter(adapted_model(), "hf://user/repo")
    assert list(hub.commits[1]) == ["adapter.vera.safetensors"]
    assert "Mine." in card.read_text()


def test_upload_with_all_that_a_card_can_say(hub, tmp_path):
    file = make_file(tmp_path)
    result = EvalResult(
        task_type="text-classification",
        dataset_type="stanfordnlp/sst2",
        dataset_name="SST-2",
        metric_type="accuracy",
        metric_value=0.94,
    )
    address = keras_vera.upload_adapter(
        file,
        "hf://user/repo",
        base_model="hf://FacebookAI/roberta-base",
        pipeline_tag="text-classification",
        license="apache-2.0",
        tags=["sentiment"],
        eval_results=[result],
        private=True,
    )
    assert address == "https://huggingface.co/user/repo/commit/1"
    assert hub.repos == {"user/repo": True}
    (files,) = hub.commits
    assert files["adapter.vera.safetensors"] == file.read_bytes()
    card = card_of(files)
    data = card.data
    assert data.base_model == "FacebookAI/roberta-base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.library_name == "keras_vera"
    assert data.pipeline_tag == "text-classification"
    assert data.license == "apache-2.0"
    assert {"vera", "keras", "sentiment"} <= set(data.tags)
    assert data.model_name == "repo"
    assert data.eval_results == [result]
    facts = data.to_dict()["keras_vera"]
    header, entries = keras_vera.files.format.read(file)
    assert facts["rank"] == 3
    assert facts["seed"] == 7
    assert facts["targets"] == header["targets"]
    assert facts["layers"] == 2
    assert facts["trained_numbers"] == sum(x.size for x in entries.values())
    assert 'load_adapter(model, "hf://user/repo/adapter.vera' in card.text
    # A bar in a regular expression does not end the cell of the table.
    assert "| .*(one\\|two) |" in card.text


def test_fingerprint_is_that_of_the_base(hub, tmp_path):
    def fingerprint():
        keras_vera.upload_adapter(make_file(tmp_path), "hf://user/repo")
        return card_of(hub.commits[-1]).data.to_dict()["keras_vera"][
            "base_fingerprint"
        ]

    first = fingerprint()
    assert fingerprint() == first
    model = make_model()
    model.layers[0].kernel.assign(model.layers[0].kernel + 1)
    keras_vera.enable_vera(model, rank=3, seed=7, targets="all-linear")
    other = tmp_path / "other.vera.safetensors"
    keras_vera.save_adapter(model, other)
    keras_vera.upload_adapter(other, "hf://user/repo")
    facts = card_of(hub.commits[-1]).data.to_dict()["keras_vera"]
    assert facts["base_fingerprint"] != first


@pytest.mark.parametrize(
    "path",
    [
        "hf://",
        "hf://user",
        "hf://user/repo@",
        "hf://us er/repo",
        "hf://user/repo/adapter.safetensors",
        "hf://user/repo/../b.vera.safetensors",
        "hf://datasets/user/repo",
        "hf://datasets/user/repo/b.vera.safetensors",
    ],
)
def test_paths_that_make_no_sense_are_refused(hub, path, tmp_path):
    model, other = adapted_model(), make_model()
    before = state(model), state(other)
    for call in (
        lambda: keras_vera.save_adapter(model, path),
        lambda: keras_vera.load_adapter(other, path),
        lambda: keras_vera.upload_adapter(make_file(tmp_path), path),
    ):
        with pytest.raises(ValueError, match="must have the form"):
            call()
    assert (state(model), state(other)) == before
    assert not hub.repos


def published(hub, tmp_path, name="a", factor=1.0):
    """Returns the path of an adapter on the Hub, and a file like it here."""
    path = f"hf://user/repo/{name}.vera.safetensors"
    file = tmp_path / f"{name}.vera.safetensors"
    model = adapted_model()
    for layer in model.layers:
        layer.vera_lambda_b.assign(factor * layer.vera_lambda_b)
    keras_vera.save_adapter(model, file)
    keras_vera.upload_adapter(file, path)
    return path, file


def test_sums_of_adapters_there(hub, tmp_path):
    (a, here_a), (b, here_b) = (
        published(hub, tmp_path, *x) for x in (("a", 1.0), ("b", 3.0))
    )
    results = [tmp_path / f"{x}.vera.safetensors" for x in ("there", "here")]
    for one, other, result in zip((a, here_a), (b, here_b), results):
        keras_vera.combine({one: 0.5, other: 2.0}, result, head=other)
    there, here = (x.read_bytes() for x in results)
    assert there == here
    with pytest.raises(keras_vera.AdapterFileError, match="'hf://user/none'"):
        keras_vera.combine({a: 0.5, "hf://user/none": 0.5}, results[0])
    assert results[0].read_bytes() == here


def test_banks_load_from_there(hub, tmp_path):
    path, file = published(hub, tmp_path)
    bank = keras_vera.AdapterBank(adapted_model(), capacity=2)
    bank.load("there", path)
    bank.load("here", file)
    x = np.random.default_rng(0).normal(size=(1, 6)).astype("float32")
    there, here, base = (bank.predict(x, [y]) for y in ("there", "here", None))
    np.testing.assert_array_equal(there, here)
    assert np.abs(there - base).max() > 1e-3
    with pytest.raises(keras_vera.AdapterFileError, match="hf://user/none"):
        bank.load("more", "hf://user/none")
    assert bank.names == ["there", "here"]


def test_files_go_on_to_another_repository(hub, tmp_path):
    path, file = published(hub, tmp_path)
    keras_vera.upload_adapter(path, "hf://other/repo")
    assert hub.commits[-1]["adapter.vera.safetensors"] == file.read_bytes()


def test_commands_read_from_there(hub, tmp_path, capsys):
    (a, here), (b, _) = (
        published(hub, tmp_path, *x) for x in (("a", 1.0), ("b", 3.0))
    )
    found = []
    for file in (a, str(here)):
        main(["inspect", file, "--verify", "--json"])
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1].pop("file") == file
    assert found[0] == found[1]
    main(["diff", a, str(here)])
    with pytest.raises(SystemExit) as raised:
        main(["diff", a, b])
    assert raised.value.code == 1
    halves = [tmp_path / f"half{i}.vera.safetensors" for i in range(2)]
    for file, half in zip((a, here), halves):
        main(["convert", str(file), "float16", str(half)])
    assert halves[0].read_bytes() == halves[1].read_bytes()
    capsys.readouterr()
    for arguments in (
        ["inspect", "hf://user/none"],
        ["diff", a, "hf://user/none"],
        ["convert", "hf://user/none", "float16", str(halves[0])],
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
        assert "'hf://user/none' could not be" in capsys.readouterr().err


def test_what_is_written_here_alone(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, file = published(hub, tmp_path)
    before = sorted(tmp_path.iterdir())
    model = adapted_model()
    unchanged = state(model)
    bank = keras_vera.AdapterBank(model, capacity=2)
    bank.add("a")
    commits = len(hub.commits)
    other, folder = "hf://user/repo/b.vera.safetensors", "hf://user/repo"
    for call, message in (
        (lambda: keras_vera.combine({file: 1}, other), "upload_adapter"),
        (lambda: bank.save("a", other), "upload_adapter"),
        (
            lambda: keras_vera.callbacks.AdapterCheckpoint(other),
            "upload_adapter",
        ),
        (
            lambda: keras_vera.AdapterBank(model, capacity=2, folder=folder),
            "`folder` must be a path on this machine",
        ),
        (
            lambda: keras_vera.save_peft_adapter(model, folder),
            "upload_folder",
        ),
        (
            lambda: keras_vera.save_peft_adapter(model, pathlib.Path(folder)),
            "upload_folder",
        ),
        (
            lambda: keras_vera.load_peft_adapter(make_model(), folder),
            "snapshot_download",
        ),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "not on the Hugging Face Hub" in str(raised.value)
    for to, output in (("float16", other), ("lora", folder)):
        with pytest.raises(SystemExit):
            main(["convert", str(file), to, output, "--json"])
        assert "not on the Hugging Face Hub" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert len(hub.commits) == commits
    assert state(model) == unchanged


def test_arguments_that_the_hub_would_refuse(hub, tmp_path):
    file = make_file(tmp_path)
    for arguments, message in (
        ({"hub_path": "user/repo"}, "must begin with 'hf://'"),
        ({"base_model": "kaggle://keras/bert/keras/base"}, "`base_model`"),
        ({"eval_results": [0.9]}, "eval_results"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_vera.upload_adapter(
                **{"filepath": file, "hub_path": "hf://user/repo", **arguments}
            )
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(keras_vera.AdapterFileError, match="mine.vera"):
        keras_vera.upload_adapter(file, "hf://user/repo")
    assert not hub.repos


def test_failures_name_the_path_and_leave_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = adapted_model()
    before = state(model)
    hub.error = ConnectionError("no network")
    with pytest.raises(
        keras_vera.AdapterFileError, match="'hf://user/repo' could not be up"
    ):
        keras_vera.save_adapter(model, "hf://user/repo")
    assert state(model) == before
    assert os.listdir(tmp_path) == []
    base = make_model()
    before = state(base)
    for path in ("hf://user/none", "hf://user/repo/b.vera.safetensors"):
        with pytest.raises(
            keras_vera.AdapterFileError, match=f"'{path}' could not be down"
        ):
            keras_vera.load_adapter(base, path)
    assert state(base) == before


def test_without_the_client(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = adapted_model()
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        keras_vera.save_adapter(model, "hf://user/repo")
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        keras_vera.load_adapter(make_model(), "hf://user/repo")
    make_file(tmp_path)  # Needs none.
