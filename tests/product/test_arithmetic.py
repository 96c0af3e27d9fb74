"""What an adapted layer costs, and its gradients beyond the first.

Outputs and first gradients are tested in `test_layers.py`.
"""

import dataclasses
import re

import keras
import numpy as np
import plans
import pytest
from gradients import to_float64
from helpers import backend
from keras import ops

from keras_vera import SharedProjection
from keras_vera.layers import VeRADense
from keras_vera.layers import VeRAEinsumDense
from keras_vera.layers._mixed_batch import mixed_batch
from keras_vera.product.plan import Plan
from keras_vera.product.structure import Blocks
from keras_vera.product.structure import Dense

pytestmark = pytest.mark.members_in_turn

BACKEND = backend()
# Sizes that no two tensors of a layer have by accident.
T, M, N, RANK = 96, 40, 56, 72
EVERY_PLAN = pytest.mark.parametrize("plan", plans.ALL, ids=str)
STRUCTURES = pytest.mark.parametrize("structure", ["dense", "blocks4"])


def make_layer(structure="dense", m=M, n=N, rank=RANK, projection=None):
    if projection is None:
        projection = SharedProjection(rank=rank, structure=structure)
    layer = VeRADense(n, projection=projection, use_bias=False)
    layer.build((None, m))
    rng = np.random.default_rng(1)
    for v in (layer.vera_lambda_d, layer.vera_lambda_b):
        v.assign(rng.normal(0, 0.5, v.shape).astype("float32"))
    return layer


def values(variables):
    return [ops.convert_to_tensor(v.value) for v in variables]


def loss_of(layers, vectors, x):
    """Returns a sum over what the layers make of one x, on JAX."""
    loss = 0
    for layer, own in zip(layers, vectors):
        frozen = values(layer.non_trainable_variables)
        y, _ = layer.stateless_call(own, frozen, x)
        loss = loss + ops.sum(ops.square(y))
    return loss


def flops(layers, x, with_input_gradient=True):
    """Counts the flops of the matrix products of one training step."""
    if BACKEND == "torch":
        from torch.utils.flop_counter import FlopCounterMode

        x = ops.convert_to_tensor(x)
        x.requires_grad_(with_input_gradient)
        with FlopCounterMode(display=False) as counter:
            sum(ops.sum(ops.square(layer(x))) for layer in layers).backward()
        return counter.get_total_flops()
    import jax

    vectors = [values(x.trainable_variables) for x in layers]
    argnums = (0, 1) if with_input_gradient else 0
    gradient = jax.grad(lambda v, x: loss_of(layers, v, x), argnums)
    compiled = jax.jit(gradient).lower(vectors, x).compile()
    return count_dots(compiled.as_text())


def count_dots(text):
    """Counts the products in the text of a compiled XLA program.

    XLA's own analysis counts element by element as well, which at these sizes
    is not small beside the products.
    """
    shapes = dict(
        re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", text),
    )
    total = 0
    found = re.findall(
        r"= \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?(%[\w.\-]+), .*?"
        r"lhs_contracting_dims={([\d,]*)}",
        text,
    )
    for output, left, contracted in found:
        left = [int(x) for x in shapes[left].split(",")]
        size = np.prod([int(x) for x in output.split(",") if x])
        total += (
            2 * size * np.prod([left[int(i)] for i in contracted.split(",")])
        )
    assert total, "XLA's text has no products: the count is broken."
    return int(total)


def expected_flops(plan, structure, x_gradient):
    width, depth = structure.width, structure.depth
    fold = 2 * M * N * depth
    through = 2 * T * width * (M + N)
    base = 2 * T * M * N
    once = fold if plan.folded else through
    total = base + once  # Forward.
    if x_gradient:
        again = 0 if plan.kept else once
        total += base + again
    if plan.m_from_kernel:
        total += base + fold
    else:
        total += through
    return total


counted = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="TensorFlow counts no flops of a step."
)


