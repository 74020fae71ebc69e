"""Launched runs of the digits network in processes of their own, which a test may kill."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import pytest

from launch import quantize
from tests.launch.conftest import DIGITS, SMALL, draw_nothing


def _run(path: Path, log: Path, draws: bool) -> None:
    # With what tests/conftest.py or the soak caches: each run compiles little, and all of it again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if not draws:
        draw_nothing(pytest.MonkeyPatch())
    sys.exit(quantize.main(["quantize", DIGITS, *SMALL, f"--workdir={path}"]))


def start(path: Path, log: Path = Path(os.devnull), draws: bool = True) -> BaseProcess:
    """A run in `path`, forked from a process that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(path, log, draws))
    process.start()
    return process


def exit_code(process: BaseProcess) -> int | None:
    """Of a process when it has ended; minus the signal that ended it."""
    process.join()
    return process.exitcode
