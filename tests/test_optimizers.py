import keras
import numpy as np
import pytest
from banks import compile_bank
from banks import make_bank
from banks import make_files
from helpers import adapted
from helpers import spoil
from keras import ops
from keras.src import api_export

import keras_vera
from keras_vera.layers._rates import base_size
from keras_vera.layers._rates import rate_factor

pytestmark = pytest.mark.eager

# Of 64 adapted layers, and of 8 or fewer, as in most models here.
RATE_OF_MANY = 1e-2
FACTOR_OF_FEW = 8**0.5
RATE = RATE_OF_MANY * FACTOR_OF_FEW
REST_RATE = 3e-3


def make_model(**kwargs):
    backbone = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])
    model = keras.Sequential(
        [keras.Input((6,)), backbone, keras.layers.Dense(3, name="head")]
    )
    kwargs = {"rank": 4, "targets": "all-linear", **kwargs}
    keras_vera.enable_vera(backbone, **kwargs)
    return model


def seeded_model(**kwargs):
    keras.utils.set_random_seed(0)
    return make_model(**kwargs)


def rate_of(optimizer):
    """Returns the rate of the next step, not the one that callbacks see."""
    rate = optimizer._get_current_learning_rate()
    return float(ops.convert_to_numpy(rate))


def moves(model, optimizer, x, y):
    """Returns the largest step of every trained variable, by name."""
    model.compile(optimizer, "mse")
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    before = [np.array(v) for v in before]
    model.fit(x, y, epochs=1, batch_size=len(x), verbose=0)
    return {
        v.name: np.abs(ops.convert_to_numpy(v) - old).max()
        for v, old in zip(model.trainable_variables, before, strict=True)
    }


@pytest.fixture
def data(rng):
    return rng.normal(size=(8, 6)), rng.normal(size=(8, 3))


def test_each_group_has_its_own_rate(data):
    model = make_model()
    spoil(model)
    steps = moves(
        model,
        keras_vera.vera_optimizer(
            vectors=keras.optimizers.Adam(1e-2),
            rest=keras.optimizers.Adam(1e-4),
        ),
        *data,
    )
    # The first step of Adam has the size of the learning rate.
    for name, step in steps.items():
        rate = 1e-2 if name.startswith("vera_lambda") else 1e-4
        assert step == pytest.approx(rate, rel=0.01), name


def test_schedule_and_names(data):
    model = make_model()
    spoil(model)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [0], [2e-3, 1e-3]
    )
    steps = moves(
        model,
        keras_vera.vera_optimizer(keras.optimizers.Adam(schedule), "adam"),
        *data,
    )
    assert steps["vera_lambda_d"] == pytest.approx(2e-3, rel=0.01)
    assert steps["kernel"] == pytest.approx(1e-3, rel=0.01)


def test_default_trains_a_model_without_head(data):
    x, _ = data
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    steps = moves(model, keras_vera.vera_optimizer(), x, np.ones((8, 3)))
    assert steps["vera_lambda_b"] == pytest.approx(RATE, rel=0.01)
    assert len(adapted(model)) == 1


def test_state_is_that_of_the_vectors(data):
    model = make_model()
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, verbose=0)
    trained = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert trained == 4 + 8 + (8 * 3 + 3)
    # That of a rate for many layers has no state.
    assert len(model.optimizer.optimizers) == 3
    # Two moments in Adam; and counters, rates.
    state = [v for v in model.optimizer.variables if len(v.shape)]
    assert sum(np.prod(v.shape) for v in state) == 2 * trained


@pytest.mark.parametrize("d_initial", [0.1, 1.0])
def test_state_survives_saving(tmp_path, data, d_initial):
    model = make_model(d_initial=d_initial)
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, verbose=0)
    config = model.optimizer.get_config()
    rebuilt = keras.optimizers.MultiOptimizer.from_config(config)
    # All but what Keras' own class leaves alone.
    del config["optimizer_map"]["config"]["rates"]
    assert rebuilt.get_config() == config
    model.save_weights(tmp_path / "model.weights.h5")
    expected = [
        ops.convert_to_numpy(v).copy() for v in model.optimizer.variables
    ]
    model.fit(*data, verbose=0)
    model.load_weights(tmp_path / "model.weights.h5")
    for variable, value in zip(
        model.optimizer.variables, expected, strict=True
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_variables_of_the_state_have_paths_of_their_own(data):
    """`get_state_tree`, and with it `OrbaxCheckpoint`, goes by them."""
    model = make_model(d_initial=0.5)
    model.compile(keras_vera.vera_optimizer(total_steps=9), "mse")
    model.fit(*data, verbose=0)
    tree = model.get_state_tree(value_format="numpy_array")
    found = keras.tree.flatten(tree["optimizer_variables"])
    assert len(found) == len(model.optimizer.variables)


def test_one_optimizer_for_both_is_refused():
    adam = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="must be two optimizers"):
        keras_vera.vera_optimizer(adam, adam)


def check_default_steps(steps, d_initial):
    scale = abs(d_initial) / 0.1
    for name, step in steps.items():
        rates = {"vera_lambda_d": RATE * scale, "vera_lambda_b": RATE / scale}
        rate = rates.get(name, REST_RATE)
        assert step == pytest.approx(rate, rel=0.01), name


