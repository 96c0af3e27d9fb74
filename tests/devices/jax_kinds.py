"""Each kind of layer on eight devices of JAX; see `test_jax_distribution.py`.

Argument: a folder, which is not used.
"""

import keras
import numpy as np
import tiny_model
from keras import distribution

import keras_vera

tokens = np.random.default_rng(0).integers(0, 16, (16, 8))
targets = np.tile(tiny_model.y[:, None], (1, 8, 1))


def trained(plan, structure):
    """Returns the vectors after two steps."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            keras.layers.Embedding(16, 8),
            keras.layers.Conv1D(8, 3, padding="same", activation="tanh"),
            keras.layers.EinsumDense("abc,cde->abde", (8, 8, 4), name="up"),
            keras.layers.EinsumDense("abde,def->abf", (8, 16), name="down"),
            keras.layers.Dense(4),
        ]
    )
    model.compile(keras.optimizers.SGD(0.5), "mse")
    keras_vera.enable_vera(
        model, rank=16, targets=".*", plan=plan, structure=structure
    )
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    model.fit(tokens, targets, batch_size=16, epochs=2, verbose=0)
    return [
        np.array(keras.ops.convert_to_numpy(v))
        for v in model.trainable_variables
    ]


mesh = distribution.DeviceMesh((2, 4), ("batch", "model"))
layouts = distribution.LayoutMap(mesh)
layouts["embedding.*/embeddings"] = ("model", None)
layouts["up/kernel"] = (None, "model", None)
layouts["down/kernel"] = ("model", None, None)
layouts["vera_projection/vera_kernel_a"] = ("model", None)
layouts["vera_projection/vera_kernel_b"] = (None, "model")
for form, active in (
    (("additive", "dense"), distribution.DataParallel()),
    (
        ("folded", "blocks4"),
        distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
    ),
):
    one = trained(*form)
    with active.scope():
        many = trained(*form)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
