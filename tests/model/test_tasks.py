"""Every type of task in KerasHub, as its users have it."""

import hub_models
import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import spoil
from hub_tasks import CASES
from hub_tasks import make_task
from keras import ops

import keras_vera

DIFFERENT = 1e-2


def answers(task, case):
    """All that the task predicts, as one array."""
    keras.utils.set_random_seed(0)  # Masks and latents are drawn.
    if case.data is None:
        return task.generate(case.prompt, num_steps=2, seed=0)
    parts = task.predict(case.data[0], verbose=0)
    return np.concatenate(
        [np.ravel(ops.convert_to_numpy(x)) for x in keras.tree.flatten(parts)]
    )


def fit_one_step(task, case):
    task.compile(
        optimizer=keras_vera.vera_optimizer(), jit_compile=backend() != "torch"
    )
    x, y = case.data
    task.fit(x, y, epochs=1, verbose=0)


# It compiles for half a minute elsewhere.
LONG = {"seq2seq lm"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.in_turn(*["torch"] if name in LONG else []),
        )
        for name in CASES
    ],
)
def test_task(name, tmp_path):
    case = CASES[name]
    task, fresh = make_task(case), make_task(case)
    base = answers(fresh, case)
    keras_vera.enable_vera(task, rank=4, targets=case.targets)
    vectors = [
        v for x in adapted(task) for v in (x.vera_lambda_d, x.vera_lambda_b)
    ]
    is_vector = {id(v) for v in vectors}
    trained = {id(v): v.path for v in task.trainable_variables}
    assert is_vector <= set(trained)
    head = {p.split("/")[0] for i, p in trained.items() if i not in is_vector}
    assert head == set(case.head)
    assert_same(answers(task, case), base, case)

    spoil(task, scale=0.2)
    if case.data is not None:
        start = numpy_weights(task)
        fit_one_step(task, case)
        for weight, before in zip(task.weights, start, strict=True):
            moved = ops.convert_to_numpy(weight) != before
            if id(weight) in is_vector:
                assert np.any(moved), weight.path
            else:
                assert np.any(moved) == (id(weight) in trained), weight.path
    expected = answers(task, case)
    texts = generated(task, case)
    assert largest_difference(expected, base) > DIFFERENT

    keras_vera.save_adapter(task, tmp_path / "a.vera.safetensors")
    keras_vera.load_adapter(fresh, tmp_path / "a.vera.safetensors")
    assert_same(answers(fresh, case), expected, case)
    assert generated(fresh, case) == texts

    keras_vera.merge(task)
    assert not adapted(task)
    assert_same(answers(task, case), expected, case)
    assert generated(task, case) == texts


def assert_same(received, expected, case):
    """Compiled programs of two models may round differently."""
    np.testing.assert_allclose(
        received, expected, rtol=case.rounding, atol=case.rounding
    )


def generated(task, case):
    """Returns the texts that a task generates, if it does."""
    if case.prompt is None or case.data is None:
        return None
    task.compile(sampler="greedy")
    return task.generate(case.prompt, max_length=6)


def test_summary_counts_the_vectors():
    task = hub_models.make_task("bert")
    lines = []
    task.summary(print_fn=lambda line, **_: lines.append(line))
    keras_vera.enable_vera(task, rank=4)
    vectors = 4 * (4 + 8)
    head = 8 * hub_models.CLASSES + hub_models.CLASSES
    lines = []
    task.summary(print_fn=lambda line, **_: lines.append(line))
    assert f"Trainable params: {vectors + head} " in "".join(lines)


def test_plot_shows_the_layers_that_there_were():
    pytest.importorskip("pydot")
    task = hub_models.make_task("bert")
    keras_vera.enable_vera(task, rank=4, targets="all-linear")
    dot = keras.utils.model_to_dot(
        task, expand_nested=True, show_layer_names=True
    ).to_string()
    assert "pooled_dense" in dot and "(Dense)" in dot
