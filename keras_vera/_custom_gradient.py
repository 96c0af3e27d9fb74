"""Functions with a gradient of their own, on each backend, in one file.

`keras.ops.custom_gradient` does not serve PyTorch well: it turns an error in
the forward pass into gradients that are NaN, and cannot tell which gradients
are wanted, so that the first adapted layers of a model would compute input
gradients that nobody reads.
"""

import keras

_BACKEND = keras.backend.backend()


def _compute(compute, key, tensor):
    # XLA finds by itself what was computed before.
    del key, tensor
    return compute()


def call_with_gradient(function, trained, frozen):
    """Calls a function whose gradient is computed by its own `backward`.

    Args:
        function: An object without tensors in it, with the methods
            `forward(wanted, *trained, *frozen)`, which returns the output and
            a tuple of tensors to keep for the backward pass, and
            `backward(upstream, wanted, kept, once, *trained, *frozen)`, which
            returns a gradient for each of `trained`. `wanted` has a boolean
            for each of `trained`; a gradient that is not wanted may be `None`.
            `once(compute, key, tensor)` returns `compute()`, or what another
            call with the same first tensor had for the same key and tensor.
        trained: Tuple of tensors that are differentiated.
        frozen: Tuple of tensors that count as constants.

    Returns:
        The output tensor.
    """
    return _call(function, tuple(trained), tuple(frozen))


if _BACKEND == "jax":
    import jax

    def _call(function, trained, frozen):
        # XLA removes what nobody reads.
        wanted = (True,) * len(trained)

        @jax.custom_vjp
        def call(trained, frozen):
            return function.forward(wanted, *trained, *frozen)[0]

        def forward(trained, frozen):
            output, kept = function.forward(wanted, *trained, *frozen)
            return output, (kept, trained, frozen)

        def backward(residuals, upstream):
            kept, trained, frozen = residuals
            gradients = function.backward(
                upstream, wanted, kept, _compute, *trained, *frozen
            )
            return gradients, None

        call.defvjp(forward, backward)
        return call(trained, frozen)

    def computed_again(tensor, after):
        """Returns `tensor` such that what follows is not shared with before.

        XLA would find the computation of the forward pass again and keep its
        result until the backward pass (for CPU, it does so all the same).
        `after` is what only the backward pass has.
        """
        return jax.lax.optimization_barrier((tensor, after))[0]

elif _BACKEND == "tensorflow":
    import tensorflow as tf

    def _call(function, trained, frozen):
        wanted = (True,) * len(trained)

        @tf.custom_gradient
        def call(*tensors):
            output, kept = function.forward(wanted, *tensors)

            def backward(upstream):
                gradients = function.backward(
                    upstream, wanted, kept, _compute, *tensors
                )
                return *gradients, *[None] * len(frozen)

            return output, backward

        # A variable in the arguments would be taken for one in the function.
        return call(*map(tf.convert_to_tensor, trained + frozen))

    def computed_again(tensor, after):
        with tf.control_dependencies([after]):
            return tf.identity(tensor)

else:
    import threading
    import weakref

    import torch

    class _Shared:
        """What the layers that read one tensor share in the backward pass.

        It lives with their graph, and drops its results when all have run.
        """

        def __init__(self):
            self.readers = 0
            self.results = {}

        def once(self, compute, key, tensor):
            key = key, tensor.data_ptr()
            if key not in self.results:
                self.results[key] = compute()
            return self.results[key]

        def done(self):
            self.readers -= 1
            if self.readers <= 0:
                self.results.clear()

    # The layers that share an input, such as query, key and value, follow
    # each other, so that the last input is all that has to be remembered.
    _last = threading.local()

    def _shared_by_readers_of(x):
        reference = getattr(_last, "reference", None)
        if reference is None or reference() is not x:
            _last.reference, _last.shared = weakref.ref(x), _Shared()
        return _last.shared

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, shared, count, *tensors):
            wanted = ctx.needs_input_grad[3 : 3 + count]
            output, kept = function.forward(wanted, *tensors)
            ctx.function = function
            ctx.shared = shared
            ctx.count = count
            ctx.tensors = len(tensors)
            ctx.save_for_backward(*tensors, *kept)
            return output

        @staticmethod
        def backward(ctx, upstream):
            saved = ctx.saved_tensors
            tensors, kept = saved[: ctx.tensors], saved[ctx.tensors :]
            if torch.is_grad_enabled():
                # What was kept is a constant to gradients of gradients.
                kept = ()
            wanted = ctx.needs_input_grad[3 : 3 + ctx.count]
            once = _compute if ctx.shared is None else ctx.shared.once
            gradients = ctx.function.backward(
                upstream, wanted, kept, once, *tensors
            )
            if ctx.shared is not None:
                ctx.shared.done()
            rest = [None] * (ctx.tensors - ctx.count)
            return None, None, None, *gradients, *rest

    def _call(function, trained, frozen):
        if torch._C._are_functorch_transforms_active():
            # `torch.func` takes no such functions; it differentiates the
            # forward pass by itself.
            wanted = (False,) * len(trained)
            return function.forward(wanted, *trained, *frozen)[0]
        shared = None
        # A compiled program finds by itself what was computed before.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            shared = _shared_by_readers_of(trained[0])
            shared.readers += 1
        return _Function.apply(
            function, shared, len(trained), *trained, *frozen
        )

    def computed_again(tensor, after):
        return tensor
