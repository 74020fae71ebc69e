"""Allocations in files: as the recipes of runs, and beside what these runs measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import aquant_jax as aq
from aquant_jax.allocation.output_error import output_error
from aquant_jax.allocation.result import chosen_entries, costs_now
from aquant_jax.errors import InputError
from aquant_jax.plan.network import take_samples
from aquant_jax.reporting.run import THIS
from aquant_jax.storage.parsing import malformed
from launch.lib import hosts
from launch.lib.command_line import Config

FILE = "allocation.json"


def use(config: Config, path: str) -> dict[str, Any]:
    """Sets the bits and borders of a config's recipe to those of an allocation, in place.

    They are fields of the config then, and identify the run.

    Returns:
        The front, and this allocation on it, as fields of the run's results.

    Raises:
        InputError: the file is no allocation, or lacks a cost that its budget counts.
    """
    try:
        allocation = aq.Allocation.load(path)
        with malformed(Path(path)):
            found = points(allocation)
    except InputError as error:
        raise InputError(f"--allocation={error}") from error
    recipe, fields = allocation.recipe, ("overrides",)
    if recipe.act_bits is None:  # its overrides have the bits of the activations
        fields = ("act_bits", "border", "overrides")
    with config.unlocked():
        for name in fields:
            config.recipe[name] = recipe.to_dict()[name]
    return found


def points(allocation: aq.Allocation) -> dict[str, Any]:
    """Fields of results: the front of an allocation with itself as the last, and its layers."""
    counted = allocation.budget.counted
    named = [*((str(i), point) for i, point in enumerate(allocation.front)), (THIS, allocation)]
    found = [
        {"name": name, "cost": cost_of(point.costs, counted), "predicted": point.degradation}
        for name, point in named
    ]
    loss = allocation.base.reconstruction.finetune_loss
    layers = [
        {"layer": entry.path, "choice": choice, "error": same and same.error,
         "bytes": same and same.costs["bytes"]}
        for entry, choice, same in chosen_entries(allocation)
    ]  # fmt: skip
    return {
        "pareto": found, "pareto_cost": counted.replace("_", " "), "pareto_loss": loss,
        "allocation": layers, "average_bits": _average_bits(allocation),
    }  # fmt: skip


def _average_bits(allocation: aq.Allocation) -> list[float | None] | None:
    """Of weights and activations (None: all in float); None where edits leave them unknown."""
    costs = costs_now(allocation)
    if costs is None:
        return None
    choices = [choice.split()[0] for _, choice, _ in chosen_entries(allocation)]
    floats = all(choice.endswith(("a16", "float")) for choice in choices)
    return [costs["weight_bits"], None if floats else costs["act_bits"]]


def measured(
    experiment: Any, quantized: aq.Quantized, inputs: Any, config: Config
) -> dict[str, Any]:
    """The fields of `use` with the output error of the network that was made of them.

    Args:
        experiment: an `experiment.Experiment`, whose ``origin`` the fields are; without a front, or
            in another process than the first, they stay as they are.
        quantized: the network.
        inputs: of the calibration set.
        config: of the run.
    """
    origin = experiment.origin
    if "pareto" not in origin or not hosts.is_first():
        return origin
    network, mask = (experiment.apply, experiment.variables), config.get("mask")
    most = max(config.eval_batch_size, quantized.recipe.reconstruction.batch_size)
    few = jax.tree.map(lambda leaf: take_samples(leaf, slice(most)), inputs)  # that surely fit
    error = output_error(quantized, *network, few, mask, origin["pareto_loss"])
    *front, this = origin["pareto"]
    return {**origin, "pareto": [*front, this | {"measured": error}]}


def cost_of(costs: Mapping[str, float], name: str) -> float:
    """A cost of an allocation; of the average bits, the mean of weights and activations."""
    if name == "average_bits":
        return (costs["weight_bits"] + costs["act_bits"]) / 2
    return costs[name]
