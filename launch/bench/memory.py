"""Measures the peak memory of a quantization, with and without a memory limit.

Weights and images are random: neither memory nor time depends on them. Every case is a process of
its own, whose peak is that of its resident memory, with everything that it holds. "same" says
whether both ended with the same bits.

Example:

    python -m launch.bench.memory --steps=5 --memory_limit=4GiB --out=memory.json
"""

import dataclasses
import hashlib
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax import models
from aquant_jax.errors import InputError, byte_size
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, memory_limits, process

CHUNK = 64  # images that are drawn at once
CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is quantized; the fields are flags."""

    model: str = "resnet50"
    size: int = 224
    samples: int = 1024
    batch_size: int = 32
    bits: int = 4
    steps: int = 0


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    default = Workload()
    flags.DEFINE_enum("model", default.model, sorted(models.MODELS), "network", flag_values=values)
    for name, text in (
        ("size", "of an image"), ("samples", "images"), ("batch_size", "of a step"),
        ("bits", "of weights and activations"), ("steps", "a block; 0 rounds to nearest"),
    ):  # fmt: skip
        least = int(name != "steps")
        flags.DEFINE_integer(name, getattr(default, name), text, least, flag_values=values)
    memory_limits.define_flag(values)
    timing.define_out(values)


def measure(workload: Workload, limit: int | None) -> dict[str, Any]:
    """Both cases, one after another; only that without a limit where there is none."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        write_images(workload, images)
        for given in dict.fromkeys((limit, None)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure_one, (workload, images, given)))
    same = len({row["sha256"] for row in rows}) == 1
    return {"benchmark": "memory", **dataclasses.asdict(workload), "same": same, "rows": rows} | (
        environment()
    )


def write_images(workload: Workload, path: Path) -> None:
    """Writes random images in the format of `numpy.load`.

    Raises:
        InputError: they do not fit on the disk.
    """
    shape = (workload.samples, workload.size, workload.size, CHANNELS)
    size, free = math.prod(shape) * np.float32().nbytes, shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(
            f"--samples={workload.samples} --size={workload.size}: the images take "
            f"{byte_size(size)}; {path.parent} has {byte_size(free)}"
        )
    images = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    rng = np.random.default_rng(0)
    for start in range(0, workload.samples, CHUNK):
        part = images[start : start + CHUNK]
        part[:] = rng.normal(size=part.shape)
    images.flush()


def measure_one(workload: Workload, images: Path, limit: int | None) -> dict[str, Any]:
    """Peak memory, seconds, plan and result of one case, in this process."""
    apply, variables = models.create(workload.model)
    method = aq.recipes.aquant if workload.steps else aq.recipes.nearest
    steps = {"steps": workload.steps} if workload.steps else {}
    recipe = method(workload.bits, workload.bits, batch_size=workload.batch_size, **steps)
    plans: list[Any] = []

    class Plan(aq.Observer):
        def on_memory(self, plan: Any) -> None:
            plans.append(plan)

    began = time.perf_counter()
    quantized = aq.quantize(
        apply, variables, np.load(images, mmap_mode="r"), recipe, observer=Plan(),
        compiler=aq.Compiler(gpu_ops.backend()), memory_limit=limit,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((quantized.layers, quantized.activations)):
        digest.update(np.asarray(leaf).tobytes())
    return {
        "limit": limit,
        "peak": process.peak_bytes(),
        "seconds": seconds,
        "places": plans[0].places,
        "sha256": digest.hexdigest(),
    }


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    limit = memory_limits.parse(values.memory_limit)
    timing.report(measure(timing.workload(Workload, values), limit), values.out)


if __name__ == "__main__":
    sys.exit(main())
