"""The examples run, tiny; the notebook is the script."""

import contextlib
import json
import pathlib
import runpy
import subprocess
import sys

import pytest
import scripts

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(script, arguments, folder):
    """Returns what the script prints after the head of its last table."""
    with contextlib.chdir(folder):
        output = scripts.run(EXAMPLES / f"{script}.py", *arguments.split())
    return output.rpartition("accuracy")[2]


def text_classification(folder):
    (folder / "own.tsv").write_text(
        "".join(
            f"{label}\t{start} is about the {letter * 3} of its kind\n"
            for letter in "abcdefghijkl"
            for label, start in (("yes", "This one"), ("no", "No other"))
        )
    )
    # The whole documentation once, two of its sentences; then own texts.
    for arguments in ("--limit 2", "--data own.tsv"):
        table = run(
            "text_classification", f"{arguments} --epochs 1 --rank 8", folder
        )
        for method in ("Head alone", "LoRA, rank 8", "VeRA, rank 8"):
            assert method in table
        check_files(folder / "text_classification_output", "learning_curves")


def one_base_many_users(folder):
    sizes = "--users 3 --sentences 10 --epochs 1 --rank 4 --batch_size 8"
    table = run("one_base_many_users", sizes, folder)
    for row in ("each alone", "all mixed", "one mixed batch", "as a file"):
        assert row in table
    check_files(folder / "one_base_many_users_output", "users", adapters=1)


def image_classification(folder, backbone="vit"):
    sizes = "--limit 8 --pretraining_epochs 1 --epochs 1 --rank 4"
    table = run(
        "image_classification", f"--backbone {backbone} {sizes}", folder
    )
    for method in ("Head alone", "LoRA, rank 8", "VeRA, rank 4", "All weights"):
        assert method in table
    assert ("has no layer to adapt" in table) == (backbone == "resnet")
    pictures = "learning_curves", "predictions"
    check_files(folder / "image_classification_output", *pictures)


def image_classification_resnet(folder):
    image_classification(folder, "resnet")


def multi_device(folder):
    # It asks for JAX and for eight devices, so for a process of its own.
    sizes = "--parallel model --epochs 1 --rank 8".split()
    table = subprocess.check_output(
        [sys.executable, EXAMPLES / "multi_device.py", *sizes],
        cwd=folder,
        text=True,
    )
    assert "8 devices; " in table and "Largest difference" in table


def check_files(folder, *pictures, adapters=2):
    for picture in pictures:
        assert (folder / f"{picture}.png").stat().st_size > 10_000
    assert len(list(folder.glob("*.vera.safetensors"))) == adapters


RUNS = [
    one_base_many_users,
    image_classification_resnet,
    image_classification,
    text_classification,
    multi_device,
]


@pytest.mark.in_turn
@pytest.mark.parametrize("check", RUNS, ids=lambda x: x.__name__)
def test_example(check, tmp_path, request):
    if check is one_base_many_users:
        request.getfixturevalue("small_minilm")
    check(tmp_path)


NOTEBOOKS = runpy.run_path(str(EXAMPLES.parent / ".ci" / "notebooks.py"))
SCRIPTS = NOTEBOOKS["SCRIPTS"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_the_script(script):
    notebook = script.with_suffix(".ipynb").read_text()
    made = NOTEBOOKS["make"](script)
    assert cells_of(notebook) == cells_of(made), "Run: python .ci/notebooks.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab(script):
    address = NOTEBOOKS["address"]()
    cells = cells_of(script.with_suffix(".ipynb").read_text())
    (_, title), (kind, install), *_ = cells
    place = address.removeprefix("https://github.com/")
    name = f"github/{place}/blob/main/examples/{script.stem}.ipynb"
    assert f"(https://colab.research.google.com/{name})" in title
    assert kind == "code"
    magic = "    %pip install "
    assert f"git+{address}" in install.partition(magic)[2]
    # Where the package is, nothing is installed.
    exec(install.replace(magic, "    raise AssertionError #"))


def cells_of(notebook):
    cells = json.loads(notebook)["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
