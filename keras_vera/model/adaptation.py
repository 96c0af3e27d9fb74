"""What `enable_vera` does to a model, what it checks, and how to undo it."""

import sys
import warnings

import keras

from keras_vera import _keras
from keras_vera.layers import _legacy_files  # noqa: F401 - serves such files.
from keras_vera.layers._base_layer import stored_kernel
from keras_vera.layers._in_place import adapt_layer
from keras_vera.layers._in_place import is_adapted
from keras_vera.layers._in_place import restore_layer
from keras_vera.layers._kinds import family_of
from keras_vera.layers._kinds import kind_of
from keras_vera.layers._kinds import reason_against
from keras_vera.model.frozen import FrozenBase
from keras_vera.model.frozen import check_state_is_unmoved
from keras_vera.model.outside import Outside
from keras_vera.model.trained import TrainedInBase


class Adaptation:
    """What one call of `enable_vera` did to a model, and how to undo it.

    Every layer that it adapted refers to it.
    """

    def __init__(
        self,
        projection,
        targets,
        d_initial,
        dropout,
        bases,
        layers,
        plan="auto",
        output_offsets=None,
        ranks=None,
        outside=(),
        trained=None,
    ):
        """
        Args:
            projection: A `SharedProjection`.
            targets: What the user asked for, for people to read.
            d_initial: Float, every entry of d at the start.
            dropout: Float.
            bases: List of the parts of the model that are frozen.
            layers: List of the layers to adapt.
            plan: String; see `choose_plan`.
            output_offsets: List of integers; see `attach_vera`.
            ranks: List of integers.
            outside: List of layers below the bases that are none of theirs.
            trained: Dict of lists of variables, by layer: what of the bases
                trains beside the vectors.
        """
        self.projection = projection
        self.targets = targets
        self.d_initial = d_initial
        self.dropout = dropout
        self.plan = plan
        self.bases = bases
        self.layers = layers
        self.output_offsets = output_offsets or [0] * len(layers)
        self.ranks = ranks or [projection.rank] * len(layers)
        self.trained = TrainedInBase(trained, layers)
        self.frozen = FrozenBase(
            bases, layers, dropout, self.trained.ids, outside
        )
        self.outside = Outside()

    def apply(self, model):
        """Adapts the layers; on failure, the model is as it was."""
        _check_kernels_are_own(model, self.layers)
        self.frozen.check_others()
        _keras.synchronize(model)
        self.outside.note(model, self.frozen.layers)
        try:
            self.frozen.freeze(model)
            for layer, offset, rank in zip(
                self.layers, self.output_offsets, self.ranks
            ):
                adapt_layer(
                    layer,
                    self.projection,
                    self.d_initial,
                    self.dropout,
                    self.plan,
                    offset,
                    rank,
                )
                layer.vera_adaptation = self
            self.trained.begin(self)
            for model in _keras.models_with(self.layers)[0]:
                _refuse_lora(model)
            _keras.reset_compiled(self.frozen.layers)
        except BaseException:
            self.undo(merge=False)
            raise

    def undo(self, merge):
        self.trained.undo(give_back=not merge)
        for layer in self.layers:
            if is_adapted(layer):
                layer.__dict__.pop("vera_adaptation", None)
                restore_layer(layer, merge=merge)
        for model in _keras.models_with(self.layers)[0]:
            if not any(map(is_adapted, _keras.flatten_layers(model))):
                model.__dict__.pop("enable_lora", None)
        self.frozen.undo(give_back=not merge)

    def beside_base(self):
        """Returns what files say of the adapter if they hold the base.

        So they do where a kernel is quantized, which takes no adapter, and
        the others would be neither base nor adapted with theirs. `None`
        where they hold the merged model.
        """
        if all(layer.quantization_mode is None for layer in self.layers):
            return None
        return {
            "ranks": self.ranks,
            "seed": self.projection.seed,
            "structure": self.projection.structure,
            "trained": self.trained.names(),
        }

    def values_in_files(self):
        """Returns the base's values that files have, by id of a variable."""
        if self.beside_base() is None:
            return {}
        return {id(variable): value for variable, value in self.base_values()}

    def base_values(self):
        """Yields each variable that the base has with another value, and it.

        Or that the base has not, and the value that makes no difference.
        """
        for layer in self.layers:
            yield from layer.base_values()
        yield from self.trained.base_values()


def check_model(model):
    """Raises unless VeRA can be enabled on `model`."""
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a Keras model or layer. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    check_no_bank(model)
    if not model.built:
        raise ValueError(
            f"`model` must be built. Received: model '{model.name}', which is "
            "not. Call it on a batch of data, or call `model.build()`, first."
        )
    if _keras.is_in_other_strategy(model):
        raise ValueError(
            "`model` must be made where it is adapted: in the `scope()` of the "
            "same `tf.distribute` strategy, or with the same devices of "
            f"`keras.distribution`. Received: model '{model.name}', made "
            "elsewhere. Make the model in the `scope()` that is active now "
            "(or after `set_distribution`), or adapt it outside of it."
        )
    _keras.check_not_wrapped(model)
    if any(is_adapted(layer) for layer in _keras.flatten_layers(model)):
        raise ValueError(
            f"Model '{model.name}' is adapted with VeRA already. Call "
            "`keras_vera.merge(model)` to keep its adapter or "
            "`keras_vera.disable_vera(model)` to drop it first."
        )


