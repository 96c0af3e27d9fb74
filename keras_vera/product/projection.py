import hashlib
import uuid
import weakref

import keras
import numpy as np
from keras import ops

from keras_vera import _keras
from keras_vera.product.checks import check_integer
from keras_vera.product.checks import check_structure
from keras_vera.product.random import unit_uniform_rows
from keras_vera.product.structure import Blocks
from keras_vera.product.structure import Dense
from keras_vera.product.structure import Explicit

# The structure of matrices that no seed makes.
EXPLICIT = "explicit"
_STREAM_A = 0
_STREAM_B = 1

# The living projections, for `shared_from_config`.
_projections: weakref.WeakSet = weakref.WeakSet()


@keras.saving.register_keras_serializable(package="keras_vera")
class SharedProjection:
    """The one frozen pair of random matrices that all adapted layers share.

    VeRA adapts a frozen layer `y = x W`, with `W` of shape `(m, n)`, as
    `y = x W + b * ((x A * d) B)`. The pair `A`, of shape `(m, rank)`, and `B`,
    of shape `(rank, n)`, is random, never trained, and shared by the layers of
    a model. It is made from `seed` and `rank` alone, with the same bits on
    every backend, platform and library version, so it is never saved.

    The pair is as large as its largest layer; every layer uses the leading
    rows of `A` and the leading columns of `B`. When a larger layer joins, the
    pair grows without changing the entries that exist. Entries are uniform
    with unit variance; each layer applies its own Kaiming factor
    `sqrt(2 / m) * sqrt(2 / rank)`.

    Args:
        seed: Integer in `[0, 2**64)`. Makes the entries. Defaults to `0`.
        rank: Positive integer, the inner dimension. Defaults to `256`.
        structure: `"dense"`, the pair of the paper, or `"blocks"`: `A` and
            `B` are block-diagonal, with 16 blocks each and a fixed permutation
            of the channels between them, which makes all that carries the rank
            16 times cheaper. `"blocks4"` has 4 blocks, and so on. Vectors and
            files have the same size. Defaults to `"dense"`.

    Attributes:
        vera_kernel_a: Non-trainable float32 `keras.Variable` of shape
            `(m, rank)`, with the largest `m` of the layers, or `None` while no
            layer is built. With s blocks, `(m, s * ceil(rank / s**2))`: for
            each input, its row in its block.
        vera_kernel_b: Non-trainable float32 `keras.Variable` of shape
            `(rank, n)`, with the largest `n` of the layers, or `None`. With
            blocks, for each output, its column in its block.

    Example:

    ```python
    projection = keras_vera.SharedProjection(seed=0, rank=64)
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras_vera.layers.VeRADense(32, projection=projection),
            keras_vera.layers.VeRADense(8, projection=projection),
        ]
    )
    ```

    Reference:

    - [Kopiczko et al., 2024](https://arxiv.org/abs/2310.11454), equation 2
      and section 3.2.
    - [Dao et al., 2022](https://arxiv.org/abs/2204.00595), section 3.1, for
      the product of two permuted block-diagonal matrices ("Monarch").
    """

    def __init__(
        self, seed: int = 0, rank: int = 256, structure: str = "dense"
    ) -> None:
        self.seed = check_integer("seed", seed, 0, 2**64 - 1)
        self.rank = check_integer("rank", rank, 1)
        self.blocks = check_structure(structure)
        self.structure = structure
        self.vera_kernel_a = None
        self.vera_kernel_b = None
        self._layers: weakref.WeakSet = weakref.WeakSet()
        self._identifier = uuid.uuid4().hex
        self._generation = 0
        _projections.add(self)

    @classmethod
    def from_matrices(cls, a, b_matrix):
        """Returns a projection that carries matrices made elsewhere.

        They are used as they are, without a Kaiming factor, and adapter files
        hold them. Its `seed` is `None` and its `structure` is `"explicit"`.

        Args:
            a: Float32 array of shape `(m, rank)`.
            b_matrix: Float32 array of shape `(rank, n)`.
        """
        projection = cls(rank=a.shape[1])
        projection.seed = None
        projection.structure = EXPLICIT
        for name, array in (("vera_kernel_a", a), ("vera_kernel_b", b_matrix)):
            variable = projection._make_variable(
                name, array.shape, _Entries(array.__getitem__)
            )
            setattr(projection, name, variable)
        return projection

    def register(self, layer):
        """Notes that `layer` uses this pair, so that growing reaches it."""
        self._layers.add(layer)

    def reserve(self, input_dim, output_dim):
        """Makes the pair large enough for a layer; existing entries stay.

        Args:
            input_dim: Positive integer, rows of `A` that the layer uses.
            output_dim: Positive integer, columns of `B` that the layer uses.
        """
        if self.structure == EXPLICIT:
            return
        a, b = self.vera_kernel_a, self.vera_kernel_b
        width = self._width
        if a is None or a.shape[0] < input_dim:
            self.vera_kernel_a = self._make_variable(
                "vera_kernel_a", (input_dim, width), _Entries(self._part_of_a)
            )
            self._replace(a, self.vera_kernel_a)
        if b is None or b.shape[1] < output_dim:
            self.vera_kernel_b = self._make_variable(
                "vera_kernel_b", (width, output_dim), _Entries(self._part_of_b)
            )
            self._replace(b, self.vera_kernel_b)

    def is_made_of_seed(self, a, b_matrix):
        """Says whether matrices are its own, by what they begin with.

        `set_weights` and checkpoints may give a model those of another one.

        Args:
            a: Float32 array of shape `(m, rank)`, or its first row.
            b_matrix: Float32 array of shape `(rank, n)`, or its first column.
        """
        if self.structure == EXPLICIT:
            return True
        all_, first = slice(0, self._width), slice(0, 1)
        return np.array_equal(
            a[:1], self._part_of_a((first, all_))
        ) and np.array_equal(b_matrix[:, :1], self._part_of_b((all_, first)))

    def beginnings(self):
        """Returns the first row of A and the first column of B, as arrays."""
        a = ops.convert_to_tensor(self.vera_kernel_a)[:1]
        b_matrix = ops.convert_to_tensor(self.vera_kernel_b)[:, :1]
        return _keras.to_numpy(a), _keras.to_numpy(b_matrix)

    def structure_of(self, contraction, rank=None):
        """Returns how the pair of a layer, of no higher rank, is laid out."""
        return self._make_structure(
            contraction.m,
            contraction.n,
            self.rank if rank is None else rank,
            contraction.one_hot,
        )

    def _make_structure(self, m, n, rank, one_hot=False):
        if self.structure == EXPLICIT:
            return Explicit(m, n, rank, one_hot)
        if self.blocks == 1:
            return Dense(m, n, rank, one_hot)
        return Blocks(m, n, rank, self.blocks, one_hot)

    def get_config(self):
        return {
            "seed": self.seed,
            "rank": self.rank,
            "structure": self.structure,
            "identifier": self._identifier,
        }

    @classmethod
    def from_config(cls, config):
        # While a file is loaded, all that had one projection get one again.
        loading = _keras.objects_being_loaded()
        key = ("keras_vera.SharedProjection", config["identifier"])
        if loading is not None and key in loading:
            return loading[key]
        config = dict(config)
        identifier = config.pop("identifier")
        projection = cls(**config)
        projection._identifier = identifier
        if loading is not None:
            loading[key] = projection
        return projection

    @classmethod
    def shared_from_config(cls, config, layer_identifier):
        """Returns the projection for a layer that is made from its config.

        `clone_model` makes one layer after the other and says nothing of what
        belongs together. So a layer joins the newest projection that came
        from the same one, unless that has a copy of this layer already: then
        another clone has begun, which gets a pair of its own (models that
        share variables disturb each other on JAX).
        """
        if _keras.objects_being_loaded() is not None:
            return cls.from_config(config)
        newest = max(
            (p for p in _projections if p._identifier == config["identifier"]),
            key=lambda p: p._generation,
            default=None,
        )
        if newest is not None and all(
            layer.identifier != layer_identifier for layer in newest._layers
        ):
            return newest
        projection = cls.from_config(config)
        if newest is not None:
            projection._generation = newest._generation + 1
        return projection

    def _part_of_a(self, index):
        rows, columns = index
        return unit_uniform_rows(
            self.seed, _STREAM_A, self._width, rows, columns
        )

    def _part_of_b(self, index):
        # By columns, so that more columns append entries.
        rows, columns = index
        entries = unit_uniform_rows(
            self.seed, _STREAM_B, self._width, columns, rows
        )
        return np.ascontiguousarray(entries.T)

    @property
    def _width(self):
        return self._make_structure(1, 1, self.rank).width

    def _make_variable(self, name, shape, initializer):
        with keras.name_scope("vera_projection"):
            return _keras.VariableOfParts(
                initializer,
                shape=shape,
                dtype="float32",
                trainable=False,
                name=name,
            )

    def _replace(self, old, new):
        if old is not None:
            for layer in self._layers:
                layer._replace_projection_variable(old, new)


class _Entries:
    """Makes a matrix, or a part of it, as `VariableOfParts` asks for it."""

    def __init__(self, part):
        self.part = part

    def __call__(self, shape, dtype=None):
        whole = self.part(tuple(slice(0, size) for size in shape))
        return ops.convert_to_tensor(whole, dtype=dtype)


def pair_sha256(a, b_matrix):
    """Returns the hash of a pair of matrices, as adapter files hold it.

    Args:
        a: Float32 tensor of shape `(m, rank)`.
        b_matrix: Float32 tensor of shape `(rank, n)`.

    Returns:
        A string, the SHA-256 in hexadecimal of both matrices as little-endian
        float32, `a` by rows and then `b_matrix` by columns.
    """
    digest = hashlib.sha256()
    for rows in (_keras.to_numpy(a), _keras.to_numpy(b_matrix).T):
        digest.update(np.ascontiguousarray(rows, dtype="<f4"))
    return digest.hexdigest()