@counted
@EVERY_PLAN
@STRUCTURES
@pytest.mark.parametrize("x_gradient", [True, False])
def test_flops_are_those_of_the_plan(plan, structure, x_gradient, rng):
    layer = make_layer(structure)
    blocks = layer.projection.blocks
    shape = Dense(M, N, RANK) if blocks == 1 else Blocks(M, N, RANK, blocks)
    x = rng.normal(size=(T, M)).astype("float32")
    with plans.forced(plan):
        received = flops([layer], x, x_gradient)
    expected = expected_flops(plan, shape, x_gradient)
    # The sums of the vectors' gradients, 2rn each, are not in the formula.
    most = expected + 4 * shape.width * N
    if BACKEND == "jax":
        # XLA for CPU, which ignores that some things are to be computed
        # again, may keep what is small: the folded kernel, and x A.
        kept = dataclasses.replace(plan, kept=plan.folded)
        expected = expected_flops(kept, shape, x_gradient)
        if not (plan.folded or plan.m_from_kernel):
            expected -= 2 * T * M * shape.width
    assert expected <= received <= most


@counted
@STRUCTURES
def test_what_x_gives_is_computed_once(structure, rng):
    # Query, key and value: x A is the same for all of them.
    projection = SharedProjection(rank=RANK, structure=structure)
    layers = [make_layer(n=N, projection=projection) for _ in range(3)]
    x = rng.normal(size=(T, M)).astype("float32")
    with plans.forced(Plan(True, True, m_from_kernel=False)):
        one, three = flops(layers[:1], x), flops(layers, x)
    width = layers[0].vera_kernel_a.shape[1]
    assert three == 3 * one - 2 * (2 * T * M * width)


def gradients(layers, x, upstream):
    """Returns the gradients of d and b of layers that read the same x."""
    vectors = [values(layer.trainable_variables) for layer in layers]
    if BACKEND == "jax":
        import jax

        def loss(vectors):
            total = 0
            for layer, own, g in zip(layers, vectors, upstream):
                frozen = values(layer.non_trainable_variables)
                y, _ = layer.stateless_call(own, frozen, x)
                total = total + ops.sum(y * g)
            return total

        found = jax.jit(jax.grad(loss))(vectors)
    elif BACKEND == "torch":
        import torch

        x = ops.convert_to_tensor(x)
        total = sum(
            ops.sum(layer(x) * ops.convert_to_tensor(g))
            for layer, g in zip(layers, upstream)
        )
        flat = [v for own in vectors for v in own]
        found = torch.autograd.grad(total, flat, retain_graph=True)
        # A second time through the same graph.
        again = torch.autograd.grad(total, flat)
        for first, second in zip(found, again):
            np.testing.assert_array_equal(first, second)
        found = [found[i : i + 2] for i in range(0, len(found), 2)]
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            total = sum(
                tf.reduce_sum(layer(x) * g)
                for layer, g in zip(layers, upstream)
            )
        found = tape.gradient(
            total,
            [[v.value for v in x.trainable_variables] for x in layers],
        )
    return [[to_float64(v) for v in own] for own in found]


@EVERY_PLAN
def test_layers_of_one_input_do_not_disturb_each_other(plan, rng):
    # What is shared depends on A, on the rank, and on how x is read.
    one, other = SharedProjection(rank=3), SharedProjection(rank=3, seed=1)
    x = rng.normal(size=(2, 5, 4, 4)).astype("float32")

    def einsum(equation, projection):
        layer = VeRAEinsumDense(equation, (5, 4, 6), projection=projection)
        layer.build(x.shape)
        return layer

    layers = [
        einsum("abcd,de->abce", one),
        einsum("abcd,ce->abde", one),
        einsum("abcd,de->abce", other),
        einsum("abcd,de->abce", SharedProjection(rank=3, structure="blocks2")),
        einsum("abcd,de->abce", one),
    ]
    for i, layer in enumerate(layers):
        for v in layer.trainable_variables:
            values = np.random.default_rng(i).normal(size=v.shape)
            v.assign(values.astype("float32"))
    upstream = rng.normal(size=(len(layers), 2, 5, 4, 6)).astype("float32")
    with plans.forced(plan):
        together = gradients(layers, x, upstream)
        for i, layer in enumerate(layers):
            # A copy, which is no input that was seen before.
            (alone,) = gradients([layer], x.copy(), upstream[i : i + 1])
            for ours, expected in zip(together[i], alone):
                np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def kept_tensors(layer, x):
    """Returns what PyTorch keeps for the backward pass."""
    import torch

    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return kept


