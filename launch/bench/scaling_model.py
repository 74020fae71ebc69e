"""Predicts the cost of large networks on many devices, and compares the model with measurements.

The model is `launch.lib.scaling_model`. Its elementwise costs, and the rate of this machine, are
fitted to the steps of a network on one device; see `FITTED`. All else is predicted: other meshes,
and networks that were not run. Nothing runs here; networks are traced from shapes. docs/scaling.md
explains the figures of the devices.

Example:

    python -m launch.bench.scaling_model --measured=resnet50.json,vit.json,decoder.json
"""

import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from aquant_jax import models, recipes
from aquant_jax.errors import InputError
from aquant_jax.recipe import Recipe
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, meshes
from launch.lib.block_counts import BlockCounts, MakeNetwork, count_blocks, image_network
from launch.lib.scaling_model import (
    BlockCost,
    Device,
    Elementwise,
    Mesh,
    Schedule,
    cost_of,
    fit_elementwise,
    memory_of,
    step_of,
)
from launch.lib.scaling_workload import Workload
from launch.lib.shape_networks import Decoder, VisionTransformer, decoder, vision_transformer

DEVICES = (1, 8, 64, 512)
CORES = 2  # of the machine that measured
GROUP = 8  # devices that share a block where blocks are learned side by side
# An H100 SXM, and assumptions; docs/scaling.md has the sources. `search` is measured.
H100 = Device(
    flops=494.7e12, bandwidth=3.35e12, memory=80e9, node=8, fast_link=450e9, slow_link=50e9,
    host_link=64e9, latency=10e-6, overhead=0.5e-3, host_overhead=2e-3, flops_share=0.4,
    bandwidth_share=0.6, search=0.0,
)  # fmt: skip


class Target(NamedTuple):
    """A network to predict.

    Attributes:
        network: its function and shapes.
        recipe: cuts it into blocks.
        schedule: how much is learned.
        like: the measured network whose elementwise costs it has.
    """

    network: MakeNetwork
    recipe: Recipe
    schedule: Schedule
    like: str


class Fit(NamedTuple):
    """What is fitted to a network on one device.

    Attributes:
        costs: elementwise.
        rate: operations a second of CPU time.
    """

    costs: Elementwise
    rate: float


