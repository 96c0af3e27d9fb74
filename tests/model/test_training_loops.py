"""Training by hand and by `fit`, in whatever order things are called."""

import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from keras import ops

import keras_vera

pytestmark = pytest.mark.members_in_turn

LEARNING_RATE = 0.1
BATCH = 4


def make_base(attention=True):
    """Returns the same base model every time."""
    keras.utils.set_random_seed(3)
    x = inputs = keras.Input((5, 8))
    if attention:
        x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Dense(6, activation="tanh", name="hidden")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="last")(x))


def enable(model):
    keras_vera.enable_vera(model, rank=4, targets="all-linear")
    spoil(model)


def make_model():
    model = make_base()
    enable(model)
    return model


def compile_sgd(model, run_eagerly=False, **kwargs):
    optimizer = keras.optimizers.SGD(LEARNING_RATE, **kwargs)
    model.compile(optimizer, "mse", run_eagerly=run_eagerly)


def fit(model, data, epochs=2, **kwargs):
    x, y = data
    kwargs = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    model.fit(x, y, epochs=epochs, **kwargs)


@pytest.fixture
def data(rng):
    x = rng.normal(size=(12, 5, 8)).astype("float32")
    return x, rng.normal(size=(12, 3)).astype("float32")


def batches(data, epochs=2):
    x, y = data
    for _ in range(epochs):
        for i in range(0, len(x), BATCH):
            yield x[i : i + BATCH], y[i : i + BATCH]


def vector_variables(model):
    return [
        variable
        for layer in adapted(model)
        for variable in (layer.vera_lambda_d, layer.vera_lambda_b)
    ]


def vectors(model):
    return [ops.convert_to_numpy(v).copy() for v in vector_variables(model)]


def assert_close_vectors(model, expected, tolerance=1e-5):
    for vector, value in zip(vectors(model), expected, strict=True):
        assert largest_difference(vector, value) < tolerance


def assert_only_vectors_moved(model, start):
    for weight, value in zip(model.weights, start, strict=True):
        moved = np.any(ops.convert_to_numpy(weight) != value)
        assert moved == ("vera_lambda" in weight.path), weight.path


def loop_of_jax(model, data):
    import jax

    optimizer = keras.optimizers.SGD(LEARNING_RATE)
    optimizer.build(model.trainable_variables)

    def loss_of(trainable, frozen, x, y):
        prediction, frozen = model.stateless_call(
            trainable, frozen, x, training=True
        )
        return ops.mean((prediction - y) ** 2), frozen

    @jax.jit
    def step(trainable, frozen, state, x, y):
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, frozen), gradients = gradient_of(trainable, frozen, x, y)
        trainable, state = optimizer.stateless_apply(
            state, gradients, trainable
        )
        return trainable, frozen, state, loss

    trainable = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in optimizer.variables]
    losses = []
    for x, y in batches(data):
        trainable, frozen, state, loss = step(trainable, frozen, state, x, y)
        losses.append(float(loss))
    for variable, value in zip(model.trainable_variables, trainable):
        variable.assign(value)
    for variable, value in zip(model.non_trainable_variables, frozen):
        variable.assign(value)
    return losses


def loop_of_tensorflow(model, data):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(LEARNING_RATE)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return [float(step(x, y)) for x, y in batches(data)]


def loop_of_torch(model, data):
    import torch

    parameters = [v.value for v in model.trainable_variables]
    listed = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in listed} == {id(p) for p in parameters}
    assert len(listed) == len(parameters)
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE)
    losses = []
    for x, y in batches(data):
        optimizer.zero_grad()
        prediction = model(x, training=True)
        loss = torch.mean((prediction - torch.as_tensor(y)) ** 2)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(
        v.value.grad is None
        for v in model.weights
        if "vera_lambda" not in v.path
    )
    return losses


LOOPS = {
    "jax": loop_of_jax,
    "tensorflow": loop_of_tensorflow,
    "torch": loop_of_torch,
}


