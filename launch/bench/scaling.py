"""Measures how a quantization splits over devices: work, communication and memory of each.

Every mesh is a process of its own with as many devices of the CPU. XLA says the operations, bytes
and collectives of the compiled step and of the hand-over to the next block. Times are medians of a
second run of the same programs. The devices share the cores, so times show no speed-up: "cpu" is
the CPU time of all of them. Weights and images are random. docs/scaling.md has the results.

Example:

    python -m launch.bench.scaling --model=resnet20_cifar --size=32 --out=scaling.json
"""

import collections
import dataclasses
import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic.range_search import search_activation_range, search_weight_range
from aquant_jax.reconstruction import devices
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, meshes
from launch.lib.hlo import collectives
from launch.lib.scaling_workload import NETWORKS, Workload

DEVICES = "JAX_NUM_CPU_DEVICES"
STEP, FORWARD = "step", "forward"  # how `Compiler.get` names programs


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    default = Workload()
    flags.DEFINE_enum("model", default.model, NETWORKS, "network", flag_values=values)
    flags.DEFINE_string("preset", default.preset, "recipe", flag_values=values)
    for name, text in (
        ("size", "of an image"), ("samples", "images"), ("batch_size", "of a step"),
        ("bits", "of weights and activations"), ("steps", "a block"),
    ):  # fmt: skip
        flags.DEFINE_integer(name, getattr(default, name), text, 1, flag_values=values)
    flags.DEFINE_bool("weights_only", default.weights_only, "float activations", flag_values=values)
    default_meshes = ["1", "2", "4", "8", "2x2", "4x2"]
    flags.DEFINE_list("meshes", default_meshes, "as --mesh of launch.quantize", flag_values=values)
    timing.define_out(values)


def measure(workload: Workload, names: list[str]) -> dict[str, Any]:
    """All meshes, one after another."""
    rows = []
    for name in names:
        samples, weights = meshes.sizes(name) or (1, 1)
        context = multiprocessing.get_context("spawn")
        with _cpu_devices(samples * weights), context.Pool(1) as pool:
            rows.append({"mesh": name} | pool.apply(measure_one, (workload, name)))
    search = {"range_search": range_search()}
    return {"benchmark": "scaling", **dataclasses.asdict(workload), "rows": rows} | (
        search | environment()
    )


@contextmanager
def _cpu_devices(count: int) -> Iterator[None]:
    """A process that starts in here has `count` devices."""
    before = os.environ.get(DEVICES)
    os.environ[DEVICES] = str(count)
    try:
        yield
    finally:
        os.environ.pop(DEVICES)
        if before is not None:
            os.environ[DEVICES] = before


def measure_one(workload: Workload, name: str) -> dict[str, Any]:
    """The blocks of the network on one mesh, in this process."""
    mesh = meshes.parse(name)
    apply, variables, samples = workload.arrays()
    recorder = Recorder()
    for _ in range(2):  # the first run compiles
        observer = BlockTimes(recorder)
        aq.quantize(
            apply, variables, samples, workload.recipe, mesh=mesh, compiler=recorder,
            observer=observer,
        )  # fmt: skip
    return {
        "blocks": [
            {"blocks": len(same)} | _block(recorder, observer, same[0], mesh)
            for same in recorder.steps.values()
        ]
    }


def range_search() -> dict[str, float]:
    """Elements of an activation, and weights, whose range is searched in a second."""
    rng = np.random.default_rng(0)
    values, weights = np.abs(rng.normal(size=2**22)), rng.normal(size=(256, 4096))
    searches: dict[str, tuple[int, Callable[[], Any]]] = {
        "elements_a_second": (values.size, lambda: search_activation_range(values, 4)),
        "weights_a_second": (weights.size, lambda: search_weight_range(weights, 4)),
    }
    calls = {name: functools.partial(timing.seconds, call) for name, (_, call) in searches.items()}
    times = timing.in_turns(calls, 3)
    return {name: size / statistics.median(times[name]) for name, (size, _) in searches.items()}


