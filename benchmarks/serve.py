"""Loads `examples/serve.py` on this machine, and checks every answer.

First, requests of 64 users at a time, of whom each has an adapter of his own,
while others come, change and go, and in the middle a replica is killed. Then
latency and throughput, with 1, 16 and 64 distinct users in flight, and of
single requests of one user each.

    KERAS_BACKEND=torch python benchmarks/serve.py --requests 10000
"""

import argparse
import collections
import http.client
import json
import math
import os
import pathlib
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import keras
import numpy as np

import keras_vera

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "serve.py"
TEXTS = ["a b c", "d e", "h g f e d c b a", "c c c", "b", "f a d e", "g h", ""]
ENDING = ".vera.safetensors"
ROUNDING = 1e-4


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--in_flight", type=int, default=64)
    parser.add_argument("--adapters", type=int, nargs="+", default=[64, 10_000])
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=2000, help="requests")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--server", choices=["ray", "plain"])
    parser.set_defaults(server="ray")
    return parser.parse_args()


def make_adapters(root, count):
    """Writes random adapters; returns what each gives for each text."""
    sys.argv = [str(SCRIPT)]
    example = runpy.run_path(str(SCRIPT), run_name="example")
    model = example["make_model"](example["parse_arguments"]())
    rng = np.random.default_rng(0)
    files, outputs = [], []
    for i in range(count):
        for v in model.trainable_variables:
            v.assign(rng.normal(0, 0.5, v.shape))
        files.append(root / f"{i}{ENDING}")
        keras_vera.save_adapter(model, files[-1])
    fresh = example["make_model"](example["parse_arguments"]())
    for file in files:
        keras_vera.load_adapter(fresh, file)
        outputs.append(
            keras.ops.convert_to_numpy(fresh.predict(TEXTS, verbose=0))
        )
    outputs = np.array(outputs)
    apart = min(
        np.abs(a - b).max(axis=-1).min()
        for i, a in enumerate(outputs)
        for b in outputs[:i]
    )
    print(f"{count} adapters, whose answers differ by {apart:.3f} at least")
    assert apart > 10 * ROUNDING
    return files, outputs