@pytest.mark.parametrize("d_initial", [0.1, 1.0, -0.02])
def test_rates_follow_d_initial(data, d_initial):
    model = make_model(d_initial=d_initial)
    spoil(model)
    steps = moves(model, keras_vera.vera_optimizer(), *data)
    check_default_steps(steps, d_initial)


@pytest.mark.parametrize("d_initial", [0.1, 1.0])
@pytest.mark.parametrize("structure", ["dense", "blocks4"])
@pytest.mark.parametrize("m, n, rank", [(64, 512, 32), (256, 128, 1024)])
def test_a_step_moves_outputs_alike(rng, m, n, rank, structure, d_initial):
    layer = keras_vera.layers.VeRADense(
        n,
        d_initial=d_initial,
        projection=keras_vera.SharedProjection(rank=rank, structure=structure),
    )
    x = rng.normal(size=(200, m)).astype("float32")
    before = ops.convert_to_numpy(layer(x))
    factor = rate_factor(layer, "vera_lambda_b")
    signs = rng.choice([-1, 1], n).astype("float32")
    layer.vera_lambda_b.assign(RATE * factor * signs)
    moved = ops.convert_to_numpy(layer(x)) - before
    # Twice 0.1, whatever the sizes, the rank, the structure and d_initial are.
    expected = 0.2 * RATE * base_size(layer)
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(expected, rel=0.15)


def layers_of_many_kinds():
    """Yields layers, and inputs of size 1 to each."""
    rng = np.random.default_rng(0)
    dense = keras.layers.Dense(32)
    yield dense, rng.normal(size=(50, 16))
    yield (
        keras.layers.EinsumDense("abc,cde->abde", (None, 4, 8)),
        rng.normal(size=(5, 10, 16)),
    )
    yield (
        keras.layers.EinsumDense("bhqd,hdc->bqc", (None, 24)),
        rng.normal(size=(5, 2, 10, 8)),
    )
    yield (
        keras.layers.EinsumDense("btc,cd->bd", 24),
        rng.normal(size=(50, 1, 16)),
    )
    yield keras.layers.Conv2D(32, 3, groups=2), rng.normal(size=(5, 6, 6, 8))
    yield keras.layers.Embedding(50, 16), rng.integers(50, size=(40,))


@pytest.mark.parametrize("scale", [0.02, 0.3, 1, 6, 100])
@pytest.mark.in_turn
@pytest.mark.parametrize("number", range(6))
def test_the_size_of_a_base(number, scale):
    layer, x = list(layers_of_many_kinds())[number]
    layer.build(x.shape)
    kernel = layer.weights[0]
    kernel.assign(scale * np.random.default_rng(1).normal(0, 0.4, kernel.shape))
    size = np.sqrt(np.mean(ops.convert_to_numpy(layer(x)) ** 2))
    keras_vera.enable_vera(layer, rank=4, targets=lambda _: True)
    expected = np.clip(size, 1, 8)
    # A power of 2; and inputs are random.
    assert 0.6 < base_size(layer) / expected < 1.7
    assert np.log2(base_size(layer)) % 1 == 0


@pytest.mark.members_in_turn
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_quantization_leaves_the_size(number, mode):
    layer, x = list(layers_of_many_kinds())[number]
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), layer])
    # Embeddings start small.
    layer.weights[0].assign((90 if number == 5 else 3) * layer.weights[0])

    def size():
        keras_vera.enable_vera(layer, rank=4, targets=lambda _: True)
        found = base_size(layer)
        keras_vera.disable_vera(layer)
        return found

    expected = size()
    model.quantize(mode)
    assert layer.quantization_mode == mode
    # It may be near where a power of 2 ends.
    assert size() in (expected / 2, expected, 2 * expected)
    assert _measured_size_is_near(layer, x)


def _measured_size_is_near(layer, x):
    output = ops.convert_to_numpy(layer(x))
    keras_vera.enable_vera(layer, rank=4, targets=lambda _: True)
    return 0.5 < base_size(layer) / np.sqrt(np.mean(output**2)) < 2


def test_a_base_without_a_size_trains_as_one_of_size_1():
    layer = keras_vera.layers.VeRADense(
        4, kernel_initializer="zeros", projection=keras_vera.SharedProjection()
    )
    layer.build((None, 3))
    assert base_size(layer) == 1


def test_a_larger_base_trains_in_the_same_way(data):
    x, y = data
    y = 1000 * y  # Adam's epsilon is not scaled.

    def trained(scale):
        keras.utils.set_random_seed(0)
        hidden = keras.layers.Dense(8, use_bias=False)
        backbone = keras.Sequential(
            [keras.Input((6,)), hidden, keras.layers.Rescaling(1 / scale)]
        )
        model = keras.Sequential(
            [keras.Input((6,)), backbone, keras.layers.Dense(3)]
        )
        hidden.kernel.assign(scale * hidden.kernel)
        keras_vera.enable_vera(backbone, rank=4, targets="all-linear")
        model.compile(keras_vera.vera_optimizer(total_steps=4), "mse")
        model.fit(x, y, epochs=4, batch_size=8, verbose=0)
        return model.predict(x, verbose=0)

    expected = trained(1.0)
    np.testing.assert_allclose(trained(4.0), expected, rtol=1e-3)