def check_no_lora(model, layers):
    """Raises if one of `layers`, those of the base, has LoRA."""
    with_lora = [x.name for x in layers if getattr(x, "lora_enabled", False)]
    if with_lora:
        raise ValueError(
            f"Model '{model.name}' has LoRA enabled, in the layers "
            f"{sorted(set(with_lora))}, which VeRA would freeze. Save and "
            "load the model to merge LoRA, or start from the base model."
        )


def check_no_bank(model):
    """Raises if `model` is that of an `AdapterBank`, or holds one.

    Its adapters are in the bank. What looks like one in its layers is of the
    model that the bank was made on, and not what the bank trains.
    """
    if any(
        getattr(layer, "vera_is_bank", False)
        for layer in _keras.flatten_layers(model)
    ):
        raise ValueError(
            f"`model` must not be that of an `AdapterBank`, nor hold one. "
            f"Received: model '{model.name}'. Use the bank's own methods for "
            "its adapters (`bank.load`, `bank.save`, `bank.predict` with "
            "`None` for the base), `keras_vera.callbacks.BestAdapters` while "
            "it trains, and `bank.model.base` for the model that it was made "
            "on."
        )


def check_layer(layer, path):
    """Raises unless `layer`, a target, can be adapted."""
    what = f"The layer '{layer.name}' at '{path}'"
    reason = reason_against(layer)
    if reason is not None:
        raise ValueError(
            f"{what} is a {type(layer).__name__}, which VeRA cannot adapt: "
            f"{reason}. Leave it out of `targets`."
        )
    if not layer.built:
        raise ValueError(
            f"{what} is not built. Call the model on a batch of data first, "
            "or leave this layer out of `targets`."
        )
    kind_of(type(layer))._make_contraction(layer)


def _check_kernels_are_own(model, layers):
    """Raises if another layer has the kernel of one that is to be adapted.

    Merged, and in Keras' files, the adapter would be in both.
    """
    owners = {}
    for layer in _keras.flatten_layers(model):
        # A wrapper may hold the kernel too, and leaves its use to the layer.
        if family_of(type(layer)) is not None:
            for variable in _keras.own_variables(layer):
                owners.setdefault(id(variable), set()).add(layer)
    for layer in layers:
        others = owners.get(id(stored_kernel(layer)), set()) - {layer}
        if others:
            raise ValueError(
                f"The layer '{layer.name}' shares its kernel with "
                f"{sorted(x.name for x in others)}, which would get its "
                "adapter as well when it is merged. Leave it out of "
                "`targets`, or call one layer in both places."
            )


def check_mergeable(model, layers):
    """Raises if a base kernel is quantized, which cannot take an adapter."""
    quantized = [x.name for x in layers if x.quantization_mode is not None]
    if quantized:
        raise ValueError(
            f"Model '{model.name}' is quantized ('{layers[0].quantization_mode}"
            f"'), in {len(quantized)} adapted layers "
            f"({', '.join(sorted(set(quantized))[:5])}). Quantizing their "
            "kernels again with the adapter in them would lose much of it. "
            "Keep the adapter beside the quantized base, or load the adapter "
            "into the model before quantization, merge, and then quantize."
        )


def warn_about_quantized_logits(model):
    """Warns where Keras gives what lies below the logits wrong gradients.

    A quantized `ReversibleEmbedding` passes them through the scale of its
    inputs only, when it makes logits.
    """
    keras_hub = sys.modules.get("keras_hub")
    if keras_hub is None:
        return
    language_models = (
        keras_hub.models.CausalLM,
        keras_hub.models.MaskedLM,
        keras_hub.models.Seq2SeqLM,
    )
    # Also where a part of one is adapted, such as its backbone.
    quantized = [
        (layer.name, holder.name)
        for holder in _keras.models_with([model])[0]
        if isinstance(holder, language_models)
        for layer in _keras.flatten_layers(holder)
        if isinstance(layer, keras.layers.ReversibleEmbedding)
        and layer.quantization_mode is not None
    ]
    if quantized:
        name, holder_name = quantized[0]
        warnings.warn(
            f"The output projection '{name}' of '{holder_name}' is "
            "quantized, and Keras passes wrong gradients through it, so that "
            "adapters train badly. Leave it out: `model.quantize(mode, "
            "filters=lambda layer: not isinstance(layer, "
            "keras.layers.ReversibleEmbedding))`.",
            stacklevel=3,
        )


