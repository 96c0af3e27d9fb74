"""What the public functions take and return.

Keras itself has no types, so that its own are `Any` for a type checker.
"""

import os
from collections.abc import Callable
from collections.abc import Sequence

import keras

FilePath = str | os.PathLike[str]
# A role, a layer name or a regular expression, or a function of a layer.
Target = str | Callable[[keras.Layer], bool]
Targets = Target | Sequence[Target]
Ranks = dict[Target, int | None]