def kept_shapes(layer, x):
    """Returns the shapes of what waits for the backward pass."""
    if BACKEND == "torch":
        x = ops.convert_to_tensor(x).requires_grad_()
        return [tuple(tensor.shape) for tensor in kept_tensors(layer, x)]
    import jax

    _, backward = jax.vjp(
        lambda v, x: layer.stateless_call(
            v, values(layer.non_trainable_variables), x
        )[0],
        values(layer.trainable_variables),
        ops.convert_to_tensor(x),
    )
    return [leaf.shape for leaf in jax.tree.leaves(backward)]


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="TensorFlow does not say what it keeps."
)
@EVERY_PLAN
@STRUCTURES
def test_only_x_is_kept_for_the_backward_pass(plan, structure, rng):
    layer = make_layer(structure)
    x = rng.normal(size=(T, M)).astype("float32")
    with plans.forced(plan):
        shapes = kept_shapes(layer, x)
    weights = {tuple(v.shape) for v in layer.weights}
    # Those have fixed sizes; of what grows with the tokens, x alone.
    assert set(shapes) <= weights | {(T, M)}
    assert shapes.count((T, M)) == 1
    # The folded kernel looks like the kernel.
    own = sum(tuple(v.shape) == (M, N) for v in layer.weights)
    if not plan.folded:
        assert shapes.count((M, N)) <= own
    else:
        assert shapes.count((M, N)) == own + plan.kept


@pytest.mark.skipif(BACKEND != "torch", reason="Only PyTorch can tell.")
def test_nothing_is_kept_for_a_gradient_that_nobody_wants(rng):
    # As in the first block of a model, whose input is frozen.
    layer = make_layer()
    x = ops.convert_to_tensor(rng.normal(size=(T, M)).astype("float32"))
    own = {v.value.data_ptr() for v in layer.weights} | {x.data_ptr()}
    with plans.forced(Plan(folded=True, kept=True, m_from_kernel=True)):
        kept = [tensor.data_ptr() for tensor in kept_tensors(layer, x)]
    assert kept and set(kept) <= own


@pytest.mark.skipif(BACKEND != "torch", reason="Only PyTorch can tell.")
@STRUCTURES
@pytest.mark.parametrize("tokens", [4, T])
def test_no_more_is_kept_than_for_lora(tokens, structure, rng):
    lora = keras.layers.Dense(N, use_bias=False)
    lora.build((None, M))
    lora.enable_lora(8)
    x = ops.convert_to_tensor(rng.normal(size=(tokens, M)).astype("float32"))
    x.requires_grad_()

    def kept(layer):
        own = {v.value.data_ptr() for v in layer.weights}
        tensors = kept_tensors(layer, x)
        return sum(t.numel() for t in tensors if t.data_ptr() not in own)

    # x, and a folded kernel: always in LoRA, here where it is not larger.
    assert kept(make_layer(structure)) == x.numel() + (tokens >= N) * M * N
    assert kept(lora) >= x.numel() + M * N


