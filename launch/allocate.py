"""Chooses bits of every layer of a config's network under a budget.

Writes allocation.json (for launch.quantize --allocation, and an editor), front.png, results.json
and the measurements, sensitivity.json. Another budget there measures nothing again, and moves
earlier results to earlier/1/ and so on. Bits of 16 stand for float, which averages count with the
bits of its dtype, such as 32. A budget is one of bytes=N, average_bits=N (or N,M for weights and
activations), bit_operations=N, latency=MS, coefficients=N and degradation=X (for the cheapest).

Example:

    python -m launch.allocate --config=configs/digits.py:w3a3 --budget=average_bits=3 \\
        --workdir=runs/allocation
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax.allocation.choices import COSTS
from aquant_jax.allocation.measure import FILE as MEASURED
from aquant_jax.errors import InputError
from aquant_jax.storage.environment import environment
from aquant_jax.storage.folder_lock import hold
from aquant_jax.storage.json_file import write_json
from aquant_jax.terminal import show
from launch.lib import allocation_inputs, command_line, experiment, plots, process
from launch.lib.allocations import FILE as ALLOCATION
from launch.lib.run_directory import IDENTITY, PAGE, RESULTS

FRONT = "front.png"
EARLIER = "earlier"  # a folder for each of the allocations before


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("config", None, "file.py:variant; required", flag_values=values)
    command_line.define_path(values, "workdir", None, "folder to write into; required")
    flags.DEFINE_string("budget", None, "NAME=VALUE; required", flag_values=values)
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/ and weights/")
    flags.DEFINE_integer("seed", 0, "of the calibration draw", 0, flag_values=values)
    allocation_inputs.define_flags(values)
    text = "of a block, before errors are measured; 0 rounds to nearest"
    flags.DEFINE_integer("steps", 0, text, 0, flag_values=values)
    text = "of launch.bench.layers, for a budget of latency; times this device if not given"
    command_line.define_path(values, "latencies", None, text)
    text = "of the cheapest (bytes)"
    flags.DEFINE_enum("cost", None, COSTS, text, flag_values=values)
    flags.mark_flags_as_required(["config", "workdir", "budget"], flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Measures, solves and writes."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    config = command_line.load_config(values.config, overrides)
    recipe = experiment.recipe_of(config)
    if values.cost and not values.budget.startswith("degradation="):
        raise InputError(f"--cost={values.cost} belongs to --budget=degradation=X")
    with flag_named(values.budget):
        budget = parse_budget(values.budget, values.cost)
    choices = allocation_inputs.parse_choices(values.weight_bits, values.act_bits, values.borders)
    latencies = allocation_inputs.read_latencies(values.latencies)
    folder = Path(values.workdir)
    check_workdir(folder)
    resumed = (folder / MEASURED).exists()
    plots.require_matplotlib()
    apply, variables, calibration = allocation_inputs.open_network(
        config, values.data_dir, values.seed
    )
    start = time.monotonic()
    with flag_named(values.budget):
        allocation = aq.allocate(
            apply, variables, calibration, budget, choices,
            recipe=recipe, mask=config.get("mask"), steps=values.steps, seed=values.seed,
            compiler=aq.Compiler(gpu_ops.backend()), latencies=latencies, resume=folder,
        )  # fmt: skip
    seconds = time.monotonic() - start
    content = {
        "config": values.config, "budget": values.budget, "choices": list(map(str, choices)),
        "steps": values.steps, "seed": values.seed, "seconds": seconds,
        "measured": allocation.measured, "degradation": allocation.degradation,
        "costs": allocation.costs, "command": process.command(), **environment(),
    }  # fmt: skip
    show(allocation)
    with hold(folder, functools.partial(check_workdir, folder)) as earlier:
        if earlier != dataclasses.replace(allocation, measured=0):
            keep_earlier(folder, earlier)
            plots.front(allocation, folder / FRONT)
            write_json(folder / RESULTS, content)
            allocation.save(folder / ALLOCATION)
    known = f"; those before are in {folder / MEASURED}" if resumed else ""
    print(f"{allocation.measured} errors measured{known}; {seconds:.0f} s; in {folder}")


def check_workdir(folder: Path) -> aq.Allocation | None:
    """The allocation in a workdir, if there is one.

    Raises:
        InputError: it is damaged, or the files of another program would be written over.
    """
    if (folder / ALLOCATION).exists():
        return aq.Allocation.load(folder / ALLOCATION)
    ours = (folder / MEASURED).exists()
    for name in () if ours else (IDENTITY, RESULTS, FRONT):
        if (folder / name).exists():
            raise InputError(f"{folder / name} is of another program; choose another --workdir")
    return None


def keep_earlier(folder: Path, earlier: aq.Allocation | None) -> None:
    """Moves the allocation of an earlier command, its front and its results into `EARLIER`."""
    if earlier is None:
        return
    numbers = (folder / EARLIER / str(number) for number in itertools.count(1))
    kept = next(path for path in numbers if not path.exists())
    kept.mkdir(parents=True)
    for name in (FRONT, PAGE, RESULTS, ALLOCATION):  # the last marks the others as its own
        if (folder / name).exists():
            (folder / name).rename(kept / name)
    budget = f"{earlier.budget.name}={getattr(earlier.budget, earlier.budget.name)}"
    print(f"the allocation of {budget} is now in {kept}")


@contextlib.contextmanager
def flag_named(budget: str) -> Iterator[None]:
    """Names the flag --budget in the InputErrors about it."""
    try:
        yield
    except InputError as error:
        what, colon, message = str(error).partition("budget: ")
        if what or not colon:
            raise
        raise InputError(f"--budget={budget}: {message}") from error


def parse_budget(text: str, cost: str | None) -> aq.Budget:
    """A budget from ``NAME=VALUE``.

    >>> parse_budget("average_bits=3,4", None).average_bits
    (3.0, 4.0)

    Raises:
        InputError: an unknown name, or no number.
    """
    name, _, value = text.partition("=")
    try:
        numbers = tuple(map(float, value.split(",")))
    except ValueError as error:
        raise InputError(f"budget: {value!r} is no number; give NAME=VALUE") from error
    fields: dict[str, Any] = {name: numbers[0] if len(numbers) == 1 else numbers}
    try:
        return aq.Budget(**fields, cost=cost)
    except TypeError as error:
        known = "bytes, average_bits, bit_operations, latency, coefficients, degradation"
        raise InputError(f"budget: unknown name {name!r}; there are {known}") from error


if __name__ == "__main__":
    sys.exit(main())
