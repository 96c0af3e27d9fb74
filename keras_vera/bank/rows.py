"""Answers by row: an example that has none does not fail the others."""

from keras import tree

from keras_vera.bank.batches import is_dataset
from keras_vera.bank.data import data_of
from keras_vera.bank.data import examples_of
from keras_vera.bank.names import has_preprocessor
from keras_vera.bank.names import preprocessed


def readable_data(model, x, adapters):
    """Returns the `Examples` of `AdapterBank.predict`, and errors by row.

    In the place of what cannot be read there is another text, so that there
    are as many examples as there were.
    """
    if is_dataset(x):
        raise ValueError(
            "`return_exceptions` is for examples in arrays or lists. "
            f"Received: a {type(x).__name__}"
        )
    if isinstance(x, list) and has_preprocessor(model):
        _, errors, data = _readable(x, lambda texts: preprocessed(model, texts))
        return examples_of(*data, adapters), errors
    return data_of(model, x, adapters=adapters), {}


def readable_prompts(model, prompts):
    """Returns what `generate` can take, and errors by row."""
    if isinstance(prompts, list) and has_preprocessor(model):
        preprocess = model.preprocessor.generate_preprocess
        prompts, errors, _ = _readable(prompts, preprocess)
        return prompts, errors
    return prompts, {}


def _readable(texts, preprocess):
    """Finds the texts that a preprocessor refuses.

    Args:
        texts: List of strings, or of what should have been one.
        preprocess: Function of a list of strings.

    Returns:
        The list with another text in the place of each that is refused; a
        dict of errors by row; and what `preprocess` makes of the list.
    """
    errors = {}
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            errors[row] = ValueError(
                "A text must be a string. Received: a value of type "
                f"{type(text).__name__}"
            )
        elif not _is_unicode(text):
            errors[row] = ValueError(
                f"A text must be valid Unicode. Received: {text[:50]!a}"
            )
    filled = _filled(texts, errors)
    try:
        return filled, errors, preprocess(filled)
    except Exception as error:
        rows = [row for row in range(len(texts)) if row not in errors]
        errors.update(_refused(texts, rows, preprocess, error))
    filled = _filled(texts, errors)
    return filled, errors, preprocess(filled)


def _filled(texts, errors):
    """Returns texts with a good one in the place of those with an error."""
    good = (text for row, text in enumerate(texts) if row not in errors)
    other = next(good, "")
    return [other if row in errors else text for row, text in enumerate(texts)]


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(texts, rows, preprocess, error):
    """Returns errors by row, of rows of which together came an error.

    They are found by halves, as there are few, if any.
    """
    if len(rows) <= 1:
        found = ValueError("The preprocessor refuses this text.")
        found.__cause__ = error
        return dict.fromkeys(rows, found)
    half, found = len(rows) // 2, {}
    for part in (rows[:half], rows[half:]):
        try:
            preprocess([texts[row] for row in part])
        except Exception as of_part:
            found.update(_refused(texts, part, preprocess, of_part))
    return found


def answers(outputs, names, errors_of_rows, errors_of_names):
    """Returns a list with the output of each row, or its error.

    Args:
        outputs: List of strings, or arrays in a structure.
        names: List of the names of the adapters of all rows.
        errors_of_rows: Dict of errors by row.
        errors_of_names: Dict of errors by name.
    """
    are_texts = isinstance(outputs, list) and isinstance(outputs[0], str)
    found = []
    for row, name in enumerate(names):
        error = errors_of_rows.get(row) or errors_of_names.get(name)
        if error is not None:
            found.append(error)
        elif are_texts:
            found.append(outputs[row])
        else:
            found.append(tree.map_structure(lambda y, i=row: y[i], outputs))
    return found