def test_any_d_initial_trains_in_the_same_way(data):
    x, y = data
    # Adam's epsilon is not scaled, so gradients are large beside it.
    y = 1000 * y

    def trained(d_initial, optimizer):
        keras.utils.set_random_seed(0)
        model = make_model(d_initial=d_initial)
        model.compile(optimizer, "mse")
        model.fit(x, y, epochs=4, batch_size=8, verbose=0)
        layer = adapted(model)[0]
        d = ops.convert_to_numpy(layer.vera_lambda_d) / d_initial
        return d, ops.convert_to_numpy(layer.vera_lambda_b) * d_initial

    expected = trained(0.1, keras_vera.vera_optimizer())
    assert np.abs(expected[0] - 1).min() > 0.1
    for d_initial in (1.0, 0.05):
        received = trained(d_initial, keras_vera.vera_optimizer())
        for a, b in zip(received, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    other = trained(1.0, keras_vera.vera_optimizer("adam"))
    assert np.abs(other[0] - expected[0]).max() > 0.1


def test_layers_of_one_model_may_start_differently(data):
    first, second = keras.layers.Dense(8), keras.layers.Dense(3)
    backbones = [
        keras.Sequential([keras.Input((6,)), first]),
        keras.Sequential([keras.Input((8,)), second]),
    ]
    for backbone, d_initial in zip(backbones, (1.0, 0.1), strict=True):
        keras_vera.enable_vera(
            backbone, rank=4, targets="all-linear", d_initial=d_initial
        )
    model = keras.Sequential([keras.Input((6,)), *backbones])
    spoil(model)
    vectors = [x.vera_lambda_b for x in (first, second)]
    before = [np.array(ops.convert_to_numpy(v)) for v in vectors]
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, batch_size=8, verbose=0)
    steps = [
        np.abs(ops.convert_to_numpy(v) - old).max()
        for v, old in zip(vectors, before, strict=True)
    ]
    assert steps == pytest.approx([RATE / 10, RATE], rel=0.01)


def make_deep_model(layers):
    """Returns a model of so many adapted layers, and one that is not."""
    backbone = keras.Sequential(
        [keras.Input((6,)), *(keras.layers.Dense(6) for _ in range(layers))]
    )
    keras_vera.enable_vera(backbone, rank=2, targets="all-linear")
    model = keras.Sequential(
        [keras.Input((6,)), backbone, keras.layers.Dense(3)]
    )
    return model, backbone


def rates_of_layers(model, optimizer):
    """Returns the rates that an optimizer has for vectors, by layer."""
    optimizer.build(model.trainable_variables)
    rates = {}
    for part in optimizer.optimizers:
        rate = rate_of(part)
        for variable in part._trainable_variables:
            if variable.name.startswith("vera_lambda"):
                rates.setdefault(id(variable.vera_layer()), set()).add(rate)
    assert all(len(own) == 1 for own in rates.values())
    return [own.pop() for own in rates.values()]


@pytest.mark.parametrize(
    "layers, factor",
    [
        (1, 8**0.5),
        (8, 8**0.5),
        (9, 8 / 3),
        (16, 2),
        (36, 4 / 3),
        (64, 1),
        (70, 1),
    ],
)
def test_few_layers_have_a_higher_default_rate(layers, factor):
    model, _ = make_deep_model(layers)
    rates = rates_of_layers(model, keras_vera.vera_optimizer())
    assert rates == pytest.approx([RATE_OF_MANY * factor] * layers)
    # The size of the bases is 1 here, and the rate of a user is his.
    rates = rates_of_layers(model, keras_vera.vera_optimizer(5e-3))
    assert rates == pytest.approx([5e-3] * layers)


def test_layers_that_do_not_train_do_not_count(data):
    model, backbone = make_deep_model(16)
    for layer in backbone.layers[:7]:
        layer.trainable = False
    optimizer = keras_vera.vera_optimizer()
    rates = rates_of_layers(model, optimizer)
    assert rates == pytest.approx([RATE_OF_MANY * 8 / 3] * 9)


def test_the_rate_follows_another_number_of_layers(data):
    model, backbone = make_deep_model(16)
    optimizer = keras_vera.vera_optimizer()
    model.compile(optimizer, "mse")
    model.fit(*data, verbose=0)
    assert rates_of_layers(model, optimizer) == pytest.approx([0.02] * 16)
    keras_vera.disable_vera(backbone)
    names = [layer.name for layer in backbone.layers[:9]]
    keras_vera.enable_vera(backbone, rank=2, targets=names)
    assert model.optimizer is optimizer and not optimizer.built
    model.fit(*data, verbose=0)
    rates = rates_of_layers(model, optimizer)
    assert rates == pytest.approx([RATE_OF_MANY * 8 / 3] * 9)


def rates_of_rest(model, **kwargs):
    """Returns the peak rates of what is no vector, by its path's end."""
    optimizer = keras_vera.vera_optimizer(total_steps=100, **kwargs)
    optimizer.build(model.trainable_variables)
    rates = {}
    for part in optimizer.optimizers:
        rate = part.get_config()["learning_rate"]
        rate = rate["config"]["warmup_target"] if type(rate) is dict else rate
        for v in part._trainable_variables:
            if not v.name.startswith("vera_lambda"):
                rates["/".join(v.path.split("/")[-2:])] = float(rate)
    return rates


