"""Which adapter each example has, where no argument of `call` can say it.

The models in between are Keras' and KerasHub's own, so the vectors of the
batch reach the layers by a scope around the call of the base model. All
backends trace or run the layers inside it, also in `jit`, `tf.function` and
`while_loop`.
"""

import contextlib
import threading

# Not a `ContextVar`, which `torch.compile` does not follow.
_scope = threading.local()


@contextlib.contextmanager
def mixed_batch(rows):
    """Lets layers use an adapter for each example.

    Args:
        rows: Dict of tuples of tensors by layer, each with one row for each
            example: d and b of an adapted layer, kernel and bias of a head.
    """
    before = getattr(_scope, "rows", None)
    _scope.rows = {id(layer): tensors for layer, tensors in rows.items()}
    try:
        yield
    finally:
        _scope.rows = before


def rows_of(layer):
    """Returns the tensors of a layer in a mixed batch, else `None`."""
    rows = getattr(_scope, "rows", None)
    return None if rows is None else rows.get(id(layer))


def check_rows(layer, x, row):
    """Raises if the rows of `x` cannot be those of the examples."""
    received, examples = x.shape[0], row.shape[0]
    if (
        isinstance(received, int)
        and isinstance(examples, int)
        and (examples == 0 or received % examples)
    ):
        raise ValueError(
            f"Layer '{layer.name}' received {received} rows for {examples} "
            "`adapter_ids`. There must be one id for each example, and the "
            "first axis of what adapted layers receive must be that of the "
            "examples."
        )