def hessian(layer, x):
    """Returns all second derivatives of `sum(sin(layer(x)))`, of d, b, x."""
    sizes = [*(v.shape[0] for v in layer.trainable_variables), x.size]
    if BACKEND == "jax":
        import jax

        def loss(d, b, x):
            frozen = values(layer.non_trainable_variables)
            y, _ = layer.stateless_call([d, b], frozen, x)
            return ops.sum(ops.sin(y))

        arguments = *values(layer.trainable_variables), x
        all_of_them = (0, 1, 2)
        gradient = jax.grad(loss, all_of_them)
        blocks = jax.jit(jax.jacrev(gradient, all_of_them))(*arguments)
        rows = [
            [np.reshape(block, (size, -1)) for block in row]
            for size, row in zip(sizes, blocks)
        ]
        return np.block(rows)
    if BACKEND == "torch":
        import torch

        x = torch.tensor(x, requires_grad=True)
        arguments = *values(layer.trainable_variables), x
        first = torch.autograd.grad(
            ops.sum(ops.sin(layer(x))), arguments, create_graph=True
        )
        rows = []
        for entry in torch.cat([g.reshape(-1) for g in first]):
            row = torch.autograd.grad(entry, arguments, retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in row]).numpy())
        return np.stack(rows)
    import tensorflow as tf

    x = tf.constant(x)
    arguments = [*(v.value for v in layer.trainable_variables), x]
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = tf.reduce_sum(tf.sin(layer(x)))
        first = inner.gradient(loss, arguments)
        flat = tf.concat([tf.reshape(g, [-1]) for g in first], 0)
    columns = [
        outer.jacobian(flat, v, experimental_use_pfor=False) for v in arguments
    ]
    return np.concatenate(
        [c.numpy().reshape(sum(sizes), -1) for c in columns], axis=1
    )