class Server:
    def __init__(self, args, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--folder", str(folder)]
            + ["--server", args.server, "--replicas", str(args.replicas)]
            + ["--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while True:
            time.sleep(1)
            try:
                if Client(self).call("GET", "/health")[0] == 200:
                    return
            except OSError:
                if self._process.poll() is not None:
                    sys.exit("The service has not started.")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        # Processes of a shell's background do not hear of SIGINT.
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


class Client:
    """One connection; it tries again where it breaks or a replica is gone."""

    def __init__(self, server):
        self._server, self._connection = server, None
        self.retries = 0

    def call(self, method, path, content=b"", tries=1):
        for last in reversed(range(tries)):
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection(
                        "127.0.0.1", self._server.port, timeout=120
                    )
                self._connection.request(method, path, content)
                response = self._connection.getresponse()
                text = response.read()
                body = json.loads(text)
                if isinstance(body, dict):
                    return response.status, body
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._connection = None
                if not last:
                    raise OSError(f"no answer: {error}") from error
            # Ray's own error page: the replica died.
            self.retries += 1
            time.sleep(0.2)
        raise OSError(f"no answer: {text[:200]}")

    def ask(self, user, text):
        content = json.dumps({"user": user, "text": text}).encode()
        return self.call("POST", "/", content, tries=50)


def in_parallel(count, function):
    """Calls a function in threads, with their numbers; raises what they do."""
    errors = []

    def run(number):
        try:
            function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[i]) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check(args, server, files, outputs):
    """Sends requests while adapters change and a replica dies."""
    counts, lock = collections.Counter(), threading.Lock()
    over, pids = threading.Event(), set()

    def is_answer(scores, adapters, text):
        given = outputs[adapters, text]
        return np.abs(given - np.array(scores)).max(-1).min() < ROUNDING

    def ask(number):
        rng, client = random.Random(number), Client(server)
        for _ in range(math.ceil(args.requests / args.in_flight)):
            kind = rng.random()
            text = rng.randrange(len(TEXTS))
            adapter = rng.randrange(len(files))
            if kind < 0.8:
                status, body = client.ask(f"user{adapter}", TEXTS[text])
                right = status == 200 and is_answer(
                    body["scores"], [adapter], text
                )
                what = "fixed"
            elif kind < 0.9:
                status, body = client.ask("guest", TEXTS[text])
                right = status == 404 or is_answer(
                    body["scores"], slice(None), text
                )
                what = f"guest {status}"
            elif kind < 0.95:
                status, body = client.ask(f"nobody{adapter}", TEXTS[text])
                right, what = status == 404, "unknown"
            else:
                bad = rng.choice([7, None, ["a"], {}, "\ud800"])
                status, body = client.ask(f"user{adapter}", bad)
                right, what = status == 422, "bad text"
            with lock:
                counts[what] += 1
                counts["WRONG"] += not right
                if not right:
                    print("WRONG", what, status, body)
                if "pid" in body:
                    pids.add(body["pid"])
                counts["all"] += 1
                dies = counts["all"] == args.requests // 2
            if dies and args.server == "ray":
                os.kill(body.get("pid") or next(iter(pids)), signal.SIGKILL)
        with lock:
            counts["retries"] += client.retries

    def change():
        """Another user comes, changes and goes."""
        rng, client = random.Random(0), Client(server)
        while not over.is_set():
            content = rng.choice(files).read_bytes()
            for method, body in (("PUT", content), ("DELETE", b"")):
                for _ in range(rng.randint(1, 2) if method == "PUT" else 1):
                    status, _ = client.call(method, "/users/guest", body, 50)
                    # A call that a dying replica had done may come again.
                    assert status in (200, 404), status
                    counts[f"{method} guest"] += 1
        assert client.call("PUT", "/users/guest", b"no file")[0] == 400

    changes = threading.Thread(target=change)
    changes.start()
    start = time.perf_counter()
    in_parallel(args.in_flight, ask)
    seconds = time.perf_counter() - start
    over.set()
    changes.join()
    print(f"{dict(counts)} by {len(pids)} replicas in {seconds:.0f} s")
    return counts["WRONG"] == 0


def measure(args, server, distinct, in_flight):
    """Prints latency and throughput with so many users in flight."""
    times, lock = [], threading.Lock()

    def ask(number):
        client = Client(server)
        for i in range(max(1, args.rounds // in_flight)):
            user = (number + i * in_flight) % distinct
            start = time.perf_counter()
            status, _ = client.ask(f"user{user}", TEXTS[i % len(TEXTS)])
            assert status == 200, status
            with lock:
                times.append(time.perf_counter() - start)

    start = time.perf_counter()
    in_parallel(in_flight, ask)
    seconds = time.perf_counter() - start
    p50, p99 = 1e3 * np.percentile(times, [50, 99])
    print(
        f"{distinct:4} users, {in_flight:3} in flight: "
        f"{len(times) / seconds:6.0f} requests/s, median {p50:.0f} ms, "
        f"99% within {p99:.0f} ms"
    )


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        files, outputs = make_adapters(root, args.users)
        bank = root / "bank"
        bank.mkdir()
        for i, file in enumerate(files):
            os.link(file, bank / f"user{i}{ENDING}")
        with Server(args, bank) as server:
            right = check(args, server, files, outputs)
            there = len(files)
            for count in args.adapters:
                for i in range(there, count):
                    os.link(files[i % len(files)], bank / f"user{i}{ENDING}")
                there = max(there, count)
                print(f"{there:,} adapters in the folder")
                for distinct in args.distinct:
                    measure(args, server, distinct, args.in_flight)
                measure(args, server, there, args.in_flight)
                measure(args, server, 1, 1)
    print(f"backend {keras.backend.backend()}, {args.replicas} replicas")
    if not right:
        sys.exit("FAILED")


if __name__ == "__main__":
    main()
