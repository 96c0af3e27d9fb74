"""Kills writers of a bank's folder; prints what it has found.

Each dies before a call of the operating system, so that every call has its
turn; then as many are killed from outside, at any moment.
Without a model: only the files matter. A writer is a fork of this process,
which has done all imports already.

    python folder_killed.py FOLDER SEED
"""

import collections
import linecache
import os
import random
import re
import signal
import sys
import time

import numpy as np

from keras_vera.bank import folder as bank_folder
from keras_vera.bank.folder import Folder
from keras_vera.files import disk
from keras_vera.files import format as adapter_format

FILES = {disk.__file__, bank_folder.__file__}
HEADER = {
    "format_version": adapter_format.FORMAT_VERSION,
    "rank": 4,
    "seed": 0,
    "structure": "dense",
    "d_initial": 0.1,
    "dropout": 0.0,
    "targets": "all-linear",
    "bases": ["base"],
    "layers": {
        "base/dense": {
            "kernel_shape": [8, 3000],
            "kernel_dtype": "float32",
            "kernel_fingerprint": "0123456789abcdef",
            "output_offset": 0,
        }
    },
    "projection_sha256": "0" * 64,
}


def content(number):
    """Returns an adapter whose numbers are all the same."""
    return adapter_format.encoded(
        HEADER,
        {
            "base/dense/vera_lambda_d": np.full(4, number, "float32"),
            "base/dense/vera_lambda_b": np.full(3000, number, "float32"),
        },
    )


def write(path, rng, contents):
    """Makes every kind of change, one after the other.

    `ann` is always there, `bob` under one of two names; `eve` comes and goes.
    """
    folder = Folder(path)
    bob, other = "bob", "rob"
    if folder.version(bob) is None:
        bob, other = other, bob
    folder.replace("ann", rng.choice(contents))
    folder.update(
        {"ann": rng.choice(contents), bob: rng.choice(contents)},
        {name: folder.version(name) for name in ("ann", bob)},
    )
    try:
        folder.rename(bob, other)
    except FileExistsError:
        # One was killed before the old name was gone.
        folder.remove(bob)
    if folder.version("eve") is None:
        folder.add("eve", rng.choice(contents))
    else:
        folder.remove("eve")


def die_at(last, function, *arguments):
    """Calls a function; dies before the system call with the number `last`.

    Returns:
        How many lines of the code that writes, with a system call each, ran.
    """
    count = 0

    def trace(frame, event, _):
        nonlocal count
        file = frame.f_code.co_filename
        if file not in FILES:
            return None
        if event == "line":
            line = linecache.getline(file, frame.f_lineno)
            if re.search(r"\b(os|file|fcntl|disk)\.\w+\(", line):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    function(*arguments)
    sys.settrace(None)
    return count


def check(folder):
    """Every adapter is whole, and none is lost."""
    found = {}
    for name in folder.names():
        _, tensors = adapter_format.read(folder.file(name))
        numbers = np.concatenate(list(tensors.values()))
        assert len(numbers) == 3004 and len(set(numbers.tolist())) == 1, name
        found[name] = numbers[0]
    assert "ann" in found and ("bob" in found or "rob" in found), found
    assert set(found) <= {"ann", "bob", "rob", "eve"}, found
    return found


def main():
    path, seed = sys.argv[1], int(sys.argv[2])
    rng = random.Random(seed)
    contents = [content(number) for number in range(20)]
    folder = Folder(path)
    folder.add("ann", contents[0])
    folder.add("bob", contents[0])
    # With `eve`, and without.
    calls = max(die_at(0, write, path, rng, contents) for _ in range(2))
    seen, before = collections.Counter(), None
    for i in range(2 * calls):
        ready, tell = os.pipe()
        writer = os.fork()
        if not writer:
            own = random.Random(seed + i)
            os.write(tell, b"!")
            while True:
                last = i + 1 if i < calls else 0
                die_at(last, write, path, own, contents)
        os.read(ready, 1)
        os.close(ready)
        os.close(tell)
        if i >= calls:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        found = check(folder)
        seen["both names of one"] += "bob" in found and "rob" in found
        seen["eve is there"] += "eve" in found
        seen["changed"] += found != before
        before = found
        left = [x for x in os.listdir(path) if x.endswith(".tmp")]
    seen["left behind"] = len(left)
    # What they left behind goes when it is old.
    for name in left:
        os.utime(os.path.join(path, name), (0, 0))
    Folder(path)
    assert not [x for x in os.listdir(path) if x.endswith(".tmp")]
    print(f"{2 * calls} writers killed: {dict(seen)}")


if __name__ == "__main__":
    main()
