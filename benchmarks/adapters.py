"""What an adapter costs beside training: to make, to keep, to change.

Enables VeRA on a BERT of base size and prints the seconds that making A and B
takes, and that everything else takes; the bytes of adapter files; and the
seconds to save and to load one.

    python benchmarks/adapters.py
"""

import argparse
import os
import statistics
import tempfile
import time

import keras
import keras_hub
import numpy as np

import keras_vera


def seconds(function, repeats=5):
    """Returns the median of the seconds that calls of `function` take."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--targets", default="attention-qv")
    args = parser.parse_args()
    model = keras_hub.models.BertBackbone(
        vocabulary_size=30522,
        num_layers=args.layers,
        num_heads=args.hidden // 64,
        hidden_dim=args.hidden,
        intermediate_dim=4 * args.hidden,
    )
    settings = {"rank": args.rank, "targets": args.targets}
    backend = keras.config.backend()
    print(f"BERT of {model.count_params():,} numbers, backend {backend}")

    def enable():
        keras_vera.enable_vera(model, **settings)

    def enable_and_disable():
        enable()
        keras_vera.disable_vera(model)

    enable()
    layers = [x for x in model._flatten_layers() if hasattr(x, "projection")]
    projection = layers[0].projection
    m, n = projection.vera_kernel_a.shape[0], projection.vera_kernel_b.shape[1]
    keras_vera.disable_vera(model)
    making = seconds(
        lambda: keras_vera.SharedProjection(rank=args.rank).reserve(m, n)
    )
    megabytes = 4e-6 * args.rank * (m + n)
    print(
        f"A and B: {megabytes:.1f} MB in {making:.3f} s, "
        f"{megabytes / making:.0f} MB/s"
    )
    both = seconds(enable_and_disable)
    print(f"enable and disable, without that: {both - making:.3f} s")

    enable()
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    numbers = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    entries = len(model.trainable_variables)
    arrays = [np.array(v) for v in model.trainable_variables]

    def switch():
        for variable, array in zip(model.trainable_variables, arrays):
            variable.assign(array)

    tokens = rng.integers(1000, 30000, (4, 32))
    x = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }

    def outputs():
        return keras.ops.convert_to_numpy(model(x)["sequence_output"])

    exact = outputs()
    with keras_vera.base_model(model):
        effect = np.abs(outputs() - exact).max()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bert.vera.safetensors")
        for dtype, width in (("bfloat16", 2), ("float16", 2), ("float32", 4)):
            saving = seconds(
                lambda: keras_vera.save_adapter(model, path, dtype=dtype)
            )
            size = os.path.getsize(path)
            print(
                f"{dtype}: {size:,} bytes for {numbers:,} numbers, that is "
                f"{size - width * numbers:,} more ({entries} entries); saved "
                f"in {1e3 * saving:.0f} ms"
            )
            keras_vera.load_adapter(model, path)
            error = np.abs(outputs() - exact).max() / effect
            print(f"{dtype}: changes outputs by {error:.1e} of what VeRA does")
            switch()
        loading = seconds(lambda: keras_vera.load_adapter(model, path))
        print(f"loaded into the adapted model in {1e3 * loading:.0f} ms")
    print(f"switched from memory in {1e3 * seconds(switch):.1f} ms")


if __name__ == "__main__":
    main()
