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


def sums_in_bfloat16():
    """Says whether a product of bfloat16 may be summed in bfloat16."""
    if _BACKEND != "tensorflow":
        return False
    return not tf.config.list_physical_devices("GPU")


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
            call with the same first tensor had for the same key and tensor in
            this backward pass.
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
    import weakref

    import tensorflow as tf

    # Not public. What is relied on, in TensorFlow 2.21, is its dict of
    # entries, and that `tf.custom_gradient` makes an operation in a graph of
    # its results and its arguments.
    from tensorflow.python.framework.ops import gradient_registry

    def _call(function, trained, frozen):
        wanted = (True,) * len(trained)

        def gradients(upstream, kept, tensors):
            found = function.backward(
                upstream, wanted, kept, _compute, *tensors
            )
            return *found, *[None] * (len(tensors) - len(wanted))

        @tf.custom_gradient
        def call(*tensors):
            output, kept = function.forward(wanted, *tensors)

            def backward(upstream, *of_kept):
                return gradients(upstream, kept, tensors)

            return (output, *kept), backward

        # A variable in the arguments would be taken for one in the function.
        tensors = [tf.convert_to_tensor(x) for x in (*trained, *frozen)]
        output, *kept = call(*tensors)
        if not tf.executing_eagerly():
            _free_with_graph(output, gradients, len(kept))
        return output

    def _free_with_graph(output, gradients, kept):
        """Replaces what TensorFlow has registered as a gradient in a graph.

        It does so for ever, under a new name in each trace, and holds all
        tensors of the graph, and with them the variables of the model. What
        takes its place finds them in the operation, and goes with the graph.
        """
        name = output.op.get_attr("_gradient_op_type").decode()
        operation, graph = output.op.name, weakref.ref(output.graph)
        registered = gradient_registry._registry
        del registered[name]

        @tf.RegisterGradient(name)
        def gradient(op, upstream, *of_others):
            if op is None:
                # A SavedModel is written.
                op = graph().get_operation_by_name(operation)
            # Its inputs: the output, what is kept, and the arguments.
            first = 1 + kept
            tensors = op.inputs[first:]
            found = gradients(upstream, op.inputs[1:first], tensors)
            return *[None] * first, *found

        weakref.finalize(
            output.graph, registered.pop, name, None
        ).atexit = False

    def computed_again(tensor, after):
        with tf.control_dependencies([after]):
            return tf.identity(tensor)

else:
    import threading

    import torch

    class _LastInput:
        """What was computed in one backward pass from the last layer input.

        The layers that share an input, such as query, key and value, follow
        each other in the backward pass as well. It holds the tensors, so that
        none can take the place of one that is gone in memory, and lets go of
        them when the pass ends.
        """

        def __init__(self, task):
            self.task = task
            self.forget()

        def forget(self):
            self.id, self.x, self.results = None, None, {}

        def once(self, compute, key, x, tensor):
            if self.id != _id_of(x):
                self.id, self.x, self.results = _id_of(x), x, {}
            key = key, _id_of(tensor)
            if key not in self.results:
                self.results[key] = compute(), tensor
            return self.results[key][0]

    _thread = threading.local()

    def _once(compute, key, x, tensor):
        """Shares within one backward pass, and never outside it.

        A pass uses the saved tensors as they are when it runs, and PyTorch
        raises where one was changed since the forward pass.
        """
        # A compiled program finds by itself what was computed before;
        # gradients of gradients go to each layer's own x.
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or not (_lies_in_memory(x) and _lies_in_memory(tensor))
        ):
            return compute()
        task = torch._C._current_graph_task_id()
        if task == -1:
            return compute()
        last = getattr(_thread, "last", None)
        if last is None or last.task != task:
            last = _thread.last = _LastInput(task)
            torch.autograd.Variable._execution_engine.queue_callback(
                last.forget
            )
        return last.once(compute, key, x, tensor)

    def _lies_in_memory(tensor):
        # Not so for those of a program that is being made.
        return (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.data_ptr() != 0
        )

    def _id_of(tensor):
        return (
            tensor.data_ptr(),
            tensor._version,
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
        )

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, count, *tensors):
            wanted = ctx.needs_input_grad[2 : 2 + count]
            output, kept = function.forward(wanted, *tensors)
            ctx.function = function
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
            wanted = ctx.needs_input_grad[2 : 2 + ctx.count]

            def once(compute, key, tensor):
                return _once(compute, key, tensors[0], tensor)

            gradients = ctx.function.backward(
                upstream, wanted, kept, once, *tensors
            )
            rest = [None] * (ctx.tensors - ctx.count)
            return None, None, *gradients, *rest

    def _call(function, trained, frozen):
        if torch._C._are_functorch_transforms_active():
            # `torch.func` takes no such functions; it differentiates the
            # forward pass by itself.
            wanted = (False,) * len(trained)
            return function.forward(wanted, *trained, *frozen)[0]
        return _Function.apply(function, len(trained), *trained, *frozen)

    def computed_again(tensor, after):
        return tensor
