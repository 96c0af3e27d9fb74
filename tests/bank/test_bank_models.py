"""What of a model an `AdapterBank` can hold, and what it refuses."""

import banks
import keras
import keras_hub
import numpy as np
import pytest
from banks import ROUNDING
from banks import expected_rows
from banks import make_bank
from banks import make_classifier
from banks import make_files
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from keras import ops
from peft_families import both_models
from peft_families import with_peft

import keras_vera

pytestmark = pytest.mark.in_turn

NAMES = ["ann", "bob"]


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path, NAMES)


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 3, banks.INPUTS)).astype("float32")


# ---- Matrices that no seed makes.


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_adapters_with_matrices_of_their_own(files, x, tmp_path, in_folder):
    """Such as a sum, and what comes from PEFT."""
    total = tmp_path / "sum.vera.safetensors"
    keras_vera.combine({files["ann"]: 0.5, files["bob"]: 0.5}, total)

    def loaded():
        model = make_classifier(vera=False)
        keras_vera.load_adapter(model, total)
        return model

    model = loaded()
    own = {"sum": total}
    for seed in (1, 2):
        banks.randomize(model, seed)
        own[f"user{seed}"] = tmp_path / f"user{seed}.vera.safetensors"
        keras_vera.save_adapter(model, own[f"user{seed}"])
    outputs = {None: predict(make_classifier(vera=False), x)}
    for name, file in own.items():
        keras_vera.load_adapter(model, file)
        outputs[name] = predict(model, x)

    folder = tmp_path / "bank" if in_folder else None
    bank = keras_vera.AdapterBank(loaded(), 3, folder)
    for name, file in own.items():
        bank.load(name, file)
    # The head of the base is that of the model that the bank is for.
    names = ["user1", "sum", "user2", "user1"]
    expected = expected_rows(outputs, names)
    assert largest_difference(bank.predict(x, names), expected) < ROUNDING
    for name, file in own.items():
        bank.save(name, tmp_path / "saved.vera.safetensors")
        assert (tmp_path / "saved.vera.safetensors").read_bytes() == (
            file.read_bytes()
        )
    bank.remove("sum")
    weights = {"user1": 0.3, "user2": 0.7}
    keras_vera.combine(weights, "both", method="nearest", bank=bank)
    keras_vera.combine(
        {own[name]: weight for name, weight in weights.items()},
        tmp_path / "both.vera.safetensors",
        method="nearest",
    )
    keras_vera.load_adapter(model, tmp_path / "both.vera.safetensors")
    found = bank.predict(x, ["both"] * len(x))
    assert largest_difference(found, predict(model, x)) < ROUNDING
    bank.remove("both")
    bank.add("fresh")
    bank.save("fresh", tmp_path / "fresh.vera.safetensors")
    keras_vera.load_adapter(
        make_classifier(vera=False), tmp_path / "fresh.vera.safetensors"
    )
    # Other matrices do not fit.
    other = tmp_path / "other.vera.safetensors"
    keras_vera.combine({files["ann"]: 0.3, files["bob"]: 0.7}, other)
    with pytest.raises(keras_vera.AdapterFileError, match="random matrices"):
        bank.load("other", other)
    assert sorted(bank.names) == ["fresh", "user1", "user2"]


def test_biases_of_an_adapter_are_refused(tmp_path):
    model, backbone = both_models("bert", tmp_path)
    with_peft(model, ["query"], bias="vera_only").save_pretrained(
        tmp_path / "peft"
    )
    keras_vera.load_peft_adapter(backbone, tmp_path / "peft")
    with pytest.raises(ValueError, match="a bias of its own"):
        keras_vera.AdapterBank(backbone, 2)


class StableDiffusion3Backbone(keras.Sequential):
    """Stands in for KerasHub's, whose name is what counts."""


def test_models_that_stack_their_batch_are_refused():
    assert hasattr(keras_hub.models, StableDiffusion3Backbone.__name__)
    model = StableDiffusion3Backbone([keras.Input((4,)), keras.layers.Dense(3)])
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    with pytest.raises(ValueError, match="which rows have which adapter"):
        keras_vera.AdapterBank(model, 2)


