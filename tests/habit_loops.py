"""One step of gradient descent, as a user writes it."""

import keras
from helpers import backend
from keras import ops


def loop(model, x, y):
    """Takes one step, with gradients cut: those of some models are large."""
    {"jax": jax_loop, "torch": torch_loop, "tensorflow": tensorflow_loop}[
        backend()
    ](model, x, y)


def jax_loop(model, x, y):
    import jax

    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss_of(trainable, rest):
        out, rest = model.stateless_call(trainable, rest, x, training=True)
        return ops.mean((out - y) ** 2), rest

    gradients, rest = jax.grad(loss_of, has_aux=True)(trainable, rest)
    for variable, gradient in zip(model.trainable_variables, gradients):
        gradient = gradient / ops.maximum(1.0, ops.norm(gradient))
        variable.assign(variable.value - 0.05 * gradient)
    for variable, value in zip(model.non_trainable_variables, rest):
        variable.assign(value)


def tensorflow_loop(model, x, y):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    keras.optimizers.SGD(0.05, clipnorm=1.0).apply(gradients, variables)


def torch_loop(model, x, y):
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    optimizer.zero_grad()
    loss = torch.mean((model(x, training=True) - torch.as_tensor(y)) ** 2)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