# Measured networks, and those on which their model is fitted: themselves, unless they stand here.
FITTED = {"resnet50": "resnet20_cifar"}
TARGETS = {
    "ResNet-50, W4A4": Target(
        image_network(functools.partial(models.abstract, "resnet50"), 224),
        recipes.qdrop(4, 4), Schedule(), "resnet20_cifar",
    ),
    "ViT-L/16, W4A4": Target(
        functools.partial(vision_transformer, VisionTransformer()),
        recipes.qdrop(4, 4), Schedule(), "small_vit",
    ),
    "8B decoder, W4A16": Target(
        functools.partial(decoder, Decoder()),
        recipes.brecq(4, None), Schedule(samples=128, mixing=False), "small_decoder",
    ),
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    """A file of `launch.bench.scaling`.

    Raises:
        InputError: it is none, or has no figures of one device, which the model is fitted to.
    """
    try:
        run = json.loads(Path(name).read_text())
        found = run["benchmark"], [row["mesh"] for row in run["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name} is no file of launch.bench.scaling") from error
    if found[0] != "scaling" or "1" not in found[1]:
        raise InputError(f"{name} is of {found[0]} on {found[1]}; it must be of scaling, on 1 too")
    return run


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_list("measured", [], "files of launch.bench.scaling", flag_values=values)
    timing.define_out(values)


def predict(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fits, the comparison with measurements, and the predictions."""
    fits = {run["model"]: fit(run) for run in reversed(measured) if run["model"] not in FITTED}
    search = measured[0]["range_search"]
    device = H100._replace(search=search["elements_a_second"])
    checks = [
        _check(run, row, fits[FITTED.get(run["model"], run["model"])])
        for run in measured
        for row in run["rows"]
    ]
    networks = {name: count_blocks(t.network, t.recipe) for name, t in TARGETS.items()}
    return {
        "benchmark": "scaling_model",
        "gpu": device._asdict(),
        "range_search": search,
        "fits": {
            name: found.costs._asdict() | {"rate": found.rate} for name, found in fits.items()
        },
        "checks": checks,
        "networks": {name: totals(found) for name, found in networks.items()},
        "predictions": [
            row
            for name, blocks in networks.items()
            for row in scenarios(name, blocks, device, fits[TARGETS[name].like].costs)
        ],
        **environment(),
    }


def fit(run: Mapping[str, Any]) -> Fit:
    """The costs and the rate of a measured network on one device."""
    rows = next(row["blocks"] for row in run["rows"] if row["mesh"] == "1")
    counts = _counts(run)
    blocks = [counts[row["name"]] for row in rows]
    flops, accessed, cpu = (
        np.array([row["step"][name] for row in rows]) for name in ("flops", "bytes_accessed", "cpu")
    )
    costs = fit_elementwise(blocks, run["batch_size"], flops, accessed)
    return Fit(costs, float(flops.sum() / cpu.sum()))


def _workload(run: Mapping[str, Any]) -> Workload:
    names = [field.name for field in dataclasses.fields(Workload)]
    return Workload(**{name: run[name] for name in names if name in run})


def _counts(run: Mapping[str, Any]) -> dict[str, BlockCounts]:
    workload = _workload(run)
    return {block.name: block for block in count_blocks(workload.network, workload.recipe)}


def _check(run: Mapping[str, Any], row: Mapping[str, Any], found: Fit) -> dict[str, Any]:
    """Predicted and measured figures of the steps of a mesh, one step of every program."""
    mesh, counts = Mesh(*(meshes.sizes(row["mesh"]) or (1, 1))), _counts(run)
    mixing = _workload(run).recipe.reconstruction.input_mixing > 0
    schedule = Schedule(run["steps"], run["batch_size"], run["samples"], mixing=mixing)
    predicted: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    for block in row["blocks"]:
        step, measured = step_of(counts[block["name"]], schedule, mesh, found.costs), block["step"]
        kinds = {kind: sent["bytes"] for kind, sent in measured["collectives"].items()}
        memory = memory_of(counts[block["name"]], schedule, mesh, False)
        work = mesh.devices * step.flops / found.rate
        pairs = {
            "flops": (step.flops, measured["flops"]),
            "bytes_accessed": (step.bytes_accessed, measured["bytes_accessed"]),
            "reduced": (step.reduced + step.reduced_over_model, kinds.get("all-reduce", 0)),
            "gathered": (step.gathered, kinds.get("all-gather", 0)),
            "permuted": (0, kinds.get("collective-permute", 0)),
            "temporary": (memory.step, measured["temporary"]),
            "cpu": (work, measured["cpu"]),
            "seconds": (work / CORES, measured["seconds"]["median"]),
        }
        for name, (ours, theirs) in pairs.items():
            predicted[name] += ours
            seen[name] += theirs
    head = {name: run[name] for name in ("model", "preset", "size")}
    return head | {
        "mesh": row["mesh"],
        "predicted": predicted,
        "measured": seen,
        "hand_over_seconds": sum(b["blocks"] * b["hand_over_seconds"] for b in row["blocks"]),
        "rest_seconds": sum(b["blocks"] * b["rest_seconds"] for b in row["blocks"]),
    }


def totals(blocks: Sequence[BlockCounts]) -> dict[str, Any]:
    """Counts of a network."""
    names = ("forward", "backward", "values", "weights")
    return {"blocks": len(blocks)} | {name: sum(getattr(b, name) for b in blocks) for name in names}


def scenarios(
    name: str, blocks: Sequence[BlockCounts], device: Device, costs: Elementwise
) -> list[dict[str, Any]]:
    """Every number of devices, and where the batch is smaller than it, what could be done."""
    schedule = TARGETS[name].schedule

    def run(mesh: Mesh, schedule: Schedule) -> list[BlockCost]:
        last = len(blocks) - 1
        return [cost_of(b, schedule, mesh, device, costs, i == last) for i, b in enumerate(blocks)]

    rows = []
    for count in DEVICES:
        data = min(count, schedule.batch)
        mesh = Mesh(data, count // data)
        way = "samples" if mesh.model == 1 else "samples and weights"
        rows.append(_summary(name, way, run(mesh, schedule), mesh, schedule))
        if mesh.model == 1:
            continue
        batch = min(count, schedule.samples)
        steps = schedule.steps * schedule.batch // batch
        larger, wide = schedule._replace(batch=batch, steps=steps), Mesh(batch, count // batch)
        rows.append(_summary(name, "larger batch", run(wide, larger), wide, larger))
        own = larger._replace(assembled=False)
        rows.append(_summary(name, "larger batch of own samples", run(wide, own), wide, own))
        side, groups = Mesh(GROUP), count // GROUP
        found = run(side, schedule)
        row = _summary(name, "blocks side by side", found, side, schedule)
        longest = max(cost.total for cost in found)
        row["hours"] = max(longest, sum(cost.total for cost in found) / groups) / 3600
        rows.append(row | {"devices": count})
    return rows


def _summary(
    name: str, way: str, found: Sequence[BlockCost], mesh: Mesh, schedule: Schedule
) -> dict[str, Any]:
    """Totals of the blocks of a network on one mesh."""
    causes: dict[str, float] = {}
    for cost in found:
        for cause, spent in cost.seconds.items():
            causes[cause] = causes.get(cause, 0.0) + spent
    whole = sum(causes.values())
    return {
        "network": name,
        "way": way,
        "devices": mesh.devices,
        "mesh": f"{mesh.data}x{mesh.model}",
        "batch": schedule.batch,
        "steps": schedule.steps,
        "hours": sum(cost.total for cost in found) / 3600,
        "step_seconds": whole / len(found),
        "shares": {cause: spent / whole for cause, spent in causes.items()},
        "memory": max(
            cost.memory.step + cost.memory.state + cost.memory.caches * (not cost.caches_on_host)
            for cost in found
        ),
        "accumulate": max(cost.accumulate for cost in found),
        "caches_on_host": sum(cost.caches_on_host for cost in found),
        "fits": all(cost.fits for cost in found),
        "sent_a_step": sum(cost.step.sent(mesh) for cost in found) / len(found),
        "sent": schedule.steps * sum(cost.step.sent(mesh) for cost in found),
    }


@command_line.program
def main(argv: list[str]) -> None:
    """Predicts and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    if not values.measured:
        raise InputError("--measured is empty; it must name files of launch.bench.scaling")
    timing.report(predict([read(name) for name in values.measured]), values.out)


if __name__ == "__main__":
    sys.exit(main())
