import gc

import keras
import numpy as np
import pytest
from helpers import adapted
from helpers import backend
from helpers import largest_difference
from helpers import numpy_weights
from helpers import predict
from helpers import spoil
from helpers import state
from keras import ops

import keras_vera

pytestmark = [pytest.mark.members_in_turn, pytest.mark.eager]


class Block(keras.layers.Layer):
    """A subclassed attention block that owns a variable of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = keras.layers.EinsumDense("btd,dnh->btnh", (None, 2, 4))
        self.value = keras.layers.EinsumDense("btd,ndh->btnh", (None, 2, 4))
        self.output_dense = keras.layers.Dense(8)

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=(8,))
        self.query.build(input_shape)
        self.value.build(input_shape)
        self.output_dense.build((*input_shape[:-1], 8))

    def call(self, x):
        weights = ops.softmax(
            ops.einsum("btnh,bsnh->bnts", self.query(x), self.query(x))
        )
        y = ops.einsum("bnts,bsnh->btnh", weights, self.value(x))
        y = ops.reshape(y, (-1, x.shape[1], 8))
        return x * self.scale + self.output_dense(y)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Block(), Block()]
        self.norm = keras.layers.BatchNormalization()
        self.head = keras.layers.Dense(3)

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x)
        x = self.norm(x, training=training)
        return self.head(ops.mean(x, axis=1))


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 5, 8), "float32"))
    return model


def sequential():
    return keras.Sequential(
        [
            keras.Input((5, 8)),
            keras.layers.Dense(6, activation="relu", name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, name="second"),
        ]
    )


def functional():
    inputs = keras.Input((5, 8))
    x = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = keras.layers.Dense(6)(keras.layers.LayerNormalization()(x))
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


MODELS = {
    "sequential": (sequential, "all-linear", ["first", "second"]),
    "functional": (functional, "attention-qv", ["query", "value"]),
    "subclassed": (subclassed, "attention-qv", None),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, targets, names = MODELS[request.param]
    return make(), targets, names


@pytest.fixture
def x(rng):
    return rng.normal(size=(6, 5, 8)).astype("float32")


def trainable_ids(model):
    return {id(v) for v in model.trainable_variables}


def vector_ids(model):
    return {
        id(v)
        for layer in adapted(model)
        for v in (layer.vera_lambda_d, layer.vera_lambda_b)
    }


def test_enable_starts_exactly_at_the_base(case, x):
    model, targets, names = case
    before = predict(model, x)
    keras_vera.enable_vera(model, rank=3, targets=targets)
    np.testing.assert_array_equal(predict(model, x), before)
    assert len(adapted(model)) == (4 if names is None else len(names))
    if names:
        assert {layer.name for layer in adapted(model)} == set(names)
    spoil(model)
    assert largest_difference(predict(model, x), before) > 1e-2


def test_exactly_the_vectors_train(case, x):
    model, targets, _ = case
    keras_vera.enable_vera(model, rank=3, targets=targets)
    assert trainable_ids(model) == vector_ids(model)
    before = numpy_weights(model)
    model.compile("adam", "mse")
    model.fit(x, np.ones((6, 3)), epochs=2, verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        moved = not np.array_equal(ops.convert_to_numpy(weight), value)
        # Normalization statistics stay as well.
        assert moved == (id(weight) in vector_ids(model)), weight.path


def test_toggling_trainable_unfreezes_nothing(case):
    model, targets, _ = case
    keras_vera.enable_vera(model, rank=3, targets=targets)
    for value in (False, True):
        model.trainable = value
    for layer in model._flatten_layers():
        layer.trainable = True
    assert trainable_ids(model) == vector_ids(model)


def test_disable_restores_exactly(case, x):
    model, targets, _ = case
    model.layers[-1].trainable = False
    before, outputs = state(model), predict(model, x)
    keras_vera.enable_vera(model, rank=3, targets=targets, dropout=0.2)
    model.compile("sgd", "mse")
    model.fit(x, np.ones((6, 3)), verbose=0)
    model.trainable = True
    keras_vera.disable_vera(model)
    model.compiled = False
    types, variables, weights = state(model)
    assert [t[:3] for t in types] == [t[:3] for t in before[0]]
    assert variables[: len(before[1])] == before[1]
    assert weights == before[2]
    np.testing.assert_array_equal(predict(model, x), outputs)


def test_merge_leaves_plain_layers(case, x):
    model, targets, _ = case
    types = [type(layer) for layer in model._flatten_layers()]
    names = [sorted(v.path for v in model.weights)]
    keras_vera.enable_vera(model, rank=3, targets=targets)
    spoil(model)
    outputs = predict(model, x)
    keras_vera.merge(model)
    assert [type(layer) for layer in model._flatten_layers()] == types
    assert [sorted(v.path for v in model.weights)] == names
    assert all(v.trainable for v in model.weights if "moving" not in v.path)
    assert largest_difference(predict(model, x), outputs) < 1e-5


def test_adapters_can_be_enabled_again(case, x):
    model, targets, _ = case
    keras_vera.enable_vera(model, rank=3, targets=targets)
    spoil(model)
    keras_vera.merge(model)
    outputs = predict(model, x)
    keras_vera.enable_vera(model, rank=5, seed=9, targets=targets)
    np.testing.assert_array_equal(predict(model, x), outputs)


def test_pair_is_shared_and_counted_once():
    model = subclassed()
    base = model.count_params()
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    layers = adapted(model)
    assert len({id(x.vera_kernel_a) for x in layers}) == 1
    assert len({id(x.vera_kernel_b) for x in layers}) == 1
    pair = 3 * (8 + 8)
    own = sum(3 + x.vera_lambda_b.shape[0] for x in layers)
    assert model.count_params() == base + pair + own


@pytest.mark.parametrize("structure", ["blocks", "blocks4"])
def test_structure_changes_the_pair_and_nothing_else(structure, x):
    dense, model = subclassed(), subclassed()
    keras_vera.enable_vera(dense, rank=32, targets="all-linear")
    base = predict(model, x)
    keras_vera.enable_vera(
        model, rank=32, targets="all-linear", structure=structure
    )
    np.testing.assert_array_equal(predict(model, x), base)
    assert [tuple(v.shape) for v in model.trainable_variables] == [
        tuple(v.shape) for v in dense.trainable_variables
    ]
    model.compile(keras_vera.vera_optimizer(), "mse")
    model.fit(x, np.ones((len(x), 3)), epochs=2, verbose=0)
    spoil(model)
    outputs = predict(model, x)
    assert largest_difference(outputs, base) > 0.01
    keras_vera.merge(model)
    assert largest_difference(predict(model, x), outputs) < 1e-5


def test_two_models_never_share_a_pair():
    first, second = sequential(), sequential()
    for model in (first, second):
        keras_vera.enable_vera(model, rank=3, targets="all-linear")
    ids = [{id(w) for w in model.weights} for model in (first, second)]
    assert ids[0].isdisjoint(ids[1])


def test_dropout_acts_in_training_only(x):
    model = sequential()
    keras_vera.enable_vera(model, rank=3, targets="first", dropout=0.5)
    spoil(model)
    np.testing.assert_array_equal(predict(model, x), predict(model, x))
    layer = adapted(model)[0]
    plain = ops.convert_to_numpy(layer(x))
    dropped = ops.convert_to_numpy(layer(x, training=True))
    again = ops.convert_to_numpy(layer(x, training=True))
    assert largest_difference(plain, dropped) > 1e-3
    assert largest_difference(again, dropped) > 1e-3
    model.compile("sgd", "mse")
    model.fit(x, np.ones((6, 3)), verbose=0)


def test_inner_model_leaves_outer_head_trainable(x):
    inner = sequential()
    inputs = keras.Input((5, 8))
    head = keras.layers.Dense(2)
    model = keras.Model(inputs, head(inner(inputs)))
    keras_vera.enable_vera(inner, rank=3, targets="first")
    expected = vector_ids(model) | {id(head.kernel), id(head.bias)}
    assert trainable_ids(model) == expected


def test_backbone_attribute_is_the_base(x):
    class WithBackbone(keras.Model):
        def __init__(self):
            super().__init__()
            self.backbone = sequential()
            self.head = keras.layers.Dense(2)

        def call(self, x):
            return self.head(self.backbone(x))

    model = WithBackbone()
    model(x)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    head = model.head
    assert {layer.name for layer in adapted(model)} == {"first", "second"}
    expected = vector_ids(model) | {id(head.kernel), id(head.bias)}
    assert trainable_ids(model) == expected


def test_frozen_model_trains_its_vectors(x):
    model = sequential()
    model.trainable = False
    keras_vera.enable_vera(model, rank=3, targets="first")
    assert trainable_ids(model) == vector_ids(model)
    keras_vera.disable_vera(model)
    assert model.trainable is False and trainable_ids(model) == set()


def test_layer_under_two_parents(x):
    shared = keras.layers.Dense(8)
    inputs = keras.Input((5, 8))
    first = keras.Sequential([keras.Input((5, 8)), shared])
    model = keras.Model(inputs, shared(first(inputs)))
    outputs = predict(model, x)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    assert adapted(model) == [shared]
    np.testing.assert_array_equal(predict(model, x), outputs)
    spoil(model)
    outputs = predict(model, x)
    keras_vera.merge(model)
    assert largest_difference(predict(model, x), outputs) < 1e-5


def test_embedding_model_of_the_same_layers_follows(x):
    # A second model over the same layers has compiled functions of its own.
    model = functional()
    features = keras.Model(model.input, model.layers[-2].output)
    before = predict(features, x)
    keras_vera.enable_vera(model, rank=3)
    spoil(model)
    assert largest_difference(predict(features, x), before) > 1e-3
    keras_vera.disable_vera(model)
    np.testing.assert_array_equal(predict(features, x), before)


def test_optimizer_without_config_starts_again(x):
    class Stubborn(keras.optimizers.SGD):
        def get_config(self):
            raise NotImplementedError

    model = sequential()
    optimizer = Stubborn(0.1)
    model.compile(optimizer, "mse")
    model.fit(x, np.ones((6, 3)), verbose=0)
    keras_vera.enable_vera(model, rank=3, targets="first")
    spoil(model)
    before = {v.path: ops.convert_to_numpy(v).copy() for v in model.weights}
    model.fit(x, np.ones((6, 3)), verbose=0)
    assert model.optimizer is optimizer
    moved = [
        v.path
        for v in model.weights
        if np.any(ops.convert_to_numpy(v) != before[v.path])
    ]
    assert moved == [v.path for v in model.trainable_variables]


def test_half_made_models_do_not_disturb():
    # What a failed constructor leaves behind is found among living models.
    half_made = object.__new__(Subclassed)
    keras_vera.enable_vera(sequential(), rank=3, targets="first")
    assert "_layers" not in vars(half_made)


class Holder(keras.Layer):
    """A plain layer, which no model knows of, with layers in a list."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]

    def build(self, input_shape):
        if not self.inner[0].built:
            self.inner[0].build(input_shape)

    def call(self, x):
        return self.inner[0](x)


