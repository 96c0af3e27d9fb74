"""VeRA (Vector-based Random Matrix Adaptation) for Keras 3."""

from keras_vera import _version
from keras_vera import callbacks as callbacks
from keras_vera import layers as layers
from keras_vera.bank.bank import AdapterBank as AdapterBank
from keras_vera.files.adapter import load_adapter as load_adapter
from keras_vera.files.adapter import save_adapter as save_adapter
from keras_vera.files.combine import combine as combine
from keras_vera.files.format import AdapterFileError as AdapterFileError
from keras_vera.files.upload import upload_adapter as upload_adapter
from keras_vera.layouts import layout_map as layout_map
from keras_vera.model.enable import base_model as base_model
from keras_vera.model.enable import disable_vera as disable_vera
from keras_vera.model.enable import enable_vera as enable_vera
from keras_vera.model.enable import merge as merge
from keras_vera.optimizers import vera_optimizer as vera_optimizer
from keras_vera.peft.load import load_peft_adapter as load_peft_adapter
from keras_vera.peft.save import save_peft_adapter as save_peft_adapter
from keras_vera.product.projection import SharedProjection as SharedProjection
from keras_vera.summary import summary as summary

__version__ = _version.version()

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
    "layout_map",
    "load_adapter",
    "load_peft_adapter",
    "merge",
    "save_adapter",
    "save_peft_adapter",
    "summary",
    "upload_adapter",
    "vera_optimizer",
]
