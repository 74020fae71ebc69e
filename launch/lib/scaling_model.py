"""A model of what a quantization costs on many devices; docs/scaling.md has its equations.

It is arithmetic on the counts of `block_counts` and on the figures of a device. Only the numbers of
`Elementwise` are fitted, to measurements on one device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from aquant_jax.reconstruction.memory import STATE_COPIES, STEP_COPIES
from aquant_jax.reconstruction.observe_ranges import MOST_ELEMENTS
from launch.lib.block_counts import BlockCounts

FLOAT, CACHED = 4, 2  # bytes of a value, and of one in a cache
ASSEMBLY = 3  # passes over a batch in memory: its rows, and what an all-reduce reads and writes
REDUCES = 2  # collectives of a step: XLA combines those of the batch, and those of the gradients
REDUCES_A_LAYER = 3  # over the axis `model`: input, output, and gradient of the input
FORWARDS = 3  # over the calibration set, a block: targets, error before, and after with hand-over
PASSES = 3  # a step is about three forward passes


class Elementwise(NamedTuple):
    """What a step does besides multiplications.

    Attributes:
        flops: operations for each value that the block makes or is given, for each element of a
            layer's input that is quantized, and for each weight.
        accessed: bytes of memory for each of these.
    """

    flops: tuple[float, ...]
    accessed: tuple[float, ...]


class Mesh(NamedTuple):
    """Devices that the samples are split over, and those that the weights are."""

    data: int
    model: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.model


class Schedule(NamedTuple):
    """How much is learned.

    Attributes:
        steps: of every block.
        batch: samples of a step.
        samples: of the calibration set.
        init_samples: those whose activations give the initial step sizes.
        mixing: whether the inputs of blocks are mixed with the float network's.
        assembled: whether a batch is drawn of all samples, so that devices exchange them; the
            library has no other way.
        accumulate: parts of a batch.
    """

    steps: int = 20_000
    batch: int = 32
    samples: int = 1024
    init_samples: int = 256
    mixing: bool = True
    assembled: bool = True
    accumulate: int = 1


class Device(NamedTuple):
    """A device and its links, in operations, bytes and seconds; docs/scaling.md has the sources.

    Attributes:
        flops, bandwidth: of the device and of its memory, a second at the peak.
        memory: bytes.
        node: devices that fast links join.
        fast_link, slow_link, host_link: bytes a second and direction, within a node, between nodes,
            and to the host.
        latency: of a collective, for every doubling of its devices.
        overhead, host_overhead: of a call: the launches of its kernels; and of Python, where a call
            is one step, because caches are on the host.
        flops_share, bandwidth_share: of the peaks, that a step reaches.
        search: elements a second of the range search of activations, on the host. Each device of
            `data` has a process, which counts those of its own samples.
    """

    flops: float
    bandwidth: float
    memory: float
    node: int
    fast_link: float
    slow_link: float
    host_link: float
    latency: float
    overhead: float
    host_overhead: float
    flops_share: float
    bandwidth_share: float
    search: float


class Step(NamedTuple):
    """One step of a block on one device.

    Attributes:
        flops: operations.
        bytes_accessed: of its memory.
        reduced: bytes of the operands of its all-reduces over `data`.
        gathered: bytes of the operands of its all-gathers over `model`.
        reduced_over_model: bytes of the operands of its all-reduces over `model`.
    """

    flops: float
    bytes_accessed: float
    reduced: float
    gathered: float
    reduced_over_model: float

    def sent(self, mesh: Mesh) -> float:
        """Bytes that a device sends, with rings of its devices."""
        data, model = 1 - 1 / mesh.data, 1 - 1 / mesh.model
        gathered = (mesh.model - 1) * self.gathered
        return 2 * data * self.reduced + gathered + 2 * model * self.reduced_over_model


class Memory(NamedTuple):
    """Bytes that a block takes on one device; see `aquant_jax.reconstruction.memory`."""

    step: float
    state: float
    caches: float


class BlockCost(NamedTuple):
    """A block on one device of a mesh.

    Attributes:
        step: one step.
        memory: what it takes.
        accumulate: parts of a batch that it needs to fit.
        caches_on_host: whether its caches lie there, to fit.
        fits: whether it does.
        seconds: of a step, by cause.
        total: seconds of the block.
    """

    step: Step
    memory: Memory
    accumulate: int
    caches_on_host: bool
    fits: bool
    seconds: dict[str, float]
    total: float


def cached_bytes(block: BlockCounts, mixing: bool) -> float:
    """Bytes of the caches and of the model's input that a step reads of a sample."""
    elements = block.starts * (1 + mixing) + block.targets
    return CACHED * elements + block.model_bytes


