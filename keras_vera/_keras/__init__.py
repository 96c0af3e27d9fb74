"""The places where Keras' public API does not reach, in one folder.

Written against Keras 3.15. What each function relies on is said there; a
release of Keras that changes it breaks this folder alone.
"""

from keras_vera._keras import backends as backends
from keras_vera._keras.calls import bound_arguments as bound_arguments
from keras_vera._keras.calls import copy_mask as copy_mask
from keras_vera._keras.calls import is_in_call as is_in_call
from keras_vera._keras.calls import is_in_inference_call as is_in_inference_call
from keras_vera._keras.calls import is_in_layer_call as is_in_layer_call
from keras_vera._keras.calls import is_training as is_training
from keras_vera._keras.calls import (
    serve_rematerialization as serve_rematerialization,
)
from keras_vera._keras.classes import class_like as class_like
from keras_vera._keras.data import comparison as comparison
from keras_vera._keras.data import data_kind as data_kind
from keras_vera._keras.data import in_order_of_metrics as in_order_of_metrics
from keras_vera._keras.data import numpy_batches as numpy_batches
from keras_vera._keras.data import split_validation as split_validation
from keras_vera._keras.devices import VariableOfParts as VariableOfParts
from keras_vera._keras.devices import batch_divisor as batch_divisor
from keras_vera._keras.devices import check_layout as check_layout
from keras_vera._keras.devices import check_made_here as check_made_here
from keras_vera._keras.devices import cut_as as cut_as
from keras_vera._keras.devices import (
    is_in_other_strategy as is_in_other_strategy,
)
from keras_vera._keras.devices import on_one_device as on_one_device
from keras_vera._keras.devices import strategy_scope as strategy_scope
from keras_vera._keras.devices import summed_over_rows as summed_over_rows
from keras_vera._keras.files import hidden_array as hidden_array
from keras_vera._keras.files import hidden_group as hidden_group
from keras_vera._keras.files import is_loading_weights as is_loading_weights
from keras_vera._keras.files import is_saving_or_loading as is_saving_or_loading
from keras_vera._keras.files import objects_being_loaded as objects_being_loaded
from keras_vera._keras.files import serve_legacy_files as serve_legacy_files
from keras_vera._keras.freezing import finalize_state as finalize_state
from keras_vera._keras.freezing import (
    freeze_own_variables as freeze_own_variables,
)
from keras_vera._keras.freezing import new_state_allowed as new_state_allowed
from keras_vera._keras.freezing import remove_attribute as remove_attribute
from keras_vera._keras.freezing import set_trainable as set_trainable
from keras_vera._keras.freezing import thaw_own_variables as thaw_own_variables
from keras_vera._keras.models import COMPILED as COMPILED
from keras_vera._keras.models import living_models as living_models
from keras_vera._keras.models import models_with as models_with
from keras_vera._keras.models import remember_model as remember_model
from keras_vera._keras.models import reset_compiled as reset_compiled
from keras_vera._keras.optimizers import check_built_with as check_built_with
from keras_vera._keras.optimizers import copy_exclusions as copy_exclusions
from keras_vera._keras.optimizers import divided as divided
from keras_vera._keras.optimizers import in_any_replica as in_any_replica
from keras_vera._keras.optimizers import mix_in as mix_in
from keras_vera._keras.optimizers import mix_out as mix_out
from keras_vera._keras.optimizers import named_in_files as named_in_files
from keras_vera._keras.optimizers import (
    outside_of_tracing as outside_of_tracing,
)
from keras_vera._keras.optimizers import (
    read_from_files_as as read_from_files_as,
)
from keras_vera._keras.optimizers import (
    update_variables_one_by_one as update_variables_one_by_one,
)
from keras_vera._keras.processes import check_all_here as check_all_here
from keras_vera._keras.processes import cut_over_processes as cut_over_processes
from keras_vera._keras.processes import to_numpy as to_numpy
from keras_vera._keras.structure import UNNAMED as UNNAMED
from keras_vera._keras.structure import call_arguments as call_arguments
from keras_vera._keras.structure import (
    draws_random_numbers as draws_random_numbers,
)
from keras_vera._keras.structure import flatten_in_order as flatten_in_order
from keras_vera._keras.structure import flatten_layers as flatten_layers
from keras_vera._keras.structure import is_graph as is_graph
from keras_vera._keras.structure import is_rematerialized as is_rematerialized
from keras_vera._keras.structure import (
    named_own_variables as named_own_variables,
)
from keras_vera._keras.structure import number_of_unnamed as number_of_unnamed
from keras_vera._keras.structure import own_variables as own_variables
from keras_vera._keras.structure import stored_attribute as stored_attribute
from keras_vera._keras.structure import structural_paths as structural_paths
from keras_vera._keras.structure import sub_layers as sub_layers
from keras_vera._keras.structure import symbolic_inputs as symbolic_inputs
from keras_vera._keras.structure import takes_training as takes_training
from keras_vera._keras.structure import trained_variables as trained_variables
from keras_vera._keras.structure import (
    untrained_variables as untrained_variables,
)
from keras_vera._keras.structure import without_number as without_number
from keras_vera._keras.values import as_value as as_value
from keras_vera._keras.values import can_assign_traced as can_assign_traced
from keras_vera._keras.values import has_read_since as has_read_since
from keras_vera._keras.values import has_trained_since as has_trained_since
from keras_vera._keras.values import is_lost as is_lost
from keras_vera._keras.values import is_read_at as is_read_at
from keras_vera._keras.values import is_traced as is_traced
from keras_vera._keras.values import reading_mark as reading_mark
from keras_vera._keras.values import reading_place as reading_place
from keras_vera._keras.values import stored_value as stored_value
from keras_vera._keras.values import synchronize as synchronize
from keras_vera._keras.values import values_kept as values_kept
from keras_vera._keras.wrappers import check_not_sharded as check_not_sharded
from keras_vera._keras.wrappers import check_not_wrapped as check_not_wrapped
from keras_vera._keras.wrappers import names_without as names_without
