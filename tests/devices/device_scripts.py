"""Runs scripts beside this file, in processes with simulated devices."""

import os
import pathlib
import socket
import subprocess
import sys

import scripts

_FOLDER = pathlib.Path(__file__).parent
# Two processes on few cores may take long to meet.
_LIMIT = 600


def run(script, *arguments, processes=1, **environment):
    """Runs a script, in one process or several; raises if one fails.

    Several get the number of theirs and a port that is free as the first
    arguments.

    Returns:
        A list of what each printed.
    """
    starts = [()]
    if processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        starts = [(number, port) for number in range(processes)]
    if "XLA_FLAGS" in environment:
        flags = os.environ.get("XLA_FLAGS", ""), environment["XLA_FLAGS"]
        environment["XLA_FLAGS"] = " ".join(flags)
    running = [
        subprocess.Popen(
            [sys.executable, script, *map(str, (*start, *arguments))],
            cwd=_FOLDER,
            env=scripts.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for start in starts
    ]
    try:
        done = [process.communicate(timeout=_LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, done):
        assert process.returncode == 0, errors[-3000:]
    return [printed for printed, _ in done]
