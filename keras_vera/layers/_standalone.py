import uuid

import keras
import numpy as np

from keras_vera import _keras
from keras_vera.layers._base_scope import suspended
from keras_vera.product.checks import check_d_initial
from keras_vera.product.checks import check_dropout
from keras_vera.product.checks import check_plan
from keras_vera.product.projection import EXPLICIT
from keras_vera.product.projection import SharedProjection
from keras_vera.product.projection import pair_sha256

_HASH = "vera_projection_sha256"
_VECTORS = ("vera_lambda_d", "vera_lambda_b")


class StandaloneVeRA:
    """What the public layers share: arguments, building, config, saving.

    The kernel and the bias are frozen; the vectors train. A file holds kernel,
    bias, vectors and the hash of the projection, which is made again.
    """

    def _init_vera(self, rank, projection, d_initial, dropout, plan):
        if self.lora_rank:
            raise ValueError(
                "`lora_rank` cannot be combined with VeRA. "
                f"Received: lora_rank={self.lora_rank}"
            )
        if self.quantization_mode is not None:
            raise ValueError(
                "`dtype` must not be a quantized one: quantize a plain layer, "
                "and adapt it with `keras_vera.enable_vera`. "
                f"Received: dtype={self.dtype_policy.name}"
            )
        if projection is None:
            projection = SharedProjection(rank=256 if rank is None else rank)
        elif not isinstance(projection, SharedProjection):
            raise ValueError(
                "`projection` must be a `keras_vera.SharedProjection`. "
                f"Received: projection={projection!r} "
                f"(of type {type(projection).__name__})"
            )
        elif projection.structure == EXPLICIT:
            raise ValueError(
                "`projection` must be made from a seed, as a layer's config "
                "says how to make it again. Received: a projection that "
                "carries matrices made elsewhere."
            )
        elif rank is not None and rank != projection.rank:
            raise ValueError(
                "`rank` must be that of `projection`, or be left out. "
                f"Received: rank={rank}, projection.rank={projection.rank}"
            )
        self.d_initial = check_d_initial(d_initial)
        self.dropout = check_dropout(dropout)
        self.plan = check_plan(plan)
        self._shared_projection = projection
        self.identifier = uuid.uuid4().hex
        projection.register(self)

    def build(self, input_shape):
        super().build(input_shape)
        _keras.freeze_own_variables(self)
        self.attach_vera(
            self._shared_projection, self.d_initial, self.dropout, self.plan
        )

    def detach_vera(self):
        super().detach_vera()
        own = _keras.own_variables(self)
        _keras.thaw_own_variables(self, own)
        for variable in own:
            variable.trainable = True

    def get_config(self):
        return {
            **super().get_config(),
            "rank": self._shared_projection.rank,
            "projection": keras.saving.serialize_keras_object(
                self._shared_projection
            ),
            "identifier": self.identifier,
            "d_initial": self.d_initial,
            "dropout": self.dropout,
            "plan": self.plan,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        identifier = config.pop("identifier")
        config["projection"] = SharedProjection.shared_from_config(
            config["projection"]["config"], identifier
        )
        layer = super().from_config(config)
        layer.identifier = identifier
        return layer

    @suspended()
    def save_own_variables(self, store):
        self.save_base_variables(store)
        if self.built:
            for name in _VECTORS:
                store[name] = getattr(self, name)
            store[_HASH] = self._projection_hash()

    @suspended()
    def load_own_variables(self, store):
        super().load_own_variables(store)
        if self.built:
            for name in _VECTORS:
                getattr(self, name).assign(store[name])

    def _check_load_own_variables(self, store):
        expected = {_HASH, *_VECTORS, "0"}
        if getattr(self, "bias", None) is not None:
            expected.add("1")
        received = set(store.keys())
        if received != expected:
            raise ValueError(
                f"Layer '{self.name}' expected the variables "
                f"{sorted(expected)}, but the file holds {sorted(received)}."
            )
        projection = self._shared_projection
        if not np.array_equal(store[_HASH], self._projection_hash()):
            raise ValueError(
                f"Layer '{self.name}' was saved with other random matrices "
                f"than seed={projection.seed}, rank={projection.rank} make "
                "here. The file is damaged, or was made by an incompatible "
                "version of keras_vera."
            )

    def _projection_hash(self):
        digest = pair_sha256(*self.projection_slices())
        return np.frombuffer(bytes.fromhex(digest), dtype=np.uint8)
