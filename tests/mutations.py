"""Plants faults in the package, one at a time, and says which tests see them.

    KERAS_BACKEND=torch python tests/mutations.py [--all] [--only NUMBER ...]

Of a copy of this checkout, the short suite runs (with `--all` the whole one),
beginning with the folder of the fault, until a test fails. A fault that no
test sees is one that a user would find.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent

# (file, what stands there, what stands there instead)
FAULTS = [
    # The arithmetic and its gradients.
    (
        "product/arithmetic.py",
        "ops.cast(d, exact) * (factor_a * factor_b)\n    a =",
        "ops.cast(d, exact) * factor_a\n    a =",
    ),
    (
        "product/arithmetic.py",
        "ops.cast(grad_d * factor, d",
        "ops.cast(grad_d, d",
    ),
    (
        "product/arithmetic.py",
        "again = computed_again(d, g)",
        "again = computed_again(d, g) * 1.01",
    ),
    (
        "product/arithmetic.py",
        'dtype == "float16" or (',
        'dtype == "none" or (',
    ),
    (
        "product/structure.py",
        "np.arange(self.rank) * channels // self.rank",
        "np.arange(self.rank)",
    ),
    ("product/random.py", "divmod(start, _WORDS", "divmod(start + 8, _WORDS"),
    # What is shared within a backward pass, on PyTorch.
    ("product/custom_gradient.py", "            tensor._version,\n", ""),
    # The plans.
    (
        "product/plan.py",
        "2 * tokens * width * (inputs + n)",
        "2 * tokens * width * inputs",
    ),
    ("product/plan.py", "folded and kept", "folded"),
    ("product/plan.py", "of_kernel < of_tokens", "of_kernel > of_tokens"),
    # The layers.
    (
        "layers/_fingerprint.py",
        "ops.take(flat, indices",
        "ops.take(flat, 0 * indices",
    ),
    # Which layers a role means.
    (
        "model/roles.py",
        "fits = sizes[down.path] in [(n, m), (n / 2, m)]",
        "fits = sizes[down.path] == (n, m)",
    ),
    ("model/roles.py", "if n == 3 * m:", "if n == 4 * m:"),
    # The frozen base.
    ("model/frozen.py", 'arguments.arguments["training"] = False', "pass"),
    # The checks of files.
    (
        "files/fit.py",
        "and fingerprint(path, layer) !=",
        "and False and fingerprint(path, layer) !=",
    ),
    ("files/fit.py", "if sha256 != header", "if False and sha256 != header"),
    (
        "files/format.py",
        "if digest.hexdigest() != header",
        "if False and digest.hexdigest() != header",
    ),
    (
        "files/fit.py",
        'if unexpected or missing:\n        _raise_names("entries"',
        'if unexpected:\n        _raise_names("entries"',
    ),
    ("files/format.py", "if len(found) != len(pairs):", "if False:"),
    # The bank.
    (
        "bank/row_optimizer.py",
        "self._row_iterations.assign_add(ops.cast(moving",
        "self._row_iterations.assign_add(1 + 0 * ops.cast(moving",
    ),
    (
        "bank/row_optimizer.py",
        "variable.assign(ops.where(mask, new, old))",
        "variable.assign(new)",
    ),
    (
        "bank/row_optimizer.py",
        "variable.assign(ops.where(mask, value[:1], value))",
        "pass",
    ),
    # PEFT's files.
    ("peft/lora.py", "left[:, :k] * sizes", "left[:, :k] * sizes[::-1]"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", type=int, nargs="*")
    args = parser.parse_args()
    seen = []
    numbers = range(len(FAULTS)) if args.only is None else args.only
    for number in numbers:
        test = first_failure(FAULTS[number], args.all)
        seen.append(test is not None)
        file, old, new = FAULTS[number]
        print(f"{number:2} {file}: {test or 'NOT SEEN'}", flush=True)
    print(f"{sum(seen)} of {len(seen)} faults are seen")


def first_failure(fault, whole):
    """Returns the first test that fails with the fault, or `None`."""
    file, old, new = fault
    with tempfile.TemporaryDirectory() as folder:
        root = copy_of_checkout(folder)
        path = root / "keras_vera" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has {text.count(old)} times: {old}")
        path.write_text(text.replace(old, new))
        first = f"tests/{pathlib.Path(file).parts[0]}"
        rest = sorted(
            str(p.relative_to(root))
            for p in (root / "tests").rglob("test_*.py")
            if first not in str(p)
        )
        for tests in ([first], rest):
            test = failure_of(root, [*tests, *["--all"] * whole])
            if test:
                return test
    return None


def copy_of_checkout(folder):
    root = pathlib.Path(folder)
    names = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def failure_of(root, arguments):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return found[1] if found else f"exit code {run.returncode}"


if __name__ == "__main__":
    main()
