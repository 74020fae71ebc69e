"""The share of a calibration set that each of several processes reads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquant_jax import data
from aquant_jax.plan.network import take_samples
from aquant_jax.plan.shared_samples import SharedSamples
from aquant_jax.reconstruction.devices import DATA
from aquant_jax.reconstruction.memory import allocate_inputs


class Calibration(NamedTuple):
    """A calibration set that is read.

    Attributes:
        inputs: of all samples, or arrays of which every process has a share.
        few: the first samples, in memory.
        samples: how many there are.
    """

    inputs: Any
    few: Any
    samples: int


def read_calibration(
    experiment: Any, samples: int, seed: int, folder: Path, skip: data.OnCorrupt, few: int
) -> Calibration:
    """Draws the calibration samples of a run.

    Each of several processes reads those of its own devices. All are read where images may be left
    out, which changes their number, where the axis "data" does not divide it, and with a limit of
    memory, as the samples may then leave the devices.

    Args:
        experiment: an `experiment.Experiment`.
        samples: how many are drawn.
        seed: of the draw.
        folder: for a mapped file.
        skip: see `data.Dataset.calibration`.
        few: how many of them every process keeps in memory.
    """
    mesh, limit = experiment.mesh, experiment.memory_limit
    allocate = functools.partial(allocate_inputs, folder, limit)
    read = functools.partial(experiment.calibration.calibration, samples, seed, skip, allocate)
    divided = mesh is not None and mesh.is_multi_process and samples % mesh.shape[DATA] == 0
    if mesh is not None and divided and skip is None and limit is None:
        return _shared(read, experiment.check, mesh, samples, few)
    found = read()
    experiment.check(found.inputs)
    first = jax.tree.map(lambda leaf: take_samples(leaf, slice(few)), found.inputs)
    return Calibration(found.inputs, first, len(found.labels))


def _shared(read: Any, check: Any, mesh: Mesh, samples: int, few: int) -> Calibration:
    split = NamedSharding(mesh, PartitionSpec(DATA))
    places = split.addressable_devices_indices_map((samples,)).values()
    ends = [place[0].indices(samples)[:2] for place in places if place]
    start = min(first for first, _ in ends)
    inputs = read(rows=slice(start, max(end for _, end in ends))).inputs
    check(inputs)

    def place(leaf: np.ndarray) -> SharedSamples:
        def part(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(samples)
            return leaf[first - start : end - start]

        shape = samples, *leaf.shape[1:]
        return SharedSamples(jax.make_array_from_callback(shape, split, part), few)

    shared = jax.tree.map(place, inputs)
    arrays = jax.tree.map(lambda leaf: leaf.array, shared)
    return Calibration(arrays, jax.tree.map(lambda leaf: leaf[:few], shared), samples)
