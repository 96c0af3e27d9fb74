"""Training many adapters in one batch."""

import banks
import keras
import numpy as np
import pytest
from banks import compile_bank
from banks import make_bank
from banks import make_classifier
from banks import make_files
from banks import stacks
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from keras import ops
from safetensors.numpy import load_file

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

NAMES = ["ann", "bob", "eve"]
MIXED = ["bob", "ann", "bob", "bob", "ann", None]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(len(MIXED), 3, banks.INPUTS)).astype("float32")
    return x, rng.integers(banks.CLASSES, size=len(MIXED))


def entries(bank, name, folder):
    """Returns what the bank saves of an adapter."""
    file = folder / f"{name}.saved.vera.safetensors"
    bank.save(name, file)
    return load_file(file)


def optimizer_rows(bank):
    """Returns copies of the optimizer's state that has a row per adapter."""
    return {
        f"{i} {v.path}": np.array(ops.convert_to_numpy(v))
        for i, v in enumerate(bank.model.optimizer.variables)
        if len(v.shape) and v.shape[0] == bank.capacity + 1
    }


def step(bank, data, adapters, rows=slice(None)):
    x, y = (part[rows] for part in data)
    return bank.fit(x, y, adapters=adapters[rows], shuffle=False, verbose=0)


def test_what_trains_is_what_the_bank_holds(files):
    bank = make_bank(files, capacity=5)
    vectors = 2 * 4 + 8 + 10
    head = 30 * banks.CLASSES + banks.CLASSES
    trained = bank.model.trainable_variables
    assert sum(np.prod(v.shape) for v in trained) == 6 * (vectors + head)
    assert {v.path for v in trained} == set(load_file(files["ann"]))
    paths = {v.path for v in bank.model.non_trainable_variables}
    assert paths.isdisjoint(v.path for v in trained)
    assert len(bank.model.weights) == len(trained) + len(
        bank.model.non_trainable_weights
    )
    bank.model.trainable = False
    assert bank.model.trainable_variables == []


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam", "adamw", "vera"])
def test_mixed_is_alone(files, data, tmp_path, name):
    """Each adapter goes where it goes by itself, however rare it is."""
    make_optimizer = {
        "sgd": lambda: keras.optimizers.SGD(0.1),
        "rmsprop": lambda: keras.optimizers.RMSprop(0.003, epsilon=1e-3),
        # Where the sum of a gradient is 0, rounding decides about Adam's step.
        "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3),
        "adamw": lambda: keras.optimizers.AdamW(0.01, 0.1, epsilon=1e-3),
        "vera": lambda: keras_vera.vera_optimizer(
            vectors=keras.optimizers.Adam(0.01, epsilon=1e-3),
            rest=keras.optimizers.Adam(0.003, epsilon=1e-3),
        ),
    }[name]
    bank = make_bank(files)
    base = numpy_weights(bank.model.base)
    before = stacks(bank)
    compile_bank(bank, make_optimizer())
    without_ann = [None if other == "ann" else other for other in MIXED]
    for adapters in [without_ann] * 3 + [MIXED] * 2:
        step(bank, data, adapters)
    for name, steps in (("ann", 2), ("bob", 5)):
        rows = [i for i, other in enumerate(MIXED) if other == name]
        model = make_classifier()
        keras_vera.load_adapter(model, files[name])
        model.compile(
            make_optimizer(),
            keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="sum"
            ),
        )
        x, y = (part[rows] for part in data)
        model.fit(x, y, epochs=steps, shuffle=False, verbose=0)
        keras_vera.save_adapter(model, tmp_path / "alone.vera.safetensors")
        expected = load_file(tmp_path / "alone.vera.safetensors")
        start = load_file(files[name])
        for key, value in entries(bank, name, tmp_path).items():
            assert largest_difference(value, expected[key]) < 1e-5, key
            assert largest_difference(start[key], expected[key]) > 1e-3, key
    # The absent adapter, the base's row, and the base: to the bit.
    absent = [0, int(bank.ids(["eve"])[0])]
    for key, value in stacks(bank).items():
        np.testing.assert_array_equal(value[absent], before[key][absent])
    for value, old in zip(numpy_weights(bank.model.base), base, strict=True):
        np.testing.assert_array_equal(value, old)


