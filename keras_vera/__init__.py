"""VeRA (Vector-based Random Matrix Adaptation) for Keras 3."""

from importlib.metadata import version as _version

from keras_vera import callbacks as callbacks
from keras_vera import layers as layers
from keras_vera._adapter_format import AdapterFileError as AdapterFileError
from keras_vera.adaptation import base_model as base_model
from keras_vera.adaptation import disable_vera as disable_vera
from keras_vera.adaptation import enable_vera as enable_vera
from keras_vera.adaptation import merge as merge
from keras_vera.adapter_file import load_adapter as load_adapter
from keras_vera.adapter_file import save_adapter as save_adapter
from keras_vera.bank import AdapterBank as AdapterBank
from keras_vera.combination import combine as combine
from keras_vera.hub_adapter import upload_adapter as upload_adapter
from keras_vera.optimizers import vera_optimizer as vera_optimizer
from keras_vera.peft_adapter import load_peft_adapter as load_peft_adapter
from keras_vera.peft_export import save_peft_adapter as save_peft_adapter
from keras_vera.projection import SharedProjection as SharedProjection
from keras_vera.summary import summary as summary

__version__ = _version("keras_vera")

__all__ = [
    "AdapterBank",
    "AdapterFileError",
    "SharedProjection",
    "base_model",
    "callbacks",
    "combine",
    "disable_vera",
    "enable_vera",
    "layers",
    "load_adapter",
    "load_peft_adapter",
    "merge",
    "save_adapter",
    "save_peft_adapter",
    "summary",
    "upload_adapter",
    "vera_optimizer",
]
