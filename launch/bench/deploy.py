"""Measures whole networks of the zoo against other runtimes, on a CPU.

Weights are random: the arithmetic does not depend on them. Every round takes one batch through XLA
in float32 and bfloat16, through our int8 backend with codes rounded to nearest, with a border a
channel and with a border an element, through onnxruntime and OpenVINO where they are installed
(extra `bench`), and through our ONNX files in both. The image is quantized to the bits of all other
tensors; with --float_stem the first layer runs in float.

Example:

    python -m launch.bench.deploy --model=resnet18 --bits=4 --rounds=15 --out=resnet18.json
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax import models
from aquant_jax.deployment.onnx import to_onnx
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, peers

CALIBRATION = 8  # images
WAYS = {"nearest": ("nearest", "element"), "channel": ("aquant", "channel"),
        "element": ("aquant", "element")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """The measured workload; its fields are the flags.

    Attributes:
        model: of the zoo, for ImageNet.
        bits: of weights and activations.
        batch_size: images a call.
        size: side of the square that the network sees.
        float_stem: whether the image stays float, and with it the first layer.
        peak: int8 products a second of this machine, in billions; 0 leaves the share out.
        rounds: how often every figure is taken.
    """

    model: str
    bits: int
    batch_size: int
    size: int
    float_stem: bool
    peak: float
    rounds: int


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("model", "resnet18", "in the zoo, for ImageNet", flag_values=values)
    flags.DEFINE_integer("bits", 4, "of weights and activations", 2, 8, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "images a call", 1, flag_values=values)
    flags.DEFINE_integer("size", 224, "side of the network's input", 1, flag_values=values)
    flags.DEFINE_boolean("float_stem", False, "leave the image float", flag_values=values)
    flags.DEFINE_float(
        "peak", 0.0, "billions of int8 products a second of this machine", 0, flag_values=values
    )
    timing.define_flags(values)


def measure(work: Workload) -> dict[str, Any]:
    """Milliseconds of a batch, by every way.

    Args:
        work: what to measure.

    Returns:
        JSON-able.

    Raises:
        InputError: an unknown model.
    """
    apply, variables = models.create(work.model)
    rng = np.random.default_rng(0)
    shape = (work.size, work.size, 3)
    x = rng.normal(size=(work.batch_size, *shape)).astype(np.float32)
    calibration = rng.normal(size=(CALIBRATION, *shape)).astype(np.float32)
    calls = peers.jax_runs(apply, variables, x)
    networks = _networks(work, apply, variables, calibration)
    equal = {}
    for name, network in networks.items():
        run = jax.jit(network.with_backend(gpu_ops.backend()))
        calls[f"ours {name}"] = functools.partial(run, x)
        equal[name] = bool(np.array_equal(run(x[:1]), jax.jit(network)(x[:1])))
    failures: dict[str, str] = {}
    for runtime, label, model in _files(apply, variables, calibration, networks):
        started, failed = peers.runs(model, x, runtime, label)
        calls |= started
        failures |= failed
    times = timing.milliseconds(calls, work.rounds)
    summaries = {name: timing.summary(values) for name, values in times.items()}
    medians = {name: summary["median"] for name, summary in summaries.items()}
    products = _products(apply, variables, x)
    return {
        "benchmark": "deploy",
        **dataclasses.asdict(work),
        "ms": summaries,
        "xla_float32_over": {name: medians["xla float32"] / ms for name, ms in medians.items()},
        "images_per_second": {name: 1e3 * len(x) / ms for name, ms in medians.items()},
        "billion_products_an_image": products / 1e9,
        "share_of_peak": {
            name: products * len(x) / ms / 1e6 / work.peak
            for name, ms in medians.items() if work.peak
        },
        "not_run": failures,
        "first_image_has_the_bits_of_the_reference": equal,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        **environment(),
    }  # fmt: skip


def _networks(work: Workload, apply: Any, variables: Any, x: np.ndarray) -> dict[str, Any]:
    compiler, networks = aq.Compiler(gpu_ops.backend()), {}
    for name, (preset, granularity) in WAYS.items():
        fields = {} if preset == "nearest" else {"steps": 0}
        recipe = aq.recipes.preset(
            preset, weight_bits=work.bits, act_bits=work.bits, batch_size=len(x),
            border_granularity=granularity, quantize_input=not work.float_stem, **fields,
        )  # fmt: skip
        options = {"observer": aq.Observer(), "compiler": compiler}
        networks[name] = aq.quantize(apply, variables, x, recipe, **options)
    return networks


def _files(
    apply: Any, variables: Any, calibration: np.ndarray, networks: dict[str, Any]
) -> Iterator[tuple[str, str, Any]]:
    """The runtimes that are installed, and the ONNX models that they run, with a label."""
    installed = peers.installed()
    if not installed:
        return
    single = peers.float_model(apply, variables, calibration)
    for label, model in (("float32", single), ("int8", peers.int8_model(single, calibration))):
        yield from ((runtime, label, model) for runtime in installed)
    for name, runtime in itertools.product(("nearest", "channel"), installed):
        yield runtime, f"of our ONNX, {name}", to_onnx(networks[name], runtime=runtime)


def _products(apply: Any, variables: Any, x: np.ndarray) -> float:
    """Multiplications of one image, half of XLA's count of operations.

    JAX keeps the program of `peers.jax_runs`, so nothing is compiled.
    """
    analysis = jax.jit(apply).lower(variables, x).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"] / 2 / len(x)


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    timing.report(measure(timing.workload(Workload, values)), values.out)


if __name__ == "__main__":
    sys.exit(main())
