"""Generation with an adapter for each prompt."""

import keras_hub
import numpy as np
import pytest
from banks import randomize
from helpers import backend
from helpers import spoil
from hub_models import CAUSAL_LMS
from hub_models import make_backbone
from hub_models import make_prompt
from hub_models import make_task
from keras import ops

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

ADAPTERS = ["b", None, "a", "b"]
SAMPLERS = {
    "greedy": lambda: "greedy",
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(
        k=2, alpha=0.4
    ),
}
RANDOM = {
    "random": lambda: keras_hub.samplers.RandomSampler(seed=1),
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=3, seed=1),
    "top_p": lambda: keras_hub.samplers.TopPSampler(p=0.5, seed=1),
}


def make_causal_lm(family):
    task = make_task(family)
    if family == "gpt2":
        # Large at random, it would choose the token whatever was attended to.
        beta = task.backbone.get_layer("layer_norm").beta
        beta.assign(np.zeros(beta.shape))
    return task


def make_bank(family, folder):
    """Returns a task, and a bank on it with two random adapters."""
    task = make_causal_lm(family)
    keras_vera.enable_vera(task, rank=4, targets="attention")
    bank = keras_vera.AdapterBank(task, capacity=3)
    for seed, name in enumerate("ab"):
        randomize(task, seed + 1)
        file = folder / f"{name}.vera.safetensors"
        keras_vera.save_adapter(task, file)
        bank.load(name, file)
    return task, bank


def generate(task, prompt):
    return task.generate(prompt, stop_token_ids=None)["token_ids"]


def alone(task, folder, prompt, name):
    if name is None:
        with keras_vera.base_model(task):
            return generate(task, prompt)
    keras_vera.load_adapter(task, folder / f"{name}.vera.safetensors")
    return generate(task, prompt)


def assert_rows_are_alone(task, bank, folder, prompt):
    found = bank.generate(prompt, ADAPTERS, stop_token_ids=None)["token_ids"]
    expected = [
        alone(task, folder, prompt, name)[i] for i, name in enumerate(ADAPTERS)
    ]
    np.testing.assert_array_equal(found, np.stack(expected))
    base = alone(task, folder, prompt, None)
    assert (found != base).any(axis=1).sum() >= 2  # The adapters matter.


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_rows_are_those_of_each_adapter_alone(tmp_path, family):
    task, bank = make_bank(family, tmp_path)
    task.compile(sampler="greedy")
    # Prompts of different lengths, some of which are generated further.
    prompt = make_prompt(4, np.array([[3], [2], [3], [4]]))
    assert_rows_are_alone(task, bank, tmp_path, prompt)


@pytest.mark.parametrize("sampler", list(SAMPLERS)[1:])
def test_samplers_that_repeat_rows(tmp_path, sampler):
    task, bank = make_bank("gemma", tmp_path)
    task.compile(sampler=SAMPLERS[sampler]())
    assert_rows_are_alone(task, bank, tmp_path, make_prompt(4))


@pytest.mark.parametrize("sampler", RANDOM)
def test_random_samplers(tmp_path, sampler):
    """With one seed, they draw for each row what they draw with it alone."""
    task, bank = make_bank("gemma", tmp_path)
    prompt = make_prompt(4)
    task.compile(sampler=RANDOM[sampler]())
    state = task.sampler.seed_generator.state
    seed = ops.convert_to_numpy(state).copy()
    found = bank.generate(prompt, ADAPTERS, stop_token_ids=None)["token_ids"]
    for i, name in enumerate(ADAPTERS):
        state.assign(seed)
        expected = alone(task, tmp_path, prompt, name)
        np.testing.assert_array_equal(found[i], expected[i])


@pytest.mark.in_turn("jax")
def test_speculative_sampler(tmp_path):
    """A draft model is not adapted; what it proposes, the adapters check."""
    task, bank = make_bank("gemma4", tmp_path)
    task.compile(sampler="greedy")
    assistant = keras_hub.models.Gemma4AssistantCausalLM(
        backbone=make_backbone("gemma4"),
        backbone_hidden_size=8,
        num_centroids=1,
        centroid_intermediate_top_k=1,
        use_ordered_embeddings=False,
        num_speculative_tokens=1,
        preprocessor=None,
    )
    prompt = make_prompt(4)
    settings = {"stop_token_ids": None, "assistant_model": assistant}
    # KerasHub keeps what it compiles here, without any adapters.
    task.generate(prompt, **settings)
    found = bank.generate(prompt, ADAPTERS, **settings)["token_ids"]
    expected = [
        alone(task, tmp_path, prompt, name)[i]
        for i, name in enumerate(ADAPTERS)
    ]
    np.testing.assert_array_equal(found, np.stack(expected))


