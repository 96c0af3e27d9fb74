"""What the first training step takes to compile in a model of many layers.

A small Llama trains by each method: the final normalization alone, Keras' LoRA
and VeRA, both on all linear layers. Compiling takes what the first step takes
beyond the second one, as a ratio to that of Keras' LoRA with an optimizer that
was built before. On TensorFlow, the operations of the traced step are counted.

    KERAS_BACKEND=tensorflow python benchmarks/first_step.py
"""

import argparse
import gc
import time

import keras
import keras_hub
import numpy as np

import keras_vera

TOKENS = 96
VOCABULARY = 4096
METHODS = ("norm", "lora", "vera", "vera-blocks")
FLOOR = "lora", True


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    return parser.parse_args()


def make(args, method):
    keras.backend.clear_session()
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=args.layers,
        num_query_heads=9,
        num_key_value_heads=3,
        hidden_dim=args.hidden,
        intermediate_dim=args.hidden * 8 // 3,
        tie_word_embeddings=True,
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    structure = "blocks" if method == "vera-blocks" else "dense"
    keras_vera.enable_vera(
        model, args.rank, targets="all-linear", structure=structure
    )
    if method == "lora":
        adapted = {v.path.split("/")[-2] for v in model.trainable_variables}
        keras_vera.disable_vera(model)
        backbone.enable_lora(8, target_layer_names=sorted(adapted))
    elif method == "norm":
        keras_vera.disable_vera(model)
        backbone.trainable = False
        backbone.layer_norm.trainable = True
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, weighted_metrics=[])
    return model


def batch():
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (8, TOKENS + 1))
    mask = np.ones((8, TOKENS), bool)
    return {"token_ids": tokens[:, :-1], "padding_mask": mask}, tokens[:, 1:]


def seconds_to_compile(model, is_built):
    if is_built:
        model.optimizer.build(model.trainable_variables)
    x, y = batch()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model.train_on_batch(x, y)
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def operations(model):
    """Returns how many operations TensorFlow traces for a step, or None."""
    if keras.config.backend() != "tensorflow":
        return None
    import tensorflow as tf

    model.optimizer.build(model.trainable_variables)
    data = keras.tree.map_structure(tf.constant, batch())
    graph = tf.function(model.train_step).get_concrete_function(data).graph
    return len(graph.get_operations())


def main():
    args = parse_arguments()
    if keras.config.backend() == "torch":
        raise SystemExit("PyTorch compiles no step. Take another backend.")
    found, counts = {}, {}
    for method in args.methods:
        counts[method] = operations(make(args, method))
        for is_built in (True, False):
            found[method, is_built] = seconds_to_compile(
                make(args, method), is_built
            )
            gc.collect()
    print(f"{args.layers} layers, backend {keras.config.backend()}")
    print("| | operations | compiling: built before, by the step |")
    print("|---|---|---|")
    floor = found.get(FLOOR, next(iter(found.values())))
    for method in args.methods:
        shown = ", ".join(
            f"{found[method, is_built] / floor:.2f} "
            f"({found[method, is_built]:.0f} s)"
            for is_built in (True, False)
        )
        count = "" if counts[method] is None else f"{counts[method]:,}"
        print(f"| {method} | {count} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