def test_torch_lists_the_trained_parameters_of_plain_layers():
    if backend() != "torch":
        pytest.skip("`parameters()` is PyTorch's.")
    base = Holder(keras.layers.Dense(3))
    outer = Holder(base)
    outer(np.ones((2, 4), "float32"))
    for undo in (keras_vera.disable_vera, keras_vera.merge):
        keras_vera.enable_vera(base, rank=2, targets="all-linear")
        for layer in (base, outer):
            assert {id(p) for p in layer.parameters() if p.requires_grad} == {
                id(v.value) for v in layer.trainable_variables
            }
        undo(base)
        for layer in (base, outer):
            values = {id(v.value) for v in layer.variables}
            assert {id(p) for p in layer.parameters()} == values


def test_torch_lists_the_trained_parameters():
    if backend() != "torch":
        pytest.skip("`parameters()` is PyTorch's.")
    model = subclassed()
    keras_vera.enable_vera(model, rank=3)
    values = {id(v.value) for v in model.trainable_variables}
    assert {id(p) for p in model.parameters() if p.requires_grad} == values


def test_failure_while_changing_the_model_is_undone(monkeypatch, x):
    model = subclassed()
    before = state(model)
    count = 0

    def fail_at_third(layer, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise MemoryError
        return attach(layer, *args, **kwargs)

    from keras_vera.layers._vera_layer import VeRALayer

    attach = VeRALayer.attach_vera
    monkeypatch.setattr(VeRALayer, "attach_vera", fail_at_third)
    with pytest.raises(MemoryError):
        keras_vera.enable_vera(model, rank=3, targets="all-linear")
    gc.collect()
    assert state(model) == before


def lora_model():
    model = functional()
    model.layers[1]._query_dense.enable_lora(2)
    return model


def enabled_model():
    model = functional()
    keras_vera.enable_vera(model, rank=3)
    return model


def batched_model():
    return keras.Sequential(
        [
            keras.Input((4, 8)),
            keras.layers.EinsumDense("btd,tde->bte", (4, 5), name="batched"),
        ]
    )


def own_call_model():
    class Scaled(keras.layers.Dense):
        def call(self, inputs, training=None):
            return 2 * super().call(inputs)

    return keras.Sequential([keras.Input((8,)), Scaled(4, name="scaled")])


@pytest.mark.parametrize(
    "make, kwargs, message",
    [
        (functional, {"rank": 0}, "`rank` must be .* rank=0"),
        (functional, {"rank": 2.0}, "`rank` must be .* rank=2.0"),
        (functional, {"rank": True}, "`rank` must be .* rank=True"),
        (functional, {"seed": -1}, "`seed` must be .* seed=-1"),
        (functional, {"seed": 2**64}, "`seed` must be"),
        (functional, {"seed": "a"}, "`seed` must be .* seed='a'"),
        (functional, {"d_initial": 0}, "`d_initial` must be"),
        (functional, {"d_initial": float("nan")}, "`d_initial` must be"),
        (functional, {"dropout": 1.0}, "`dropout` must be"),
        (functional, {"plan": "fold"}, "`plan` must be .* plan='fold'"),
        (functional, {"structure": "x"}, "`structure` must be .*structure='x'"),
        (functional, {"targets": "qery"}, "'qery' .* Did you mean 'query'"),
        (functional, {"targets": []}, "`targets` must be a role"),
        (functional, {"targets": 3}, "`targets` must be a role"),
        (functional, {"targets": "("}, "neither a layer's name nor"),
        (functional, {"targets": lambda x: False}, "matches no layer"),
        (functional, {"targets": ["query", "nokey"]}, "'nokey' matches no"),
        (
            functional,
            {"targets": "layer_normalization.*"},
            "layers of type LayerNormalization",
        ),
        (sequential, {}, "the role 'attention-qv' matches no .* 'first'"),
        (enabled_model, {}, "adapted with VeRA already. Call .*merge"),
        (lora_model, {}, "has LoRA enabled, in the layers \\['query'\\]"),
        (batched_model, {"targets": "batched"}, "'btd,tde->bte': .*\\['t'\\]"),
        (own_call_model, {"targets": "scaled"}, "layers of type Scaled"),
    ],
)
def test_refusals_leave_the_model_as_it_was(make, kwargs, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        keras_vera.enable_vera(model, **kwargs)
    assert state(model) == before


def test_unbuilt_and_foreign_models_are_refused():
    with pytest.raises(ValueError, match="must be built"):
        keras_vera.enable_vera(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="must be a Keras model"):
        keras_vera.enable_vera("model")

    class Lazy(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras.layers.Dense(3)
            self.unused = keras.layers.Dense(3, name="unused")

        def call(self, x):
            return self.used(x)

    model = Lazy()
    model(np.zeros((1, 2)))
    model.built = True
    before = state(model)
    with pytest.raises(ValueError, match="matches are not built: .*dense_1"):
        keras_vera.enable_vera(model, targets="unused")
    assert state(model) == before
    # A role takes what is there, and says what it leaves out.
    with pytest.warns(UserWarning, match="1 layers .* are not built .*dense_1"):
        keras_vera.enable_vera(model, targets="all-linear")
    assert adapted(model) == [model.used]


@pytest.mark.parametrize(
    "function", ["disable_vera", "merge", "summary", "base_model"]
)
def test_unadapted_model_is_refused(function):
    call = getattr(keras_vera, function)
    with pytest.raises(ValueError, match="Call `keras_vera.enable_vera"):
        with call(functional()):
            pass


@pytest.mark.parametrize("function", ["disable_vera", "merge"])
@pytest.mark.parametrize(
    "part",
    [
        lambda model: model.layers[0],
        lambda model: keras.Model(model.inputs, model.layers[2].output),
    ],
    ids=["layer", "graph"],
)
def test_a_part_of_what_is_adapted_is_refused(part, function):
    model = sequential()
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    spoil(model)
    part = part(model)
    before = state(model)
    with pytest.raises(ValueError, match="must hold the whole .*a part of it"):
        getattr(keras_vera, function)(part)
    assert state(model) == before


def called_anew(model):
    """Returns a model with all layers of another one but its input."""
    inputs = keras.Input((5, 8))
    y = inputs
    for layer in model.layers:
        y = layer(y)
    return keras.Model(inputs, y)


@pytest.mark.parametrize(
    "around",
    [lambda model: keras.Model(model.inputs, model.outputs), called_anew],
    ids=["graph", "anew"],
)
def test_layers_of_a_base_stand_for_it(around, x, tmp_path):
    path = tmp_path / "a.vera.safetensors"
    model = sequential()
    base = predict(model, x)
    keras_vera.enable_vera(model, rank=3, targets="all-linear")
    spoil(model)
    outer = around(model)
    adapted_outputs = predict(outer, x)
    keras_vera.save_adapter(outer, path)
    keras_vera.disable_vera(outer)
    assert adapted(model) == []
    np.testing.assert_array_equal(predict(model, x), base)
    keras_vera.load_adapter(outer, path)
    np.testing.assert_array_equal(predict(outer, x), adapted_outputs)
    keras_vera.merge(outer)
    assert adapted(model) == []
    assert largest_difference(predict(model, x), adapted_outputs) < 1e-5


def test_lora_on_an_adapted_layer_is_refused():
    model = enabled_model()
    before = state(model)
    with pytest.raises(ValueError, match="cannot take LoRA"):
        adapted(model)[0].enable_lora(2)
    assert state(model) == before


def test_weights_of_a_layer_are_in_the_order_of_the_plain_one(x):
    model, plain = sequential(), sequential()
    keras_vera.enable_vera(model, rank=3, targets="first")
    layer, same = model.layers[0], plain.layers[0]
    for listed in (layer.weights, layer.variables):
        assert listed[0] is layer._kernel and listed[1] is layer.bias
        assert [v.name for v in listed[2:]] == [
            "vera_lambda_d",
            "vera_lambda_b",
            "vera_kernel_a",
            "vera_kernel_b",
        ]
    same.set_weights(layer.get_weights()[:2])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(same(x)), ops.convert_to_numpy(layer(x))
    )
    layer.set_weights(layer.get_weights())
    assert trainable_ids(layer) == vector_ids(model)


def test_kernel_shows_the_adapter(x):
    model = sequential()
    keras_vera.enable_vera(model, rank=3, targets="first")
    spoil(model)
    layer = adapted(model)[0]
    expected = np.maximum(
        x @ ops.convert_to_numpy(layer.kernel)
        + ops.convert_to_numpy(layer.bias),
        0,
    )
    outputs = ops.convert_to_numpy(layer(x))
    assert largest_difference(outputs, expected) < 1e-5


class SameKernel(keras.layers.Dense):
    """Has the kernel of another layer, which is none of its parts."""

    def __init__(self, units, other, **kwargs):
        super().__init__(units, **kwargs)
        self.other = [other]

    def build(self, input_shape):
        self._kernel = self.other[0]._kernel
        self.bias = self.add_weight(shape=(self.units,), name="bias")
        self.built = True


@pytest.mark.parametrize("targets", ["all-linear", ["one"], ["other"]])
def test_a_kernel_of_two_layers_is_refused(targets, rng):
    """`merge` would put the adapter of one layer into both."""
    one = keras.layers.Dense(6, name="one")
    model = keras.Sequential(
        [keras.Input((6,)), one, SameKernel(6, one, name="other")]
    )
    inputs = rng.normal(size=(3, 6)).astype("float32")
    expected = predict(model, inputs)
    with pytest.raises(ValueError, match="shares its kernel with"):
        keras_vera.enable_vera(model, rank=3, targets=targets)
    assert not adapted(model)
    assert len(model.trainable_variables) == 3
    np.testing.assert_array_equal(predict(model, inputs), expected)


@pytest.mark.skipif(backend() == "torch", reason="Keras has no sparse tensors")
@pytest.mark.parametrize("plan", ["folded", "additive"])
def test_sparse_inputs(plan, rng):
    dense = np.eye(8, 6, dtype="float32") * rng.normal(size=(8, 6))
    dense = dense.astype("float32")
    targets = rng.normal(size=(8, 3)).astype("float32")
    if backend() == "tensorflow":
        import tensorflow as tf

        sparse = tf.sparse.from_dense(dense)
    else:
        from jax.experimental.sparse import BCOO

        sparse = BCOO.fromdense(dense)
    found = []
    for inputs in (dense, sparse):
        keras.utils.set_random_seed(0)
        x = keras.Input((6,), sparse=inputs is sparse)
        y = keras.layers.Dense(3)(keras.layers.Dense(8, "tanh")(x))
        model = keras.Model(x, y)
        keras_vera.enable_vera(model, rank=3, targets="all-linear", plan=plan)
        spoil(model)
        model.compile("sgd", "mse")
        model.fit(inputs, targets, batch_size=8, shuffle=False, verbose=0)
        found.append(
            [*numpy_weights(model), ops.convert_to_numpy(model(inputs))]
        )
    for one, other in zip(*found, strict=True):
        assert largest_difference(one, other) < 1e-5


class LowRank(keras.layers.Dense):
    """A layer that has factors in the place of a kernel."""

    def build(self, input_shape):
        self.u = self.add_weight(shape=(input_shape[-1], 2), name="u")
        self.v = self.add_weight(shape=(2, self.units), name="v")
        self.built = True

    def call(self, x):
        return (x @ self.u) @ self.v


def test_layers_without_a_kernel_do_not_matter():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="one"), LowRank(4)]
    )
    keras_vera.enable_vera(model, rank=4, targets="one")
    assert len(adapted(model)) == 1


