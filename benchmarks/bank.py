"""Many adapters in one batch, and many in one bank.

First, a batch with 1, 4, 16 and 64 different adapters: counted flops, and
times as ratios to the batch with one adapter in the same round, for a forward
pass and for a training step; on PyTorch beside LoRA in PEFT, which mixes
adapters in a forward pass by a loop over them (`adapter_names`). Then banks in
a folder of more and more adapters, of which every batch draws at random.

    KERAS_BACKEND=jax python benchmarks/bank.py
    KERAS_BACKEND=torch python benchmarks/bank.py --part mixed --rounds 20
"""

import argparse
import importlib.util
import os
import pathlib
import resource
import statistics
import tempfile
import time

import keras
import numpy as np
import step

import keras_vera

BACKEND = keras.config.backend()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["mixed", "folder", "both"])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--ffn", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument(
        "--distinct", type=int, nargs="+", default=[1, 4, 16, 64]
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[10, 100, 1000, 10_000, 100_000],
        help="adapters in the folder",
    )
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument(
        "--files",
        type=int,
        default=2000,
        help="different files; a larger folder has links to them",
    )
    parser.set_defaults(part="both", device="cpu", dtype="float32")
    return parser.parse_args()


def make_model(args):
    backbone = step.make_backbone(args)
    y = backbone(backbone.input)["sequence_output"]
    model = keras.Model(
        backbone.input, keras.layers.GlobalAveragePooling1D()(y)
    )
    keras_vera.enable_vera(backbone, rank=args.rank)
    return model


def random_adapter(bank, rng):
    return {
        name: rng.normal(0, 0.1, array.shape).astype("float32")
        for name, array in bank._files.fresh.items()
    }


# ---- One batch with several adapters.


def counted_flops(model, batch, target):
    """Returns the flops of a forward pass and of a training step."""
    trained = model.trainable_variables
    if BACKEND == "torch":
        from torch.utils.flop_counter import FlopCounterMode

        found = []
        for run in (
            lambda: model.predict_on_batch(batch),
            lambda: model.train_on_batch(batch, target),
        ):
            run()  # The first call also builds.
            with FlopCounterMode(display=False) as counter:
                run()
            found.append(counter.get_total_flops())
        return found
    if BACKEND == "tensorflow":
        import tensorflow as tf

        batch = {name: tf.constant(value) for name, value in batch.items()}

        @tf.function(jit_compile=True)
        def forward(batch):
            return model(batch)

        @tf.function(jit_compile=True)
        def gradients(batch):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(model(batch, training=True) ** 2)
            grads = tape.gradient(loss, [v.value for v in trained])
            return [tf.convert_to_tensor(grad) for grad in grads]

        return [step.xla_flops(f, batch) for f in (forward, gradients)]
    import jax

    def forward(values, frozen, batch):
        return model.stateless_call(values, frozen, batch)[0]

    def gradients(values, frozen, batch):
        return jax.grad(lambda v: (forward(v, frozen, batch) ** 2).mean())(
            values
        )

    state = (
        [v.value for v in trained],
        [v.value for v in model.non_trainable_variables],
    )
    return [
        jax.jit(function)
        .lower(*state, batch)
        .compile()
        .cost_analysis()["flops"]
        for function in (forward, gradients)
    ]


def ratios(steps, rounds, first):
    """Returns median and quartiles of times as ratios, and milliseconds."""
    seconds = step.measure(steps, rounds)
    rows = {}
    for name, own in seconds.items():
        found = sorted(a / b for a, b in zip(own, seconds[first]))
        quarter = len(found) // 4
        rows[name] = (
            statistics.median(found),
            found[quarter],
            found[-1 - quarter],
            1e3 * statistics.median(own),
        )
    return rows


