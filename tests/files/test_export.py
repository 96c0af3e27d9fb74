"""A merged model goes on through everything that Keras and KerasHub have."""

import keras
import keras_hub
import numpy as np
import pytest
import torch
import transformers
from helpers import backend
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from hub_models import FAMILIES
from hub_models import GROUPED
from hub_models import HEADS
from hub_models import TEXT
from hub_models import make_inputs
from hub_models import make_task
from hub_models import randomize

import keras_vera

ROUNDING = 3e-5
DIFFERENT = 1e-2

# What KerasHub exports to Hugging Face transformers, and reads from it.
TO_TRANSFORMERS = {
    "GemmaBackbone": {**TEXT, **GROUPED, "head_dim": 4},
    "Gemma3Backbone": {
        **TEXT,
        **GROUPED,
        "head_dim": 4,
        "image_size": None,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
    },
    "GPT2Backbone": {**TEXT, **HEADS, "intermediate_dim": 32},
    "Llama3Backbone": {**TEXT, **GROUPED},
    "MistralBackbone": {**TEXT, **GROUPED},
    "QwenBackbone": {**TEXT, **GROUPED},
}
# What Keras exports ONNX with.
TO_ONNX = {"jax": "jax2onnx", "tensorflow": "tf2onnx", "torch": "onnxscript"}


def adapted_then_merged(model, outputs):
    """Returns what the adapted model gave; `model` is merged now."""
    base = outputs(model)
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    spoil(model, scale=0.3)
    adapted = outputs(model)
    assert largest_difference(adapted, base) > DIFFERENT
    keras_vera.merge(model)
    assert largest_difference(outputs(model), adapted) < ROUNDING
    return adapted


@pytest.mark.in_turn
@pytest.mark.parametrize("family", FAMILIES)
def test_keras_file_and_preset(family, tmp_path):
    task = make_task(family)
    x, _ = make_inputs(family)
    adapted = adapted_then_merged(task, lambda model: predict(model, x))
    task.save(tmp_path / "task.keras")
    task.save_to_preset(tmp_path / "preset")
    for loaded in (
        keras.saving.load_model(tmp_path / "task.keras"),
        type(task).from_preset(str(tmp_path / "preset")),
    ):
        assert largest_difference(predict(loaded, x), adapted) < ROUNDING


@pytest.mark.in_turn
@pytest.mark.parametrize("name", TO_TRANSFORMERS)
def test_transformers(name, tmp_path):
    backbone = getattr(keras_hub.models, name)(**TO_TRANSFORMERS[name])
    randomize(backbone)
    x, _ = make_inputs("gpt2", rows=3)
    x["padding_mask"][:] = 1
    adapted = adapted_then_merged(backbone, lambda model: predict(model, x))
    backbone.export_to_transformers(str(tmp_path / "exported"))
    model = transformers.AutoModel.from_pretrained(
        tmp_path / "exported", dtype="float32"
    )
    with torch.no_grad():
        exported = model.eval()(
            input_ids=torch.from_numpy(x["token_ids"]).long()
        )
    np.testing.assert_allclose(
        exported.last_hidden_state.numpy(), adapted, atol=2e-4
    )


@pytest.fixture
def exportable():
    """A merged model, its inputs, and what it gave when adapted.

    Its layers are those that every exporter knows.
    """
    inputs = keras.Input((6, 8), batch_size=4)
    x = keras.layers.EinsumDense("btd,dnh->btnh", (6, 2, 4))(inputs)
    x = keras.layers.Reshape((6, 8))(x)
    x = keras.layers.Dense(5, activation="tanh")(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    randomize(model)
    x = np.random.default_rng(1).normal(size=(4, 6, 8)).astype("float32")
    return model, x, adapted_then_merged(model, lambda model: predict(model, x))


@pytest.mark.skipif(backend() == "torch", reason="not so in Keras")
def test_saved_model(exportable, tmp_path):
    import tensorflow as tf

    model, x, adapted = exportable
    model.export(tmp_path / "saved_model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    outputs = np.asarray(loaded.serve(x))
    assert largest_difference(outputs, adapted) < ROUNDING


def test_onnx(exportable, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip(TO_ONNX[backend()])
    model, x, adapted = exportable
    model(x)  # On JAX, Keras wants it called outside of `predict`.
    path = tmp_path / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    (outputs,) = session.run(None, {given.name: x})
    assert largest_difference(outputs, adapted) < ROUNDING
