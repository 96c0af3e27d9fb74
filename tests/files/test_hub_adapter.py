"""Adapters on the Hugging Face Hub, against a stand-in for it."""

import os
import sys
import tempfile

import huggingface_hub
import keras
import pytest
from helpers import numpy_weights
from helpers import spoil
from helpers import state
from hub_stand_in import Hub
from huggingface_hub import EvalResult

import keras_vera

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