def make_model_with_heads(*inputs):
    backbone = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])
    x = keras.Input((6,))
    y = backbone(x)
    for size in inputs:
        y = keras.layers.Dense(size, trainable=False)(y)
        y = keras.layers.Dense(2, name=f"head_{size}")(y)
    y = keras.layers.LayerNormalization(name="norm")(y)
    y = keras.layers.Reshape((2, 1))(y)
    y = keras.layers.Conv1D(1, 1, name="conv")(y)
    keras_vera.enable_vera(backbone, rank=2, targets="all-linear")
    return keras.Model(x, y)


def test_heads_of_many_inputs_have_a_lower_default_rate():
    model = make_model_with_heads(1, 384, 512, 768, 1024, 1536, 4096)
    rates = rates_of_rest(model)
    expected = {
        "head_1/kernel": 0.01,
        "head_384/kernel": 0.01,
        "head_512/kernel": 0.01,
        "head_768/kernel": 0.005,
        "head_1024/kernel": 0.005,
        "head_1536/kernel": 0.003,
        "head_4096/kernel": 0.003,
        "head_4096/bias": 0.01,
        "norm/gamma": 0.01,
        "conv/kernel": 0.003,
    }
    assert {x: rates[x] for x in expected} == pytest.approx(expected)


@pytest.mark.parametrize("rest, rate", [(0.02, 0.02), ("sgd", 0.01)])
def test_a_given_rate_is_that_of_all_else(rest, rate):
    rates = rates_of_rest(make_model_with_heads(4096), rest=rest)
    assert list(rates.values()) == pytest.approx([rate] * len(rates))


def test_all_else_has_its_rates_beside_a_given_optimizer():
    vectors = keras.optimizers.Adam(0.5)
    rates = rates_of_rest(make_model_with_heads(768), vectors=vectors)
    assert rates["head_768/kernel"] == pytest.approx(0.005)


def test_a_copy_has_the_rates_of_all_else():
    # As of one that two models share, of which one is adapted anew.
    optimizer = keras_vera.vera_optimizer(total_steps=100)
    models = [make_model_with_heads(768), make_model_with_heads(768)]
    for model in models:
        model.compile(optimizer, "mse")
    x, y = np.ones((4, 6)), np.ones((4, 2, 1))
    models[1].fit(x, y, verbose=0)
    backbone = models[0].layers[1]
    keras_vera.disable_vera(backbone)
    keras_vera.enable_vera(backbone, rank=3, targets="all-linear")
    copied = models[0].optimizer
    assert copied is not optimizer
    copied.build(models[0].trainable_variables)
    for of_layers in (copied, optimizer):
        sizes = sorted(
            part.get_config()["learning_rate"]["config"]["warmup_target"]
            for part in of_layers.optimizers
            if part._trainable_variables
        )
        assert sizes == pytest.approx([0.003, 0.005, 0.01, 0.03 * 8**0.5])


def test_rates_as_numbers(data):
    model = make_model(d_initial=1.0)
    spoil(model)
    steps = moves(model, keras_vera.vera_optimizer(5e-3, 2e-4), *data)
    expected = {"vera_lambda_d": 5e-2, "vera_lambda_b": 5e-4}
    for name, step in steps.items():
        rate = expected.get(name, 2e-4)
        assert step == pytest.approx(rate, rel=0.01), name


def trained(optimizer, data, callbacks=(), epochs=1):
    """Returns the weights of a model after a training, and the model."""
    model = make_model(d_initial=1.0)
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(rng.normal(size=v.shape))
    # So that the rate of `b` follows a large base as well.
    adapted(model)[0]._kernel.assign(4 * np.ones((6, 8)))
    model.compile(optimizer, "mse")
    model.fit(
        *data,
        shuffle=False,
        callbacks=list(callbacks),
        epochs=epochs,
        verbose=0,
    )
    return [ops.convert_to_numpy(v) for v in model.trainable_variables], model


def check_trained_alike(found, expected):
    for value, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


def test_callbacks_set_rates_as_users_do(data):
    # Keras' own set all rates alike, from the first epoch on.
    fixed = keras.callbacks.LearningRateScheduler(lambda epoch: 0.02)
    optimizer = keras_vera.vera_optimizer
    expected = trained(optimizer(0.02, 0.02), data, epochs=3)
    found = trained(optimizer(0.5, 0.7), data, [fixed], epochs=3)
    check_trained_alike(found, expected)
    assert {
        round(float(ops.convert_to_numpy(part.learning_rate)), 6)
        for part in found[1].optimizer.optimizers
    } == {0.02}
    # Units of the default rate, which is higher for few layers.
    expected = trained(optimizer(0.02 * FACTOR_OF_FEW, 0.02), data, epochs=3)
    check_trained_alike(trained(optimizer(), data, [fixed], 3), expected)


def test_callbacks_multiply_rates(data):
    halved = keras.callbacks.LearningRateScheduler(lambda epoch, x: x / 2)
    expected = trained(keras_vera.vera_optimizer(0.01, 0.02), data)
    found = trained(keras_vera.vera_optimizer(0.02, 0.04), data, [halved])
    check_trained_alike(found, expected)


def test_a_plateau_lowers_all_rates(data):
    plateau = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.1, patience=0, min_delta=100
    )
    _, model = trained(keras_vera.vera_optimizer(), data, epochs=3)
    before = [rate_of(part) for part in model.optimizer.optimizers]
    _, model = trained(keras_vera.vera_optimizer(), data, [plateau], 3)
    after = [rate_of(part) for part in model.optimizer.optimizers]
    assert len(set(before)) == 4
    np.testing.assert_allclose(after, np.array(before) / 100, rtol=1e-5)


