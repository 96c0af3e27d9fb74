"""Six families of KerasHub, tiny: what users will do with real ones."""

import gc
from dataclasses import dataclass
from unittest import mock

import keras
import numpy as np
import pytest
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from helpers import state
from hub_models import CAUSAL_LMS
from hub_models import FAMILIES
from hub_models import LENGTH
from hub_models import make_backbone
from hub_models import make_inputs
from hub_models import make_prompt
from hub_models import make_task
from keras import ops

import keras_vera
from keras_vera.layers import _vera_layer
from keras_vera.product.plan import choose_plan

pytestmark = pytest.mark.in_turn

# Largest difference of outputs of about 1: by rounding, and by an adapter.
ROUNDING = 3e-5
DIFFERENT = 1e-2

every_family = pytest.mark.parametrize("family", FAMILIES)

# Written out, so that a leak or a loss in `enable_vera` cannot hide.
ATTENTION_PATHS = {
    "bert": [f"transformer_layer_{i}/self_attention_layer" for i in (0, 1)],
    "roberta": [f"transformer_layer_{i}/self_attention_layer" for i in (0, 1)],
    "gemma": [f"decoder_block_{i}/attention" for i in (0, 1)],
    "llama": [f"transformer_layer_{i}/self_attention" for i in (0, 1)],
    "gpt2": [f"transformer_layer_{i}/self_attention" for i in (0, 1)],
    "vit": [f"vit_encoder/transformer_block_{i}/mha" for i in (1, 2)],
}
HEADS = {
    "bert": ["logits/bias", "logits/kernel"],
    "roberta": [
        "logits/bias",
        "logits/kernel",
        "pooled_dense/bias",
        "pooled_dense/kernel",
    ],
    "gemma": [],
    "llama": [],
    "gpt2": [],
    "vit": ["predictions/bias", "predictions/kernel"],
}
ATTENTION = ["attention_output", "key", "query", "value"]
TRANSFORMER_MLP = [
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]
BLOCKS = {
    "bert": [*ATTENTION, *TRANSFORMER_MLP],
    "roberta": [*ATTENTION, *TRANSFORMER_MLP],
    "gemma": [*ATTENTION, "ffw_gating", "ffw_gating_2", "ffw_linear"],
    "llama": [*ATTENTION, *TRANSFORMER_MLP, "feedforward_gate_dense"],
    "gpt2": [*ATTENTION, *TRANSFORMER_MLP],
    "vit": [*ATTENTION, "dense_1", "dense_2"],
}
OUTSIDE_BLOCKS = {"bert": ["pooled_dense"]}


def trainable_paths(model):
    return sorted(v.path for v in model.trainable_variables)


def expected_paths(family):
    vectors = [
        f"{attention}/{layer}/vera_lambda_{letter}"
        for attention in ATTENTION_PATHS[family]
        for layer in ("query", "value")
        for letter in "bd"
    ]
    return sorted(vectors + HEADS[family])


def outputs(model, x):
    """Runs without compiling, so that equal models give equal bits."""
    return ops.convert_to_numpy(model(x, training=False))


def generate(task):
    return task.generate(make_prompt(), stop_token_ids=None)["token_ids"]


def generate_without_cache(task):
    tokens = make_prompt()["token_ids"]
    mask = np.ones_like(tokens)
    for i in range(3, LENGTH):
        logits = outputs(task, {"token_ids": tokens, "padding_mask": mask})
        tokens[:, i] = np.argmax(logits[:, i - 1], axis=-1)
    return tokens


@dataclass
class Trained:
    family: str
    task: keras.Model
    x: object
    start: dict  # Values before training, by variable id.
    outputs: np.ndarray


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request):
    """A trained task with its head; tests must not change it."""
    keras.utils.set_random_seed(0)
    family = request.param
    task = make_task(family)
    x, y = make_inputs(family)
    keras_vera.enable_vera(task, rank=4)
    spoil(task)
    start = dict(zip(map(id, task.weights), numpy_weights(task)))
    task.compile(
        optimizer=keras_vera.vera_optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # `torch.compile` is no concern of this package, and slow.
        jit_compile=backend() != "torch",
    )
    task.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return Trained(family, task, x, start, outputs(task, x))