def test_loop_by_hand_equals_fit(data, plan):
    model = make_model()
    start = numpy_weights(model)
    losses = LOOPS[backend()](model, data)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert_only_vectors_moved(model, start)
    fitted = make_model()
    compile_sgd(fitted)
    fit(fitted, data)
    assert_close_vectors(model, vectors(fitted))


def test_torch_lists_the_parameters_of_a_lone_layer():
    if backend() != "torch":
        pytest.skip("`parameters()` is PyTorch's.")
    layer = keras.layers.MultiHeadAttention(2, 4)
    layer.build((None, 5, 8), (None, 5, 8))
    list(layer.parameters())
    for change in (keras_vera.enable_vera, keras_vera.disable_vera):
        change(layer)
        trainable = {id(v.value) for v in layer.trainable_variables}
        listed = {id(p) for p in layer.parameters() if p.requires_grad}
        assert listed == trainable


@pytest.mark.parametrize("epochs_before", [0, 2])
def test_enabling_after_compile_and_fit(data, epochs_before):
    model = make_base()
    compile_sgd(model)
    if epochs_before:
        fit(model, data, epochs_before)
    base = predict(model, data[0])
    enable(model)
    before_fit = predict(model, data[0])
    assert largest_difference(before_fit, base) > 1e-2
    assert_predict_is_fresh(model, data[0])

    start = numpy_weights(model)
    fit(model, data)
    assert_only_vectors_moved(model, start)
    assert largest_difference(predict(model, data[0]), before_fit) > 1e-3
    assert_predict_is_fresh(model, data[0])
    evaluated = model.evaluate(*data, verbose=0)
    expected = np.mean((predict(model, data[0]) - data[1]) ** 2)
    assert evaluated == pytest.approx(expected, rel=1e-4)

    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(model, data[0]), base)


def assert_predict_is_fresh(model, x):
    # Without compiling, nothing can be out of date.
    fresh = ops.convert_to_numpy(model(x))
    assert largest_difference(predict(model, x), fresh) < 1e-5


@pytest.mark.parametrize("undo", ["disable_vera", "merge"])
def test_training_goes_on_as_in_a_plain_model(data, undo):
    model = make_model()
    compile_sgd(model)
    fit(model, data)
    getattr(keras_vera, undo)(model)
    plain = make_base()
    plain.set_weights(model.get_weights())
    for each in (model, plain):
        compile_sgd(each)
        fit(each, data)
    for weight, expected in zip(model.weights, plain.weights, strict=True):
        assert largest_difference(weight, expected) < 1e-6, weight.path
    assert_predict_is_fresh(model, data[0])


@pytest.mark.parametrize("call", [predict, keras.Model.__call__])
def test_base_model_gives_base_outputs(data, call):
    def run(model):
        return ops.convert_to_numpy(call(model, data[0]))

    model = make_base()
    compile_sgd(model)
    base = run(model)
    enable(model)
    fit(model, data)
    trained, expected = run(model), vectors(model)
    assert largest_difference(trained, base) > 1e-2
    with keras_vera.base_model(model):
        np.testing.assert_array_equal(run(model), base)
        assert model.evaluate(*data, verbose=0) == pytest.approx(
            np.mean((base - data[1]) ** 2), rel=1e-4
        )
    np.testing.assert_array_equal(run(model), trained)
    assert model.evaluate(*data, verbose=0) == pytest.approx(
        np.mean((trained - data[1]) ** 2), rel=1e-4
    )
    with pytest.raises(KeyboardInterrupt):
        with keras_vera.base_model(model):
            raise KeyboardInterrupt
    np.testing.assert_array_equal(run(model), trained)
    for vector, value in zip(vectors(model), expected, strict=True):
        np.testing.assert_array_equal(vector, value)


