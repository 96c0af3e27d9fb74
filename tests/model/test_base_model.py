"""`base_model` in training steps, in threads, and what it refuses or saves."""

import threading

import keras
import numpy as np
import pytest
from gradients import outputs_and_gradients
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from keras import ops

import keras_vera

pytestmark = pytest.mark.members_in_turn

BATCH = 4


class ReadsKernel(keras.layers.Layer):
    """Uses the kernel of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(6, name="inner")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return ops.matmul(ops.tanh(x), self.dense.kernel) + self.dense.bias


def make_base():
    """Returns a model of many kinds of layers, the same every time."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(11, 8)(inputs)
    x = keras.layers.Conv1D(6, 3, groups=2, activation="relu")(x)
    x = keras.layers.Conv1D(6, 2)(x)
    x = keras.layers.SimpleRNN(6, return_sequences=True)(x)
    x = keras.layers.Dropout(0.3)(x)
    x = ReadsKernel()(x)
    x = keras.layers.EinsumDense("btd,dnh->btnh", (3, 2, 3))(x)
    x = keras.layers.Reshape((3, 6))(x)
    x = keras.layers.Dense(8, activation="tanh")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="last")(x))


def frozen_base():
    # On some processors, PyTorch convolves otherwise with a kernel that trains.
    model = make_base()
    model.trainable = False
    return model


TARGETS = ["all-linear", "conv", "embedding"]


def enable(model):
    keras_vera.enable_vera(model, rank=4, targets=TARGETS)
    spoil(model)


def make_model():
    model = make_base()
    enable(model)
    return model


@pytest.fixture
def x(rng):
    return rng.integers(11, size=(BATCH, 6)).astype("int32")


def numpy_of(tensors):
    return keras.tree.map_structure(ops.convert_to_numpy, tensors)


def both(model, x):
    """Returns the adapted outputs and the base's, of one computation."""
    with keras_vera.base_model(model):
        before = model(x)
    outputs = model(x)
    with keras_vera.base_model(model):
        return outputs, before, model(x)


def run_traced(function, x):
    if backend() == "jax":
        import jax

        return numpy_of(jax.jit(function)(x))
    if backend() == "tensorflow":
        import tensorflow as tf

        return numpy_of(tf.function(function)(x))
    return numpy_of(function(ops.convert_to_tensor(x)))


def assert_both(model, plain, x):
    expected = run_traced(model, x)
    base = run_traced(plain, x)
    found = run_traced(lambda x: both(model, x), x)
    assert largest_difference(expected, base) > 1e-2
    assert largest_difference(found[0], expected) < 1e-5
    np.testing.assert_array_equal(found[1], base)
    np.testing.assert_array_equal(found[2], base)


def test_base_in_the_same_graph(x):
    model = make_model()
    start = numpy_weights(model)
    assert_both(model, frozen_base(), x)
    for weight, value in zip(model.weights, start, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


def test_base_has_its_own_bias(x):
    model = make_model()
    for layer in adapted(model):
        if getattr(layer, "bias", None) is not None:
            layer.set_adapter_bias(np.full(layer.bias.shape, 0.7, "float32"))
    assert_both(model, frozen_base(), x)
    with keras_vera.base_model(model):
        y = predict(model, x)
    np.testing.assert_array_equal(y, predict(frozen_base(), x))
    biases = [x.bias for x in adapted(model) if x.vera_base_bias is not None]
    assert len(biases) == 5
    assert all(np.all(ops.convert_to_numpy(b) == 0.7) for b in biases)


def test_quantized_base(rng):
    def make():
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6)])
        model.quantize("int8")
        return model

    model = make()
    enable_dense = {"rank": 4, "targets": "all-linear"}
    keras_vera.enable_vera(model, **enable_dense)
    spoil(model)
    assert_both(model, make(), rng.normal(size=(5, 8)).astype("float32"))


def test_public_layers(rng):
    model = keras.Sequential(
        [keras.Input((8,)), keras_vera.layers.VeRADense(6, rank=4)]
    )
    spoil(model)
    plain = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6)])
    plain.set_weights(numpy_weights(model)[:2])
    assert_both(model, plain, rng.normal(size=(5, 8)).astype("float32"))


# ---- Training with the base as a reference.


class DirectPreferences(keras.Model):
    """Trains a policy by DPO, whose reference is its base or given."""

    def __init__(self, policy, reference=None):
        super().__init__()
        self.policy = policy
        self.reference = reference

    def call(self, x):
        return self.policy(x["chosen"])

    def compute_loss(self, x=None, *args, **kwargs):
        x = ops.concatenate([x["chosen"], x["rejected"]])
        wanted = self.log_probability(self.policy(x, training=True))
        if self.reference is not None:
            reference = self.reference(x)
        else:
            with keras_vera.base_model(self.policy):
                reference = self.policy(x)
        margin = wanted - self.log_probability(reference)
        chosen, rejected = ops.split(margin, 2)
        return -ops.mean(ops.log_sigmoid(0.5 * (chosen - rejected)))

    def log_probability(self, logits):
        return ops.log_softmax(logits)[:, 0]