def test_a_rate_of_its_own_is_a_number(data):
    _, model = trained(keras_vera.vera_optimizer(), data)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    with pytest.raises(ValueError, match="optimizer with this schedule"):
        model.optimizer.optimizers[1].learning_rate = schedule


def test_optimizers_that_are_given_stay_as_they_are(data):
    model = make_model(d_initial=1.0)
    spoil(model)
    given = keras.optimizers.Adam(5e-3)
    steps = moves(model, keras_vera.vera_optimizer(given), *data)
    for name in ("vera_lambda_d", "vera_lambda_b"):
        assert steps[name] == pytest.approx(5e-3, rel=0.01)
    assert given in model.optimizer.optimizers


def test_total_steps():
    model = make_model(d_initial=1.0)
    optimizer = keras_vera.vera_optimizer(total_steps=40)
    optimizer.build(model.trainable_variables)
    steps = np.arange(45)
    factors = np.where(
        steps < 4,
        (1 + steps * 3 / 4) / 4,
        (1 + np.cos(np.pi * np.minimum(steps - 4, 36) / 36)) / 2,
    )
    used = [x for x in optimizer.optimizers if x._trainable_variables]
    rates = []
    for part in used:
        peak = float(
            part.get_config()["learning_rate"]["config"]["warmup_target"]
        )
        rates.append(peak)
        for step, factor in zip(steps, factors, strict=True):
            part.iterations.assign(int(step))
            rate = rate_of(part)
            assert rate == pytest.approx(peak * factor, rel=1e-5, abs=1e-9)
    rate = FACTOR_OF_FEW * 0.3 / 40**0.5
    expected = [0.01, rate / 10, rate * 10]
    assert sorted(rates) == pytest.approx(expected)