@pytest.mark.parametrize("call", [predict, keras.Model.__call__])
@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_epoch_end"])
def test_base_model_in_a_callback_leaves_training_alone(data, moment, call):
    model, undisturbed = make_model(), make_model()
    with keras_vera.base_model(model):
        base = predict(model, data[0])
    for each in (model, undisturbed):
        each.compile(keras_vera.vera_optimizer(), "mse")
    outputs = []

    def ask_the_base(*args, **kwargs):
        # Not by `callback.model`, which would bring JAX' variables up to date.
        with keras_vera.base_model(model):
            outputs.append(ops.convert_to_numpy(call(model, data[0])))

    callback = keras.callbacks.LambdaCallback(**{moment: ask_the_base})
    fit(model, data, callbacks=[callback])
    fit(undisturbed, data)
    assert len(outputs) == (6 if moment == "on_train_batch_end" else 2)
    for y in outputs:
        assert largest_difference(y, base) < 1e-6
    assert_close_vectors(model, vectors(undisturbed), tolerance=1e-6)


class WithBackbone(keras.Model):
    def __init__(self):
        super().__init__()
        self.backbone = make_base()
        self.head = keras.layers.Dense(3, name="head")
        self.build((None, 5, 8))

    def build(self, input_shape):
        self.head.build((None, 3))
        self.built = True

    def call(self, x):
        return self.head(self.backbone(x))


@pytest.mark.eager
@pytest.mark.parametrize("frozen", ["model", "backbone", "layers"])
def test_vectors_train_whatever_was_frozen_before(data, frozen):
    model = WithBackbone()
    for layer in {
        "model": [model],
        "backbone": [model.backbone],
        "layers": model.backbone.layers,
    }[frozen]:
        layer.trainable = False
    enable(model)
    start = numpy_weights(model)
    compile_sgd(model)
    fit(model, data)
    # The head stays as trainable as it was.
    head = [] if frozen == "model" else map(id, model.head.weights)
    expected = {*head, *map(id, vector_variables(model))}
    for weight, value in zip(model.weights, start, strict=True):
        moved = np.any(ops.convert_to_numpy(weight) != value)
        assert moved == (id(weight) in expected), weight.path


def test_gradient_accumulation(data, plan):
    data = [array[: 2 * BATCH] for array in data]
    model, expected = make_model(), make_model()
    compile_sgd(model, gradient_accumulation_steps=2)
    fit(model, data)
    compile_sgd(expected)
    fit(expected, data, batch_size=2 * BATCH)
    assert_close_vectors(model, vectors(expected))
    assert largest_difference(vectors(model)[0], vectors(make_model())[0]) > 0


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_rematerialization(data, mode, plan):
    with keras.RematScope(mode=mode):
        model = make_base()
    expected = make_model()
    enable(model)
    # Keras' "full" mode needs it on TensorFlow, adapted or not.
    run_eagerly = backend() == "tensorflow" and mode == "full"
    for each in (model, expected):
        compile_sgd(each, run_eagerly)
        fit(each, data)
    assert_close_vectors(model, vectors(expected))


@pytest.fixture
def dtype_policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.eager
@pytest.mark.parametrize("enable_first", [True, False])
@pytest.mark.parametrize(
    "dtype_policy",
    ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"],
    indirect=True,
)
def test_dtype_policies(data, dtype_policy, enable_first):
    # JAX has no attention in float16 on CPU, adapted or not.
    attention = backend() != "jax" or "bfloat16" in dtype_policy
    model = make_base(attention)
    if enable_first:
        enable(model)
    # Compiling chooses a loss scale for float16.
    model.compile(keras_vera.vera_optimizer(), "mse")
    if not enable_first:
        fit(model, data, epochs=1)
        enable(model)
    start = numpy_weights(model)
    fit(model, data, epochs=1)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    dtype = keras.backend.standardize_dtype(model(data[0]).dtype)
    assert dtype == model.compute_dtype
    assert np.all(np.isfinite(np.concatenate(vectors(model))))
    assert_only_vectors_moved(model, start)
    # As in float32, up to the rounding of activations and kernels.
    keras.config.set_dtype_policy("float32")
    exact = make_base(attention)
    base = predict(exact, data[0])
    enable(exact)
    exact.set_weights([w.astype("float32") for w in numpy_weights(model)])
    expected = predict(exact, data[0])
    outputs = predict(model, data[0]).astype("float32")
    assert largest_difference(outputs, expected) < 0.05
    assert largest_difference(outputs, base) > 0.2
