"""Loss against the rate of a new head, for heads on inputs of several sizes.

Each head is on the first token of MiniLM, as the text example has it, whose
query and value projections have VeRA at the default rate. Prints for each rate
of the head the validation loss; for each head the number of its inputs, and
their mean size before training. Options that are not its own go to the example.

    python benchmarks/rates_of_heads.py
    python benchmarks/rates_of_heads.py --steps 300 --rates 0.003 0.01
"""

import argparse
import tempfile

import keras
import numpy as np
import tasks
from keras import layers

import keras_vera

FEW = 256  # Sentences on which the inputs of the head are measured.


def first_token(x):
    return x


def enlarged(x):
    return layers.Rescaling(2.5)(x)


def two_layers(x):
    """As KerasHub's classifier of RoBERTa."""
    x = layers.Dense(x.shape[-1], activation="tanh")(x)
    return layers.Dropout(0.1)(x)


def wide(x):
    return layers.Dense(
        4 * x.shape[-1],
        activation="tanh",
        trainable=False,
        kernel_initializer=keras.initializers.RandomNormal(0, 0.3, seed=1),
    )(x)


HEADS = {
    "first token": first_token,
    "enlarged": enlarged,
    "two layers": two_layers,
    "wide": wide,
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--heads", nargs="+", choices=HEADS, default=list(HEADS)
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[0.003, 0.01, 0.02, 0.05]
    )
    return parser.parse_known_args()


def make_model(task, head):
    """Returns a classifier, its backbone, and what gives its head's inputs."""
    classifier = task.make_model(0)
    backbone = classifier.backbone
    classes = classifier.output_shape[-1]
    keras.utils.set_random_seed(0)
    token = backbone.output["sequence_output"][:, 0]
    x = HEADS[head](layers.Dropout(0.1)(token))
    model = keras.Model(backbone.input, layers.Dense(classes)(x))
    return model, backbone, keras.Model(backbone.input, x)


def main():
    args, options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        task = tasks.load("docstrings", folder, options=options)
        few = tasks.first(task.validation, FEW)[0]
        for head in args.heads:
            inputs = make_model(task, head)[-1]
            size = np.abs(inputs.predict(few, verbose=0))
            losses = []
            for rate in args.rates:
                keras.backend.clear_session()
                model, backbone, _ = make_model(task, head)
                keras_vera.enable_vera(
                    backbone, rank=256, structure="blocks", seed=0
                )
                optimizer = keras_vera.vera_optimizer(
                    rest=rate, total_steps=args.steps
                )
                tasks.train(
                    *(task, model, optimizer, args.steps, args.batch_size),
                    seed=0,
                )
                loss = tasks.measure(model, task.validation, args.batch_size)
                losses.append(f"{rate:g}: {loss['loss']:.3f}")
            print(
                f"{head}: {size.shape[-1]} inputs of {size.mean():.2f}, "
                f"{args.steps} steps: {', '.join(losses)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