@pytest.mark.parametrize(
    "total_steps, rate, rest",
    [
        (20, 0.05, 0.01),
        (100, 0.03, 0.01),
        (225, 0.02, 0.01),
        (900, 0.01, 0.006),
        (3600, 0.005, 0.003),
        (10**6, 0.005, 0.003),
    ],
)
def test_short_runs_have_higher_rates(total_steps, rate, rest):
    optimizer = keras_vera.vera_optimizer(total_steps=total_steps)
    rates = [
        part.get_config()["learning_rate"]["config"]["warmup_target"]
        for part in optimizer.optimizers
    ]
    assert rates == pytest.approx([rate, rest])


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_few_steps_train(data, total_steps):
    model = make_model()
    steps = moves(
        model, keras_vera.vera_optimizer(total_steps=total_steps), *data
    )
    assert steps["vera_lambda_b"] == pytest.approx(
        FACTOR_OF_FEW * 0.05, rel=0.01
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"vectors": 0.0}, "`vectors` must be an optimizer or a positive"),
        ({"rest": -1}, "`rest` must be an optimizer or a positive"),
        ({"rest": float("nan")}, "`rest` must be an optimizer or a positive"),
        ({"total_steps": 0}, "`total_steps` must be an integer"),
        ({"total_steps": 1e3}, "`total_steps` must be an integer"),
        (
            {"vectors": "adam", "rest": "sgd", "total_steps": 10},
            "both `vectors` and `rest` are optimizers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        keras_vera.vera_optimizer(**kwargs)


def test_equal_rates_are_two_optimizers(data):
    model = make_model()
    spoil(model)
    steps = moves(model, keras_vera.vera_optimizer(0.01, 0.01), *data)
    assert list(steps.values()) == pytest.approx([0.01] * 4, rel=0.01)


def test_rates_follow_another_adaptation(data):
    optimizer = keras_vera.vera_optimizer()
    model = make_model(d_initial=1.0)
    model.compile(optimizer, "mse")
    model.fit(*data, verbose=0)
    backbone = model.layers[0]
    for d_initial in (0.1, 0.3, 1.0):
        keras_vera.disable_vera(backbone)
        keras_vera.enable_vera(
            backbone, rank=4, targets="all-linear", d_initial=d_initial
        )
        assert model.optimizer is optimizer
        spoil(model)
        before = {
            v.name: np.array(ops.convert_to_numpy(v))
            for v in adapted(model)[0].weights
        }
        model.fit(*data, batch_size=8, verbose=0)
        steps = {
            v.name: np.abs(ops.convert_to_numpy(v) - before[v.name]).max()
            for v in adapted(model)[0].trainable_variables
        }
        check_default_steps(steps, d_initial)


def test_a_copy_of_a_shared_optimizer_has_the_rates(data):
    optimizer = keras_vera.vera_optimizer()
    models = [make_model(d_initial=1.0), make_model(d_initial=1.0)]
    for model in models:
        model.compile(optimizer, "mse")
    models[1].fit(*data, verbose=0)
    backbone = models[0].layers[0]
    keras_vera.disable_vera(backbone)
    keras_vera.enable_vera(
        backbone, rank=4, targets="all-linear", d_initial=0.5
    )
    spoil(models[0])
    steps = moves(models[0], models[0].optimizer, *data)
    check_default_steps(steps, 0.5)


def test_files_hold_classes_of_keras_alone(tmp_path, data, monkeypatch):
    model = make_model(d_initial=1.0)
    model.compile(keras_vera.vera_optimizer(total_steps=8), "mse")
    assert model.optimizer.name.startswith("multi_optimizer")
    model.fit(*data, verbose=0)
    assert "keras_vera" not in str(keras.optimizers.serialize(model.optimizer))
    model.save(tmp_path / "model.keras")
    # As where this package is not there.
    monkeypatch.setitem(
        api_export.REGISTERED_NAMES_TO_OBJS,
        "keras.optimizers.MultiOptimizer",
        keras.optimizers.MultiOptimizer,
    )
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.MultiOptimizer
    map_class = type(loaded.optimizer._optimizer_map)
    assert map_class is keras.optimizers.OptimizerMap


@keras.saving.register_keras_serializable("keras_vera_tests")
def sgd_for(variable):
    return keras.optimizers.SGD(0.1)


@pytest.mark.parametrize("by_function", [False, True])
def test_other_optimizers_are_read_as_they_are(by_function):
    by_path = keras.optimizers.OptimizerMap(
        keras.optimizers.SGD(0.1), {".*bias": keras.optimizers.Adam(0.2)}
    )
    plain = keras.optimizers.MultiOptimizer(sgd_for if by_function else by_path)
    config = keras.optimizers.serialize(plain)
    read = keras.optimizers.deserialize({**config})
    assert type(read) is keras.optimizers.MultiOptimizer
    assert keras.optimizers.serialize(read) == config


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("total_steps", [None, 20])
def test_rates_go_through_serialization(data, total_steps, is_built):
    """As in `compile_from_config`, which `clone_model` and files call."""
    model, *others = (seeded_model(d_initial=0.5) for _ in range(3))
    model.compile(keras_vera.vera_optimizer(total_steps=total_steps), "mse")
    if is_built:
        model.optimizer.build(model.trainable_variables)
    config = model.get_compile_config()
    serialized = keras.optimizers.serialize(model.optimizer)
    others[0].compile_from_config(config)
    others[1].compile(keras.optimizers.deserialize(serialized), "mse")
    for x in (model, *others):
        x.fit(*data, shuffle=False, verbose=0)
        for v, expected in zip(x.weights, model.weights, strict=True):
            np.testing.assert_array_equal(
                ops.convert_to_numpy(v), ops.convert_to_numpy(expected)
            )


@pytest.mark.parametrize("others", ["layers", "rates"])
def test_what_is_excluded_from_weight_decay(data, others):
    """As one optimizer for all variables does it."""
    found = []
    for make in (
        lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.5),
        lambda: keras_vera.vera_optimizer(
            *[keras.optimizers.AdamW(1e-3, weight_decay=0.5) for _ in "vr"]
        ),
    ):
        model = seeded_model(d_initial=1.0)
        optimizer = make()
        names = {"layers": ["head"], "rates": ["vera_lambda", "bias"]}[others]
        optimizer.exclude_from_weight_decay(var_names=names)
        model.compile(optimizer, "mse")
        model.fit(*data, shuffle=False, verbose=0)
        found.append([ops.convert_to_numpy(v) for v in model.weights])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def make_own_model(projection):
    """Returns one of layers with an adapter, whose rates differ."""
    dense = keras_vera.layers.VeRADense
    model = keras.Sequential(
        [
            keras.Input((6,)),
            dense(8, projection=projection, d_initial=0.5, name="a-b"),
            dense(8, projection=projection),
            dense(8, projection=projection, d_initial=0.5),
            keras.layers.Reshape((8, 1)),
            keras.layers.Conv1D(1, 1),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="head"),
        ]
    )
    kernel = model.layers[1]._kernel
    kernel.assign(4 * np.eye(8))
    return model