# ---- Heads.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_regularizer": "l2"}, "`kernel_regularizer` of layer 'head'"),
        ({"bias_regularizer": "l1"}, "`bias_regularizer` of layer 'head'"),
        ({"kernel_constraint": "max_norm"}, "`kernel_constraint` of layer"),
        ({"bias_constraint": "non_neg"}, "`bias_constraint` of layer 'head'"),
    ],
)
def test_heads_whose_options_are_of_all_numbers(options, message):
    base = make_classifier().get_layer(index=1)
    head = keras.layers.Dense(3, name="head", **options)
    model = keras.Model(base.input, head(base.output))
    with pytest.raises(ValueError, match=message):
        keras_vera.AdapterBank(model, 2)
    head.trainable = False
    keras_vera.AdapterBank(model, 2)


class LogitsFirst(keras.Model):
    """Layers in another order than that in which they are called."""

    def __init__(self):
        super().__init__()
        self.logits = keras.layers.Dense(3)
        self.pooler = keras.layers.Dense(5, activation="tanh")
        self.body = make_classifier().get_layer(index=1)

    def call(self, x):
        return self.logits(self.pooler(self.body(x)))


def two_outputs():
    base = make_classifier().get_layer(index=1)
    outputs = [keras.layers.Dense(n)(base.output) for n in (4, 6)]
    return keras.Model(base.input, outputs)


