"""What the benchmarks share: figures of several functions, taken in turns in one run."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Call = Callable[[], Any]


def seconds(call: Call, repeat: int = 1) -> float:
    """Seconds a call, until its results are there; `repeat` calls are waited for together."""
    start = time.perf_counter()
    results = [call() for _ in range(repeat)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / repeat


def in_turns(timers: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """What every timer gives in every round; one more round before them compiles."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds + 1):
        for name, timer in timers.items():
            found[name].append(timer())
    return {name: values[1:] for name, values in found.items()}


def milliseconds(calls: Mapping[str, Call], rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, see `in_turns`.

    Each is called once before it is timed, so that what the one before left to be done, such as
    giving memory back to the kernel, is not counted.
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
