"""What PyTorch wraps around a model: data parallel and sharded modules."""

import gc
import sys
import weakref

import keras

_BACKEND = keras.backend.backend()
if _BACKEND == "torch":
    import torch

# How many sharded modules there were when a layer was in none of them.
_checked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def check_not_sharded(layer):
    """Raises for a layer of what PyTorch's FSDP has sharded.

    Keras reads its variables, not the parameters of the module that these
    replace, so that each process would train alone. Relies on PyTorch's
    mapping from modules that `fully_shard` got to their state, and on the
    mark that `FullyShardedDataParallel` leaves on parameters.
    """
    if _BACKEND != "torch" or torch.compiler.is_compiling():
        return
    vector = getattr(layer, "vera_lambda_b", None)
    if vector is not None and _is_flattened(vector.value):
        raise _sharded(layer, "FullyShardedDataParallel")
    # Not imported before somebody shards a module.
    states = sys.modules.get("torch.distributed._composable_state")
    modules = states._module_state_mapping if states is not None else ()
    if not modules or _checked.get(layer) == len(modules):
        return
    for module in list(modules):
        if isinstance(module, keras.Layer) and any(
            layer is below for below in module._flatten_layers()
        ):
            raise _sharded(layer, "fully_shard")
    _checked[layer] = len(modules)


def _is_flattened(parameter):
    return getattr(parameter, "_fsdp_flattened", False)


def _sharded(layer, name):
    return ValueError(
        f"Layer '{layer.name}' is below a module that is sharded by PyTorch's "
        f"`{name}` (FSDP), which Keras does not read: the gradients of the "
        "processes would never be summed up. Use "
        "`torch.nn.parallel.DistributedDataParallel`, which sends the few "
        "trained numbers only, or the JAX backend with "
        "`keras.distribution.ModelParallel` for a base that does not fit one "
        "device."
    )


def check_not_wrapped(model):
    """Raises for a model in a `DistributedDataParallel`.

    It reduces the gradients of those parameters that it found when it was
    made, and says nowhere in the module that it did.
    """
    if _BACKEND != "torch":
        return
    for layer in model._flatten_layers():
        check_not_sharded(layer)
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if any(map(_is_flattened, model.parameters())):
        raise _sharded(model, "FullyShardedDataParallel")
    gc.collect()
    wrapper_class = torch.nn.parallel.DistributedDataParallel
    for wrapper in gc.get_objects():
        if issubclass(type(wrapper), wrapper_class) and any(
            module is model for module in wrapper.module.modules()
        ):
            raise ValueError(
                f"`model` must be adapted before it is wrapped. Received: "
                f"model '{model.name}', in a `DistributedDataParallel` that "
                "would not reduce the gradients of the adapter. Call "
                "`enable_vera` (or `load_adapter`) first, and "
                "`DistributedDataParallel(model)` afterwards."
            )


def names_without(module, kept):
    """Returns the names that PyTorch has for all parameters but some.

    Args:
        module: A layer.
        kept: Set of the ids of parameters.
    """
    return [
        f"{path}.{name}"
        for path, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
        if id(parameter) not in kept
    ]
