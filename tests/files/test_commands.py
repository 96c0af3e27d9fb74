"""The commands of `python -m keras_vera`."""

import json
import pathlib
import shutil
import subprocess
import sys

import adapter_files
import keras
import keras_hub
import numpy as np
import pytest
import safetensors
from helpers import spoil
from peft_families import both_models

import keras_vera
from keras_vera.__main__ import main
from keras_vera.files import format as adapter_format

pytestmark = pytest.mark.in_turn

FILE = pathlib.Path(__file__).parents[1] / "golden" / "blocks2.vera.safetensors"


def test_inspect():
    output = subprocess.check_output(
        [sys.executable, "-m", "keras_vera", "inspect", FILE], text=True
    )
    for line in (
        f"{FILE}: {FILE.stat().st_size:,} bytes",
        "  rank:           6",
        "  seed:           2024",
        "  structure:      blocks2",
        "  base:           backbone",
        "  vectors:        68 numbers in 5 layers",
        "    head/kernel  (6, 3) F32",
    ):
        assert line in output.splitlines()
    assert "backbone/layers/multi_head_attention/query_dense  8x2x4" in output
    assert "--verify" in output.splitlines()[-1]


def test_verify_reads_the_numbers(tmp_path, capsys):
    main(["inspect", str(FILE), "--verify"])
    assert "checksum" in capsys.readouterr().out
    damaged = tmp_path / FILE.name
    shutil.copy(FILE, damaged)
    with open(damaged, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    main(["inspect", str(damaged)])
    capsys.readouterr()
    assert "SHA-256" in error_of(capsys, "inspect", damaged, "--verify")
    assert "No such file" in error_of(capsys, "inspect", tmp_path / "absent")


def error_of(capsys, *arguments):
    """Returns what a command that fails says."""
    with pytest.raises(SystemExit) as raised:
        main([str(x) for x in arguments])
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def json_of(capsys, *arguments, code=0):
    """Returns what a command prints for programs."""
    try:
        main([*map(str, arguments), "--json"])
        received = 0
    except SystemExit as raised:
        received = raised.code
    assert received == code
    return json.loads(capsys.readouterr().out)


def test_inspect_as_json(capsys):
    found = json_of(capsys, "inspect", FILE)
    header, entries = adapter_files.read(FILE)
    for name in ("rank", "seed", "structure", "targets", "bases"):
        assert found[name] == header[name]
    assert found["bytes"] == FILE.stat().st_size
    assert found["vectors"] == 68 and len(found["layers"]) == 5
    rows = [list(x.values()) for x in found["layers"].values()]
    assert rows == header["layers"]
    assert found["other_entries"]["head/kernel"] == {
        "shape": [6, 3],
        "dtype": "F32",
    }


def changed(tmp_path, change, file=FILE):
    header, entries = adapter_files.read(file)
    change(header, entries)
    file = tmp_path / "changed.vera.safetensors"
    adapter_files.write(file, header, entries)
    return file


def test_diff_of_the_same(tmp_path, capsys):
    same = changed(tmp_path, lambda header, entries: None)
    found = json_of(capsys, "diff", FILE, same)
    assert not found["settings"] and not found["different_entries"]
    cosines = [x["cosine"] for x in found["layers"].values()]
    assert (
        cosines
        == [pytest.approx({"vera_lambda_d": 1.0, "vera_lambda_b": 1.0})] * 5
    )
    main(["diff", str(FILE), str(same)])
    assert "the same" in capsys.readouterr().out


def test_diff(tmp_path, capsys):
    names = []

    def change(header, entries):
        header.update(seed=5, dropout=0.25)
        header["layers"][1][2] = "0" * 16
        names.extend(sorted(x for x in entries if "lambda_b" in x))
        entries[names[0]] = -2 * entries[names[0]]
        entries[names[1]] = np.zeros_like(entries[names[1]])
        b = entries[names[2]]
        entries[names[2]] = np.arange(len(b)).astype("float32")
        del header["layers"][4]
        for name in ("vera_lambda_d", "vera_lambda_b"):
            del entries[names[4].replace("vera_lambda_b", name)]

    file = changed(tmp_path, change)
    found = json_of(capsys, "diff", FILE, file, code=1)
    assert found["settings"] == {"seed": [2024, 5], "dropout": [0.0, 0.25]}
    paths = [name.rsplit("/", 1)[0] for name in names]
    assert found["layers_in_a_only"] == [paths[4]]
    assert found["layers_in_b_only"] == []
    assert set(found["different_entries"]) == {
        *names[:3],
        names[4],
        names[4].replace("lambda_b", "lambda_d"),
    }
    b = adapter_files.read(FILE)[1][names[2]].astype("float64")
    other = np.arange(len(b))
    cosine = b @ other / np.linalg.norm(b) / np.linalg.norm(other)
    received = [
        found["layers"][x]["cosine"]["vera_lambda_b"] for x in paths[:4]
    ]
    assert received == [pytest.approx(-1), None, pytest.approx(cosine), 1.0]
    assert found["layers"][paths[1]]["kernel_fingerprint"][1] == "0" * 16
    with pytest.raises(SystemExit) as raised:
        main(["diff", str(FILE), str(file)])
    assert raised.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "seed: 2024 | 5" in lines
    assert f"only in {FILE}: {paths[4]}" in lines
    assert any("-1.000" in x and x.endswith(paths[0]) for x in lines)


def test_diff_of_what_files_rely_on(tmp_path, capsys):
    """Such as a bias of the base, which no adapter trains."""
    files = []
    for bias in (0.0, 1.0):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.layers[0].bias.assign(np.full(3, bias))
        keras_vera.enable_vera(model, rank=4, targets="all-linear")
        files.append(tmp_path / f"{bias:g}.vera.safetensors")
        keras_vera.save_adapter(model, files[-1])
    found = json_of(capsys, "diff", *files, code=1)
    assert found["different_unsaved"] and not found["different_entries"]
    with pytest.raises(SystemExit):
        main(["diff", *map(str, files)])
    assert "fingerprints" in capsys.readouterr().out


def test_diff_of_other_columns_of_the_matrices(tmp_path, capsys):
    """Where all else is the same, down to the vectors."""
    a = FILE.with_name("explicit.vera.safetensors")
    b = changed(tmp_path, lambda header, _: header["layers"][0].append(1), a)
    found = json_of(capsys, "diff", a, b, code=1)
    first = list(found["layers"].values())[0]
    assert first.pop("output_offset") == [0, 1]
    assert all(list(x) == ["cosine"] for x in found["layers"].values())
    with pytest.raises(SystemExit):
        main(["diff", str(a), str(b)])
    assert "output_offset: 0 | 1" in capsys.readouterr().out


def test_convert_to_half_floats(tmp_path, capsys):
    _, before = adapter_files.read(FILE)
    for dtype in ("float16", "bfloat16", "float32"):
        output = tmp_path / f"{dtype}.vera.safetensors"
        found = json_of(capsys, "convert", FILE, dtype, output)
        assert found["bytes"] == output.stat().st_size
        header, after = adapter_format.read(output)  # The checksum as well.
        for name, array in before.items():
            expected = array.astype(dtype).astype("float32")
            np.testing.assert_array_equal(after[name], expected)
        with safetensors.safe_open(output, framework="numpy") as content:
            stored = {content.get_slice(x).get_dtype() for x in before}
        assert stored == {
            {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
        }
    assert header["layers"] == adapter_format.read(FILE)[0]["layers"]


def test_what_cannot_be_converted(tmp_path, capsys):
    large = changed(
        tmp_path, lambda _, x: x["head/kernel"].__imul__(np.float32(1e6))
    )
    output = tmp_path / "new.vera.safetensors"
    output.write_bytes(b"old")
    for arguments, message in (
        ((large, "float16", output), "'head/kernel' holds NaN or infinity"),
        ((FILE, "float16", tmp_path / "new.h5"), "must end in"),
        ((FILE, "float64", output), "invalid choice: 'float64'"),
        ((FILE, "float16", output, "--rank", "4"), "`--rank` is for lora"),
        ((FILE, "float16", output, "--preset", "x"), "`--preset` is for peft"),
        ((FILE, "peft", output), "Pass `--preset`"),
        ((FILE, "lora", output, "--preset", "x"), "Pass `--task`"),
        (
            (FILE, "lora", output, "--preset", "x", "--task", "Nothing"),
            "no model 'Nothing'",
        ),
        ((tmp_path / "absent", "float16", output), "No such file"),
    ):
        assert message in error_of(capsys, "convert", *arguments)
    assert output.read_bytes() == b"old"
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(
        [large.name, output.name]
    )


def test_convert_for_peft(tmp_path, capsys):
    """Each is what `save_peft_adapter` writes."""
    _, backbone = both_models("bert", tmp_path / "base")
    task = keras_hub.models.BertTextClassifier(
        backbone, preprocessor=None, num_classes=3
    )
    for model, more in (
        (backbone, []),
        (task, ["--task", "BertTextClassifier", "--num-classes", "3"]),
    ):
        keras_vera.enable_vera(model, rank=5)
        spoil(model)
        file = tmp_path / "a.vera.safetensors"
        keras_vera.save_adapter(model, file)
        for to, rank, as_lora in (
            ("peft", [], False),
            ("lora", [], True),
            ("lora", ["--rank", "2"], 2),
        ):
            found = json_of(
                *(capsys, "convert", file, to, tmp_path / "output"),
                *("--preset", tmp_path / "base", *more, *rank),
            )
            report = keras_vera.save_peft_adapter(
                model, tmp_path / "expected", as_lora=as_lora
            )
            assert found.get("lost") == (report or {}).get("lost")
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                both = [
                    (tmp_path / folder / name).read_bytes()
                    for folder in ("output", "expected")
                ]
                assert both[0] == both[1]
        keras_vera.disable_vera(model)
    lora = "convert", file, "lora", tmp_path / "none"
    preset = "--preset", tmp_path / "base"
    for more, message in (
        (["--num-classes", "3"], "Pass `--task`"),
        (["--task", "BertBackbone"], "Pass `--task`"),
        (["--task", "TextClassifier"], "needs `--num-classes`"),
    ):
        assert message in error_of(capsys, *lora, *preset, *more)
    assert not (tmp_path / "none").exists()