@pytest.mark.eager(False)
@pytest.mark.parametrize(
    "mode",
    # JAX does so anyway; `torch.compile` gives the same, but takes minutes.
    ["run_eagerly"]
    + [pytest.param("jit_compile", marks=pytest.mark.in_turn("tensorflow"))]
    * (backend() != "torch"),
)
def test_steps_are_the_same_in_every_mode(files, data, mode):
    found = []
    for compiled in (False, True):
        bank = make_bank(files)
        bank.model.compile(
            keras_vera.vera_optimizer(
                vectors=keras.optimizers.Adam(0.01, epsilon=1e-3),
                rest=keras.optimizers.SGD(0.1),
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            **{mode: compiled},
        )
        before = stacks(bank)
        for adapters in (MIXED, MIXED[::-1]):
            step(bank, data, adapters)
        found.append(stacks(bank))
    for key, value in found[0].items():
        assert largest_difference(value, found[1][key]) < 1e-6, key
        if "classes" not in key:
            assert np.any(value != before[key]), key


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.01),
    "vera": lambda: keras_vera.vera_optimizer(),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=4.0
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_absent_adapters_do_not_move(files, data, name):
    bank = make_bank(files)
    compile_bank(bank, OPTIMIZERS[name]())
    everybody = ["bob", "ann", "eve", "bob", "ann", "eve"]
    step(bank, data, everybody)  # Now all have moments.
    before, moments = stacks(bank), optimizer_rows(bank)
    eve, ann = bank.ids(["eve", "ann"])
    assert moments
    for key, value in moments.items():
        assert np.any(value[eve] != value[0]), key
    for _ in range(2):
        step(bank, data, MIXED)
    for old, new in ((before, stacks(bank)), (moments, optimizer_rows(bank))):
        for key, value in new.items():
            for row in (0, eve):
                np.testing.assert_array_equal(value[row], old[key][row], key)
            assert np.all(np.isfinite(value)), key
            if "classes" not in key:
                assert np.any(value[ann] != old[key][ann]), key


def test_a_step_of_adam_is_that_of_the_sum_of_the_gradients(files, data):
    """Also for an adapter with several examples in the batch."""
    gradients = make_bank(files)
    compile_bank(gradients, keras.optimizers.SGD(1.0))
    before = stacks(gradients)
    step(gradients, data, MIXED)
    bank = make_bank(files)
    compile_bank(bank, keras.optimizers.Adam(0.01, epsilon=0.1))
    step(bank, data, MIXED)
    moved = stacks(bank)
    for key, value in stacks(gradients).items():
        if "classes" not in key:
            g = before[key].astype("f8") - value
            # The first step: both moments, corrected, are g and g squared.
            expected = -0.01 * g / (np.abs(g) + 0.1 / np.sqrt(1 - 0.999))
            difference = moved[key] - before[key] - expected
            assert np.abs(difference).max() < 1e-5, key


def test_state_of_the_optimizer_is_of_the_size_of_the_vectors(files, data):
    bank = make_bank(files)
    compile_bank(bank, keras.optimizers.Adam())
    step(bank, data, MIXED)
    trained = sum(np.prod(v.shape) for v in bank.model.trainable_variables)
    state = sum(np.prod(v.shape) for v in bank.model.optimizer.variables)
    # The counts of steps, of each adapter and of all, and the learning rate.
    assert state == 2 * trained + bank.capacity + 1 + 2


def test_a_new_adapter_has_no_moments_of_an_old_one(files, data, tmp_path):
    def moves(bank):
        bank.load("new", files["eve"])
        step(bank, data, ["new"] * 6)
        return entries(bank, "new", tmp_path)

    bank = make_bank({"ann": files["ann"]})
    compile_bank(bank, keras.optimizers.Adam(0.1))
    step(bank, data, ["ann"] * 6)
    bank.remove("ann")
    found = moves(bank)
    fresh = make_bank({}, capacity=1)
    compile_bank(fresh, keras.optimizers.Adam(0.1))
    for key, value in moves(fresh).items():
        assert largest_difference(value, found[key]) < 1e-6, key


@pytest.mark.eager(False)
@pytest.mark.parametrize("name", ["adam", "vera", "loss scale"])
def test_growing_keeps_moments(files, data, name):
    small, large = make_bank(files), make_bank(files, capacity=5)
    for bank in (small, large):
        compile_bank(bank, OPTIMIZERS[name]())
        step(bank, data, MIXED)
    small.grow(5)
    for bank in (small, large):
        step(bank, data, ["eve", *MIXED[1:]])
    found = stacks(small)
    for key, value in stacks(large).items():
        assert largest_difference(value, found[key]) < 1e-6, key


def test_an_optimizer_may_be_built_before(files, data):
    banks_ = [make_bank(files), make_bank(files)]
    for bank, is_built in zip(banks_, (False, True)):
        optimizer = keras.optimizers.Adam(0.01)
        if is_built:
            optimizer.build(bank.model.trainable_variables)
        compile_bank(bank, optimizer)
        step(bank, data, MIXED)
    expected, found = map(stacks, banks_)
    for key, value in expected.items():
        assert largest_difference(value, found[key]) < 1e-6, key