@EVERY_PLAN
@pytest.mark.parametrize("structure", ["dense", "blocks2"])
def test_gradients_of_gradients(plan, structure, rng):
    # No size is a multiple of the blocks.
    tokens, m, n, rank = 3, 5, 3, 3
    layer = make_layer(structure, m=m, n=n, rank=rank)
    x = rng.normal(size=(tokens, m)).astype("float32")
    blocks = layer.projection.blocks
    w, a, b_matrix = map(
        to_float64, (layer._kernel, layer.vera_kernel_a, layer.vera_kernel_b)
    )
    a, b_matrix = plans.full_pair(a, b_matrix, m, n, rank, blocks)
    a *= np.sqrt(2 * blocks / m) * np.sqrt(2 * blocks / rank)

    def gradient(point):
        d, b, x = np.split(point, [rank, rank + n])
        x = x.reshape(tokens, m)
        kernel = w + (a * d) @ b_matrix * b
        g = np.cos(x @ kernel)
        product = np.einsum("ti,tj,ik,kj->kj", x, g, a, b_matrix)
        return np.concatenate(
            [product @ b, d @ product, (g @ kernel.T).ravel()]
        )

    vectors = [to_float64(v) for v in layer.trainable_variables]
    point = np.concatenate([*vectors, x.ravel()])
    step = 1e-6
    expected = [
        (gradient(point + step * e) - gradient(point - step * e)) / (2 * step)
        for e in np.eye(len(point))
    ]
    expected = np.stack(expected, axis=1)
    with plans.forced(plan):
        received = hessian(layer, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.skipif(BACKEND != "torch", reason="For PyTorch's compiler.")
@EVERY_PLAN
def test_torch_compile(plan, rng):
    import torch

    layer = make_layer()
    x = ops.convert_to_tensor(rng.normal(size=(T, M)).astype("float32"))
    vectors = values(layer.trainable_variables)

    def step(x):
        return torch.autograd.grad(ops.sum(ops.sin(layer(x))), vectors)

    with plans.forced(plan):
        # Without code generation, which takes a minute each; and in one graph,
        # or nothing would be compiled.
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        loss = ops.sum(ops.sin(compiled(x)))
        received = torch.autograd.grad(loss, vectors)
        for ours, expected in zip(received, step(x)):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


@pytest.mark.skipif(BACKEND != "torch", reason="For PyTorch's compiler.")
def test_torch_compile_in_mixed_batches(rng):
    import torch

    torch.compiler.reset()  # One function may be compiled eight times only.
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = ops.convert_to_tensor(rng.normal(size=(3, M)).astype("float32"))
    alone = layer(x)
    np.testing.assert_allclose(compiled(x).detach(), alone.detach(), atol=1e-5)
    for d in (1.0, 2.0):
        rows = ops.full((3, RANK), d), ops.ones((3, N))
        with mixed_batch({layer: rows}):
            expected = layer(x)
            received = compiled(x)
        np.testing.assert_allclose(received, expected, atol=1e-5)
        assert (expected - alone).abs().max() > 0.1
    np.testing.assert_allclose(compiled(x).detach(), alone.detach(), atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="For `tf.function`.")
@STRUCTURES
def test_tf_function_with_unknown_sizes(structure, plan, rng):
    import tensorflow as tf

    layer = make_layer(structure)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(layer(x)))
        return tape.gradient(
            loss, [x, *(v.value for v in layer.trainable_variables)]
        )

    signature = [tf.TensorSpec((None, None, M))]
    compiled = tf.function(step, input_signature=signature)
    for batch in (3, 0, 1):
        x = tf.constant(rng.normal(size=(batch, 2, M)).astype("float32"))
        for received, expected in zip(compiled(x), step(x), strict=True):
            np.testing.assert_allclose(received, expected, rtol=0, atol=1e-4)
    assert compiled.experimental_get_tracing_count() == 1


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="`tf.vectorized_map` is no such transform."
)
@STRUCTURES
def test_gradients_of_each_example(structure, plan, rng):
    if BACKEND == "torch":
        from torch.func import grad
        from torch.func import vmap
    else:
        from jax import grad
        from jax import vmap

    layer = make_layer(structure)
    x = rng.normal(size=(5, M)).astype("float32")
    upstream = rng.normal(size=(5, N)).astype("float32")

    def loss(vectors, x, g):
        frozen = values(layer.non_trainable_variables)
        y, _ = layer.stateless_call(vectors, frozen, x[None])
        return ops.sum(y[0] * g)

    found = vmap(grad(loss), (None, 0, 0))(
        values(layer.trainable_variables),
        *map(ops.convert_to_tensor, (x, upstream)),
    )
    (together,) = gradients([layer], x, upstream[None])
    for ours, expected in zip(found, together):
        assert ours.shape == (5, *expected.shape)
        np.testing.assert_allclose(
            to_float64(ours).sum(0), expected, rtol=0, atol=1e-4
        )


@EVERY_PLAN
def test_a_layer_that_is_used_twice(plan, rng):
    layer = make_layer(m=4, n=4, rank=3)
    x = rng.normal(size=(5, 4)).astype("float32")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(layer(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    d, b = (to_float64(v) for v in layer.trainable_variables)
    with plans.forced(plan):
        model.fit(x, np.zeros((5, 4)), batch_size=5, epochs=1, verbose=0)
    # By hand: y = x K K, loss = mean(y^2).
    w, a, b_matrix = map(
        to_float64, (layer._kernel, layer.vera_kernel_a, layer.vera_kernel_b)
    )
    a *= np.sqrt(2 / 4) * np.sqrt(2 / 3)
    kernel = w + (a * d) @ b_matrix * b
    h = x @ kernel
    g = 2 * (h @ kernel) / 20
    grad_kernel = h.T @ g + x.T @ (g @ kernel.T)
    product = np.einsum("ij,ik,kj->kj", grad_kernel, a, b_matrix)
    expected = d - 0.1 * (product @ b), b - 0.1 * (d @ product)
    for v, value in zip(layer.trainable_variables, expected):
        np.testing.assert_allclose(to_float64(v), value, rtol=0, atol=1e-5)
