"""Runs the README's lines with the package that is installed.

    python .ci/try_wheel.py

For a fresh environment with the wheel, its `hub` extra and a backend. Tiny
models stand in for the presets.
"""

import os
import pathlib
import re
import sys
import tempfile

import keras
import keras_hub

import keras_vera

ROOT = pathlib.Path(__file__).parent.parent


def main():
    sys.path.append(str(ROOT / "tests"))
    import doc_stand_ins

    for name, make in doc_stand_ins.PRESETS.items():
        setattr(getattr(keras_hub.models, name), "from_preset", make)
    readme = (ROOT / "README.md").read_text()
    names = doc_stand_ins.data()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for code in re.findall("^```python\n(.*?)^```$", readme, re.S | re.M):
            exec(code, names)
        os.chdir(ROOT)
    print(
        f"Python {sys.version.split()[0]}, keras {keras.version()}, "
        f"{keras.backend.backend()}: the README's lines run with keras_vera "
        f"{keras_vera.__version__} of {keras_vera.__path__[0]}"
    )


if __name__ == "__main__":
    main()
