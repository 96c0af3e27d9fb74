"""What users do with files of a model, and with copies of it."""

import copy
import pickle

import keras
import numpy as np
from adapter_files import read
from habit_models import is_working_memory
from habit_world import Action
from habit_world import File
from habit_world import accepted
from habit_world import action
from habit_world import check
from habit_world import close
from habit_world import content
from habit_world import equal
from habit_world import kind
from habit_world import refused
from habit_world import value_of
from helpers import adapted

import keras_vera


@action
class Save(Action):
    then: str = "fresh"

    def do(self, world):
        path = world.path(".vera.safetensors")

        def call():
            keras_vera.save_adapter(world.model, path)

        if world.truth is None:
            refused(world, call)
            check(not path.exists(), "refused and written")
            return
        outputs = world.adapted_outputs()
        sure = (
            world.model.trainable
            and not world.truth.may_refuse
            and world.scope is None
        )
        if not accepted(world, call, must=sure):
            check(not path.exists(), "refused and written")
            return
        saved = world.outside_saved()
        if world.scope is None:
            entries = read(path)[1].values()
            trained = [w for w in world.weights if id(w) in world.truth.trained]
            expected = world.vectors() + saved + trained
            expected = [value_of(w) for w in expected]
            same = sorted(map(content, entries)) == sorted(
                map(content, expected)
            )
            check(same, "file is not what trains")
        model, body = world.twin(world.start)
        # A layer that was added later would be adapted as well.
        alike = len(world.weights) == len(world.truth.order)
        if self.then == "adapted" and alike:
            world.truth.adapter.enable(model, body)
        keras_vera.load_adapter(model, path)
        rounding = world.truth.adapter.reloading
        what = "loaded is not saved"
        close(world.outputs(model), outputs, what, rounding)
        ids = {id(w) for w in saved} | world.truth.trained
        world.adapter_file = File(
            path=path,
            truth=world.truth,
            outputs=outputs,
            values=world.values(),
            vectors=[value_of(w) for w in world.vectors()],
            saved={i for i, w in enumerate(world.weights) if id(w) in ids},
            shape=world.shape,
        )


@action
class Load(Action):
    """Loads the adapter file into the model as it is now."""

    changes = True

    def do(self, world):
        file = world.adapter_file
        if file is None:
            return
        plain = world.truth is None
        truth = world.describe(file.truth.adapter) if plain else world.truth
        base = {id(w) for w in file.truth.base} - file.truth.trained
        fits = file.shape == world.shape and all(
            np.array_equal(value_of(w), value)
            for w, value in zip(world.weights, file.values)
            if id(w) in base
        )
        same = plain or (
            truth.adapter.settings == file.truth.adapter.settings
            and truth.adapter.where == file.truth.adapter.where
        )

        def call():
            keras_vera.load_adapter(world.model, file.path)

        # Flags outside the base say what a file has to hold.
        if not accepted(world, call, must=False):
            sure = fits and same and not plain
            sure = sure and not world.off and not truth.may_refuse
            check(not sure, "refuses its own file")
            return
        if plain:
            world.begin_adapted(truth)
            world.note_trained(truth.adapter.train)
        if fits and all(
            np.array_equal(value_of(w), value)
            for i, (w, value) in enumerate(zip(world.weights, file.values))
            if i not in file.saved
        ):
            rounding = file.truth.adapter.reloading
            what = "loaded is not saved"
            close(world.outputs(), file.outputs, what, rounding)


@action
class SaveWeights(Action):
    def do(self, world):
        path = world.path(".weights.h5")
        world.model.save_weights(path)
        outputs = world.outputs()
        if not (world.quantized and world.truth):
            twin, _ = world.twin(world.start)
            twin.load_weights(path)
            close(world.outputs(twin), outputs, "weights file is not the model")
        world.weights_file = File(
            path=path,
            truth=world.truth,
            outputs=outputs,
            values=world.values(),
            vectors=[value_of(w) for w in world.vectors()],
            saved=set(),
            shape=world.shape,
        )


@action
class LoadWeights(Action):
    changes = True

    def do(self, world):
        file = world.weights_file
        if file is None or file.shape != world.shape:
            return
        world.model.load_weights(file.path)
        if file.truth is world.truth:
            for w, value in zip(world.weights, file.values):
                if not is_working_memory(w):
                    back = np.array_equal(value_of(w), value)
                    check(back, "weights file moved", kind(w))
            for w, value in zip(world.vectors(), file.vectors, strict=True):
                check(np.array_equal(value_of(w), value), "vectors not loaded")
            equal(world.outputs(), file.outputs, "weights not loaded")
            return
        if not (world.quantized and file.truth):
            close(world.outputs(), file.outputs, "weights not loaded")
        if world.truth is not None:
            # The user gave the model another base.
            truth = world.truth
            truth.values = [value_of(w) for w in truth.base]
            truth.may_refuse = file.truth is not None
            truth.is_blind = truth.may_refuse and bool(truth.trained)
            world.start = world.values()


@action
class SaveModel(Action):
    ending: str = ".keras"

    def do(self, world):
        def saved(model):
            path = world.path(self.ending)
            model.save(path)
            return keras.saving.load_model(path, compile=False)

        if copied(world, saved) is None:
            return
        loaded = saved(world.model)
        check(not adapted(loaded), "saved model is adapted")
        if not (world.quantized and world.truth):
            what = "saved is not the model"
            close(world.outputs(loaded), world.outputs(), what)


@action
class Copy(Action):
    how: str = "clone"

    def do(self, world):
        make = {
            "clone": cloned,
            "deepcopy": copy.deepcopy,
            "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        }[self.how]
        expected = copied(world, make)
        if expected is None:
            return
        made = make(world.model)
        world.outputs(made)
        check(not adapted(made), "copy is adapted")
        extra = [w for w in made.weights if "vera_" in w.path]
        check(not extra, "copy has vectors")
        shapes = [tuple(w.shape) for w in made.weights]
        expected = [tuple(w.shape) for w in expected.weights]
        check(shapes == expected, "weights of a copy")
        if self.how != "clone":
            if not (world.quantized and world.truth):
                close(world.outputs(made), world.outputs(), "copy differs")
        elif world.truth is not None and not world.off:
            self.check_flags(world, made)

    def check_flags(self, world, made):
        truth = world.truth
        flags = dict(zip(map(id, truth.base), truth.variable_flags))
        for w, mine in zip(made.weights, world.weights):
            same = w.trainable == flags.get(id(mine), w.trainable)
            check(same, "flags of a clone", kind(mine))


def cloned(model):
    return keras.models.clone_model(model)


def copied(world, make):
    """Returns a copy of a plain twin, or `None` where Keras itself fails."""
    twin, _ = world.twin(world.start)
    try:
        made = make(twin)
        outputs = world.outputs(made)
        if make is not cloned:
            close(outputs, world.outputs(twin), "Keras' own copy differs")
    except Exception:
        return None
    return made