# On JAX, every operation would be compiled alone.
EAGER = pytest.param({"run_eagerly": True}, marks=pytest.mark.in_turn("torch"))
MODES = [{}, EAGER]
if backend() == "tensorflow":
    MODES = [{"jit_compile": True}, {"jit_compile": False}, *MODES[1:]]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_direct_preference_optimization(rng, mode):
    data = {
        name: rng.integers(11, size=(8, 6)).astype("int32")
        for name in ("chosen", "rejected")
    }
    losses, policies = [], []
    for reference in (None, frozen_base()):
        policy = make_model()
        start = numpy_weights(policy)
        model = DirectPreferences(policy, reference)
        model.compile(keras.optimizers.SGD(0.3), **mode)
        keras.utils.set_random_seed(5)
        fitted = model.fit(
            data, np.zeros(8), BATCH, epochs=2, shuffle=False, verbose=0
        )
        losses.append(fitted.history["loss"])
        policies.append(policy)
    np.testing.assert_allclose(*losses, rtol=1e-6)
    for own, expected in zip(*(p.weights for p in policies), strict=True):
        assert largest_difference(own, expected) < 1e-6, own.path
    moved = [
        largest_difference(v, value) > 1e-6
        for v, value in zip(policies[0].weights, start, strict=True)
    ]
    assert sum(moved) > 0.8 * len(policies[0].trainable_variables)
    # What was compiled for the step goes on, and the base is what it was.
    x = data["chosen"]
    with keras_vera.base_model(policies[0]):
        np.testing.assert_array_equal(
            predict(policies[0], x), predict(frozen_base(), x)
        )


def test_uncompiled_steps_of_jax(x):
    if backend() != "jax":
        pytest.skip("There, variables have no values in the middle of `fit`.")

    class Distilled(keras.Model):
        def __init__(self):
            super().__init__()
            self.policy = make_small()
            keras_vera.enable_vera(self.policy, 2, targets="all-linear")
            spoil(self.policy)
            self.seen = []

        def call(self, x):
            return self.policy(x)

        def train_step(self, state, data):
            with keras_vera.base_model(self.policy):
                y, _ = self.stateless_call(state[0], state[1], data[0])
            self.seen.append(y)
            return super().train_step(state, data)

    x = np.linspace(-1, 1, 40, dtype="float32").reshape(8, 5)
    vectors = []
    for run_eagerly in (True, False):
        model = Distilled()
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=run_eagerly)
        model.fit(x, np.ones((8, 3)), 2, shuffle=False, verbose=0)
        vectors.append(numpy_of([v.value for v in model.trainable_variables]))
        if run_eagerly:
            assert len(model.seen) == 4
            seen = np.concatenate(model.seen)
            base = numpy_of(make_small()(x))
            assert largest_difference(seen, base) < 1e-6
    for eager, compiled in zip(*vectors, strict=True):
        assert largest_difference(eager, compiled) < 1e-6


def test_no_gradient_through_the_base(x):
    model = make_model()
    base = model.get_layer("last")

    def loss_of():
        with keras_vera.base_model(model):
            return ops.sum(model(x) ** 2) + ops.sum(base.kernel)

    variables = model.trainable_variables
    if backend() == "jax":
        import jax

        def stateless(trainable):
            with keras_vera.base_model(model):
                # Its values of the adapter come last, and do not count.
                y, _ = model.stateless_call(trainable, frozen, x)
            return ops.sum(y**2)

        frozen = [v.value for v in model.non_trainable_variables]
        trainable = [v.value for v in variables]
        step = jax.value_and_grad(stateless)
        loss, gradients = step(trainable)
        gradients += jax.jit(step)(trainable)[1]
        expected = np.sum(predict(frozen_base(), x) ** 2)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
    elif backend() == "tensorflow":
        import tensorflow as tf

        def step():
            with tf.GradientTape() as tape:
                loss = loss_of()
            return [g for g in tape.gradient(loss, variables) if g is not None]

        gradients = [*step(), *tf.function(step)()]
    else:
        assert not loss_of().requires_grad
        gradients = []
    for gradient in gradients:
        assert not np.any(ops.convert_to_numpy(gradient))


