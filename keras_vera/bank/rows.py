"""Answers by row: an example that has none does not fail the others."""

from keras import tree

from keras_vera.bank.batches import is_dataset
from keras_vera.bank.names import has_preprocessor
from keras_vera.bank.names import preprocessed


def readable_inputs(model, x):
    """Returns inputs that `model` takes, and errors by row; see `_readable`."""
    if is_dataset(x):
        raise ValueError(
            "`return_exceptions` is for examples in arrays or lists. "
            f"Received: a {type(x).__name__}"
        )
    if isinstance(x, list) and has_preprocessor(model):
        return _readable(x, lambda texts: preprocessed(model, texts))
    return x, {}


def readable_prompts(model, prompts):
    """As `readable_inputs`, of what `generate` takes."""
    if isinstance(prompts, list) and has_preprocessor(model):
        return _readable(prompts, model.preprocessor.generate_preprocess)
    return prompts, {}


def _readable(texts, preprocess):
    """Finds the texts that a preprocessor refuses.

    Args:
        texts: List of strings, or of what should have been one.
        preprocess: Function of a list of strings.

    Returns:
        The list with another text in the place of each that is refused, so
        that it stays as long as it was; and a dict of errors by row.
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
    rows = [row for row in range(len(texts)) if row not in errors]
    if rows:
        errors.update(_refused(texts, rows, preprocess))
    good = [row for row in rows if row not in errors]
    return [
        texts[row] if row not in errors else texts[good[0]] if good else ""
        for row in range(len(texts))
    ], errors


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(texts, rows, preprocess):
    """Returns errors by row, found by halves: few are refused, if any."""
    try:
        preprocess([texts[row] for row in rows])
        return {}
    except Exception as error:
        if len(rows) == 1:
            found = ValueError("The preprocessor refuses this text.")
            found.__cause__ = error
            return {rows[0]: found}
    half = len(rows) // 2
    return {
        **_refused(texts, rows[:half], preprocess),
        **_refused(texts, rows[half:], preprocess),
    }


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