def test_vectors_and_heads_have_their_own_rates(files, data):
    bank = make_bank(files)
    rates = {"vectors": 1e-2, "rest": 1e-4}
    compile_bank(
        bank,
        keras_vera.vera_optimizer(
            **{k: keras.optimizers.Adam(v) for k, v in rates.items()}
        ),
    )
    before = stacks(bank)
    step(bank, data, MIXED)
    (row,) = bank.ids(["bob"])
    for key, value in stacks(bank).items():
        if "classes" not in key:
            moved = np.abs(value[row] - before[key][row]).max()
            rate = rates["vectors" if "vera_lambda" in key else "rest"]
            assert moved == pytest.approx(rate, rel=0.02), key


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: keras.optimizers.Lamb(), "Lamb"),
        (lambda: keras.optimizers.Adafactor(), "Adafactor"),
        (lambda: keras.optimizers.ScheduleFreeAdamW(), "ScheduleFreeAdamW"),
        (lambda: keras.optimizers.Adam(clipnorm=1.0), "clipnorm=1.0"),
        (
            lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
            "gradient_accumulation_steps=2",
        ),
        (
            lambda: keras_vera.vera_optimizer(
                keras.optimizers.Adam(use_ema=True)
            ),
            "use_ema=True",
        ),
    ],
)
def test_optimizers_that_would_mix_adapters(files, make, match):
    bank = make_bank(files)
    with pytest.raises(ValueError, match=match):
        bank.model.compile(make(), "mse")


def test_fewer_classes_train(files, data, tmp_path):
    x, y = data
    bank = make_bank({}, capacity=2)
    bank.add("two", classes=2)
    bank.add("all")
    start = entries(bank, "two", tmp_path)
    compile_bank(bank, keras.optimizers.Adam(0.05))
    adapters = ["two", "all"] * 3
    y = np.where([name == "two" for name in adapters], y % 2, y)
    losses = [
        bank.fit(x, y, adapters=adapters, verbose=0).history["loss"][0]
        for _ in range(8)
    ]
    assert losses[-1] < losses[0] / 2
    head = [v for k, v in entries(bank, "two", tmp_path).items() if "ker" in k]
    assert head[0].shape == (30, 2)
    assert bank.predict(x, ["two"] * 6).argmax(-1).max() <= 1
    assert not np.array_equal(
        start[next(k for k in start if "ker" in k)], head[0]
    )


def test_dropout_is_in_the_adapters_only(tmp_path, data):
    files = make_files(tmp_path, NAMES, dropout=0.5)
    bank = make_bank(files, dropout=0.5)
    x, _ = data
    ids = bank.ids(["ann", None, "ann", None, "eve", None])
    plain = ops.convert_to_numpy(bank.model([x, ids]))
    dropped = ops.convert_to_numpy(bank.model([x, ids], training=True))
    difference = np.abs(plain - dropped).max(axis=1)
    assert (difference[[0, 2, 4]] > 1e-3).all()
    assert (difference[[1, 3, 5]] < 1e-6).all()


def test_evaluate_and_validation(files, data):
    bank = make_bank(files)
    x, y = data
    bank.model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    logits = bank.predict(x, MIXED)
    accuracy = np.mean(logits.argmax(-1) == y)
    found = bank.evaluate(x, y, MIXED, verbose=0, return_dict=True)
    assert found["accuracy"] == pytest.approx(accuracy)
    ids = bank.ids(MIXED)
    history = bank.fit(
        x, y, adapters=MIXED, validation_data=([x, ids], y), verbose=0
    )
    assert history.history["val_accuracy"][0] == pytest.approx(accuracy)


def test_a_callback_can_use_the_bank(files, data, tmp_path):
    """Also on JAX, where variables are stale in the middle of `fit`."""
    bank = make_bank(files)
    compile_bank(bank, keras.optimizers.SGD(0.1))
    x, y = data
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(entries(bank, "bob", tmp_path))
            with pytest.raises(ValueError, match="while `fit` trains"):
                bank.remove("bob")

    bank.fit(x, y, adapters=MIXED, epochs=2, callbacks=[Look()], verbose=0)
    after = entries(bank, "bob", tmp_path)
    for key, value in after.items():
        assert largest_difference(seen[0][key], value) > 1e-5, key
        np.testing.assert_array_equal(seen[1][key], value)


@pytest.mark.skipif(
    backend() != "jax",
    reason="refused on PyTorch; Keras itself cannot do it on TensorFlow",
)
def test_rematerialization(tmp_path, data, files):
    """Layers that run again in the backward pass still know the adapters."""
    found = []
    for mode in (None, "full"):
        if mode is None:
            model = make_classifier()
        else:
            with keras.RematScope(mode=mode):
                model = make_classifier()
        bank = make_bank(files, model=model)
        compile_bank(bank, keras.optimizers.SGD(0.1))
        before = stacks(bank)
        step(bank, data, MIXED)
        found.append(stacks(bank))
    for key, value in found[0].items():
        assert largest_difference(value, found[1][key]) < 1e-6, key
        if "vera_lambda" in key:
            assert np.any(value != before[key]), key
