"""Keras layers with a VeRA adapter, for building models with them."""

from keras_vera.layers.vera_conv import VeRAConv1D as VeRAConv1D
from keras_vera.layers.vera_conv import VeRAConv2D as VeRAConv2D
from keras_vera.layers.vera_conv import VeRAConv3D as VeRAConv3D
from keras_vera.layers.vera_dense import VeRADense as VeRADense
from keras_vera.layers.vera_einsum_dense import (
    VeRAEinsumDense as VeRAEinsumDense,
)
from keras_vera.layers.vera_embedding import VeRAEmbedding as VeRAEmbedding

__all__ = [
    "VeRAConv1D",
    "VeRAConv2D",
    "VeRAConv3D",
    "VeRADense",
    "VeRAEinsumDense",
    "VeRAEmbedding",
]
