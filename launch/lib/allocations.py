"""Allocations in files, as the recipes of runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aquant_jax as aq
from aquant_jax.storage.parsing import malformed
from launch.lib.command_line import Config


def use(config: Config, path: str) -> dict[str, Any]:
    """Sets the bits and borders of a config's recipe to those of an allocation, in place.

    They are fields of the config then, and identify the run.

    Returns:
        The front, and this allocation on it, as fields of the run's results.

    Raises:
        InputError: the file is no allocation, or lacks a cost that its budget counts.
    """
    allocation = aq.Allocation.load(path)
    recipe, fields = allocation.recipe, ("overrides",)
    if recipe.act_bits is None:  # its overrides have the bits of the activations
        fields = ("act_bits", "border", "overrides")
    with config.unlocked():
        for name in fields:
            config.recipe[name] = recipe.to_dict()[name]
    counted = allocation.budget.counted
    named = [*((str(i), point) for i, point in enumerate(allocation.front)), ("this", allocation)]
    with malformed(Path(path)):
        points = [
            {"name": name, "cost": cost_of(point.costs, counted), "predicted": point.degradation}
            for name, point in named
        ]
    return {"pareto": points, "pareto_cost": counted.replace("_", " ")}


def cost_of(costs: Mapping[str, float], name: str) -> float:
    """A cost of an allocation; of the average bits, the mean of weights and activations."""
    if name == "average_bits":
        return (costs["weight_bits"] + costs["act_bits"]) / 2
    return costs[name]
