"""All that users do to a model, and a sequence of it."""

import keras
from habit_actions import NAME as NAME
from habit_actions import AddHead as AddHead
from habit_actions import Base as Base
from habit_actions import Compile as Compile
from habit_actions import Disable as Disable
from habit_actions import Enable as Enable
from habit_actions import Evaluate as Evaluate
from habit_actions import Merge as Merge
from habit_actions import Predict as Predict
from habit_actions import Quantize as Quantize
from habit_actions import Spoil as Spoil
from habit_actions import Toggle as Toggle
from habit_actions import Train as Train
from habit_banks import Bank as Bank
from habit_files import Copy as Copy
from habit_files import Load as Load
from habit_files import LoadWeights as LoadWeights
from habit_files import Save as Save
from habit_files import SaveModel as SaveModel
from habit_files import SaveWeights as SaveWeights
from habit_world import Action as Action
from habit_world import World


def run(recipe, actions, folder):
    """Does one action after the other; an error says at which it came."""
    keras.utils.set_random_seed(0)
    step = 0
    try:
        world = World(recipe, folder)
        for step, action in enumerate(actions):
            action.run(world)
    except Exception as error:
        error.step = step
        raise
