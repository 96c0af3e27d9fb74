"""`python -m keras_vera inspect` says what is in a file."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from keras_vera.__main__ import main

FILE = pathlib.Path(__file__).parent / "golden" / "blocks2.vera.safetensors"


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
    with pytest.raises(SystemExit, match=f"{damaged}.*SHA-256"):
        main(["inspect", str(damaged), "--verify"])
    with pytest.raises(SystemExit, match="No such file"):
        main(["inspect", str(tmp_path / "absent")])