def find_bases(model):
    """Returns the parts of `model` that get frozen; see `enable_vera`."""
    keras_hub = sys.modules.get("keras_hub")
    # Some backbones have another one under this name.
    if keras_hub is not None and isinstance(model, keras_hub.models.Backbone):
        return [model]
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, keras.Layer):
        return [backbone]
    if keras_hub is None:
        return [model]
    backbones = [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras_hub.models.Backbone)
    ]
    return backbones or [model]


def base_paths(model, bases):
    """Returns the layers of the bases by structural path in `model`."""
    inside = {id(x) for base in bases for x in _keras.flatten_layers(base)}
    return {
        path: layer
        for path, layer in _keras.structural_paths(model).items()
        if id(layer) in inside
    }


def adapted_layers(model):
    """Returns the adapted layers of `model` by structural path."""
    return {
        path: layer
        for path, layer in _keras.structural_paths(model).items()
        if is_adapted(layer)
    }


def check_adapted(model):
    """Returns the adapted layers of `model`, or raises if it has none."""
    if isinstance(model, keras.Layer):
        check_no_bank(model)
        layers = [x for x in _keras.flatten_layers(model) if is_adapted(x)]
        if layers:
            return layers
    raise ValueError(
        "`model` must be adapted with VeRA. "
        f"Received: model={model!r}, which is not. Call "
        "`keras_vera.enable_vera(model)` first."
    )


def parts_of_bases(model, layers):
    """Returns the parts of `model` that `enable_vera` froze, as a whole.

    `keras.Model(backbone.input, head(backbone.output))` holds the layers of
    the backbone, but not the backbone: then they stand for it.

    Args:
        model: The model, for the message.
        layers: The layers of the model.

    Raises:
        ValueError: If weights of what was adapted are not in the model.
    """
    held = {id(layer) for layer in layers}
    bases = [base for plan in adaptations(layers) for base in plan.bases]
    bases = list({id(base): base for base in bases}.values())
    found = []
    while bases:
        base = bases.pop(0)
        if id(base) in held:
            found.append(base)
        elif _keras.own_variables(base):
            raise ValueError(
                "`model` must hold the whole of what `enable_vera` adapted. "
                f"Received: model '{model.name}', a part of it. Pass the "
                "model on which it was called."
            )
        else:
            bases.extend(_keras.sub_layers(base))
    return found


def check_base_is_clean(model, layers):
    """Raises if a weights file merged another adapter into the base."""
    bases = [x for plan in adaptations(layers) for x in plan.frozen.layers]
    merged = [
        layer.name
        for layer in {id(x): x for x in [*layers, *bases]}.values()
        if getattr(layer, "vera_base_is_merged", False)
    ]
    if merged:
        raise ValueError(
            f"{len(merged)} layers of '{model.name}' "
            f"({', '.join(sorted(set(merged))[:5])}) hold an adapter that "
            "`load_weights` merged into their kernels, or what was trained in "
            "full, because the file was saved on another base, with another "
            "rank or seed, or with other targets. An adapter saved or "
            "applied now would not fit the base model. Load the base weights "
            "into the model before the file of the adapted model, or keep "
            "the whole model with `keras_vera.merge(model)` and "
            "`model.save_weights()`."
        )


def check_base_is_unmoved(model, layers):
    """Raises if the base has state that it had not when it was adapted."""
    frozen = [adaptation.frozen for adaptation in adaptations(layers)]
    check_state_is_unmoved(model, frozen)


def base_values(model, layers):
    """Returns pairs of the variables of `model` with their base values."""
    # A layer of `keras_vera.layers` says it itself.
    sources = [getattr(layer, "vera_adaptation", layer) for layer in layers]
    own = {id(variable) for variable in model.variables}
    return [
        (variable, value)
        for source in {id(source): source for source in sources}.values()
        for variable, value in source.base_values()
        if id(variable) in own
    ]


def restore(model, layers, merge):
    _keras.synchronize(model)
    for layer in layers:
        if getattr(layer, "vera_adaptation", None) is None:
            restore_layer(layer, merge=merge)
    for adaptation in adaptations(layers):
        adaptation.undo(merge=merge)
        layers = layers + adaptation.frozen.layers
    _keras.reset_compiled(layers)


def adaptations(layers):
    """Returns what adapted these layers, each once."""
    found = [getattr(layer, "vera_adaptation", None) for layer in layers]
    return list({id(x): x for x in found if x is not None}.values())


def _refuse_lora(model):
    """Makes `backbone.enable_lora` raise; it would freeze the vectors."""
    if not hasattr(model, "enable_lora"):
        return

    def enable_lora(*args, **kwargs):
        raise ValueError(
            f"Model '{model.name}' is adapted with VeRA; `enable_lora` would "
            "freeze its vectors. Call `keras_vera.merge(model)` to keep the "
            "adapter or `keras_vera.disable_vera(model)` to drop it first."
        )

    model.enable_lora = enable_lora