@every_family
def test_enabling_changes_no_output(family):
    task = make_task(family)
    x, _ = make_inputs(family)
    before = predict(task, x)
    keras_vera.enable_vera(task, rank=4)
    np.testing.assert_array_equal(predict(task, x), before)
    spoil(task)
    assert largest_difference(predict(task, x), before) > DIFFERENT


@every_family
def test_exactly_vectors_and_head_are_trainable(family):
    task = make_task(family)
    keras_vera.enable_vera(task, rank=4)
    assert trainable_paths(task) == expected_paths(family)
    task.trainable = False
    assert trainable_paths(task) == []
    task.trainable = True
    task.backbone.trainable = True
    assert trainable_paths(task) == expected_paths(family)


def test_fit_moves_every_number_of_vectors_and_head_alone(trained):
    expected = set(expected_paths(trained.family))
    for weight in trained.task.weights:
        start = trained.start[id(weight)]
        moved = ops.convert_to_numpy(weight) != start
        if weight.path in expected:
            assert np.all(moved), weight.path
        else:
            assert not np.any(moved), weight.path


def test_adapter_file_gives_back_the_trained_model(trained, tmp_path):
    keras_vera.save_adapter(trained.task, tmp_path / "a.vera.safetensors")
    loaded = make_task(trained.family)
    assert (
        largest_difference(outputs(loaded, trained.x), trained.outputs)
        > DIFFERENT
    )
    keras_vera.load_adapter(loaded, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(outputs(loaded, trained.x), trained.outputs)
    assert trainable_paths(loaded) == expected_paths(trained.family)


def test_keras_file_holds_the_merged_model(trained, tmp_path):
    trained.task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert_plain(loaded)
    difference = largest_difference(outputs(loaded, trained.x), trained.outputs)
    assert difference < ROUNDING


def test_preset_holds_the_merged_model(trained, tmp_path):
    trained.task.save_to_preset(tmp_path)
    loaded = type(trained.task).from_preset(str(tmp_path))
    assert_plain(loaded)
    difference = largest_difference(outputs(loaded, trained.x), trained.outputs)
    assert difference < ROUNDING


def assert_plain(model):
    projections = [x for x in model._flatten_layers() if x.name in ATTENTION]
    assert len(projections) == 8
    for layer in projections:
        assert type(layer) is keras.layers.EinsumDense
    assert not [w.path for w in model.weights if "vera_" in w.path]


@every_family
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_targets_and_merge(family, targets):
    task = make_task(family)
    x, _ = make_inputs(family)
    types = [type(layer) for layer in task._flatten_layers()]
    paths = [w.path for w in task.weights]
    base = outputs(task, x)
    keras_vera.enable_vera(task, rank=4, targets=targets)
    names = sorted(
        v.path.split("/")[-2]
        for v in task.trainable_variables
        if v.path.endswith("/vera_lambda_b")
    )
    if targets == "attention":
        assert names == sorted(2 * ATTENTION)
    else:
        outside = OUTSIDE_BLOCKS.get(family, [])
        assert names == sorted(2 * BLOCKS[family] + outside)

    spoil(task)
    adapted = outputs(task, x)
    assert largest_difference(adapted, base) > DIFFERENT
    keras_vera.merge(task)
    assert largest_difference(outputs(task, x), adapted) < ROUNDING
    assert_plain(task)
    assert [type(layer) for layer in task._flatten_layers()] == types
    assert [w.path for w in task.weights] == paths


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_generate(family):
    task = make_task(family)
    task.compile(sampler="greedy")
    base = generate(task)  # Compiles: what follows must not be stale.
    keras_vera.enable_vera(task, rank=4)
    with mock.patch.object(
        _vera_layer, "choose_plan", wraps=choose_plan
    ) as asked:
        np.testing.assert_array_equal(generate(task), base)
    # The three prompts are read at once, then a token of each is decoded.
    folded = {
        call.args[0]: choose_plan(*call.args, **call.kwargs).folded
        for call in asked.call_args_list
    }
    assert folded == {3 * LENGTH: True, 3: False}
    spoil(task, scale=2)
    adapted = generate(task)
    assert np.any(adapted != base)
    np.testing.assert_array_equal(adapted, generate_without_cache(task))
    keras_vera.merge(task)
    np.testing.assert_array_equal(generate(task), adapted)


def restorable_state(model):
    """`state` without attribute names: PyTorch lists parameters when asked."""
    layers, variables, weights = state(model)
    return [layer[:3] for layer in layers], variables, weights


@every_family
def test_disabling_restores_everything(family):
    task = make_task(family)
    task.backbone.layers[-1].trainable = False
    x, _ = make_inputs(family)
    before, base = restorable_state(task), outputs(task, x)
    keras_vera.enable_vera(task, rank=4, targets="all-linear")
    spoil(task)
    assert largest_difference(outputs(task, x), base) > DIFFERENT
    task.trainable = True
    keras_vera.disable_vera(task)
    assert restorable_state(task) == before
    np.testing.assert_array_equal(outputs(task, x), base)


@every_family
def test_lora_is_refused(family):
    task = make_task(family)
    keras_vera.enable_vera(task, rank=4)
    spoil(task)
    before = state(task)
    with pytest.raises(ValueError, match="adapted with VeRA; `enable_lora`"):
        task.backbone.enable_lora(4)
    assert state(task) == before
    keras_vera.disable_vera(task)
    task.backbone.enable_lora(2)  # Possible again.


@pytest.mark.parametrize("targets", ["mlp", "attention-qv"])
def test_lora_is_refused_above_what_is_adapted(targets):
    backbone = make_backbone("gemma")
    first, second = backbone.transformer_layers
    before = restorable_state(backbone)
    keras_vera.enable_vera(first, rank=4, targets=targets)
    keras_vera.enable_vera(second, rank=4, targets=targets)
    for one in (first, second):
        adapted_state = state(backbone)
        with pytest.raises(ValueError, match="adapted with VeRA; `enable_lora"):
            backbone.enable_lora(2)
        assert state(backbone) == adapted_state
        keras_vera.disable_vera(one)
    assert restorable_state(backbone) == before
    backbone.enable_lora(2)  # Possible again.


@every_family
def test_backbone_first_and_task_around_it(family, tmp_path):
    backbone = make_backbone(family)
    keras_vera.enable_vera(backbone, rank=4)
    spoil(backbone)
    task = make_task(family, backbone)
    assert trainable_paths(task) == expected_paths(family)
    x, _ = make_inputs(family)
    expected = outputs(task, x)

    keras_vera.save_adapter(task, tmp_path / "a.vera.safetensors")
    loaded = make_task(family)
    assert largest_difference(outputs(loaded, x), expected) > DIFFERENT
    keras_vera.load_adapter(loaded, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(outputs(loaded, x), expected)
    assert trainable_paths(loaded) == expected_paths(family)


def test_own_model_of_two_backbones(tmp_path):
    def make():
        text, image = make_backbone("roberta"), make_backbone("vit")
        inputs = [
            {
                name: keras.Input((LENGTH,), dtype="int32")
                for name in text.input
            },
            keras.Input((8, 8, 3)),
        ]
        parts = [text(inputs[0])[:, 0], image(inputs[1])[:, 0]]
        head = keras.layers.Dense(1, name="head", kernel_initializer="ones")
        return keras.Model(inputs, head(keras.layers.Concatenate()(parts)))

    model = make()
    x = [make_inputs("roberta")[0], make_inputs("vit")[0]]
    base = outputs(model, x)
    keras_vera.enable_vera(model, rank=4)
    head = ["head/bias", "head/kernel"]
    vectors = expected_paths("roberta") + expected_paths("vit")
    vectors = [path for path in vectors if "vera_lambda" in path]
    assert trainable_paths(model) == sorted(vectors + head)
    spoil(model)
    expected = outputs(model, x)
    keras_vera.save_adapter(model, tmp_path / "a.vera.safetensors")
    loaded = make()
    np.testing.assert_array_equal(outputs(loaded, x), base)
    keras_vera.load_adapter(loaded, tmp_path / "a.vera.safetensors")
    np.testing.assert_array_equal(outputs(loaded, x), expected)


def test_objects_that_keras_leaves_half_made():
    # Keras makes empty instances of the classes of a Functional model, which
    # stay among the living objects until the next garbage collection.
    gc.disable()
    try:
        task = make_task("bert")
        keras_vera.enable_vera(task, rank=4)
        keras_vera.disable_vera(task)
    finally:
        gc.enable()
