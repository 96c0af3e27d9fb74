"""The examples run, tiny; the notebook is the script."""

import contextlib
import json
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import scripts

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(script, arguments, folder, head="accuracy"):
    """Returns what the script prints after the head of its last table."""
    with contextlib.chdir(folder):
        output = scripts.run(EXAMPLES / f"{script}.py", *arguments.split())
    return output.rpartition(head)[2]


def text_classification(folder):
    (folder / "own.tsv").write_text(
        "".join(
            f"{label}\t{start} is about the {letter * 3} of its kind\n"
            for letter in "abcdefghijkl"
            for label, start in (("yes", "This one"), ("no", "No other"))
        )
    )
    # The whole documentation once, two of its sentences; then own texts.
    for arguments in ("--limit 2 --lora", "--data own.tsv"):
        table = run(
            "text_classification", f"{arguments} --epochs 1 --rank 8", folder
        )
        for method in ("Head alone", "VeRA, rank 8"):
            assert method in table
        assert ("LoRA, rank 8" in table) == ("--lora" in arguments)
        check_files(folder / "text_classification_output", "learning_curves")


def one_base_many_users(folder):
    sizes = "--users 3 --sentences 10 --epochs 1 --rank 4 --batch_size 8"
    table = run("one_base_many_users", sizes, folder)
    for row in ("each alone", "all mixed", "one mixed batch", "as a file"):
        assert row in table
    for start in ("nothing", "the mean of the others"):
        line = re.search(rf"New users from {start} reach .*\n(.*)\n", table)
        assert len(line[1].split()) == 3
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


def tiny_causal_lm():
    """Returns a language model of random numbers that reads single bytes."""
    vocabulary = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    vocabulary += ["<|start_header_id|>", "<|end_header_id|>", "in"]
    # Bytes as byte-pair tokenizers write them: some as other characters.
    vocabulary += [chr(i) for i in range(33, 127)]
    vocabulary += [chr(i) for i in (*range(161, 173), *range(174, 324))]
    tokenizer = keras_hub.models.Llama3Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["i n"],
    )
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer)
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor)


def data_to_text(folder):
    tiny_causal_lm().save_to_preset(folder / "tiny")
    sizes = "--pairs 6 --held_out 6 --length 208 --rank 4 --batch_size 4"
    sizes += " --preset tiny"
    table = run("data_to_text", f"{sizes} --lora", folder, "BLEU")
    for row in ("Base", "VeRA, rank 4", "LoRA, rank 8", "two styles"):
        assert row in table
    check_files(folder / "data_to_text_output")


def instruction_tuning(folder):
    tiny_causal_lm().save_to_preset(folder / "tiny")
    sizes = "--pairs 6 --held_out 3 --length 224 --rank 4 --batch_size 4"
    table = run(
        "instruction_tuning", f"{sizes} --preset tiny", folder, "summary"
    )
    for row in ("Base", "Base, form described", "VeRA", "VeRA, 8-bit base"):
        # Random letters are no JSON.
        assert re.search(rf"^{row}(  +0){{5}}$", table, re.MULTILINE)
    check_files(folder / "instruction_tuning_output", adapters=1)


def check_files(folder, *pictures, adapters=2):
    for picture in pictures:
        assert (folder / f"{picture}.png").stat().st_size > 10_000
    assert len(list(folder.glob("*.vera.safetensors"))) == adapters


# On the cheaper one of two; TensorFlow makes graphs for long.
RUNS = {
    "jax": [multi_device, one_base_many_users, instruction_tuning],
    "torch": [
        data_to_text,
        image_classification,
        image_classification_resnet,
        text_classification,
    ],
}


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=pytest.mark.in_turn(backend))
        for backend, checks in RUNS.items()
        for check in checks
    ],
    ids=lambda check: check.__name__,
)
def test_example(check, tmp_path, request):
    if check in (one_base_many_users, text_classification):
        request.getfixturevalue("small_minilm")
    check(tmp_path)


CAUSAL_LM = runpy.run_path(str(EXAMPLES / "_causal_lm.py"))


def test_answers_alone_have_a_weight():
    causal_lm = tiny_causal_lm()
    tokenizer = causal_lm.preprocessor.tokenizer
    prompts, answers = ["So, what?", "Hm?"], ["It is in.", "No: " + "x" * 90]
    x, y, weights = CAUSAL_LM["to_arrays"](causal_lm, prompts, answers, 80)
    assert x["token_ids"].shape == y.shape == weights.shape == (2, 80)
    np.testing.assert_array_equal(x["token_ids"][:, 1:], y[:, :-1])
    # What `generate` is given, then the answer, its end, and nothing.
    inputs = causal_lm.preprocessor.generate_preprocess(
        CAUSAL_LM["as_chat"](causal_lm, prompts), sequence_length=80
    )
    given, mask = (
        keras.ops.convert_to_numpy(inputs[key])
        for key in ("token_ids", "padding_mask")
    )
    for i, answer in enumerate(answers):
        prompt = given[i][: mask[i].sum()]
        expected = [*prompt, *tokenizer(answer), tokenizer.end_token_id][:81]
        used = len(expected) - 1
        np.testing.assert_array_equal(x["token_ids"][i, :used], expected[:-1])
        np.testing.assert_array_equal(y[i, :used], expected[1:])
        assert x["padding_mask"][i].sum() == used + (used < 80)
        (counted,) = weights[i].nonzero()
        first, last = len(prompt) - 1, used - 1
        np.testing.assert_array_equal(counted, np.arange(first, last + 1))


def test_answers_do_not_depend_on_the_batch():
    causal_lm = tiny_causal_lm()
    CAUSAL_LM["compile_for_answers"](causal_lm)
    prompts = ["So, what?", "Hm?", "in or out?"]
    answers = [
        CAUSAL_LM["answer"](causal_lm, prompts, 90, batch_size=size)
        for size in (2, 3)
    ]
    assert len(answers[0]) == 3 and answers[0] == answers[1]


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
    exec(re.sub("^    %", "    raise AssertionError #", install, flags=re.M))


def cells_of(notebook):
    cells = json.loads(notebook)["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
