"""Plants faults in the package, one at a time, and says which tests see them.

    KERAS_BACKEND=torch python tests/mutations.py [--all] [--only NUMBER ...]

Of a copy of this checkout, the tests beside a fault run, as the short suite
has them (with `--all`, all of them), until one fails. A fault that no test
sees is one that a user would find.
"""

import argparse
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
# What tests import and takes long, but nothing of the package.
SLOW = ["keras_hub", "hypothesis", "pytest", "scipy", "safetensors.numpy"]

# (file, what stands there, what stands there instead, who shall see it)
FAULTS = [
    # The arithmetic and its gradients.
    (
        "product/arithmetic.py",
        "ops.cast(d, exact) * (factor_a * factor_b)\n    a =",
        "ops.cast(d, exact) * factor_a\n    a =",
        "product/test_arithmetic layers/test_layers",
    ),
    (
        "product/arithmetic.py",
        "ops.cast(grad_d * factor, d",
        "ops.cast(grad_d, d",
        "product/test_arithmetic layers/test_layers",
    ),
    (
        "product/arithmetic.py",
        "again = computed_again(d, g)",
        "again = computed_again(d, g) * 1.01",
        "product/test_arithmetic",
    ),
    (
        "product/arithmetic.py",
        'dtype == "float16" or (',
        'dtype == "none" or (',
        "layers/test_layers product/test_arithmetic",
    ),
    (
        "product/structure.py",
        "np.arange(self.rank) * channels // self.rank",
        "np.arange(self.rank)",
        "product/test_projection layers/test_layers product/test_arithmetic",
    ),
    (
        "product/random.py",
        "divmod(start, _WORDS",
        "divmod(start + 8, _WORDS",
        "product/test_projection",
    ),
    # What is shared within a backward pass, on PyTorch.
    (
        "product/custom_gradient.py",
        "if last is None or last.task != task:",
        "if last is None:",
        "product/test_shared_gradients",
    ),
    # The plans.
    (
        "product/plan.py",
        "2 * tokens * width * (inputs + n)",
        "2 * tokens * width * inputs",
        "product/test_plan",
    ),
    (
        "product/plan.py",
        "folded and kept",
        "folded",
        "product/test_plan product/test_arithmetic",
    ),
    (
        "product/plan.py",
        "of_kernel < of_tokens",
        "of_kernel > of_tokens",
        "product/test_plan product/test_arithmetic",
    ),
    # The layers.
    (
        "layers/_fingerprint.py",
        "ops.take(flat, indices",
        "ops.take(flat, 0 * indices",
        "files/test_format files/test_adapter_file",
    ),
    # Which layers a role means.
    (
        "model/roles.py",
        "fits = sizes[down.path] in [(n, m), (n / 2, m)]",
        "fits = sizes[down.path] == (n, m)",
        "model/test_targets model/test_coverage",
    ),
    (
        "model/roles.py",
        "if n == 3 * m:",
        "if n == 4 * m:",
        "model/test_targets model/test_coverage",
    ),
    # The frozen base.
    (
        "model/frozen.py",
        'arguments.arguments["training"] = False',
        "pass",
        "model/test_frozen",
    ),
    # The checks of files.
    (
        "files/fit.py",
        "and fingerprint(path, layer) !=",
        "and False and fingerprint(path, layer) !=",
        "files/test_adapter_file files/test_unsaved files/test_hostile_files",
    ),
    (
        "files/fit.py",
        "if sha256 != header",
        "if False and sha256 != header",
        "files/test_adapter_file files/test_hostile_files",
    ),
    (
        "files/format.py",
        "if digest.hexdigest() != header",
        "if False and digest.hexdigest() != header",
        "files/test_hostile_files files/test_adapter_file",
    ),
    (
        "files/fit.py",
        'if unexpected or missing:\n        _raise_names("entries"',
        'if unexpected:\n        _raise_names("entries"',
        "files/test_adapter_file files/test_hostile_files",
    ),
    (
        "files/format.py",
        "if len(found) != len(pairs):",
        "if False:",
        "files/test_hostile_files files/test_adapter_file",
    ),
    # The bank.
    (
        "bank/row_optimizer.py",
        "self._row_iterations.assign_add(ops.cast(moving",
        "self._row_iterations.assign_add(1 + 0 * ops.cast(moving",
        "bank/test_bank_training",
    ),
    (
        "bank/row_optimizer.py",
        "variable.assign(ops.where(mask, new, old))",
        "variable.assign(new)",
        "bank/test_bank_training",
    ),
    (
        "bank/row_optimizer.py",
        "variable.assign(ops.where(mask, value[:1], value))",
        "pass",
        "bank/test_bank_training",
    ),
    # PEFT's files.
    (
        "peft/lora.py",
        "left[:, :k] * sizes",
        "left[:, :k] * sizes[::-1]",
        "peft/test_peft_lora",
    ),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", type=int, nargs="*")
    args = parser.parse_args()
    for name in SLOW:
        importlib.import_module(name)
    seen = []
    numbers = range(len(FAULTS)) if args.only is None else args.only
    for number in numbers:
        test = first_failure(*FAULTS[number], args.all)
        seen.append(test is not None)
        print(f"{number:2} {FAULTS[number][0]}: {test or 'NOT SEEN'}")
        sys.stdout.flush()
    print(f"{sum(seen)} of {len(seen)} faults are seen")


def first_failure(file, old, new, tests, whole):
    """Returns the first test that fails with the fault, or `None`."""
    with tempfile.TemporaryDirectory() as folder:
        root = copy_of_checkout(folder)
        path = root / "keras_vera" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has {text.count(old)} times: {old}")
        path.write_text(text.replace(old, new))
        names = [f"tests/{test}.py" for test in tests.split()]
        return failure_of(root, ["-x", "-q", "-n0", *names, *["--all"] * whole])


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
    """Runs pytest in a fork of this process, which has imported the rest."""
    printed = root / "printed.txt"
    child = os.fork()
    if not child:
        handle = os.open(printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "cache")
        sys.argv = ["pytest", *arguments]
        sys.path[0] = str(root)
        code = sys.modules["pytest"].main(arguments)
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return None
    found = re.search(
        r"^(?:FAILED|ERROR) (.*?)(?: - |$)", printed.read_text(), re.M
    )
    return found[1] if found else f"status {status}"


if __name__ == "__main__":
    main()
