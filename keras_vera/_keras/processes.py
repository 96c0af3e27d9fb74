"""Several processes that run one program, each with some of the devices.

This is `jax.distributed`. What one of them computes with arrays that lie in
several waits for the others, for ever if they do something else.
"""

import keras
from keras import ops

# Seconds that a process waits for the others.
PATIENCE = 300


def check_all_here(call, variables):
    """Raises if not every process of the program makes the same call.

    Where all numbers are in this process, there is nothing to wait for.

    Relies on the client of `jax.distributed`, whose barriers have a limit.

    Args:
        call: String, the name of the function, for the message.
        variables: List of variables.

    Raises:
        RuntimeError: If another process does not make the call in time.
    """
    if not any(map(_spans_processes, variables)):
        return
    import jax
    from jax._src import distributed

    client = distributed.global_state.client
    try:
        client.wait_at_barrier(f"keras_vera/{call}", PATIENCE * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"`{call}` must be called by all {jax.process_count()} processes, "
            "since the model lies on devices of several. This is process "
            f"{jax.process_index()}, and another did not call it within "
            f"{PATIENCE} seconds, or had called it alone before. Call it in "
            "every process, not in one of them."
        ) from error


def cut_over_processes(variables):
    """Returns those variables of which this process holds only a part."""
    return [v for v in variables if _is_cut(v)]


def to_numpy(x):
    """Returns a variable or tensor as an array, whole in every process.

    What is sharded over processes is gathered: all of them must call this.
    """
    x = ops.convert_to_tensor(x)
    if _is_cut(x):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return ops.convert_to_numpy(x)


def _spans_processes(x):
    return not getattr(_stored(x), "is_fully_addressable", True)


def _is_cut(x):
    return _spans_processes(x) and not _stored(x).is_fully_replicated


def _stored(x):
    return x._value if isinstance(x, keras.Variable) else x
