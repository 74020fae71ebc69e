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
from pathlib import Path

from aquant_jax.storage import archive
from tests.launch.processes import exit_code, start
from tests.support.process import REPOSITORY

LONGEST = 8.0  # seconds before a kill
EXIT_CODES = (0, 2, -signal.SIGKILL)  # finished, refused, killed


def disturb(path: Path, log: Path, draw: random.Random, racing: bool) -> list[int | None]:
    """Starts one or two processes, kills them at random moments; their exit codes."""
    runs = [start(path, log) for _ in range(2 if racing else 1)]
    ends = sorted((draw.uniform(0, LONGEST), index) for index in range(len(runs)))
    began = time.monotonic()
    for end, index in ends:
        time.sleep(max(0.0, began + end - time.monotonic()))
        runs[index].kill()
    return [exit_code(runs[index]) for _, index in ends]


def digest(path: Path) -> str:
    """SHA-256 of the arrays of the network of a finished run."""
    arrays = sorted(archive.read(path / "quantized").arrays.items())
    found = hashlib.sha256()
    for name, array in arrays:
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def soak(folder: Path, runs: int) -> None:
    """Runs what is missing of `runs`; raises an AssertionError at the first that is not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    reference, results, log = (folder / name for name in ("reference", "soak.jsonl", "soak.log"))
    assert exit_code(start(reference, log)) == 0
    expected = digest(reference)
    done = len(results.read_text().splitlines()) if results.exists() else 0
    for number in range(done, runs):
        draw, path = random.Random(number), folder / f"run{number}"
        shutil.rmtree(path, ignore_errors=True)
        racing = number % 2 == 1
        codes = [disturb(path, log, draw, racing) for _ in range(draw.randint(1, 3))]
        last = exit_code(start(path, log))
        record = {
            "run": number, "racing": racing, "exit_codes": codes, "finished": last == 0,
            "same": last == 0 and digest(path) == expected,
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