class Block(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(4)
        self.bottleneck = keras.layers.Dense(6, activation="tanh")

    def call(self, x):
        return self.head(self.bottleneck(x))


def in_a_block():
    """The last head is inside another layer, where nobody looks."""
    base = make_classifier().get_layer(index=1)
    return keras.Model(base.input, Block()(base.output))


def hidden():
    base = make_classifier().get_layer(index=1)
    y = keras.layers.Dense(3, "tanh")(base.output)
    return keras.Model(base.input, keras.layers.Dense(3, trainable=False)(y))


def behind(after):
    def make():
        base = make_classifier().get_layer(index=1)
        y = keras.layers.Reshape((3, 10))(base.output)
        return keras.Model(base.input, after(keras.layers.Dense(4)(y)))

    return make


NOT_KNOWN = {
    "subclassed": LogitsFirst,
    "two outputs": two_outputs,
    "block": in_a_block,
    "hidden": hidden,
    "negative": behind(lambda y: -y),
    "scaled by less than 0": behind(lambda y: y / -2),
    "from 1": behind(lambda y: 1 - ops.sigmoid(y)),
    "unit": behind(keras.layers.UnitNormalization()),
    "tokens": behind(keras.layers.Softmax(axis=1)),
    "flat softmax": behind(lambda y: ops.softmax(ops.reshape(y, (-1, 12)))),
    "all": behind(lambda y: ops.mean(y, axis=-1)),
    "user's": behind(keras.layers.Activation(lambda y: -y)),
    "gelu": behind(keras.layers.Activation("gelu")),
    "square": behind(lambda y: y * y),
}


@pytest.mark.parametrize("make", NOT_KNOWN.values(), ids=NOT_KNOWN)
def test_classes_of_a_head_that_is_not_known(make, x, tmp_path):
    model = make()
    model(x)
    bank = keras_vera.AdapterBank(model, 2)
    with pytest.raises(ValueError, match="a head that gives the model's"):
        bank.add("ann", classes=2)
    bank.add("ann")
    # All else works.
    path = tmp_path / "ann.vera.safetensors"
    bank.save("ann", path)
    bank.load("bob", path)
    expected = keras.tree.flatten(model.predict(x, verbose=0))
    for name in ("ann", "bob", None):
        found = keras.tree.flatten(bank.predict(x, [name] * len(x)))
        for one, other in zip(found, expected, strict=True):
            assert largest_difference(one, other) < ROUNDING


def nested(head):
    base = make_classifier().get_layer(index=1)
    inner = keras.Sequential([base, keras.layers.Dense(7, "tanh"), head])
    inputs = keras.Input(base.input_shape[1:])
    return keras.Model(inputs, keras.layers.Softmax()(inner(inputs)))


def one_of_two_outputs(head):
    base = make_classifier().get_layer(index=1)
    return keras.Model(base.input, [base.output, head(base.output)])


class Subclassed(keras.Model):
    def __init__(self, head):
        super().__init__()
        self.head = head
        self.body = make_classifier().get_layer(index=1)

    def call(self, x):
        return self.head(self.body(x))


def the_only_one(head):
    """However its logits get to the output."""
    base = make_classifier().get_layer(index=1)
    y = head(base.output)
    return keras.Model(base.input, keras.layers.Add()([y, y * 0]))


def in_a_wrapper(head):
    base = make_classifier().get_layer(index=1)
    y = keras.layers.Dense(6, "tanh", name="bottleneck")(base.output)
    y = keras.layers.Reshape((2, 3))(y)
    return keras.Model(base.input, keras.layers.TimeDistributed(head)(y))


def called_twice(head):
    """As where dropout is sampled several times."""
    base = make_classifier().get_layer(index=1)
    dropped = [keras.layers.Dropout(rate)(base.output) for rate in (0.1, 0.3)]
    average = keras.layers.Average()([head(y) for y in dropped])
    return keras.Model(base.input, average)


def through_a_model_without_heads(head):
    base = make_classifier().get_layer(index=1)
    after = keras.Sequential(
        [keras.layers.Reshape((2, 2)), keras.layers.Flatten()]
    )
    y = head(keras.layers.Dense(7, "tanh")(base.output))
    return keras.Model(base.input, after(y))


@pytest.mark.parametrize(
    "make",
    [
        nested,
        one_of_two_outputs,
        Subclassed,
        the_only_one,
        in_a_wrapper,
        called_twice,
        through_a_model_without_heads,
    ],
)
def test_classes_are_those_of_the_last_head(make, x):
    head = keras.layers.Dense(4, name="head")
    model = make(head)
    model(x)
    bank = keras_vera.AdapterBank(model, 1)
    bank.add("ann", classes=3)
    outputs = bank.predict(x, ["ann"] * len(x))
    logits = keras.tree.flatten(outputs)[-1]
    expected = keras.tree.flatten(model.predict(x, verbose=0))[-1]
    if make is nested:  # Probabilities.
        assert np.all(logits[..., 3] == 0)
        expected = expected[:, :3] / expected[:, :3].sum(axis=1, keepdims=True)
    else:
        assert np.all(logits[..., 3] == -1e9)
    difference = largest_difference(logits[..., :3], expected[..., :3])
    assert difference < ROUNDING


@pytest.mark.parametrize(
    "after",
    [
        lambda y: ops.softmax(y / 2),
        lambda y: 2 * ops.sigmoid(y) - 1,
        lambda y: keras.layers.Softmax()(1 + y * np.float32(3)),
        lambda y: ops.cast(ops.log_softmax(y), "float32"),
        lambda y: keras.layers.Activation("softmax")(ops.divide(y, 2)),
        lambda y: keras.layers.Activation("sigmoid")(y),
        lambda y: keras.layers.Dropout(0.5)(ops.mean(y, axis=1)),
        lambda y: keras.layers.GlobalAveragePooling1D()(y),
    ],
)
def test_what_comes_after_the_head(after, x):
    """It gives what it gives without the columns of absent classes."""
    logits = behind(lambda y: y)()
    model = keras.Model(logits.input, after(logits.output))
    bank = keras_vera.AdapterBank(model, 1)
    bank.add("ann", classes=3)
    found = bank.predict(x, ["ann"] * len(x))
    expected = after(ops.convert_to_tensor(predict(logits, x)[..., :3]))
    expected = ops.convert_to_numpy(expected)
    assert largest_difference(found[..., :3], expected) < ROUNDING
    assert np.all(found[..., 3] <= found[..., :3].min(axis=-1))


# ---- The base.


def test_weights_that_come_after_the_bank(files, x, tmp_path):
    base_weights = tmp_path / "base.weights.h5"
    other = make_classifier(vera=False)
    spoil(other, scale=0.1)
    for layer in other.layers[1].layers:
        for v in layer.weights:
            v.assign(np.array(v) + 0.1)
    other.save_weights(base_weights)
    model = make_classifier()
    bank = make_bank(files, 4, model)
    model.load_weights(base_weights)
    path = tmp_path / "late.vera.safetensors"
    bank.model.compile("sgd", "mse")
    for call in (
        lambda: bank.fit(x[:1], np.ones((1, 4)), adapters=["ann"]),
        lambda: bank.save("ann", path),
        lambda: bank.load("new", files["bob"]),
        lambda: bank.add("new"),
    ):
        with pytest.raises(ValueError, match="other weights than when"):
            call()
    assert bank.names == NAMES and not path.exists()


@pytest.mark.parametrize("part", [slice(-1, None), slice(-2, -1)])
def test_random_matrices_that_come_after_the_bank(files, part, tmp_path):
    """One of the two is enough."""
    model = make_classifier()
    bank = make_bank(files, 4, model)
    names = ["vera_kernel_a", "vera_kernel_b"]
    (variable,) = [v for v in model.weights if v.name in names][part]
    variable.assign(-1 * np.array(variable))
    with pytest.raises(ValueError, match="other random matrices"):
        bank.save("ann", tmp_path / "late.vera.safetensors")
    with pytest.raises(ValueError, match="are not those of seed=0"):
        keras_vera.save_adapter(model, tmp_path / "late.vera.safetensors")


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize(
    "change",
    [
        keras_vera.disable_vera,
        keras_vera.merge,
        lambda model: (
            keras_vera.disable_vera(model),
            keras_vera.enable_vera(model, 4, targets="all-linear", seed=3),
        ),
    ],
    ids=["disable", "merge", "enable"],
)
def test_adapters_outlive_their_base(files, x, tmp_path, change, in_folder):
    """What they have learned can be saved, and nothing else be done."""
    model = make_classifier()
    bank = keras_vera.AdapterBank(
        model, 3, tmp_path / "bank" if in_folder else None
    )
    for name, file in files.items():
        bank.load(name, file)
    expected = bank.predict(x, NAMES * 2)
    spoil(model)  # So that `merge` moves the kernels.
    bank.model.compile("sgd", "mse")
    change(model.layers[1])
    kernels = [np.array(v) for v in model.weights]
    for call in (
        lambda: bank.fit(x, np.ones((4, 4)), adapters=NAMES * 2),
        lambda: bank.predict(x, NAMES * 2),
        lambda: bank.load("new", files["bob"]),
        lambda: bank.add("new"),
        lambda: bank.add("new", like="ann"),
        lambda: keras_vera.combine({"ann": 1.0}, "new", bank=bank),
    ):
        with pytest.raises(ValueError, match="not adapted as it was when"):
            call()
    assert bank.names == NAMES
    found = make_bank({}, 2)
    for name in NAMES:
        path = tmp_path / f"{name}.saved.vera.safetensors"
        bank.save(name, path)
        assert path.read_bytes() == files[name].read_bytes()
        found.load(name, path)
    assert largest_difference(found.predict(x, NAMES * 2), expected) < ROUNDING
    for now, before in zip(model.weights, kernels, strict=True):
        np.testing.assert_array_equal(now, before)


class Towers(keras.Model):
    """Adapted one by one, each with random matrices of its own."""

    def __init__(self):
        super().__init__()
        # In another order than that of their names.
        self.text = make_classifier().get_layer(index=1)
        self.image = make_classifier().get_layer(index=1)

    def call(self, x):
        return self.image(x) + self.text(x)


@pytest.mark.parametrize("moved", ["image", "text"])
def test_each_of_two_towers_has_its_random_matrices(moved, x, tmp_path):
    model = Towers()
    model(x)
    bank = keras_vera.AdapterBank(model, 1)
    bank.add("ann")
    path = tmp_path / "both.vera.safetensors"
    bank.save("ann", path)
    path.unlink()
    weights = getattr(model, moved).weights
    (a,) = [v for v in weights if v.name == "vera_kernel_a"]
    a.assign(-1 * np.array(a))
    with pytest.raises(ValueError, match="other random matrices"):
        bank.save("ann", path)
    assert not path.exists()


def test_a_bank_changes_in_the_middle_of_an_epoch(files, x, tmp_path):
    """On JAX, the weights are elsewhere then."""
    bank = make_bank(files, 4)
    bank.model.compile("sgd", "mse")
    path = tmp_path / "ann.vera.safetensors"

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            bank.save("ann", path)
            bank.load(f"copy{batch}", path)

    bank.fit(
        x,
        np.ones((4, 4)),
        adapters=["ann", "bob"] * 2,
        batch_size=2,
        callbacks=[Save()],
        verbose=0,
    )
    assert bank.names == [*NAMES, "copy0", "copy1"]
    names = ["copy1"] * len(x), ["ann"] * len(x)
    found, expected = (bank.predict(x, own) for own in names)
    assert largest_difference(found, expected) < ROUNDING


@pytest.mark.parametrize("apply", [False, True], ids=["fit", "apply"])
def test_an_optimizer_of_another_model_trains_all_of_it(files, apply):
    """It was compiled for a bank before, and built for a plain model."""
    optimizer = keras.optimizers.SGD(0.1)
    plain_class = type(optimizer)
    bank = make_bank(files)
    bank.model.compile(optimizer, "mse")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(optimizer, "mse")
    before = np.array(model.layers[0].kernel)
    if apply:
        variables = model.trainable_variables
        ones = [keras.ops.ones(v.shape) for v in variables]
        optimizer.apply(ones, variables)
    else:
        model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0)
    assert np.all(np.array(model.layers[0].kernel) != before)
    assert type(optimizer) is plain_class


