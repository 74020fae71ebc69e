"""Common parts of the benchmarks: figures of several functions in turns, and their report."""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from aquant_jax.errors import InputError
from launch.lib import command_line

Call = Callable[[], Any]


def seconds(call: Call, repeat: int = 1) -> float:
    """Seconds per call, until its results are ready; `repeat` calls are awaited together."""
    start = time.perf_counter()
    results = [call() for _ in range(repeat)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / repeat


def in_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The figure of every timer in every round; one more round before them compiles."""
    figures: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds + 1):
        for name, timer in timers.items():
            figures[name].append(timer())
    return {name: values[1:] for name, values in figures.items()}


def milliseconds(calls: Mapping[str, Call], rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, see `in_turns`.

    Each is called once before it is timed, so that work left over by the call before, such as
    returning memory to the kernel, is not counted.
    """

    def timer(call: Call) -> float:
        seconds(call)
        return seconds(call, repeat) * 1e3

    return in_turns({name: functools.partial(timer, c) for name, c in calls.items()}, rounds)


def summary(times: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    if len(times) < 2:
        return {"median": times[0], "iqr": 0.0}
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "iqr": high - low}


def define_flags(values: flags.FlagValues) -> None:
    """The flags --rounds and --out."""
    flags.DEFINE_integer("rounds", 5, "how often every figure is taken", 1, flag_values=values)
    define_out(values)


def define_out(values: flags.FlagValues) -> None:
    """The flag --out, see `report`."""
    command_line.define_path(values, "out", None, "file to write the JSON to as well")


def workload(kind: Any, values: flags.FlagValues) -> Any:
    """The workload of a benchmark, a dataclass whose fields are flags."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: values[name].value for name in names})


def report(results: Mapping[str, Any], out: str | None) -> None:
    """Prints the figures of a benchmark as JSON and, with `out`, writes the same text there.

    Raises:
        InputError: `out` cannot be written.
    """
    text = json.dumps(results, indent=2)
    print(text)
    if out is None:
        return
    try:
        Path(out).write_text(text + "\n")
    except OSError as error:
        raise InputError(f"--out={out} cannot be written: {error.strerror}") from error
