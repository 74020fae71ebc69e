"""The memory of a quantization: how much there is, what every block needs, and where caches lie.

A block is learned from cached activations of all calibration samples, which are read batch by
batch. They lie on the device while they fit there, else in the memory of the host, else in files.
Where they lie changes no bit of the result.

Of several processes, each keeps all samples of a cache that leaves its devices, so that it reads a
batch without the others.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import resource
import shutil
import socket
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from aquant_jax.errors import InputError, byte_size
from aquant_jax.graph.ir import Layer
from aquant_jax.graph.partition import Block
from aquant_jax.graph.subgraph import extract_subgraph
from aquant_jax.plan.checks import boundary_bytes
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction import devices, hosts
from aquant_jax.reconstruction.activation_cache import Allocate
from aquant_jax.storage.mapped_array import MappedArray

CGROUP = Path("/sys/fs/cgroup")
DEVICE, HOST, DISK = "device", "host", "disk"
# Measured with XLA's memory analysis of the steps of ResNet-50's blocks, on CPU: a training step
# holds 1 to 2.7 times the inputs of layers and the values of a block, less if it is rematerialized,
# and float weights 11 times. The rest is for what the runtime holds besides.
STEP_COPIES, REMATERIALIZED_COPIES, FORWARD_COPIES = 4, 3, 2
STATE_COPIES, FORWARD_STATE_COPIES = 11, 3
INPUTS_SHARE = 1 / 8


class BlockMemory(NamedTuple):
    """What a block needs, in bytes.

    Attributes:
      name: of the block.
      step: activations and gradients of one batch, on each device.
      state: weights, learned parameters and optimizer state, on each device.
      caches: of the model's inputs, of its inputs and of its outputs; see `MemoryPlan.places`.
    """

    name: str
    step: int
    state: int
    caches: tuple[int, int, int]


class MemoryPlan(NamedTuple):
    """Where the caches of a quantization lie.

    Attributes:
      blocks: what every block needs.
      places: of the caches: those of the model's inputs, and then of the outputs of every block.
      free: bytes that there are in every place, for each process.
      folder: of the files.
      share: devices with memory of their own that a cache is split over while it lies on them.
    """

    blocks: tuple[BlockMemory, ...]
    places: tuple[str, ...]
    free: dict[str, int]
    folder: Path
    share: int

    def allocate(self, index: int) -> Allocate:
        """What makes the arrays of the outputs of block number `index`."""
        place = self.places[index + 1]
        if place == DISK:
            return self._on_disk
        return devices.empty if place == DEVICE else _on_host

    @property
    def inputs_on_device(self) -> bool:
        """Whether the model's inputs are on the device, and not where the caller has them."""
        return self.places[0] == DEVICE

    def needs(self, index: int) -> dict[str, int]:
        """Bytes that block number `index` needs in every place."""
        block = self.blocks[index]
        needed = dict.fromkeys(self.free, 0)
        needed[DEVICE] = block.step + block.state
        for place, size in zip(self._places_of(index), block.caches, strict=True):
            needed[place] += size // self.share if place == DEVICE else size
        return needed

    def _on_disk(self, samples: int, shape: tuple[int, ...], dtype: Any) -> MappedArray:
        make = functools.partial(MappedArray, self.folder, (samples, *shape), dtype)
        return hosts.together(make)

    def _places_of(self, index: int) -> tuple[str, str, str]:
        return self.places[0], self.places[index], self.places[index + 1]

    def __str__(self) -> str:
        """A line a block."""
        free = ", ".join(f"{size / 2**20:,.0f} on {place}" for place, size in self.free.items())
        lines = [f"memory in MiB; free are {free}:"]
        for index, block in enumerate(self.blocks):
            sizes = [size / 2**20 for size in (sum(block.caches), block.state, block.step)]
            needs = [f"{size / 2**20:,.1f} on {place}" for place, size in self.needs(index).items()]
            lines.append(
                f"{index:3d}  {block.name}: caches {sizes[0]:,.1f}, weights and optimizer "
                f"{sizes[1]:,.1f}, step {sizes[2]:,.1f}: {', '.join(needs)}"
            )
        return "\n".join(lines)


def check_limit(limit: Any) -> None:
    """InputError unless a memory limit is None or a positive whole number."""
    if limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0):
        return
    raise InputError(f"memory_limit is {limit!r}; it must be a positive number of bytes, or None")


def free_bytes(limit: int | None = None) -> int:
    """Bytes that the default device can still allocate.

    On a CPU this is what the machine has available, less where a control group or ``ulimit -v``
    leaves less.

    Args:
      limit: bytes that may be in use at most: of the device, or by the process on a CPU.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        used = statistics["bytes_in_use"]
        return max(min(statistics["bytes_limit"], limit or math.inf) - used, 0)
    process = psutil.Process().memory_info()
    free = [psutil.virtual_memory().available]
    if limit is not None:
        free.append(limit - process.rss)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        free.append(address_space - process.vms)
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        most, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(most - used)
    return max(min(free), 0)


def allocate_inputs(
    folder: Path, limit: int | None, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """An array for calibration samples: in memory where it takes at most `INPUTS_SHARE` of what is
    free, else in a file of the folder, which is mapped."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= INPUTS_SHARE * free_bytes(limit):
        return np.empty(shape, dtype)
    return MappedArray(folder, shape, dtype).whole()