@pytest.mark.parametrize("name", ["sgd", "vera"])
def test_an_optimizer_that_was_built_for_a_bank(files, x, name):
    """It says so, as Keras' own do."""
    optimizer = keras.optimizers.SGD(0.1)
    if name == "vera":
        optimizer = keras_vera.vera_optimizer(optimizer)
    bank = make_bank(files)
    bank.model.compile(optimizer, "mse")
    bank.fit(x, np.ones((4, 4)), adapters=NAMES * 2, verbose=0)
    before = banks.stacks(bank)
    variables = [keras.Variable(np.ones(shape)) for shape in ((5, 2), (2,))]
    with pytest.raises(ValueError, match="can only be called for the var"):
        optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
    for key, value in banks.stacks(bank).items():
        np.testing.assert_array_equal(value, before[key])


# ---- Inputs.


def test_inputs_of_whole_numbers_are_no_ids(tmp_path, rng):
    """As of a recommender, whose last input has the shape `(batch,)`."""
    keras.utils.set_random_seed(0)
    features, item = keras.Input((4,)), keras.Input((), dtype="int32")
    y = keras.layers.Concatenate()(
        [
            keras.layers.Dense(5, name="up")(features),
            keras.layers.Embedding(9, 3)(item),
        ]
    )
    base = keras.Model([features, item], y)
    keras_vera.enable_vera(base, rank=4, targets="all-linear")
    head = keras.layers.Dense(2, name="head")
    model = keras.Model(base.inputs, head(base.output))
    bank = keras_vera.AdapterBank(model, 2)
    for name in NAMES:
        bank.add(name)
    bank.model.compile("sgd", "mse")
    x = [rng.normal(size=(4, 4)).astype("float32"), np.arange(4)]
    y = rng.normal(size=(4, 2)).astype("float32")
    names = ["ann", "bob", "ann", "bob"]
    data = (x, y, names)
    bank.fit(x, y, adapters=names, validation_data=data, verbose=0)
    expected = bank.predict(x, names)
    pairs = ((tuple(x), np.array(names)) for _ in range(1))
    assert largest_difference(bank.predict(pairs), expected) < ROUNDING
    history = bank.fit(
        x, y, adapters=names, validation_data=data, epochs=2, verbose=0
    )
    assert "val_loss" in history.history


def test_rows_are_counted_before_anything_trains(files, x):
    bank = make_bank(files)
    bank.model.compile("sgd", "sparse_categorical_crossentropy")
    before = banks.stacks(bank)
    names = ["ann", "bob"] * 2
    for y, weights, message in (
        ([0, 1, 2, 0], None, r"`y` must be arrays.*shape of \(\) for 4"),
        (np.zeros(3), None, r"`y` must be arrays.*shape of \(3,\) for 4"),
        (np.zeros(4), [1, 1, 0, 1], "`sample_weight` must be arrays"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.fit(x, y, adapters=names, sample_weight=weights)
    for key, value in banks.stacks(bank).items():
        np.testing.assert_array_equal(value, before[key])