class Function(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.built = True

    def call(self, x):
        return self.function(x)


class RunAgain(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(6, "tanh")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        # JAX knows a function that it has seen, with what it saw then.
        return keras.remat(lambda x: self.dense(x))(x)


@pytest.mark.parametrize("mode", ["full", "activations", "in a layer", None])
def test_gradients_through_a_base_that_runs_again(mode, rng):
    def make():
        keras.utils.set_random_seed(3)
        with keras.RematScope(mode=None if mode == "in a layer" else mode):
            layers = [
                RunAgain()
                if mode == "in a layer"
                else keras.layers.Dense(6, "tanh"),
                keras.layers.Dense(3, "tanh"),
            ]
        return keras.Sequential([keras.Input((5,)), *layers])

    def base_of(x):
        with keras_vera.base_model(model):
            return model(x)

    x, upstream = (rng.normal(size=(8, n)).astype("float32") for n in (5, 3))
    model = make()
    _, expected = outputs_and_gradients(Function(make()), x, upstream)
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    spoil(model)
    _, adapter = outputs_and_gradients(Function(model), x, upstream)
    _, found = outputs_and_gradients(Function(base_of), x, upstream)
    assert largest_difference(adapter["x"], expected["x"]) > 1e-2
    assert largest_difference(found["x"], expected["x"]) < 1e-6


def test_torch_compile(rng):
    if backend() != "torch":
        pytest.skip("`torch.compile` is PyTorch's.")
    import torch

    def make():
        keras.utils.set_random_seed(3)
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(6)])

    model = make()
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    spoil(model)
    x = torch.tensor(rng.normal(size=(5, 8)).astype("float32"))
    base, expected = numpy_of(make()(x)), numpy_of(model(x))
    step = torch.compile(lambda x: both(model, x), backend="eager")
    alone = torch.compile(model, backend="eager")
    for _ in range(2):
        outputs, *bases = numpy_of(step(x))
        np.testing.assert_allclose(outputs, expected, rtol=1e-5)
        np.testing.assert_array_equal(alone(x).detach(), expected)
        with keras_vera.base_model(model):
            bases.append(alone(x).detach())
        for y in bases:
            np.testing.assert_array_equal(y, base)


def test_tensorflow_refuses_functions_with_the_adapter_in_them(x):
    if backend() != "tensorflow":
        pytest.skip("Only there can it be seen.")
    import tensorflow as tf

    model = make_model()
    called = tf.function(model)
    step = tf.function(lambda x: (called(x), with_base(x)))

    def with_base(x):
        with keras_vera.base_model(model):
            return called(x)

    with pytest.raises(ValueError, match="a compiled function was called"):
        step(x)


# ---- Blocks in blocks, errors, threads.


def test_first_compiled_inside(x):
    model = make_model()
    expected = numpy_of(model(x))
    base = predict(frozen_base(), x)
    with keras_vera.base_model(model):
        with keras_vera.base_model(model):
            np.testing.assert_array_equal(predict(model, x), base)
        np.testing.assert_array_equal(predict(model, x), base)
        assert_is_base(model, x, base)
    assert largest_difference(predict(model, x), expected) < 1e-5


def assert_is_base(model, x, base):
    found = run_traced(lambda x: both(model, x), x)
    for y in found:
        assert largest_difference(y, base) < 1e-6


def test_error_inside_gives_the_adapter_back(x):
    model = make_model()
    start = numpy_weights(model)

    def fail(x):
        with keras_vera.base_model(model):
            model(x)
            raise KeyboardInterrupt

    for run in (fail, lambda x: run_traced(fail, x)):
        with pytest.raises(KeyboardInterrupt):
            run(x)
        for weight, value in zip(model.weights, start, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)
        eager = numpy_of(model(x))
        assert largest_difference(run_traced(model, x), eager) < 1e-5


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_threads(x, tmp_path):
    model = make_model()
    expected, base = numpy_of(model(x)), numpy_of(frozen_base()(x))

    def as_base():
        with keras_vera.base_model(model):
            return numpy_of(model(x))

    file = tmp_path / "a.vera.safetensors"
    keras_vera.save_adapter(model, file)
    content = file.read_bytes()
    with keras_vera.base_model(model):
        np.testing.assert_array_equal(in_thread(as_base), base)
        found = in_thread(lambda: numpy_of(model(x)))
        np.testing.assert_array_equal(found, expected)
        in_thread(lambda: keras_vera.save_adapter(model, file))
        np.testing.assert_array_equal(numpy_of(model(x)), base)
    assert file.read_bytes() == content
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


# ---- Saving, changing and training inside.


def make_small():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(3)]
    )


@pytest.fixture
def small():
    model = make_small()
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    spoil(model)
    return model


@pytest.fixture
def inputs(rng):
    return rng.normal(size=(6, 5)).astype("float32")


