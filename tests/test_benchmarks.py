"""The benchmarks run, at a tiny size."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from helpers import backend
from scripts import environment
from scripts import run
from test_examples import tiny_causal_lm

pytestmark = pytest.mark.in_turn

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.in_turn("torch")
def test_step(tmp_path):
    sizes = "--hidden 64 --heads 2 --ffn 128 --batch 16 --sequence 16".split()
    methods = ["naive VeRA 256", "VeRA 256 blocks"]
    done = subprocess.run(
        [
            *(sys.executable, FOLDER / "step.py", "--backends", backend()),
            *("--targets", "qv", "--rounds", "2", *sizes),
            *("--methods", *methods, "--output_dir", tmp_path),
        ],
        env=environment(MPLBACKEND="agg"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    flops = dict(
        re.findall(r"^(\S.*?) +(\d\.\d{3}) +.* to ", done.stdout, re.MULTILINE)
    )
    assert set(flops) == {"floor", *methods}
    assert float(flops["floor"]) == 1
    # Flops, megabytes, time.
    assert re.search(r"^floor +1\.000 +\d+ +1\.00 ", done.stdout, re.MULTILINE)
    assert float(flops["VeRA 256 blocks"]) < float(flops["naive VeRA 256"])
    assert (tmp_path / "step.png").stat().st_size > 1000


def evidence(folder, *arguments):
    """Returns the lines of the file, and what is printed."""
    printed = run(
        *(FOLDER / "evidence.py", "--output", folder / "evidence.jsonl"),
        *("--batch_size", "4", "--seeds", "1", "--rates", "0.1", *arguments),
    )
    lines = (folder / "evidence.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], printed


@pytest.mark.in_turn("torch")
def test_evidence_of_texts(tmp_path, small_minilm):
    folder = tmp_path / "sst2"
    folder.mkdir()
    for part in ("train", "dev", "test"):
        (folder / f"{part}.txt").write_text(
            "".join(
                f"{label} a {word} that is {part} of {letter * 3}\n"
                for letter in "abcdefgh"
                for label, word in ((0, "failure"), (1, "success"))
            )
        )
    _, output = evidence(
        tmp_path,
        *("--data", tmp_path, "--limit", "4", "--methods", "vera16-blocks4"),
        *("--tasks", "docstrings", "sst2", "--steps", "2"),
    )
    for task in ("docstrings", "sst2"):
        row = rf"^\| {task}, 2 x 4 \| vera16-blocks4 \| all-linear \| "
        assert re.search(row + r"\d+ \| 0.1 \| 1 \| 0\.", output, re.M)
        assert re.search(row + r"0.1: \d", output, re.M)


@pytest.mark.in_turn("torch")
def test_rates_of_heads(small_minilm):
    output = run(
        *(FOLDER / "rates_of_heads.py", "--limit", "4", "--steps", "1"),
        *("--batch_size", "4", "--rates", "0.1", "0.2"),
    )
    row = r"^(\D+): (\d+) inputs of (\d+\.\d+), 1 steps: 0.1: \d.*, 0.2: \d"
    found = {
        head: (int(inputs), float(size))
        for head, inputs, size in re.findall(row, output, re.M)
    }
    inputs, size = found["first token"]
    assert found["enlarged"] == (inputs, pytest.approx(2.5 * size, abs=0.02))
    assert found["wide"][0] == 4 * inputs
    assert found["two layers"][0] == inputs


@pytest.mark.in_turn("torch")
def test_lora_ranks(tmp_path, small_minilm):
    tiny_causal_lm().save_to_preset(tmp_path / "tiny")
    tables = []
    for sizes in (
        ["docstrings", "--limit", "4"],
        "e2e --pairs 4 --held_out 4 --length 208 --preset tiny".split(),
    ):
        sizes = [tmp_path / x if x == "tiny" else x for x in sizes]
        output = run(
            *(FOLDER / "lora_ranks.py", "--rank", "128", "--ranks", "2"),
            *("--steps", "1", "--batch_size", "4", "--examples", "2"),
            *("--task", *sizes),
        )
        tables += re.findall(r"^\| VeRA [^$]*?\| no adapter .*$", output, re.M)
    assert len(tables) == 2
    for table in tables:
        ours, exact, lower, none = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.splitlines()
        )
        assert exact[0] == "LoRA, exact" and lower[0] == "LoRA, rank 2"
        assert exact[2] == "0.000, 0.000, 0.000" and float(exact[3]) < 1e-3
        assert float(lower[2].split(", ")[-1]) > 0.01
        assert 0.01 < float(lower[3]) < 10
        assert ours[4] == exact[4]


@pytest.mark.in_turn("torch")
def test_evidence_of_language_models(tmp_path):
    tiny_causal_lm().save_to_preset(tmp_path / "tiny")
    for task, sizes in {
        "e2e": "--pairs 6 --held_out 6 --length 208",
        "instructions": "--pairs 6 --held_out 4 --length 224",
    }.items():
        lines, _ = evidence(
            tmp_path,
            *("--tasks", task, "--preset", tmp_path / "tiny", *sizes.split()),
            *("--methods", "vera4", "vera4-groups1", "lora2", "--steps", "2"),
        )
        package, prototype, lora = [x for x in lines if x["task"] == task]
        assert package["loss"] == pytest.approx(prototype["loss"], abs=1e-4)
        assert lora["test_loss"] > 0 and "accuracy" not in lora


@pytest.mark.in_turn("torch")
def test_evidence(tmp_path):
    digits = "--tasks", "digits", "--limit", "8", "--steps", "3", "--methods"
    methods = "vera8 vera8-groups1 vera8-groups4 vera8-scale lora2 head".split()
    figure = tmp_path / "figure.svg"
    lines, _ = evidence(tmp_path, *digits, *methods)
    assert [line["method"] for line in lines] == methods
    # What is there is not trained again.
    again, _ = evidence(tmp_path, *digits, *methods, "--figure", figure)
    assert again == lines
    found = {line["method"]: line for line in lines}
    package, prototype = found["vera8"], found["vera8-groups1"]
    assert package["loss"] == pytest.approx(prototype["loss"], abs=1e-4)
    assert package["loss"] != pytest.approx(found["head"]["loss"], abs=1e-2)
    # 24 matrices of 64 x 64, or 256 on one side in 8.
    vectors = 16 * 64 + 4 * (256 + 64)
    assert package["numbers"] == prototype["numbers"] == 24 * 8 + vectors
    assert found["vera8-groups4"]["numbers"] == 4 * 24 * 8 + vectors
    assert found["vera8-scale"]["numbers"] == 24 * 8 + 2 * vectors
    assert found["lora2"]["numbers"] == 2 * (16 * 2 * 64 + 8 * (256 + 64))
    drawn = re.findall(r"<text [^>]*>(.*?)</text>", figure.read_text())
    assert {x.strip() for x in drawn} >= {"digits", *methods}


def test_plans(tmp_path):
    figure = tmp_path / "plans.svg"
    sizes = "--width 64 --rank 16 --tokens 1 512 --output".split()
    output = subprocess.check_output(
        [sys.executable, FOLDER / "plans.py", *sizes, figure], text=True
    )
    head, _, *rows = [
        line.strip("| ").split(" | ") for line in output.splitlines()
    ]
    few, many = [dict(zip(head, map(float, row), strict=True)) for row in rows]
    assert few["auto"] == few["additive"] < few["folded"]
    assert many["auto"] == many["folded"] < many["additive"]
    assert "tokens" in figure.read_text()


@pytest.mark.in_turn("tensorflow")
@pytest.mark.skipif(backend() == "torch", reason="Nothing is compiled.")
def test_first_step():
    output = run(FOLDER / "first_step.py", "--layers", "1", "--hidden", "144")
    found = dict(re.findall(r"^\| (\S+) \| ([\d,]*) \| \d.*\(", output, re.M))
    assert list(found) == ["norm", "lora", "vera", "vera-blocks"]
    if backend() != "tensorflow":
        assert not any(found.values())
        return
    counts = {method: int(x.replace(",", "")) for method, x in found.items()}
    # In each of 7 adapted layers.
    assert counts["lora"] < counts["vera"] < counts["lora"] + 7 * 50
    assert counts["vera-blocks"] < counts["vera"] + 7 * 50


def test_rates_of_formula():
    output = run(
        *(FOLDER / "rates_of_formula.py", "--rows", "3", "7"),
        *("--rates", "0.001", "0.1"),
    )
    assert len(re.findall(r"^Row\(.*: best 0.1 of ", output, re.M)) == 2


def test_fuzz_adapter_file():
    output = run(FOLDER / "fuzz_adapter_file.py", "--files", "5000")
    assert "5,000 files in" in output
    assert "refused" in output
    assert "sealed, read" in output
    assert "inspect               code 0" in output
    for finding in ("ANOTHER", "CHANGED, READ", "NOT PRINTABLE"):
        assert finding not in output


def test_adapters():
    output = run(
        *(FOLDER / "adapters.py", "--hidden", "64"),
        *("--layers", "1", "--rank", "8"),
    )
    # Two layers, each 8 and 64 numbers.
    assert "bytes for 144 numbers" in output
    assert re.search(r"^loaded .* in \d+ ms$", output, re.M)
    errors = dict(re.findall(r"^(\w+): changes outputs by (\S+)", output, re.M))
    assert float(errors["float32"]) == 0 < float(errors["float16"]) < 1e-2
    assert float(errors["float16"]) < float(errors["bfloat16"]) < 1e-1


def test_bank():
    sizes = "--hidden 64 --heads 2 --ffn 128 --batch 16 --sequence 16 --rank 8"
    output = run(
        *(FOLDER / "bank.py", *sizes.split()),
        *("--distinct", "1", "4", "16", "--rounds", "2"),
        *("--sizes", "20", "--slots", "16", "--files", "10"),
    )
    ours, _, peft = output.partition("LoRA 8 in PEFT")
    flops = re.findall(r"^(\d+) adapters +flops (\S+) ", ours, re.M)
    assert flops == [(n, "1.0000") for n in ("1", "4", "16")] * 2
    assert ("16 adapters" in peft) == (backend() == "torch")
    assert re.search(r"^ +20 adapters: opened in ", output, re.M)


@pytest.mark.in_turn("none")  # As does `tests/bank/test_bank_processes.py`.
def test_folder():
    """Two writers and a reader at once; every answer is checked."""
    output = subprocess.check_output(
        [
            *(sys.executable, FOLDER / "folder.py", "--steps", "8"),
            *("--readers", "1", "--names", "3", "--capacity", "3"),
        ],
        text=True,
    )
    assert re.search(r"^[1-9]\S* versions .*; [1-9]\S* answers", output, re.M)
    assert "wrong: 0, lost: 0" in output


@pytest.mark.in_turn("jax")
def test_serve():
    output = run(
        *(FOLDER / "serve.py", "--server", "plain"),
        *("--requests", "160", "--in_flight", "4", "--users", "8"),
        *("--adapters", "10", "--distinct", "2", "--rounds", "8"),
    )
    counts = dict(re.findall(r"'([\w ]+)': (\d+)", output))
    assert counts["all"] == "160" and counts["WRONG"] == "0"
    assert all(int(counts[x]) for x in ("fixed", "unknown", "bad text"))
    assert "requests/s" in output


# They take minutes; `tests/devices` has these engines as well.
@pytest.mark.in_turn("none")
@pytest.mark.parametrize(
    "engine",
    [
        "torch DistributedDataParallel",
        "tensorflow MirroredStrategy",
        "jax ModelParallel",
    ],
)
def test_devices(engine):
    output = subprocess.check_output(
        [sys.executable, FOLDER / "devices.py", "--engines", engine], text=True
    )
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", output, re.M))
    assert len(rows) == 11
    for call, shown in rows.items():
        if call.endswith("generate"):
            assert shown == "0 tokens"
        else:
            assert float(shown) < 1e-5, (call, shown)


@pytest.mark.in_turn("jax")
def test_large_models():
    """What the formulas say is what XLA compiles: A and B are gathered once in
    a step, and of gradients those of the vectors alone are sent."""
    script = FOLDER / "large_models.py"
    output = subprocess.check_output(
        [sys.executable, script, "--check", "2", "4"], text=True
    )
    assert output.count(": all-reduce ") == output.count(": arguments ") == 2
    output = run(script)
    # As PEFT counts its LoRA: 19,988,480 numbers.
    assert len(re.findall(r"Llama-7B, LoRA 8 \| \S+ \| 80.0 ", output)) == 2