def rates_of_variables(model):
    """Returns the rate of each trained variable, by its path."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    rates = {}
    for part in optimizer.optimizers:
        rate = rate_of(part)
        for variable in part._trainable_variables:
            end = "/".join(variable.path.split("/")[-2:])
            rates[end] = pytest.approx(rate)
    assert len(rates) == len(model.trainable_variables)
    return rates


def check_same_weights(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(one),
            ops.convert_to_numpy(other),
            rtol=1e-6,
            atol=1e-7,
        )


@pytest.mark.filterwarnings("error:Skipping variable loading")
@pytest.mark.parametrize("total_steps", [None, 20])
def test_a_file_keeps_the_rates_of_layers(tmp_path, data, total_steps):
    model = make_own_model(keras_vera.SharedProjection(seed=0, rank=4))
    model.compile(keras_vera.vera_optimizer(total_steps=total_steps), "mse")
    model.fit(*data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert rates_of_variables(loaded) == rates_of_variables(model)
    assert len({str(x) for x in rates_of_variables(loaded).values()}) > 3
    for x in (model, loaded):
        x.fit(*data, shuffle=False, verbose=0)
    check_same_weights(
        [*loaded.weights, *loaded.optimizer.variables],
        [*model.weights, *model.optimizer.variables],
    )


@keras.saving.register_keras_serializable("keras_vera_tests")
class Tower(keras.layers.Layer):
    """Holds a layer of the same name as others do."""

    def __init__(self, d_initial, **kwargs):
        super().__init__(**kwargs)
        self.d_initial = d_initial
        projection = keras_vera.SharedProjection(seed=0, rank=4)
        self.dense = keras_vera.layers.VeRADense(
            3, projection=projection, d_initial=d_initial, name="dense"
        )

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {**super().get_config(), "d_initial": self.d_initial}


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_a_file_tells_layers_of_one_name_apart(tmp_path, data):
    x = keras.Input((6,))
    towers = [Tower(0.1, name="left"), Tower(0.8, name="right")]
    y = keras.layers.Add()([tower(x) for tower in towers])
    model = keras.Model(x, y)
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    rates = {
        v.path: round(rate_of(part), 6)
        for part in loaded.optimizer.optimizers
        for v in part._trainable_variables
    }
    assert rates == {
        "left/dense/vera_lambda_d": round(RATE, 6),
        "left/dense/vera_lambda_b": round(RATE, 6),
        "right/dense/vera_lambda_d": round(RATE * 8, 6),
        "right/dense/vera_lambda_b": round(RATE / 8, 6),
    }


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_a_file_of_nested_layers_of_one_name(tmp_path, data):
    """Keras forgets what the paths of their variables began with."""
    projection = keras_vera.SharedProjection(seed=0, rank=4)
    inner = [
        keras.Sequential(
            [
                keras.Input((6,)),
                keras_vera.layers.VeRADense(
                    6, projection=projection, d_initial=d, name="dense"
                ),
            ]
        )
        for d in (0.1, 0.8)
    ]
    inner[0].layers[0]._kernel.assign(4 * np.eye(6))
    model = keras.Sequential([*inner, keras.layers.Dense(3)])
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(*data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for x in (model, loaded):
        x.fit(*data, shuffle=False, verbose=0)
    check_same_weights(loaded.weights, model.weights)


def is_of_head(variable):
    return variable.path.endswith("head_kernel_momentum")


@pytest.mark.parametrize("inputs", [8, 800])
@pytest.mark.parametrize("total_steps", [None, 20])
def test_a_file_of_a_merged_model(
    tmp_path, data, monkeypatch, total_steps, inputs
):
    """Its head trains on as where this package is not there."""
    model = seeded_model(d_initial=0.5)
    if inputs != 8:
        model.pop()
        # At another rate.
        model.add(keras.layers.Dense(inputs, trainable=False))
        model.add(keras.layers.Dense(3, name="head"))
    model.compile(keras_vera.vera_optimizer(total_steps=total_steps), "mse")
    model.fit(*data, epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = [keras.models.load_model(tmp_path / "model.keras")]
    # As it is saved again.
    loaded[0].save(tmp_path / "again.keras")
    loaded.append(keras.models.load_model(tmp_path / "again.keras"))
    monkeypatch.setitem(
        api_export.REGISTERED_NAMES_TO_OBJS,
        "keras.optimizers.MultiOptimizer",
        keras.optimizers.MultiOptimizer,
    )
    plain = keras.models.load_model(tmp_path / "model.keras")
    assert type(plain.optimizer) is keras.optimizers.MultiOptimizer
    (momentum,) = [v for v in model.optimizer.variables if is_of_head(v)]
    for x in (plain, *loaded):
        (found,) = [v for v in x.optimizer.variables if is_of_head(v)]
        np.testing.assert_array_equal(
            ops.convert_to_numpy(found), ops.convert_to_numpy(momentum)
        )
        x.fit(*data, shuffle=False, verbose=0)
    for x in loaded:
        check_same_weights(x.weights, plain.weights)


def test_a_file_of_a_model_that_has_not_trained(tmp_path, data):
    """The sizes of its kernels are known later; these are of size 1."""
    model = make_own_model(keras_vera.SharedProjection(seed=0, rank=4))
    model.layers[1]._kernel.assign(np.eye(8))
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for x in (model, loaded):
        x.fit(*data, shuffle=False, verbose=0)
    assert rates_of_variables(loaded) == rates_of_variables(model)


def test_one_from_a_config_is_for_any_model(data):
    model = make_own_model(keras_vera.SharedProjection(seed=0, rank=4))
    model.compile(keras_vera.vera_optimizer(total_steps=20), "mse")
    model.fit(*data, verbose=0)
    expected = rates_of_variables(model)
    other, _ = make_deep_model(16)
    made = model.optimizer
    for _ in range(2):
        made = type(made).from_config(made.get_config())
        # By steps, times 2 by layers, and half of it in the first of two.
        rates = rates_of_layers(other, made)
        assert rates == pytest.approx([0.05] * 16)
    made = type(made).from_config(made.get_config())
    model.compile(made, "mse")
    model.fit(*data, verbose=0)
    assert rates_of_variables(model) == expected


def test_a_copy_with_loss_scaling_has_the_rates(data):
    optimizer = keras_vera.vera_optimizer()
    optimizer.optimizers[1].exclude_from_weight_decay(var_names=["x"])
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    models = [make_deep_model(16) for _ in range(2)]
    for model, _ in models:
        model.compile(optimizer, "mse")
    models[1][0].fit(*data, verbose=0)
    model, backbone = models[0]
    names = [layer.name for layer in backbone.layers[:9]]
    keras_vera.disable_vera(backbone)
    keras_vera.enable_vera(backbone, rank=2, targets=names)
    copied = model.optimizer
    assert copied is not optimizer
    rates = rates_of_layers(model, copied.inner_optimizer)
    assert rates == pytest.approx([RATE_OF_MANY * 8 / 3] * 9)
    patterns = [
        getattr(part, "_exclude_from_weight_decay_pattern", None) is not None
        for part in copied.inner_optimizer.optimizers
    ]
    assert patterns == [False, False, True]


def both_optimizers(make):
    """Returns one for all variables, and one that divides them the same."""
    return make(), keras_vera.vera_optimizer(make(), make())


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    "there",
    [
        "dbkc",  # Of d and b, and of a head's kernel and bias.
        "..kc",
        "db..",
        "d..c",
    ],
)
def test_some_gradients_are_missing(rng, there):
    """All else trains, and counts steps, as with one optimizer for all."""
    results = []
    for optimizer in both_optimizers(lambda: keras.optimizers.Adam(1e-2)):
        variables = seeded_model().trainable_variables
        by_name = dict(zip("kcdb", sorted(variables, key=lambda v: v.path)))
        assert len(by_name) == len(variables)
        rng = np.random.default_rng(0)
        for names in ("dbkc", there, "dbkc"):
            grads = {x: rng.normal(size=by_name[x].shape) for x in "dbkc"}
            optimizer.apply(
                [
                    ops.convert_to_tensor(grads[x], "float32")
                    if x in names
                    else None
                    for x in by_name
                ],
                (v for v in by_name.values()),
            )
        # Of some variables alone.
        optimizer.apply_gradients(
            (ops.ones(v.shape), v) for x, v in by_name.items() if x in there
        )
        results.append([ops.convert_to_numpy(v) for v in by_name.values()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_cannot_be_applied_changes_nothing():
    model, other = make_model(), make_model()
    optimizer = keras_vera.vera_optimizer()
    variables = model.trainable_variables
    optimizer.build(variables)
    before = [ops.convert_to_numpy(v) for v in variables]
    grads = [ops.ones(v.shape) for v in variables]
    for arguments, message in (
        ([grads, other.trainable_variables], "Unknown variable: .*vera_lambda"),
        ([[None] * len(grads), variables], "No gradients provided"),
        ([grads[:1]], "must match"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.apply(*arguments)
    for v, old in zip(variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(v), old)


def test_the_state_goes_through_set_weights(data):
    models = [seeded_model(), seeded_model()]
    for model in models:
        model.compile(keras_vera.vera_optimizer(), "mse")
    models[0].fit(*data, verbose=0)
    state = [np.array(v) for v in models[0].optimizer.variables]
    models[1].optimizer.build(models[1].trainable_variables)
    models[1].optimizer.set_weights(state)
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.fit(*data, shuffle=False, verbose=0)
    for one, other in zip(*(x.weights for x in models), strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        )


def test_averages_of_vectors_alone(data):
    """`SwapEMAWeights` asks it of the optimizer of all else as well."""

    def make():
        return keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)

    found = []
    for optimizer in both_optimizers(make):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        keras_vera.enable_vera(model, rank=4, targets="all-linear")
        spoil(model)
        model.compile(optimizer, "mse")
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        model.fit(*data, epochs=2, verbose=0, callbacks=[swap])
        found.append([ops.convert_to_numpy(v) for v in model.weights])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_what_is_excluded_is_so_at_every_rate():
    model = make_model(d_initial=1.0)
    optimizer = keras_vera.vera_optimizer()
    optimizer.exclude_from_weight_decay(var_names=["vera_lambda"])
    for part in optimizer.optimizers:
        part.weight_decay = 0.1
    variables = model.trainable_variables
    for v in variables:
        v.assign(ops.ones(v.shape))
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    for v in variables:
        decayed = ops.convert_to_numpy(v).max() < 1
        assert decayed == ("vera_lambda" not in v.path)


def test_it_is_built_while_something_is_compiled():
    model = make_model(d_initial=1.0)
    expected = keras_vera.vera_optimizer()
    expected.build(model.trainable_variables)
    optimizer = keras_vera.vera_optimizer()
    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def build():
            optimizer.build(model.trainable_variables)
            return [v.value for v in optimizer.variables[:1]]

        build()
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.function(optimizer.build)(model.trainable_variables)
    else:
        pytest.skip("PyTorch runs what it compiles as it is.")
    rates = [
        [part.get_config()["learning_rate"] for part in x.optimizers]
        for x in (optimizer, expected)
    ]
    assert rates[0] == rates[1]


def test_rates_in_a_bank(tmp_path, rng):
    files = make_files(tmp_path, ["ann", "bob"], d_initial=1.0)
    bank = make_bank(files, d_initial=1.0)
    compile_bank(bank, keras_vera.vera_optimizer())
    config = keras.optimizers.serialize(bank.model.optimizer)
    assert "keras_vera" not in str(config)
    stacks = bank.model.trainable_variables
    before = [np.array(ops.convert_to_numpy(v)) for v in stacks]
    x, y = rng.normal(size=(8, 3, 6)).astype("float32"), np.arange(8) % 4
    bank.fit(x, y, adapters=["ann", "bob"] * 4, batch_size=8, verbose=0)
    for v, old in zip(stacks, before, strict=True):
        step = np.abs(ops.convert_to_numpy(v) - old).max()
        check_default_steps({v.path.split("/")[-1]: step}, 1.0)
