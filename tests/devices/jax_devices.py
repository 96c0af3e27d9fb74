"""Eight devices of JAX; see `test_jax_distribution.py`.

Arguments: a folder, and which of the functions below to run.
"""

import contextlib
import sys

import keras
import keras_hub
import numpy as np
import tiny_model
from jax.sharding import NamedSharding
from keras import distribution
from keras.distribution import DataParallel
from keras.distribution import DeviceMesh
from keras.distribution import LayoutMap
from keras.distribution import ModelParallel

import keras_vera
from keras_vera.product import projection as projections

x, y = tiny_model.x, tiny_model.y
TARGETS = {"targets": "all-linear"}


def to_numpy(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def spec_of(variable):
    return tuple(variable.value.sharding.spec)


def assert_close(a, b, atol=3e-6):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@contextlib.contextmanager
def raises(words, kind=ValueError):
    try:
        yield
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing raised {words!r}")


def mesh_of(shape):
    return DeviceMesh(shape, ("batch", "model"))


def model_parallel(shape, **layouts):
    layout_map = LayoutMap(mesh_of(shape))
    for path, layout in layouts.items():
        layout_map[path] = layout
    return ModelParallel(layout_map=layout_map)


KERNELS = {".*up/kernel": (None, "model"), ".*down/kernel": ("model", None)}
PAIR = {
    "vera_projection/vera_kernel_a": ("model", None),
    "vera_projection/vera_kernel_b": (None, "model"),
}


def adapted_model():
    model = tiny_model.make_model()
    keras_vera.enable_vera(model, rank=4, **TARGETS)
    return model


def fit(model, epochs=3, callbacks=()):
    history = model.fit(
        x,
        y,
        batch_size=16,
        epochs=epochs,
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    )
    return history.history["loss"]


def predict(model):
    return model.predict(x, verbose=0)


def matrices(folder):
    """A and B are made part by part, with the same bits."""
    made = []
    plain = projections.unit_uniform_rows

    def unit_uniform_rows(*arguments):
        entries = plain(*arguments)
        made.append(entries.size)
        return entries

    projections.unit_uniform_rows = unit_uniform_rows
    # Larger than what Keras would compile an initializer for.
    size, rank = 8000, 1024
    rows = {"vera_projection/vera_kernel_a": ("model", None)}
    for active in (model_parallel((1, 8), **rows), DataParallel()):
        made.clear()
        with active.scope():
            projection = keras_vera.SharedProjection(seed=3, rank=rank)
            projection.reserve(size, 8)
        parts = 8 if isinstance(active, ModelParallel) else 1
        assert made == [size * rank // parts] * parts + [8 * rank], made
        a = projection.vera_kernel_a.value
        assert a.sharding.shard_shape(a.shape) == (size // parts, rank)
        expected = plain(3, 0, rank, slice(0, size), slice(0, rank))
        np.testing.assert_array_equal(np.asarray(a), expected)
        b = np.asarray(projection.vera_kernel_b)
        expected = plain(3, 1, rank, slice(0, 8), slice(0, rank)).T
        np.testing.assert_array_equal(b, expected)
    # By columns as well, and matrices that come with a file.
    by_rank = {
        "vera_projection/vera_kernel_a": (None, "model"),
        "vera_projection/vera_kernel_b": ("model", "batch"),
    }
    whole = keras_vera.SharedProjection(seed=3, rank=24)
    whole.reserve(16, 8)
    pair = to_numpy([whole.vera_kernel_a, whole.vera_kernel_b])
    with model_parallel((2, 4), **by_rank).scope():
        cut = keras_vera.SharedProjection(seed=3, rank=24)
        cut.reserve(16, 8)
        given = keras_vera.SharedProjection.from_matrices(*pair)
    for other in (cut, given):
        assert spec_of(other.vera_kernel_b) == ("model", "batch")
        both = to_numpy([other.vera_kernel_a, other.vera_kernel_b])
        assert_close(pair, both, atol=0)


def models(folder):
    """An adapted model is the same on one device and on eight."""
    one = adapted_model()
    losses, outputs = fit(one), predict(one)
    with keras_vera.base_model(one):
        base = predict(one)
    assert np.abs(base - outputs).max() > 1e-3
    keras_vera.save_adapter(one, f"{folder}/one.vera.safetensors")
    for name, active in {
        "data": DataParallel(),
        "1x8": model_parallel((1, 8), **KERNELS, **PAIR),
        "2x4": model_parallel(
            (2, 4), **KERNELS, **PAIR, **{".*up/vera_lambda_b": ("model",)}
        ),
    }.items():
        path = f"{folder}/{name}.vera.safetensors"
        with active.scope():
            model = adapted_model()
            before = {v.path: v.value.sharding for v in model.variables}
            assert_close(fit(model), losses)
            after = {v.path: v.value.sharding for v in model.variables}
            assert before == after, (before, after)
            if name != "data":
                a = after["vera_projection/vera_kernel_a"]
                assert tuple(a.spec) == ("model", None)
            assert_close(predict(model), outputs)
            with keras_vera.base_model(model):
                assert_close(predict(model), base)
            assert_close(predict(model), outputs)
            keras_vera.save_adapter(model, path)
            keras_vera.disable_vera(model)
            assert_close(predict(model), base)
            # From one device to eight, and back.
            keras_vera.load_adapter(model, f"{folder}/one.vera.safetensors")
            assert_close(predict(model), outputs)
            keras_vera.merge(model)
            assert_close(predict(model), outputs)
            for variable in model.variables:
                assert variable.value.sharding == before[variable.path]
        again = tiny_model.make_model()
        keras_vera.load_adapter(again, path)
        assert_close(predict(again), outputs)


class Interrupted(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def checkpoints(folder):
    """What is interrupted goes on, and files go from eight devices to one."""
    one = adapted_model()
    fit(one, epochs=4)
    outputs = predict(one)
    for name, active in {
        "data": DataParallel(),
        "1x8": model_parallel((1, 8), **KERNELS, **PAIR),
    }.items():
        backup = keras.callbacks.BackupAndRestore(f"{folder}/{name}")
        path = f"{folder}/{name}.weights.h5"
        saved = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
        with active.scope():
            try:
                fit(adapted_model(), 4, [backup, Interrupted()])
            except KeyboardInterrupt:
                pass
            again = adapted_model()
            before = {v.path: v.value.sharding for v in again.variables}
            assert len(fit(again, 4, [backup, saved])) == 2
            for variable in again.variables:
                assert variable.value.sharding == before[variable.path]
            assert_close(predict(again), outputs)
        alone = adapted_model()
        alone.load_weights(path)
        assert_close(predict(alone), outputs)


def order(folder):
    """What is made in the wrong order, or laid out wrongly."""
    with DataParallel().scope():
        model = tiny_model.make_model()
    keras_vera.enable_vera(model, rank=4, **TARGETS)
    path = f"{folder}/order.vera.safetensors"
    keras_vera.save_adapter(model, path)
    for step in ("enabled", "loaded", "bank"):
        if step == "loaded":
            keras_vera.disable_vera(model)
            keras_vera.load_adapter(model, path)
        checked = model
        if step == "bank":
            checked = keras_vera.AdapterBank(model, 3).model
        for variable in checked.variables:
            sharding = variable.value.sharding
            assert isinstance(sharding, NamedSharding), (step, variable.path)
            assert sharding.num_devices == 8, (step, variable.path)
    with DataParallel().scope():
        fit(model)
    predict(model)
    with DataParallel().scope():
        elsewhere = adapted_model()
    with raises("made elsewhere"):
        two = DataParallel(devices=distribution.list_devices()[:2])
        with two.scope():
            keras_vera.disable_vera(elsewhere)
            keras_vera.enable_vera(elsewhere, rank=4, **TARGETS)
    plain = tiny_model.make_model()
    with DataParallel().scope(), raises("made elsewhere"):
        keras_vera.enable_vera(plain, rank=4, **TARGETS)
    assert all("vera" not in v.path for v in plain.variables)
    with DataParallel().scope(), raises("made elsewhere"):
        keras_vera.load_adapter(plain, path)
    fit(plain)
    older = adapted_model()
    with DataParallel().scope(), raises("set_distribution"):
        fit(older)
    # Failed calls left it as it was.
    predict(older)
    for key, layout in {
        "vera_projection/vera_kernel_a": (None, None, "model"),
        ".*up/vera_lambda_b": (None, "model"),
        ".*down/vera_lambda_d": (None, "model"),
        ".*down/vera_lambda_b": ("batch", "model"),
    }.items():
        with model_parallel((1, 8), **{key: layout}).scope():
            model = tiny_model.make_model()
            with raises("axes, but the variable has"):
                keras_vera.enable_vera(model, rank=4, **TARGETS)
            assert all("vera" not in v.path for v in model.variables)
            fit(model)
    with model_parallel((1, 8), **PAIR).scope():
        model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8)])
        with raises("12 numbers into 8 parts"):
            keras_vera.enable_vera(model, rank=4, **TARGETS)


def make_bank(**settings):
    bank = keras_vera.AdapterBank(adapted_model(), capacity=7, **settings)
    bank.model.compile(keras.optimizers.Adam(0.01), "mse")
    for name in "abcde":
        bank.add(name)
    return bank


def fit_bank(bank):
    bank.fit(
        x, y, adapters=NAMES, batch_size=16, epochs=3, shuffle=False, verbose=0
    )


NAMES = list("aaaaaaaabbcdcdab")


def bank(folder):
    """A bank is the same on one device and on eight, of any batch."""
    one = make_bank()
    fit_bank(one)
    some = x[:11], [*NAMES[5:13], None, "e", None]
    outputs = one.predict(x, NAMES), one.predict(*some)
    score = one.evaluate(x[:11], y[:11], some[1], verbose=0)
    slots = "layers/.*/vera_lambda_."
    for active in (
        DataParallel(),
        model_parallel((1, 8), **KERNELS, **PAIR, **{slots: ("model", None)}),
    ):
        with active.scope():
            many = make_bank()
            for stack in many.model.trainable_variables:
                rows = stack.value.sharding.shard_shape(stack.shape)[0]
                assert rows == (8 if isinstance(active, DataParallel) else 1)
            fit_bank(many)
            assert_close(many.predict(x, NAMES), outputs[0])
            assert_close(many.predict(*some), outputs[1])
            if isinstance(active, DataParallel):
                assert_close(many.predict(*some, batch_size=3), outputs[1])
                found = many.evaluate(x[:11], y[:11], some[1], verbose=0)
                np.testing.assert_allclose(found, score, atol=1e-6)
                found = many.predict(batch for batch in [some])
                assert_close(found, outputs[1])
                state = to_numpy(many.model.variables)
                with raises("multiples of 8"):
                    many.fit(x[:11], y[:11], adapters=some[1], verbose=0)
                with raises("multiples of 8"):
                    many.fit(
                        x,
                        y,
                        adapters=NAMES,
                        validation_data=(x[:11], y[:11], some[1]),
                        verbose=0,
                    )
                assert_close(to_numpy(many.model.variables), state, atol=0)
            many.grow(15)
            assert_close(many.predict(*some), outputs[1])
    with DataParallel().scope():
        # More adapters than slots.
        folded = make_bank(folder=f"{folder}/bank")
        names = [f"user {i}" for i in range(10)]
        for name in names:
            folded.add(name)
        assert folded.predict(x[:10], names).shape == (10, 4)
        assert len(to_numpy([folded.evaluate(x[:10], y[:10], names)])) == 1
        _generate()


def _generate():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    keras_vera.enable_vera(model, rank=4)
    lm = keras_vera.AdapterBank(model, 3)
    lm.add("a")
    rng = np.random.default_rng(0)
    prompts = {
        "token_ids": rng.integers(1, 20, (8, 8)).astype("int32"),
        "padding_mask": np.tile(np.arange(8) < 4, (8, 1)).astype("int32"),
    }
    few = {key: value[:3] for key, value in prompts.items()}
    names = ["a", None, "a"]
    settings = {"stop_token_ids": None}
    whole = lm.generate(prompts, [*names, *[None] * 5], **settings)
    part = lm.generate(few, names, **settings)
    np.testing.assert_array_equal(part["token_ids"], whole["token_ids"][:3])


def layouts(folder):
    """Layouts that are found by structure."""
    settings = {
        "vocabulary_size": 64,
        "num_query_heads": 8,
        "num_key_value_heads": 8,
        "hidden_dim": 32,
        "intermediate_dim": 64,
    }
    llama = keras_hub.models.LlamaBackbone
    inputs = {
        "token_ids": np.arange(24).reshape(2, 12).astype("int32"),
        "padding_mask": np.ones((2, 12), "int32"),
    }

    def adapted(targets="all-linear"):
        keras.utils.set_random_seed(0)
        model = llama(num_layers=2, **settings)
        keras_vera.enable_vera(model, rank=8, targets=targets)
        rng = np.random.default_rng(1)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        return model

    one = adapted()
    outputs = one.predict(inputs, verbose=0)
    small = llama(num_layers=1, **settings)
    found = keras_vera.layout_map(small, mesh_of((2, 4)), "all-linear")
    with ModelParallel(layout_map=found).scope():
        model = adapted()
    specs = {v.path: spec_of(v) for v in model.variables}
    attention = "transformer_layer_1/self_attention"
    for path, spec in {
        "token_embedding/embeddings": ("model", None),
        "token_embedding/reverse_embeddings": (None, "model"),
        f"{attention}/query/kernel": (None, "model", None),
        f"{attention}/query/vera_lambda_b": ("model",),
        f"{attention}/query/vera_lambda_d": (None,),
        f"{attention}/attention_output/kernel": ("model", None, None),
        f"{attention}/attention_output/vera_lambda_b": (None,),
        "transformer_layer_1/feedforward_gate_dense/kernel": (
            None,
            "model",
        ),
        "transformer_layer_0/feedforward_output_dense/kernel": (
            "model",
            None,
        ),
        "vera_projection/vera_kernel_a": ("model", None),
        "vera_projection/vera_kernel_b": (None, "model"),
    }.items():
        assert specs[path] == spec, (path, specs[path])
    big = [v for v in model.variables if len(v.shape) > 1]
    for variable in big:
        value = variable.value
        held = np.prod(value.sharding.shard_shape(value.shape))
        assert held == np.prod(value.shape) // 4, variable.path
    with ModelParallel(layout_map=found).scope():
        assert_close(model.predict(inputs, verbose=0), outputs, atol=2e-5)
    # The layouts that somebody else made stay, and b goes by them.
    mesh = mesh_of((1, 8))
    theirs = llama.get_layout_map(mesh)
    found = keras_vera.layout_map(
        small, mesh, kernels=theirs, capacity=7, targets="attention"
    )
    assert {key: found[key].axes for key in theirs} == {
        key: theirs[key].axes for key in theirs
    }
    path = "transformer_layer_0/self_attention/attention_output"
    assert found[f"{path}/vera_lambda_b"].axes == ("batch",)
    with ModelParallel(layout_map=found).scope():
        stacks = keras_vera.AdapterBank(adapted("attention"), 7).model
    for stack in stacks.trainable_variables:
        assert spec_of(stack) == ("model", None), stack.path
    # Names that differ in numbers alone.
    dense = keras.layers.Dense
    plain = keras.Sequential(
        [keras.Input((8,)), dense(16), dense(8), dense(24)]
    )
    found = keras_vera.layout_map(plain, mesh, "all-linear")
    same = [plain.layers[i].kernel.path for i in (0, 1)]
    assert [found[path].axes for path in same] == [
        (None, "model"),
        ("model", None),
    ]
    with raises("Take 7"):
        keras_vera.layout_map(plain, mesh, "all-linear", capacity=5)
    with raises("`axis` must be"):
        keras_vera.layout_map(plain, mesh, "all-linear", axis="rank")


for name in sys.argv[2:]:
    globals()[name](sys.argv[1])
    print(name, flush=True)