def plan_memory(
    net: Network, limit: int | None, folder: str | Path | None, seeds: int
) -> MemoryPlan:
    """Decide where caches lie: what does not fit on the device, largest first, lies elsewhere.

    All processes of the mesh in force call this together, and decide alike.

    Args:
      net: the network.
      limit: see `free_bytes`.
      folder: for files, which all processes see; None takes that of temporary files.
      seeds: quantized networks that are made at once.

    Raises:
      InputError: a block does not fit (the message names it and both sizes).
    """
    files = Path(folder or tempfile.gettempdir())
    free = _least(_free_places(limit, files), shared=() if folder is None else (DISK,))
    return hosts.together(lambda: _planned(net, limit, files, free, seeds))


def _planned(
    net: Network, limit: int | None, files: Path, free: dict[str, int], seeds: int
) -> MemoryPlan:
    on_cpu, several = devices.share_memory(), devices.several_processes()
    share = jax.process_count() if several and on_cpu else devices.count()
    share = 1 if on_cpu and not several else share  # devices of a CPU share its memory
    blocks = tuple(_needs(net, block, seeds, share) for block in net.blocks)
    plan = MemoryPlan(blocks, (DEVICE,) * (len(blocks) + 1), free, files, share)
    for place, other in zip(list(free), list(free)[1:], strict=False):
        for index in range(len(blocks)):
            plan = _fitted(plan, index, place, other)
    for index, block in enumerate(blocks):
        for place, size in plan.needs(index).items():
            if size > free[place]:
                raise InputError(
                    f"block {index} {block.name} needs about {byte_size(size)} of memory on "
                    f"{place}, and {byte_size(free[place])} are free{_advice(place, limit)}"
                )
    return plan


def _free_places(limit: int | None, files: Path) -> dict[str, int]:
    """Bytes that are free in every place that this process can use."""
    free = {DEVICE: free_bytes(limit)}
    if not devices.share_memory():
        free[HOST] = psutil.virtual_memory().available
    return free | {DISK: shutil.disk_usage(_existing(files)).free}


def _least(free: dict[str, int], shared: Collection[str]) -> dict[str, int]:
    """What every process can have, where all take as much.

    Args:
      free: of this process.
      shared: places that are the same for all of them. Others belong to a machine, but a GPU's
        memory to one process.
    """
    if not devices.several_processes():
        return free
    found = hosts.exchange([socket.gethostname(), free])
    machines = collections.Counter(machine for machine, _ in found)

    def part(place: str, machine: str, size: int) -> int:
        if place == DEVICE and HOST in free:
            return size
        return size // (len(found) if place in shared else machines[machine])

    return {place: min(part(place, of, sizes[place]) for of, sizes in found) for place in free}


def _advice(place: str, limit: int | None) -> str:
    if place == DISK:
        return " there; choose another folder"
    of = "" if limit is None else f" of memory_limit {byte_size(limit)}"
    return f"{of}; lower batch_size, raise accumulate, or set rematerialize"


def _fitted(plan: MemoryPlan, index: int, place: str, other: str) -> MemoryPlan:
    """`plan` with so many caches of a block in the `other` place that it fits, or all of them."""
    while plan.needs(index)[place] > plan.free[place]:
        numbers = (0, index, index + 1)
        sizes = dict(zip(numbers, plan.blocks[index].caches, strict=True))
        movable = [i for i, size in sizes.items() if plan.places[i] == place and size]
        if not movable:
            break
        largest = max(movable, key=sizes.__getitem__)
        plan = plan._replace(places=(*plan.places[:largest], other, *plan.places[largest + 1 :]))
    return plan


def _needs(net: Network, block: Block, seeds: int, share: int) -> BlockMemory:
    graph, learning = net.graph, net.recipe.reconstruction
    subgraph = extract_subgraph(graph, block.start, tuple(dict.fromkeys(block.end + block.targets)))
    values = sum(_bytes(graph.avals[v].shape) for op in subgraph.ops for v in op.outputs)
    layers = [_bytes(graph.avals[op.x].shape) for op in subgraph.weighted]
    weights = sum(_weight_bytes(op.layer) for op in subgraph.weighted)
    step, state = FORWARD_COPIES * (values + sum(layers)), FORWARD_STATE_COPIES * weights
    if learning.steps:
        copies = REMATERIALIZED_COPIES if learning.rematerialize else STEP_COPIES
        step, state = copies * (values + sum(layers)), STATE_COPIES * weights

    def cached(values: Sequence[int], times: int) -> int:
        return times * boundary_bytes(graph, values, net.samples)

    leaves = [graph.avals[i] for i in graph.inputs if graph.avals[i].shape]
    inputs = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in leaves) * net.samples
    end = 0 if block is net.blocks[-1] else cached(block.end, 1 + seeds)
    targets = 0 if end and block.targets == block.end else cached(block.targets, 1)
    caches = inputs, cached(block.start, 1 + seeds), end + targets
    return BlockMemory(block.name, step // share, state, caches)


def _bytes(shape: Sequence[int]) -> int:
    return 4 * math.prod(shape)


def _weight_bytes(layer: Layer) -> int:
    """Bytes of a weight on each device."""
    parts = 1 if devices.share_memory() else devices.channel_devices(layer)
    return _bytes(layer.weight_shape) // parts


def _on_host(samples: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.empty((samples, *shape), dtype)


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
