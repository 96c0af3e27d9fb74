"""Several processes on the folder of one bank; every answer is checked.

Writers train, replace, add, rename and remove adapters at random, and keep a
copy of each version. Readers predict meanwhile. Afterwards each answer must be
that of a version which the folder had at some time during the call, to
rounding; an error, of a name that it did not have at some time. Names that
always exist must never give one. Writers also try to add the same names: one
of them must win.

    KERAS_BACKEND=torch python benchmarks/folder.py --minutes 10
"""

import argparse
import collections
import itertools
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np

import keras_vera

ENDING = ".vera.safetensors"
ROUNDING = 1e-4
FOREVER = float("inf")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--steps", type=int, help="of each process, instead of minutes"
    )
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--names", type=int, default=6, help="of each writer")
    parser.add_argument("--capacity", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--role", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model():
    """Returns a small classifier, the same in all processes."""
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    y = keras.layers.Dense(16, activation="tanh", name="up")(x)
    y = keras.layers.Dense(12, activation="tanh", name="down")(y)
    backbone = keras.Model(x, y)
    model = keras.Model(x, keras.layers.Dense(3, name="head")(backbone(x)))
    rng = np.random.default_rng(5)
    for v in model.weights:
        v.assign(rng.normal(0, 0.6, v.shape))
    keras_vera.enable_vera(backbone, rank=8, targets="all-linear")
    return model


def example():
    return np.random.default_rng(7).normal(size=(1, 6)).astype("float32")


# ---- Processes.


class Log:
    def __init__(self, path):
        self._file = open(path, "w")

    def add(self, start, *what):
        """Notes what happened between `start` and now."""
        # One clock for all processes.
        line = [start, time.monotonic(), *what]
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Writer:
    def __init__(self, args, root, own):
        self.folder, self.own = root / "bank", own
        self.versions = root / "versions"
        self.log = Log(root / f"writer{own}.log")
        self.rng = random.Random(args.seed + int(own))
        self.model = make_model()
        self.bank = keras_vera.AdapterBank(
            self.model, args.capacity, folder=self.folder
        )
        self.bank.model.compile(
            keras.optimizers.SGD(0.5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.fixed = [f"fixed {own} {i}" for i in range(args.names)]
        self.moving = {f"moving {own} {i}": None for i in range(args.names)}
        self.contested = dict.fromkeys(["contested 0", "contested 1"])
        self.count = 0

    def file_of(self, name):
        return self.bank._register.folder.file(name)

    def note(self, start, action, name, there=True):
        """Keeps the version that a name has now, or notes that it has none."""
        if there:
            self.count += 1
            version = f"{self.own}-{self.count}"
            # Nobody else writes this name.
            shutil.copy(self.file_of(name), self.versions / (version + ENDING))
        self.log.add(start, action, name, version if there else None)

    def random_file(self):
        for v in self.model.trainable_variables:
            v.assign(
                np.random.default_rng(self.rng.getrandbits(32)).normal(
                    0, 0.6, v.shape
                )
            )
        path = self.versions / f"next{self.own}{ENDING}"
        keras_vera.save_adapter(self.model, path)
        return path

    def start(self):
        for name in self.fixed:
            start = time.monotonic()
            self.bank.load(name, self.random_file())
            self.note(start, "add", name)

    def step(self):
        action = self.rng.choice(
            ["fit", "replace", "move", "rename", "contest"]
        )
        getattr(self, action)()

    def fit(self):
        names = self.rng.sample(self.fixed, 3)
        labels = [self.rng.randrange(3) for _ in names]
        start = time.monotonic()
        self.bank.fit(
            np.repeat(example(), 3, axis=0),
            np.array(labels),
            adapters=names,
            verbose=0,
        )
        for name in names:
            self.note(start, "fit", name)

    def replace(self):
        name = self.rng.choice(self.fixed)
        file = self.random_file()
        start = time.monotonic()
        self.bank.load(name, file, replace=True)
        self.note(start, "replace", name)

    def move(self):
        name = self.rng.choice(list(self.moving))
        there = self.moving[name]
        file = None if there else self.random_file()
        start = time.monotonic()
        if there:
            self.bank.remove(name)
        else:
            self.bank.load(name, file)
        self.moving[name] = not there
        self.note(start, "remove" if there else "add", name, not there)

    def rename(self):
        there = [name for name, x in self.moving.items() if x]
        absent = [name for name, x in self.moving.items() if not x]
        if not there or not absent:
            return
        old, new = self.rng.choice(there), self.rng.choice(absent)
        start = time.monotonic()
        self.bank.rename(old, new)
        self.moving.update({old: False, new: True})
        self.note(start, "rename", old, False)
        self.note(start, "rename", new)

    def contest(self):
        name = self.rng.choice(list(self.contested))
        mine = self.contested[name]
        file = None if mine else self.random_file()
        start = time.monotonic()
        if mine:
            self.bank.remove(name)
            self.contested[name] = False
            self.note(start, "remove", name, False)
            return
        try:
            self.bank.load(name, file)
        except ValueError as error:
            if "already" not in str(error):
                raise
            self.log.add(start, "refused", name, None)
        else:
            self.contested[name] = True
            self.note(start, "win", name)


class Reader:
    def __init__(self, args, root, own):
        self.log = Log(root / f"reader{own}.log")
        self.rng = random.Random(args.seed + 1000 + int(own))
        self.bank = keras_vera.AdapterBank(
            make_model(), args.capacity, folder=root / "bank"
        )
        self.fixed, others = [], ["contested 0", "contested 1"]
        for writer in range(args.writers):
            for i in range(args.names):
                self.fixed.append(f"fixed {writer} {i}")
                others.append(f"moving {writer} {i}")
        self.all = self.fixed + others

    def start(self):
        pass

    def step(self):
        by_row = self.rng.random() < 0.5
        names = self.rng.choices(self.all if by_row else self.fixed, k=8)
        start = time.monotonic()
        answers = self.bank.predict(
            np.repeat(example(), 8, axis=0), names, return_exceptions=by_row
        )
        answers = [
            type(x).__name__ if isinstance(x, Exception) else x.tolist()
            for x in answers
        ]
        self.log.add(start, names, answers)


def work(args):
    """A process: starts, says so, waits for a line, and goes on until it has
    done its steps, or a file says that it is over."""
    role, root, own = args.role
    root = pathlib.Path(root)
    process = {"writer": Writer, "reader": Reader}[role](args, root, own)
    process.start()
    print("ready", flush=True)
    sys.stdin.readline()
    done = itertools.count()
    while next(done) != args.steps and not (root / "over").exists():
        process.step()


# ---- Checks.


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def histories(root, writers):
    """Returns by name what it was when: `(version, from, until)`.

    Both at their widest: from the beginning of a call, to the end of the next.
    """
    found = collections.defaultdict(list)
    counts = collections.Counter()
    events = []
    for writer in range(writers):
        events += read_log(root / f"writer{writer}.log")
    for start, end, action, name, version in sorted(events, key=lambda e: e[1]):
        counts[action] += 1
        if action == "refused":
            continue
        history = found[name]
        if not history:
            history.append([None, 0, FOREVER])
        if name.startswith("contested") and action == "win":
            assert history[-1][0] is None, (name, "has two owners")
        history[-1][2] = end
        history.append([version, start, FOREVER])
    return found, counts


def outputs_of_versions(root):
    model = make_model()
    return {
        path.name[: -len(ENDING)]: _output(model, path)
        for path in (root / "versions").glob("*-*" + ENDING)
    }


def _output(model, path):
    keras_vera.load_adapter(model, path)
    return model.predict_on_batch(example())[0]


def check(root, args):
    history, counts = histories(root, args.writers)
    outputs = {
        version: np.array(keras.ops.convert_to_numpy(y))
        for version, y in outputs_of_versions(root).items()
    }
    answers, errors, wrong, news = 0, 0, [], 0
    for reader in range(args.readers):
        seen = {}
        for start, end, names, found in read_log(root / f"reader{reader}.log"):
            for name, answer in zip(names, found):
                possible = {
                    version
                    for version, since, until in history.get(
                        name, [(None, 0, FOREVER)]
                    )
                    if since <= end and start <= until
                }
                if isinstance(answer, str):
                    errors += 1
                    right = None in possible
                else:
                    answers += 1
                    differences = [
                        np.abs(outputs[version] - answer).max()
                        for version in possible - {None}
                    ]
                    right = min(differences, default=1) < ROUNDING
                    news += name in seen and seen[name] != answer
                    seen[name] = answer
                if not right:
                    wrong.append((reader, start, end, name, answer, possible))
    lost = [
        name
        for name, entries in history.items()
        if not is_on_disk(root, name, entries[-1][0])
    ]
    print(
        f"{len(outputs):,} versions ("
        + ", ".join(f"{n:,} {action}" for action, n in sorted(counts.items()))
        + f"); {answers:,} answers and {errors:,} errors of absent names "
        f"checked; an answer was another than the one before {news:,} times"
    )
    print(f"wrong: {len(wrong)}, lost: {len(lost)}")
    for line in wrong[:10] + lost[:10]:
        print(line)
    return not wrong and not lost


def is_on_disk(root, name, version):
    """Says whether the folder has, in the end, the last version of a name."""
    bank = keras_vera.bank.folder.Folder(root / "bank")
    if version is None:
        return bank.version(name) is None
    kept = (root / "versions" / (version + ENDING)).read_bytes()
    return pathlib.Path(bank.file(name)).read_bytes() == kept


def main():
    args = parse_arguments()
    if keras.backend.backend() == "torch":
        import torch

        # The processes are many, and the batches small.
        torch.set_num_threads(1)
    if args.role:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "bank").mkdir()
        (root / "versions").mkdir()
        roles = [("writer", i) for i in range(args.writers)]
        roles += [("reader", i) for i in range(args.readers)]
        processes = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--role", role, folder, str(i)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for role, i in roles
        ]
        started = all(p.stdout.readline() == "ready\n" for p in processes)
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        if started and args.steps is None:
            time.sleep(60 * args.minutes)
        if not started or args.steps is None:
            (root / "over").touch()
        failed = [p.wait() for p in processes] != [0] * len(processes)
        if failed or not started or not check(root, args):
            sys.exit("FAILED")


if __name__ == "__main__":
    main()