class Recorder(aq.Compiler):
    """Keeps what XLA says of every program, and how long its calls took.

    Attributes:
        block: number of the block that is at work.
        steps: of every compiled step: the blocks that share it.
        programs: by block and name: the figures of XLA.
        calls: by block and name: wall and CPU seconds of every call.
    """

    def __init__(self) -> None:
        super().__init__(gpu_ops.backend())
        self.block = 0
        self.steps: dict[Hashable, list[int]] = {}
        self.programs: dict[tuple[int, str], dict[str, Any]] = {}
        self.calls: dict[tuple[int, str], list[tuple[float, float]]] = {}
        self._compiled: dict[Hashable, tuple[Any, dict[str, Any]]] = {}

    def get(self, key: Any, build: Callable[[], Callable], **options: Any) -> Callable:
        """See `Compiler.get`."""
        return functools.partial(self._call, key, super().get(key, build, **options))

    def _call(self, key: Any, function: Any, *arguments: Any) -> Any:
        known = key, jax.tree.structure(arguments)  # borders or none
        if known not in self._compiled:
            compiled = function.lower(*arguments).compile()
            self._compiled[known] = compiled, analysis(compiled)
        compiled, figures = self._compiled[known]
        if key[0] == STEP and self.block not in (same := self.steps.setdefault(key, [])):
            same.append(self.block)
        name = key[0]
        self.programs[self.block, name] = figures
        start, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(compiled(*arguments))
        spent = time.perf_counter() - start, time.process_time() - cpu
        self.calls.setdefault((self.block, name), []).append(spent)
        return result


def analysis(compiled: Any) -> dict[str, Any]:
    """What XLA says of a compiled program: of one device, in operations and bytes."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    found = collectives(compiled.as_text() or "")
    return {
        "flops": cost.get("flops", 0.0),
        "bytes_accessed": cost.get("bytes accessed", 0.0),
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "collectives": {kind: sent._asdict() for kind, sent in found.items()},
    }


class BlockTimes(aq.Observer):
    """Seconds of every block, and what it hands on."""

    def __init__(self, recorder: Recorder) -> None:
        self.names: list[str] = []
        self.outputs: list[list[tuple[int, ...]]] = []
        self.seconds: list[float] = []
        self._recorder = recorder
        recorder.calls.clear()

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.names)

    def on_start(self, net: Any) -> None:
        """See `Observer`."""
        shapes = [[net.graph.avals[value].shape for value in block.end] for block in net.blocks]
        self.outputs = shapes

    def on_block_start(self, index: int, block: Any) -> None:
        """See `Observer`."""
        self._recorder.block = index
        self.names.append(block.name)

    def on_block_end(self, report: Any) -> None:
        """See `Observer`."""
        self.seconds.append(report.seconds)


def _block(
    recorder: Recorder, observer: BlockTimes, index: int, mesh: Mesh | None
) -> dict[str, Any]:
    """The figures of a block. The hand-over is the second pass of the quantized block, in which its
    error is measured too. `rest` is the range search, the caches, and Python."""
    programs = {name: figures for (i, name), figures in recorder.programs.items() if i == index}
    calls = {name: spent for (i, name), spent in recorder.calls.items() if i == index}
    wall = {name: sum(seconds for seconds, _ in spent) for name, spent in calls.items()}
    passes = [seconds for seconds, _ in calls[FORWARD]]
    last = index == observer.count - 1
    return {
        "name": observer.names[index],
        "step": programs[STEP] | {
            "seconds": timing.summary([seconds for seconds, _ in calls[STEP]]),
            "cpu": statistics.median(cpu for _, cpu in calls[STEP]),
        },
        "forward": programs[FORWARD],
        "write": None if last else written(observer.outputs[index], mesh),
        "hand_over_seconds": 0.0 if last else sum(passes[len(passes) // 2 :]),
        "rest_seconds": observer.seconds[index] - sum(wall.values()),
    }  # fmt: skip


def written(shapes: list[tuple[int, ...]], mesh: Mesh | None) -> dict[str, Any]:
    """The collectives that write a batch of outputs into the caches of a hand-over."""
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    with devices.in_force(mesh):
        for shape in shapes:
            cache = devices.empty(2 * shape[0], shape[1:], np.float16)
            batch = devices.split_samples(np.zeros(shape, np.float16))
            program = jax.jit(devices.write, donate_argnums=0).lower(cache, batch, 0).compile()
            for kind, sent in collectives(program.as_text() or "").items():
                totals[kind] += sent.bytes
                counts[kind] += sent.count
    return {kind: {"count": counts[kind], "bytes": totals[kind]} for kind in counts}


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    timing.report(measure(timing.workload(Workload, values), values.meshes), values.out)


if __name__ == "__main__":
    sys.exit(main())
