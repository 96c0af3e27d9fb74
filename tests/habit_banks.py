"""What users do with a bank on an adapted model."""

import warnings

import keras
from habit_actions import targets
from habit_actions import trains
from habit_world import Action
from habit_world import accepted
from habit_world import action
from habit_world import check
from habit_world import close
from habit_world import refused
from habit_world import reset_states
from keras import ops

import keras_vera


@action
class Bank(Action):
    """Makes a bank, uses and trains it, and throws it away."""

    fits: bool = True
    folder: bool = False
    seed: int = 0

    def do(self, world):
        made = []
        folder = world.path("_bank") if self.folder else None

        def call():
            made.append(keras_vera.AdapterBank(world.model, 3, folder))

        if world.truth is None:
            refused(world, call)
        elif accepted(world, call, must=False):
            self.use(world, made[0])

    def use(self, world, bank):
        path = world.path(".vera.safetensors")
        names = ["two"] * len(world.x)
        bank.add("one")
        if world.scope is None and world.model.trainable:
            keras_vera.save_adapter(world.model, path)
            bank.load("two", path)
            what = "loaded into a bank is not the model"
            close(self.outputs(world, bank, names), world.outputs(), what)
        else:
            bank.add("two")
        base = self.outputs(world, bank, [None] * len(world.x))
        close(base, world.base_outputs(), "base of a bank")
        fresh = self.outputs(world, bank, ["one"] * len(world.x))
        close(fresh, base, "fresh adapter of a bank")
        if self.fits and trains(world):
            self.train(world, bank, path, names)

    def outputs(self, world, bank, names):
        reset_states(world.model)
        y = bank.predict(world.x, names, batch_size=len(names), verbose=0)
        reset_states(world.model)
        return ops.convert_to_numpy(y)

    def train(self, world, bank, path, names):
        half = len(names) // 2
        before = self.outputs(world, bank, names)
        bank.model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=True)
        bank.fit(
            world.recipe.x(self.seed + 1),
            targets(world),
            adapters=["one"] * half + [None] * half,
            batch_size=len(names),
            verbose=0,
        )
        after = self.outputs(world, bank, names)
        close(after, before, "an absent adapter moved")
        one = self.outputs(world, bank, ["one"] * len(names))
        path = path.with_name("one_" + path.name)
        bank.save("one", path)
        model, _ = world.twin(world.start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keras_vera.load_adapter(model, path)
        close(world.outputs(model), one, "saved from a bank is not the bank")
        check(set(bank.names) == {"one", "two"}, "names of a bank")