@pytest.mark.eager(False)
def test_no_adapter_is_compiled_in(tmp_path, monkeypatch):
    task, bank = make_bank("gemma", tmp_path)
    task.compile(sampler="greedy")
    traces = []
    original = type(task).generate_step

    def counted(self, *args, **kwargs):
        traces.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(task), "generate_step", counted)
    prompt = make_prompt(4)
    bank.generate(prompt, ADAPTERS, stop_token_ids=None)
    bank.generate(prompt, ["a"] * 4, stop_token_ids=None)
    assert len(traces) == (2 if backend() == "torch" else 1)
    assert_rows_are_alone(task, bank, tmp_path, prompt)
    # Other vectors under a name that was there before.
    bank.remove("a")
    spoil(task, seed=9)
    keras_vera.save_adapter(task, tmp_path / "a.vera.safetensors")
    bank.load("a", tmp_path / "a.vera.safetensors")
    assert_rows_are_alone(task, bank, tmp_path, prompt)
    # Another sampler.
    task.compile(sampler=SAMPLERS["beam"]())
    assert_rows_are_alone(task, bank, tmp_path, prompt)
    # One that is set otherwise.
    sampler = RANDOM["top_k"]()
    task.compile(sampler=sampler)
    bank.generate(prompt, ADAPTERS, stop_token_ids=None)
    sampler.k = 1
    task.compile(sampler=sampler)
    assert_rows_are_alone(task, bank, tmp_path, prompt)


@pytest.mark.eager(False)
def test_texts(tmp_path):
    """Strings in, strings out, as with the model itself."""
    vocabulary = ["<|endoftext|>", *"abcdefghijk", "ab"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["a b"],
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=6
    )
    task = make_causal_lm("gpt2")
    task = type(task)(backbone=task.backbone, preprocessor=preprocessor)
    keras_vera.enable_vera(task, rank=4, targets="attention")
    bank = keras_vera.AdapterBank(task, capacity=1)
    randomize(task, 1)
    keras_vera.save_adapter(task, tmp_path / "a.vera.safetensors")
    bank.load("a", tmp_path / "a.vera.safetensors")
    task.compile(sampler="greedy")
    prompts = ["ab", "ab"]
    settings = {"max_length": 6, "stop_token_ids": None}
    found = bank.generate(prompts, ["a", None], **settings)
    assert found[0] == task.generate(prompts, **settings)[0]
    with keras_vera.base_model(task):
        assert found[1] == task.generate(prompts, **settings)[1]
    assert found[0] != found[1]
    answers = bank.generate(
        ["ab", 7, "ab", "ab"],
        ["a", "a", "nobody", None],
        return_exceptions=True,
        **settings,
    )
    assert (answers[0], answers[3]) == tuple(found)
    assert isinstance(answers[1], ValueError)
    assert "no adapter named 'nobody'" in str(answers[2])
    with pytest.raises(ValueError, match="1 names for 2 examples"):
        bank.generate(prompts, ["a"])
    with pytest.raises(ValueError, match="2 names for 3 examples"):
        # Texts are counted, not the letters of the first.
        texts = {"encoder_text": ["ab", "a", "b"], "decoder_text": ["a"] * 3}
        bank.generate(texts, ["a", None])
    with pytest.raises(ValueError, match="`prompts` must be a list"):
        bank.generate("ab", ["a"])


@pytest.mark.parametrize(
    "prompts, count",
    [
        (["a", "b", "a"], 3),
        (("a", "b", "a"), 3),
        (np.array(["a", "b", "a"]), 3),
        (np.array(["a", "b", "a"], object), 3),
        ("a", 1),
    ],
)
def test_texts_are_counted_beside_images(tmp_path, prompts, count):
    """Whose rows are no examples."""
    _, bank = make_bank("gemma", tmp_path)
    image = np.zeros((8, 7, 3), "float32")
    images = image if count == 1 else [image] * count
    inputs = {"images": images, "prompts": prompts}
    with pytest.raises(ValueError, match=f"2 names for {count} examples"):
        bank.generate(inputs, ["a", None])


def test_token_ids_are_counted_beside_images(tmp_path):
    _, bank = make_bank("gemma", tmp_path)
    inputs = {"images": [np.zeros((8, 8, 3))] * 4, **make_prompt(4)}
    with pytest.raises(ValueError, match="2 names for 4 examples"):
        bank.generate(inputs, ["a", None])