def step_of(block: BlockCounts, schedule: Schedule, mesh: Mesh, costs: Elementwise) -> Step:
    """One step of a block on one device of a mesh."""
    share = schedule.batch / mesh.data
    products = 2 * share * (block.forward + block.backward) / mesh.model
    weights = block.weights / mesh.model
    elements = share * _elements(block)
    elements[-1] = weights * schedule.accumulate
    cached = cached_bytes(block, schedule.mixing)
    several, split = mesh.data > 1, mesh.model > 1
    exchanged = several * schedule.assembled * schedule.batch * cached / mesh.model
    gradients = FLOAT * (weights + block.others + 1)  # and the loss
    inputs, outputs = FLOAT * block.layer_inputs, FLOAT * block.layer_outputs
    return Step(
        products + float(elements @ costs.flops),
        float(elements @ costs.accessed) + ASSEMBLY * exchanged,
        exchanged + several * gradients * schedule.accumulate,
        split * share * (cached + inputs + outputs) / mesh.model,
        split * share * inputs,
    )


def _elements(block: BlockCounts) -> np.ndarray:
    """What `Elementwise` counts, of one sample."""
    return np.array([block.values + block.starts, block.quantized, block.weights], float)


def memory_of(block: BlockCounts, schedule: Schedule, mesh: Mesh, last: bool) -> Memory:
    """Bytes that a block takes on one device; what the last block hands on is not cached."""
    samples = schedule.samples / mesh.data
    held = 2 * block.starts + (block.targets if last else 2 * block.ends)
    part = schedule.batch / mesh.data / schedule.accumulate
    return Memory(
        STEP_COPIES * FLOAT * part * (block.values + block.layer_inputs),
        STATE_COPIES * FLOAT * block.weights / mesh.model,
        samples * (CACHED * held + block.model_bytes),
    )


def cost_of(
    block: BlockCounts, schedule: Schedule, mesh: Mesh, device: Device, costs: Elementwise,
    last: bool = False,
) -> BlockCost:  # fmt: skip
    """A block on one device. Caches leave for the host first, then batches are cut into parts."""
    parts = [k for k in range(1, schedule.batch + 1) if schedule.batch % (k * mesh.data) == 0]
    for accumulate in parts or [1]:
        schedule = schedule._replace(accumulate=accumulate)
        memory = memory_of(block, schedule, mesh, last)
        on_host = sum(memory) > device.memory
        fits = memory.step + memory.state <= device.memory
        if fits:
            break
    found = step_of(block, schedule, mesh, costs)
    spent = _seconds(found, block, schedule, mesh, device)
    calls = schedule.accumulate
    spent["overhead"] = calls * device.overhead
    if on_host or calls > 1:
        spent["overhead"] = calls * device.host_overhead
    if on_host:
        moved = schedule.batch / mesh.data * cached_bytes(block, schedule.mixing)
        spent["host"] = moved / device.host_link
    forwards = FORWARDS * schedule.samples / schedule.batch / PASSES
    searched = sum(min(MOST_ELEMENTS, schedule.init_samples * n) for n in block.searched)
    total = (schedule.steps + forwards) * sum(spent.values()) + searched / device.search / mesh.data
    return BlockCost(found, memory, schedule.accumulate, on_host, fits, spent, total)


def _seconds(
    found: Step, block: BlockCounts, schedule: Schedule, mesh: Mesh, device: Device
) -> dict[str, float]:
    """Seconds of a step by cause; nothing overlaps."""
    link = device.fast_link if mesh.devices <= device.node else device.slow_link
    hops = REDUCES * math.log2(mesh.data)
    hops += (REDUCES_A_LAYER * block.layers + 1) * math.log2(mesh.model)
    return {
        "compute": found.flops / (device.flops * device.flops_share),
        "memory": found.bytes_accessed / (device.bandwidth * device.bandwidth_share),
        "links": found.sent(mesh) / link,
        "latency": schedule.accumulate * hops * device.latency,
    }


def fit_elementwise(
    blocks: Sequence[BlockCounts], batch: int, flops: np.ndarray, accessed: np.ndarray
) -> Elementwise:
    """The costs that explain the measured operations and bytes of the steps of `blocks` best, each
    relative to what was measured. None is negative.

    Args:
        blocks: counts.
        batch: samples of a step.
        flops, accessed: of each block's step, on one device.
    """
    elements = np.array([_elements(block) for block in blocks]) * (batch, batch, 1)
    products = np.array([2 * batch * (block.forward + block.backward) for block in blocks])

    def fit(rest: np.ndarray, measured: np.ndarray) -> tuple[float, ...]:
        causes, values = elements / measured[:, None], np.maximum(rest, 0) / measured
        return tuple(optimize.nnls(causes, values)[0].tolist())

    return Elementwise(fit(flops - products, flops), fit(accessed, accessed))
