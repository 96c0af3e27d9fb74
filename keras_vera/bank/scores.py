"""How well each adapter of a bank does on its own examples."""

import numpy as np
from keras import ops
from keras import tree

from keras_vera import _keras
from keras_vera.bank.ids import ids_in
from keras_vera.bank.outputs import outputs_of_parts


class Scores:
    """The compiled loss and metrics of a `BankModel`, for each adapter.

    Every batch passes through the model once, whatever adapters are in it.
    The metrics are the model's own; what they have counted for an adapter is
    kept here while they count for another.
    """

    def __init__(self, model):
        """
        Args:
            model: A compiled `BankModel`.
        """
        self._model = model
        self._counted = {}  # By slot, the values of the metrics' variables.
        self._losses = {}  # By slot, the sum over examples, and their number.

    def add(self, x, y=None, sample_weight=None):
        """Adds a batch, in NumPy arrays, to what is counted."""
        outputs = outputs_of_parts(self._model, [x])
        self.add_outputs(np.asarray(ids_in(x)), outputs, y, sample_weight)

    def add_outputs(self, ids, outputs, y=None, sample_weight=None):
        """As `add`, of a batch for which there are outputs already."""
        for slot in np.unique(ids).tolist():
            rows = np.flatnonzero(ids == slot)
            part = tree.map_structure(
                lambda v, rows=rows: None if v is None else v[rows],
                {"y": y, "y_pred": outputs, "sample_weight": sample_weight},
            )
            # The loss of each output is a metric as well.
            self._restart(slot)
            loss = self._model.compute_loss(x=None, **part, training=False)
            total, count = self._losses.get(slot, (0.0, 0))
            self._losses[slot] = (
                total + float(ops.convert_to_numpy(loss)) * len(rows),
                count + len(rows),
            )
            self._model.compute_metrics(x=None, **part)
            self._counted[slot] = [
                ops.convert_to_numpy(v) for v in self._variables()
            ]

    def results(self):
        """Returns dicts of values by name of the metric, by slot."""
        results = {}
        for slot, (total, count) in self._losses.items():
            self._restart(slot)
            values = self._model.get_metrics_result()
            results[slot] = {
                name: float(ops.convert_to_numpy(value))
                for name, value in values.items()
                if not len(getattr(value, "shape", ()))
            }
            results[slot]["loss"] = total / count
        self._model.reset_metrics()
        return results

    def _restart(self, slot):
        """Lets the metrics go on where they were with an adapter."""
        self._model.reset_metrics()
        if slot in self._counted:
            for variable, value in zip(self._variables(), self._counted[slot]):
                variable.assign(value)

    def _variables(self):
        return [v for metric in self._model.metrics for v in metric.variables]


def of_all(model, slots, data, kwargs):
    """Returns what `keras.Model.evaluate` does, in one call or by batches.

    Args:
        model: A compiled `BankModel`.
        slots: Its `Slots`.
        data: The `Examples` or `Batches`.
        kwargs: Dict of further arguments of `keras.Model.evaluate`.
    """
    is_divided = data.is_divided(kwargs.get("batch_size"))
    if is_divided and slots.have_room_for(data.names):
        x, y, sample_weight = data.joined(slots.ids(data.names))
        return model.evaluate(x, y, sample_weight=sample_weight, **kwargs)
    kwargs = dict(kwargs)
    return_dict = kwargs.pop("return_dict", False)
    scores = Scores(model)
    for parts, *targets in slots.batches(data, kwargs):
        outputs = outputs_of_parts(model, parts)
        # All together.
        ids = np.zeros(len(tree.flatten(outputs)[0]), "int32")
        scores.add_outputs(ids, outputs, *targets)
    found = scores.results()[0]
    if return_dict:
        return dict(sorted(found.items()))  # As Keras does.
    return _keras.in_order_of_metrics(model, found)