def mixed_batches(args):
    bank = keras_vera.AdapterBank(make_model(args), max(args.distinct))
    rng = np.random.default_rng(0)
    count = max(args.distinct)
    for i in range(count):
        bank.add(f"user{i}")
    adapters = [random_adapter(bank, rng) for _ in range(count)]
    bank.model.write(list(range(1, count + 1)), adapters, [1] * count)
    bank.model.compile(
        keras.optimizers.Adam(1e-6), "mse", jit_compile=BACKEND != "torch"
    )
    x = step.batch_of(args)
    target = np.zeros((args.batch, args.hidden), "float32")
    batches = {
        n: {**x, "adapter_ids": (np.arange(args.batch) % n + 1).astype("int32")}
        for n in args.distinct
    }
    flops = {
        n: counted_flops(bank.model, b, target) for n, b in batches.items()
    }
    first = args.distinct[0]
    for i, (title, run) in enumerate(
        {
            "forward": bank.model.predict_on_batch,
            "training step": lambda b: bank.model.train_on_batch(b, target),
        }.items()
    ):
        steps = {n: lambda b=b: run(b) for n, b in batches.items()}
        print(f"\n{title}, VeRA {args.rank}, {args.batch} x {args.sequence}")
        for n, row in ratios(steps, args.rounds, first).items():
            same = flops[n][i] / flops[first][i]
            print_row(f"{n} adapters", same, row)
    if BACKEND == "torch" and importlib.util.find_spec("peft"):
        print("\nforward, LoRA 8 in PEFT, adapter_names")
        steps, flops = peft_forwards(args)
        for n, row in ratios(steps, args.rounds, first).items():
            print_row(f"{n} adapters", flops[n] / flops[first], row)


def print_row(name, flops, row):
    ratio, low, high, milliseconds = row
    print(
        f"{name:14} flops {flops:.4f}  time {ratio:.2f} "
        f"({low:.2f} to {high:.2f})  {milliseconds:.1f} ms"
    )


def peft_forwards(args):
    import peft
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=1000,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=args.ffn,
            max_position_embeddings=args.sequence,
        ),
        add_pooling_layer=False,
    )
    config = peft.LoraConfig(r=8, target_modules=["query", "value"])
    model = peft.get_peft_model(model, config, adapter_name="user0")
    for i in range(1, max(args.distinct)):
        model.add_adapter(f"user{i}", config)
    model.eval()  # PEFT mixes adapters in inference only.
    tokens = torch.tensor(step.batch_of(args)["token_ids"]).long()
    steps, flops = {}, {}
    for n in args.distinct:

        def run(names=[f"user{i % n}" for i in range(args.batch)]):
            with torch.no_grad():
                y = model(input_ids=tokens, adapter_names=names)
                return y.last_hidden_state.mean(1).numpy()

        with FlopCounterMode(display=False) as counter:
            run()
        steps[n], flops[n] = run, counter.get_total_flops()
    return steps, flops


# ---- More adapters than fit on the device.


def folders(args):
    model = make_model(args)
    rng = np.random.default_rng(0)
    x = step.batch_of(args)
    with tempfile.TemporaryDirectory() as root:
        source = pathlib.Path(root, "source")
        bank = keras_vera.AdapterBank(model, 1, folder=source)
        files = min(args.files, max(args.sizes))
        for i in range(files):
            bank._files.write(
                source / f"{i}.vera.safetensors", random_adapter(bank, rng), 1
            )
        size = (source / "0.vera.safetensors").stat().st_size
        print(
            f"\nfolders, {size:,} bytes per adapter, {args.slots} slots, "
            f"batches of {args.batch} with adapters at random"
        )
        for count in args.sizes:
            folder = pathlib.Path(root, str(count))
            folder.mkdir()
            for i in range(count):
                os.link(
                    source / f"{i % files}.vera.safetensors",
                    folder / f"user{i}.vera.safetensors",
                )
            start = time.perf_counter()
            bank = keras_vera.AdapterBank(model, args.slots, folder=folder)
            opened = time.perf_counter() - start
            names = np.array(bank.names)

            def run():
                adapters = rng.choice(names, args.batch).tolist()
                bank.predict(x, adapters, batch_size=args.batch)

            run()
            seconds = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            batch = rng.choice(names, args.batch).tolist()
            # Of this process, whatever else the machine does.
            start = time.process_time()
            for _ in range(100):
                bank._register.check_known(batch)
            looked = (time.process_time() - start) / 100
            share = looked / statistics.median(seconds)
            print(
                f"{count:8,} adapters: opened in {opened:.2f} s, "
                f"{args.batch / statistics.median(seconds):.0f} examples/s, "
                f"peak memory of the process {peak:.2f} GB; whether files "
                f"have changed: {1e6 * looked / len(set(batch)):.1f} "
                f"microseconds each, {share:.2%} of a batch"
            )


def main():
    args = parse_arguments()
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(os.cpu_count())
    if args.part != "folder":
        mixed_batches(args)
    if args.part != "mixed":
        folders(args)
    print(f"\nbackend {BACKEND}, {step.device(args)}")


if __name__ == "__main__":
    main()
