"""Texts of a few letters, and tokenizers that read them.

`sentencepiece` is imported late: `.ci/try_wheel.py` runs in an environment
with little in it.
"""

import io

import hub_models
import keras_hub

SENTENCES = ["a b c d", "d c b", "b d a c", "a a d"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
PAIRS = ["<s>", "<pad>", "</s>", "<mask>", "a", "Ġb", "Ġc", "Ġd", "d", "b"]
PAIRS += ["c", "Ġ", "Ġa"]


def words():
    """Returns a tokenizer of BERT."""
    return keras_hub.tokenizers.BertTokenizer(WORDS)


def byte_pairs(kind):
    """Returns a tokenizer of a class of byte pairs, as RoBERTa's and BART's."""
    return kind(
        {token: i for i, token in enumerate(PAIRS)},
        [f"Ġ {letter}" for letter in "abcd"],
    )


def characters(kind, **ids):
    """Returns a tokenizer of a class of SentencePiece, of 9 characters."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=9,
        model_type="char",
        minloglevel=2,
        **ids,
    )
    return kind(model.getvalue())


def make_classifier():
    """Returns a BERT classifier of texts, the same one every time."""
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        words(), sequence_length=hub_models.LENGTH
    )
    return hub_models.make_task("bert", preprocessor=preprocessor)