def test_files_hold_the_adapter(small, inputs, tmp_path):
    expected = predict(small, inputs)
    file = tmp_path / "inside.vera.safetensors"
    weights = tmp_path / "inside.weights.h5"
    with keras_vera.base_model(small):
        keras_vera.save_adapter(small, file)
        small.save_weights(weights)
        small.save(tmp_path / "inside.keras")
        callback = keras_vera.callbacks.AdapterCheckpoint(
            tmp_path / "checkpoint.vera.safetensors"
        )
        callback.set_model(small)
        callback.on_epoch_end(0, {})
    for path in (file, tmp_path / "checkpoint.vera.safetensors"):
        model = make_small()
        keras_vera.load_adapter(model, path)
        np.testing.assert_array_equal(predict(model, inputs), expected)
    again = make_small()
    keras_vera.enable_vera(again, rank=2, targets="all-linear")
    again.load_weights(weights)
    np.testing.assert_array_equal(predict(again, inputs), expected)
    for path in (weights, tmp_path / "inside.keras"):
        model = make_small()
        if path.suffix == ".keras":
            model = keras.saving.load_model(path)
        else:
            model.load_weights(path)
        assert largest_difference(predict(model, inputs), expected) < 1e-5


def test_weights_loaded_inside_are_there_afterwards(small, inputs, tmp_path):
    expected = predict(small, inputs)
    base = predict(make_small(), inputs)
    small.save_weights(tmp_path / "a.weights.h5")
    spoil(small, seed=7)
    with keras_vera.base_model(small):
        small.load_weights(tmp_path / "a.weights.h5")
        np.testing.assert_array_equal(predict(small, inputs), base)
    np.testing.assert_array_equal(predict(small, inputs), expected)


def test_peft_files_hold_the_adapter(tmp_path):
    hub_models = pytest.importorskip("hub_models")
    backbone = hub_models.make_backbone("bert")
    keras_vera.enable_vera(backbone, rank=2)
    spoil(backbone)
    keras_vera.save_peft_adapter(backbone, tmp_path / "outside")
    with keras_vera.base_model(backbone):
        keras_vera.save_peft_adapter(backbone, tmp_path / "inside")
        with pytest.raises(ValueError, match="Leave the block first"):
            keras_vera.load_peft_adapter(backbone, tmp_path / "outside")
    for file in (tmp_path / "outside").iterdir():
        inside = tmp_path / "inside" / file.name
        assert inside.read_bytes() == file.read_bytes()


def test_changes_are_refused(small, inputs, tmp_path):
    file = tmp_path / "a.vera.safetensors"
    keras_vera.save_adapter(small, file)
    expected = predict(small, inputs)
    outer = keras.Sequential([keras.Input((5,)), small])
    inner = keras.Sequential([keras.Input((5,)), small.layers[0]])
    with keras_vera.base_model(small):
        for change in (
            lambda: keras_vera.load_adapter(small, file),
            lambda: keras_vera.merge(small),
            lambda: keras_vera.disable_vera(inner),
            lambda: keras_vera.enable_vera(outer),
            lambda: keras_vera.AdapterBank(small, capacity=1),
        ):
            with pytest.raises(ValueError, match="Leave the block first"):
                change()
            if backend() != "torch":
                with pytest.raises(ValueError, match="Leave the block first"):
                    raise in_thread(lambda: error_of(change))
    np.testing.assert_array_equal(predict(small, inputs), expected)


def error_of(function):
    try:
        function()
    except ValueError as error:
        return error


def test_training_inside_is_an_error(small, inputs):
    # PyTorch refuses by itself to train where nothing can.
    head = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((5,)), small, head])
    model.compile("sgd", "mse")
    labels = np.ones((6, 2))
    model.fit(inputs, labels, verbose=0)
    expected = predict(small, inputs)
    with pytest.raises(ValueError, match="was trained inside"):
        with keras_vera.base_model(model):
            model.fit(inputs, labels, verbose=0)
    np.testing.assert_array_equal(predict(small, inputs), expected)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_step_with_its_updates_inside_is_an_error(small, inputs, run_eagerly):
    if backend() == "torch":
        pytest.skip("The base gives no gradient there.")

    class Sloppy(keras.Sequential):
        def train_step(self, *args, **kwargs):
            with keras_vera.base_model(self):
                return super().train_step(*args, **kwargs)

    model = Sloppy([keras.Input((5,)), *small.layers])
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    start = numpy_weights(small)
    with pytest.raises(ValueError, match="was trained inside"):
        model.fit(inputs, np.ones((6, 3)), verbose=0)
    if backend() == "tensorflow":
        for weight, value in zip(small.weights, start, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


def test_compiling_inside_is_no_training():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    spoil(model)
    x, y = np.ones((4, 4), "float32"), np.ones((4, 3), "float32")
    with keras_vera.base_model(model):
        model.compile("sgd", "mse")
        model.evaluate(x, y, verbose=0)
    # On PyTorch, nothing that trains is in the graph.
    with pytest.raises((ValueError, RuntimeError), match="trained|grad_fn"):
        with keras_vera.base_model(model):
            model.compile("sgd", "mse")
            model.fit(x, y, verbose=0)
