"""Kills launched runs at random moments, two at once in every other one, and compares the codes.

Each run quantizes the digits network in a directory of its own. Up to three times it is killed at a
random moment; in every other run a second process starts in the same directory. Then it is finished
and compared with a run that nobody disturbed. A line a run goes to FOLDER/soak.jsonl; the same
command goes on after the last one. Processes are forked from one that has everything imported.

    python -m tests.launch.soak FOLDER RUNS
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from aquant_jax.storage import archive
from launch import quantize
from tests.launch.conftest import DIGITS, SMALL
from tests.support.process import REPOSITORY

LONGEST = 8.0  # seconds before a kill
EXIT_CODES = (0, 2, -signal.SIGKILL)  # finished, refused, killed


def fork(work: Callable[[], int], log: Path) -> int:
    """The process id of a child that exits with the result of `work`."""
    if child := os.fork():
        return child
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    finally:
        os._exit(code)


def start(path: Path, log: Path) -> int:
    """The process id of a launched run."""
    argv = ["quantize", DIGITS, *SMALL, f"--workdir={path}"]
    return fork(lambda: quantize.main(argv), log)


def wait(child: int) -> int:
    """The exit code of a process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def disturb(path: Path, log: Path, draw: random.Random, racing: bool) -> list[int]:
    """Starts one or two processes, kills them at random moments; their exit codes."""
    children = [start(path, log) for _ in range(2 if racing else 1)]
    ends = sorted((draw.uniform(0, LONGEST), child) for child in children)
    began = time.monotonic()
    for end, child in ends:
        time.sleep(max(0.0, began + end - time.monotonic()))
        os.kill(child, signal.SIGKILL)  # one that has ended stays until it is waited for
    return [wait(child) for child in children]


def digest(path: Path, log: Path) -> str:
    """SHA-256 of the arrays of the network of a finished run, taken in a process of its own."""

    def write() -> int:
        stored = archive.read(path / "quantized")
        digest = hashlib.sha256()
        for name, array in sorted(stored.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        (path / "digest").write_text(digest.hexdigest())
        return 0

    assert wait(fork(write, log)) == 0  # tensorstore, once used, lets its process not fork
    return (path / "digest").read_text()


def soak(folder: Path, runs: int) -> None:
    """Runs what is missing of `runs`; raises an AssertionError at the first that is not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reference, results, log = (folder / name for name in ("reference", "soak.jsonl", "soak.log"))
    assert wait(start(reference, log)) == 0
    expected = digest(reference, log)
    done = len(results.read_text().splitlines()) if results.exists() else 0
    for number in range(done, runs):
        draw, path = random.Random(number), folder / f"run{number}"
        shutil.rmtree(path, ignore_errors=True)
        racing = number % 2 == 1
        codes = [disturb(path, log, draw, racing) for _ in range(draw.randint(1, 3))]
        last = wait(start(path, log))
        record = {
            "run": number, "racing": racing, "exit_codes": codes, "finished": last == 0,
            "same": last == 0 and digest(path, log) == expected,
            "left": sorted(p.name for p in path.iterdir() if p.name.startswith(".")),
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        assert record["same"], record
        assert all(code in EXIT_CODES for pair in codes for code in pair), record
        shutil.rmtree(path)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    soak(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
