"""What layers share in a backward pass of PyTorch is never out of date."""

import threading
import weakref

import numpy as np
import plans
import pytest
from helpers import backend
from helpers import spoil
from keras import ops

from keras_vera import SharedProjection
from keras_vera import layers as vera_layers

if backend() != "torch":
    pytest.skip("Other backends share by themselves.", allow_module_level=True)

import torch
from torch.utils.checkpoint import checkpoint

TOKENS, INPUTS, OUTPUTS, RANK = 12, 6, 5, 4
FROM_TOKENS = plans.Plan(folded=True, kept=True, m_from_kernel=False)
every_plan = pytest.mark.parametrize("plan", plans.ALL, ids=str)


@pytest.fixture
def layers():
    """Query, key and value."""
    return make_layers(3)


def make_layers(count):
    projection = SharedProjection(rank=RANK)
    found = []
    for seed in range(count):
        layer = vera_layers.VeRADense(OUTPUTS, projection=projection)
        layer.build((None, INPUTS))
        spoil(layer, seed=seed)
        found.append(layer)
    return found


def vectors(layers):
    return [v.value for x in layers for v in (x.vera_lambda_d, x.vera_lambda_b)]


def forward(layers, x):
    return sum(torch.sum(layer(x) ** 2) for layer in layers)


def exact(layers, x):
    """Returns the gradients of `forward`, of the formula in float64."""
    x = torch.tensor(ops.convert_to_numpy(x), dtype=torch.float64)
    found = []
    for layer in layers:
        a, b_matrix, kernel, bias, d, b = (
            v.value.detach().double()
            for v in (
                layer.vera_kernel_a,
                layer.vera_kernel_b,
                layer._kernel,
                layer.bias,
                layer.vera_lambda_d,
                layer.vera_lambda_b,
            )
        )
        d.requires_grad_()
        b.requires_grad_()
        factor = 2 / np.sqrt(INPUTS * RANK)
        y = x @ kernel + bias + factor * b * (((x @ a[:INPUTS]) * d) @ b_matrix)
        loss = torch.sum(y**2)
        found += torch.autograd.grad(loss, [d, b])
    return found


def assert_close(received, expected):
    for one, other in zip(received, expected, strict=True):
        one = one.detach().double()
        assert torch.linalg.norm(one - other) < 1e-4 * torch.linalg.norm(other)


def batches(rng, count=3):
    return torch.from_numpy(
        rng.normal(size=(count, TOKENS, INPUTS)).astype("float32")
    )


@every_plan
@pytest.mark.parametrize("how", ["copy_", "numpy"])
def test_one_buffer_for_all_batches(layers, plan, how, rng):
    array = np.zeros((TOKENS, INPUTS), "float32")
    buffer = torch.from_numpy(array)
    with plans.forced(plan):
        forward(layers, buffer)  # With gradients on, and never used.
        for batch in batches(rng):
            if how == "numpy":
                array[:] = batch.numpy()
            else:
                buffer.copy_(batch)
            received = torch.autograd.grad(
                forward(layers, buffer), vectors(layers)
            )
            assert_close(received, exact(layers, batch))


@every_plan
def test_heads_trained_in_turn(layers, plan, rng):
    buffer = torch.empty((TOKENS, INPUTS))
    with plans.forced(plan):
        for step, batch in enumerate(batches(rng, 4)):
            buffer.copy_(batch)
            losses = [forward([layer], buffer) for layer in layers]
            turn = step % len(layers)
            received = torch.autograd.grad(
                losses[turn], vectors([layers[turn]])
            )
            assert_close(received, exact([layers[turn]], batch))


def shared_products(layers, run):
    """Returns what `run` returns, and how often it computes `x A`."""
    calls = []
    structure = layers[0]._vera_layout.structure
    original = type(structure).down

    def down(self, x, a):
        calls.append(x)
        return original(self, x, a)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(structure), "down", down)
        result = run()
    return result, len(calls)


def test_twice_through_one_graph(layers, rng):
    x, other, _ = batches(rng)
    with plans.forced(FROM_TOKENS):
        loss = forward(layers, x)

        def run():
            torch.autograd.grad(loss, vectors(layers), retain_graph=True)
            forward(layers, other).backward()
            return torch.autograd.grad(loss, vectors(layers))

        received, products = shared_products(layers, run)
    assert_close(received, exact(layers, x))
    # Once for query, key and value in each pass, and not once for all.
    assert products == 3


def test_a_graph_through_changed_inputs_is_refused(layers, rng):
    x = batches(rng, 1)[0]
    with plans.forced(FROM_TOKENS):
        loss = forward(layers, x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()


def test_an_error_in_a_backward_pass_leaves_nothing_behind(layers, rng):
    x, other, _ = batches(rng)
    buffer = x.clone()

    def fail(gradient):
        raise ZeroDivisionError

    with plans.forced(FROM_TOKENS):
        hidden = buffer.clone().requires_grad_()
        hidden.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            forward(layers, hidden).backward()
        with torch.no_grad():
            hidden.copy_(other)
        received = torch.autograd.grad(forward(layers, hidden), vectors(layers))
    assert_close(received, exact(layers, other))


def test_gradients_of_gradients(layers, rng):
    x = batches(rng, 1)[0]

    def second(run):
        x.grad = None
        first = torch.autograd.grad(
            run(x.requires_grad_()), vectors(layers), create_graph=True
        )
        total = sum(torch.sum(g**2) for g in first)
        return torch.autograd.grad(total, [x])

    def detached(x):
        # The same memory, another way to x.
        return forward(layers[:1], x) + forward(layers[1:], x.detach())

    def apart(x):
        return forward(layers[:1], x) + forward(layers[1:], x.detach().clone())

    with plans.forced(FROM_TOKENS):
        assert_close(second(detached), [g.double() for g in second(apart)])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(layers, use_reentrant, rng):
    x = batches(rng, 1)[0].requires_grad_()
    with plans.forced(FROM_TOKENS):
        loss = checkpoint(
            lambda x: forward(layers, x), x, use_reentrant=use_reentrant
        )
        for v in vectors(layers):
            v.grad = None
        loss.backward()
        received = [v.grad for v in vectors(layers)]
    assert_close(received, exact(layers, x.detach()))


def test_threads(rng):
    models = [make_layers(3) for _ in range(4)]
    inputs = batches(rng, 4)
    found = {}

    def train(number):
        for _ in range(20):
            found[number] = torch.autograd.grad(
                forward(models[number], inputs[number]),
                vectors(models[number]),
            )

    with plans.forced(FROM_TOKENS):
        threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(4):
        expected = exact(models[number], inputs[number])
        assert_close(found[number], expected)


def test_nothing_is_held_after_the_pass(layers, rng):
    def step():
        x = torch.tensor(batches(rng, 1)[0].numpy())
        with plans.forced(FROM_TOKENS):
            forward(layers, x).backward()
        return weakref.ref(x.untyped_storage())

    assert step()() is None
