"""The examples run, tiny; the notebook is the script."""

import pathlib
import subprocess
import sys

import jupytext
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def test_text_classification(tmp_path):
    (tmp_path / "own.tsv").write_text(
        "".join(
            f"{label}\t{start} is about the {letter * 3} of its kind\n"
            for letter in "abcdefghijkl"
            for label, start in (("yes", "This one"), ("no", "No other"))
        )
    )
    script = EXAMPLES / "text_classification.py"
    # The whole documentation once, two of its sentences; then own texts.
    for arguments in (["--limit", "2"], ["--data", "own.tsv"]):
        arguments += ["--epochs", "1", "--rank", "8"]
        output = subprocess.check_output(
            [sys.executable, script, *arguments], cwd=tmp_path, text=True
        )
        table = output.split("accuracy", 1)[1]
        for method in ("Head alone", "LoRA, rank 8", "VeRA, rank 8"):
            assert method in table
        folder = tmp_path / "text_classification_output"
        assert (folder / "learning_curves.png").stat().st_size > 10_000
        assert len(list(folder.glob("*.vera.safetensors"))) == 2


def test_one_base_many_users(tmp_path):
    script = EXAMPLES / "one_base_many_users.py"
    sizes = "--users 3 --sentences 10 --epochs 1 --rank 4 --batch_size 8"
    output = subprocess.check_output(
        [sys.executable, script, *sizes.split()], cwd=tmp_path, text=True
    )
    table = output.split("mean accuracy", 1)[1]
    for row in ("each alone", "all mixed", "one mixed batch", "as a file"):
        assert row in table
    folder = tmp_path / "one_base_many_users_output"
    assert (folder / "users.png").stat().st_size > 10_000
    assert (folder / "user00.vera.safetensors").exists()


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_image_classification(backbone, tmp_path):
    script = EXAMPLES / "image_classification.py"
    sizes = "--limit 8 --pretraining_epochs 1 --epochs 1 --rank 4"
    output = subprocess.check_output(
        [sys.executable, script, "--backbone", backbone, *sizes.split()],
        cwd=tmp_path,
        text=True,
    )
    table = output.split("s per epoch", 1)[1]
    for method in ("Head alone", "LoRA, rank 8", "VeRA, rank 4", "All weights"):
        assert method in table
    assert ("has no layer to adapt" in table) == (backbone == "resnet")
    folder = tmp_path / "image_classification_output"
    for picture in ("learning_curves.png", "predictions.png"):
        assert (folder / picture).stat().st_size > 10_000
    assert len(list(folder.glob("*.vera.safetensors"))) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_the_script(script):
    def cells(path):
        return [(c.cell_type, c.source) for c in jupytext.read(path).cells]

    assert cells(script.with_suffix(".ipynb")) == cells(script), (
        "Run: jupytext --to ipynb examples/*.py"
    )
