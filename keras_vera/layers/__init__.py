from keras_vera.layers.vera_dense import VeRADense as VeRADense
from keras_vera.layers.vera_einsum_dense import (
    VeRAEinsumDense as VeRAEinsumDense,
)

__all__ = ["VeRADense", "VeRAEinsumDense"]
