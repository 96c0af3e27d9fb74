"""What other layers read of an adapted layer: the adapter, or an error."""

import copy

import keras
import numpy as np
import pytest
from gradients import squares_and_gradients
from helpers import largest_difference
from helpers import predict
from helpers import spoil
from keras import ops

import keras_vera
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._fingerprint import kernel_fingerprint

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]

L = keras.layers


class _Reader(L.Layer):
    """A layer that reads the kernel of the one inside it in its call."""

    def __init__(self, inner, read, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.read = inner, read

    def build(self, shape):
        if not self.inner.built:
            self.inner.build(shape)


class OfMatrix(_Reader):
    def call(self, x):
        return ops.matmul(x, getattr(self.inner, self.read))


class OfTable(_Reader):
    def call(self, x):
        return ops.take(getattr(self.inner, self.read), x, axis=0)


class OfConvolution(_Reader):
    def call(self, x):
        return ops.conv(x, getattr(self.inner, self.read))


class OfMethod(_Reader):
    """It calls a method that the class of the inner layer adds."""

    def call(self, x):
        return getattr(self.inner, self.read)(x)


@keras.saving.register_keras_serializable(package="test_reads")
class Scaled(L.Dense):
    def scaled(self, x):
        return ops.matmul(x, 2 * self.kernel)

    def scaled_base(self, x):
        return ops.matmul(x, 2 * self._kernel)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self._kernel.shape[-1])


CASES = {
    "dense": (OfMatrix, lambda: L.Dense(4), "kernel", "_kernel"),
    "einsum": (
        OfMatrix,
        lambda: L.EinsumDense("ab,bc->ac", 4),
        "kernel",
        "_kernel",
    ),
    "embedding": (OfTable, lambda: L.Embedding(9, 4), *["embeddings"] * 2),
    "convolution": (OfConvolution, lambda: L.Conv1D(4, 1), *["kernel"] * 2),
    "method": (OfMethod, lambda: Scaled(4), "scaled", "scaled_base"),
}
every_case = pytest.mark.parametrize("case", CASES)


def make_model(case):
    """Returns a model, its reader, what reads right and wrong, and inputs."""
    reader_class, make_inner, public, private = CASES[case]
    keras.utils.set_random_seed(0)
    reader = reader_class(make_inner(), public)
    rng = np.random.default_rng(0)
    if case == "embedding":
        x = rng.integers(0, 9, (5, 3)).astype("int32")
    else:
        x = rng.normal(size=(5, 3, 8) if case == "convolution" else (5, 8))
        x = x.astype("float32")
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    model = keras.Model(inputs, reader(inputs))
    private = private if private.endswith("base") else f"_{private.strip('_')}"
    return model, reader, public, private, x


def adapt(model):
    keras_vera.enable_vera(model, rank=4, targets=".*")
    spoil(model)


@every_case
def test_reading_the_base_in_a_call_is_an_error(case):
    model, reader, public, private, x = make_model(case)
    base = predict(model, x)
    adapt(model)
    expected = predict(model, x)
    assert largest_difference(expected, base) > 0.01
    name, shown = reader.inner.name, public.replace("scaled", "kernel")

    reader.read = private
    message = f"reads `_{shown}` of layer '{name}'.*read `{shown}` instead"
    for call in (lambda: model(x), lambda: model.predict_on_batch(x)):
        with pytest.raises(ValueError, match=message):
            call()
    with keras_vera.base_model(model):
        received = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(received, base, atol=1e-6)

    keras_vera.disable_vera(model)
    np.testing.assert_allclose(predict(model, x), base, atol=1e-6)
    reader.read = public
    adapt(model)
    keras_vera.merge(model)
    reader.read = private
    np.testing.assert_allclose(predict(model, x), expected, atol=1e-5)


@every_case
def test_reading_the_adapted_kernel_trains(case):
    model, reader, public, _, x = make_model(case)
    adapt(model)
    received, gradients = squares_and_gradients(model, x, True)
    if case == "method":
        x = 2 * x
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    # `Scaled` reads its own kernel to say its shape.
    called = keras.Model(inputs, reader.inner(inputs))
    expected, wanted = squares_and_gradients(called, x, True)
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    assert len(gradients) == len(wanted) == 2
    for gradient, of_called in zip(gradients, wanted):
        assert np.all(of_called)
        np.testing.assert_allclose(gradient, of_called, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["dense", "einsum", "embedding"])
def test_quantized_kernel_is_not_read_in_a_call(case):
    model, reader, public, private, x = make_model(case)
    reader.inner.quantize("int8")
    raw = predict(model, x)
    adapt(model)
    for name in (public, private):
        reader.read = name
        message = f"reads `{name}` of .*quantized .int8.*call this one instead"
        with pytest.raises(ValueError, match=message):
            model(x)
    reader.read = public
    keras_vera.disable_vera(model)
    np.testing.assert_allclose(predict(model, x), raw, rtol=1e-6)


@every_case
def test_outside_of_calls_the_base_is_there(case, tmp_path):
    model, reader, public, _, x = make_model(case)
    kernel = stored_kernel(reader.inner)
    fingerprint = kernel_fingerprint(kernel)
    before = ops.convert_to_numpy(kernel).copy()
    adapt(model)
    layer, attribute = reader.inner, f"_{public.replace('scaled', 'kernel')}"
    assert getattr(layer, attribute) is stored_kernel(layer) is kernel
    assert layer.weights[0] is kernel
    assert kernel_fingerprint(stored_kernel(layer)) == fingerprint
    expected = predict(model, x)

    model.save_weights(tmp_path / "x.weights.h5")
    weights = layer.get_weights()
    layer.set_weights([0 * weights[0], *weights[1:]])
    assert not np.any(ops.convert_to_numpy(kernel))
    kernel.assign(before)
    spoil(model, seed=2)
    model.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_array_equal(predict(model, x), expected)

    other = copy.deepcopy(layer)
    assert getattr(other, attribute) is not kernel
    if case != "convolution":
        layer.quantize("int8", type_check=False)
        assert getattr(layer, attribute) is stored_kernel(layer)
        assert getattr(layer, attribute).dtype == "int8"


@pytest.mark.parametrize("method", ["assign", "assign_add", "assign_sub"])
def test_assigning_to_an_adapted_kernel_says_what_to_do(method):
    model = keras.Sequential([L.Embedding(5, 4), L.Dense(3), L.Dense(2)])
    model(np.zeros((2, 3), "int32"))
    keras_vera.enable_vera(model, rank=2, targets=["embedding", "all-linear"])
    for kernel in (model.layers[0].embeddings, model.layers[1].kernel):
        with pytest.raises(ValueError, match="nothing can be assigned.*Give"):
            getattr(kernel, method)(ops.zeros(kernel.shape))
    keras_vera.disable_vera(model)
    model.layers[1].kernel.assign(np.ones((4, 3)))
