"""Runs the scripts of examples and benchmarks as users do, but sooner."""

import contextlib
import io
import os
import pathlib
import runpy
import string
import sys

import keras
import numpy as np
import pytest

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
for letter in string.ascii_lowercase:
    PIECES += [letter, f"##{letter}"]


def run(script, *arguments):
    """Returns what a script prints that runs in this process.

    Another one would first import again what takes ten seconds.
    """
    before, sys.argv = sys.argv, [str(script), *map(str, arguments)]
    # As Python does: scripts import others beside them.
    sys.path.insert(0, str(script.parent))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
        sys.path.remove(str(script.parent))
    return printed.getvalue()


def environment(*folders, **variables):
    """Returns that of a process without TensorFlow, unless it is the backend.

    Args:
        *folders: Further ones to import from.
        **variables: Further ones of the environment.
    """
    variables = {**os.environ, **variables}
    if variables.get("KERAS_BACKEND", keras.backend.backend()) != "tensorflow":
        folders = pathlib.Path(__file__).parent / "without_tensorflow", *folders
    found = variables.get("PYTHONPATH")
    folders = [*map(str, folders), *([found] if found else [])]
    return {**variables, "PYTHONPATH": os.pathsep.join(folders)}


@pytest.fixture
def small_minilm(monkeypatch):
    """A small model in the place of MiniLM; its words are letters."""
    import keras_hub

    models = keras_hub.models

    def classifier(preset, num_classes, preprocessor=None):
        backbone = models.BertBackbone(
            vocabulary_size=len(PIECES),
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=16,
            max_sequence_length=32,
        )
        # The same each time, as what is pretrained is.
        rng = np.random.default_rng(0)
        for weight in backbone.weights:
            if len(weight.shape) > 1:
                weight.assign(rng.normal(0, 0.1, weight.shape))
        return models.BertTextClassifier(
            backbone, num_classes=num_classes, preprocessor=preprocessor
        )

    def preprocessor(preset, sequence_length):
        return models.BertTextClassifierPreprocessor(
            models.BertTokenizer(PIECES, lowercase=True),
            sequence_length=sequence_length,
        )

    for name, make in (("", classifier), ("Preprocessor", preprocessor)):
        owner = getattr(models, f"TextClassifier{name}")
        monkeypatch.setattr(owner, "from_preset", make)