def stack(kind, kept):
    """Returns a built layer or model that calls the layers that it keeps."""

    class Stack(kind):
        def __init__(self):
            super().__init__()
            self.kept = kept

        def call(self, x):
            for layer in sorted(self._layers, key=lambda layer: layer.name):
                x = layer(x)
            return x

    layer = Stack()
    layer(np.zeros((2, 8), "float32"))
    return layer


class Dense_1(keras.layers.Dense):  # noqa: N801 - as Keras calls a second one.
    pass


def denses(count, of=keras.layers.Dense):
    return [of(8) for _ in range(count)]


@pytest.mark.parametrize("kind", [keras.layers.Layer, keras.Model])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: set(denses(2)), r"weights in a `set`: \['dense"),
        (lambda: {"a": [*denses(1), set(denses(1))]}, "weights in a `set`"),
        (lambda: {tuple(denses(2))}, "weights in a `set`"),
        (lambda: {keras.Sequential(denses(1))}, r"`set`: \['sequential"),
        (
            lambda: [*denses(2), *denses(1, Dense_1)],
            "one path in files, '.*kept/dense_1': .* Dense and Dense_1",
        ),
    ],
)
def test_layers_that_files_cannot_tell_apart_are_refused(
    make, message, kind, tmp_path, rng
):
    path = tmp_path / "a.vera.safetensors"
    model = stack(kind, make())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        keras_vera.enable_vera(model, targets="all-linear")
    assert state(model) == before
    # Outside a base, where they train.
    base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    keras_vera.enable_vera(base, rank=2, targets="all-linear")
    keras_vera.save_adapter(base, path)
    outer = keras.Sequential([keras.Input((8,)), base, model])
    before = state(outer)
    for call in (keras_vera.save_adapter, keras_vera.load_adapter):
        with pytest.raises(ValueError, match=message):
            call(outer, path)
    assert state(outer) == before


@pytest.mark.parametrize("kind", [keras.layers.Layer, keras.Model])
def test_sets_of_what_files_can_tell_apart_are_taken(kind):
    listed = denses(2)
    kept = [{"z": listed}, set(listed), {keras.layers.Activation("relu")}]
    model = stack(kind, kept)
    keras_vera.enable_vera(model, rank=2, targets="all-linear")
    assert adapted(model) == listed
