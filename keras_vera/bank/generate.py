"""`generate` of a KerasHub `CausalLM` with an adapter for each prompt."""

import functools

import keras
import numpy as np

from keras_vera import _keras
from keras_vera.layers._mixed_batch import mixed_batch

_ROWS = "keras_vera_rows"
# What the compiled function has baked in.
_COMPILED_WITH = ("sampler", "run_eagerly", "jit_compile")


class Generator:
    """Generates with the base model of a bank, and leaves it as it is.

    KerasHub compiles `generate_step` once and passes inputs and the model's
    own variables to it. The vectors of the batch are neither, so they join
    the inputs; a stand-in for the model, which shares all it has, hands them
    in before and takes them out inside.
    """

    def __init__(self, model):
        self._model = model
        self._stand_in = None
        self._compiled_with = None

    def generate(self, rows, prompts, **kwargs):
        """As `CausalLM.generate`; `rows` are those of `BankModel.rows`."""
        model = self._model
        if getattr(model, "sampler", None) is None:
            # As KerasHub does it at the end of the constructor.
            model.compile()
        # A new stand-in also when `enable_vera` and the like reset the old.
        compiled_with = [getattr(model, name) for name in _COMPILED_WITH]
        # One sampler may be set otherwise, and compiled again.
        compiled_with.append(
            {
                name: value
                for name, value in vars(model.sampler).items()
                if isinstance(value, (str, int, float))
            }
        )
        if compiled_with != self._compiled_with:
            self._stand_in = _make_stand_in(model)
            self._compiled_with = compiled_with
        stand_in = self._stand_in
        layers = list(rows)
        stand_in.__dict__["_vera_layers"] = layers
        stand_in.__dict__["_vera_rows"] = [
            [tensor for tensor in rows[layer] if tensor is not None]
            for layer in layers
        ]
        stand_in.__dict__["preprocessor"] = model.preprocessor
        return stand_in.generate(prompts, **kwargs)


class _WithRows:
    """Before the class of a `CausalLM`."""

    def make_generate_function(self):
        generate = super().make_generate_function()

        def generate_with_rows(inputs, stop_token_ids=None):
            inputs = {**inputs, _ROWS: self._vera_rows}
            return generate(inputs, stop_token_ids=stop_token_ids)

        return generate_with_rows

    def generate_step(self, inputs, stop_token_ids=None):
        inputs = dict(inputs)
        rows = dict(zip(self._vera_layers, inputs.pop(_ROWS)))
        with mixed_batch(rows):
            return super().generate_step(inputs, stop_token_ids)


def _make_stand_in(model):
    # Not `copy.copy`, which makes a new model from the config.
    stand_in = object.__new__(_class_with_rows(type(model)))
    stand_in.__dict__.update(model.__dict__)
    # Those of the model know no rows.
    stand_in.__dict__.update(dict.fromkeys(_keras.COMPILED))
    _keras.remember_model(stand_in)
    return stand_in


@functools.cache
def _class_with_rows(plain_class):
    return _keras.class_like(plain_class, (_WithRows,))


def check_can_generate(model, prompts):
    is_model = isinstance(model, keras.Model)
    # Those that make images have no sampler.
    can_generate = hasattr(model, "generate_step") and hasattr(model, "sampler")
    if not (is_model and can_generate):
        raise ValueError(
            "`generate` needs a bank on a `keras_hub.models.CausalLM`. "
            f"Received: a bank on a {type(model).__name__}"
        )
    if not isinstance(prompts, (list, dict)):
        raise ValueError(
            "`prompts` must be a list of strings or a dict of arrays. "
            f"Received: prompts of type {type(prompts).__name__}"
        )


def padded_prompts(prompts, adapters):
    """Adds prompts for the base until `keras.distribution` can cut them.

    Returns:
        The prompts and the names, and a function that takes what is generated
        and removes what is too much.
    """
    count = len(adapters)
    missing = -count % _keras.batch_divisor()
    if not missing:
        return prompts, adapters, lambda outputs: outputs
    adapters = [*adapters, *[None] * missing]
    if isinstance(prompts, list):
        prompts = [*prompts, *prompts[:1] * missing]
        return prompts, adapters, lambda outputs: outputs[:count]
    prompts = keras.tree.map_structure(
        lambda v: np.concatenate([v, np.repeat(v[:1], missing, axis=0)]),
        keras.tree.map_structure(keras.ops.convert_to_numpy, prompts),
    )
    return (
        prompts,
        adapters,
        lambda outputs: keras.tree.map_structure(lambda v: v[:count], outputs),
    )
