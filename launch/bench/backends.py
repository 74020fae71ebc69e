"""Measures what deployment costs: im2col columns, and whole networks.

columns: `gpu_ops.img2col_border` (int8 codes, 4 bits, shared quadratic borders) against the best
of jnp: runs of rows (`layers.im2col`), shifted slices, and `conv_general_dilated_patches`.
networks: the digits network and, with --data_dir, ResNet-20, quantized by a few steps of aquant at
W2A2, by the reference implementation and by gpu_ops: equal classes on all test images, and ms per
batch.

Example:

    python -m launch.bench.backends --data_dir=../shared/data --rounds=15 --out=backends.json
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import border
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer, quantize, to_units
from aquant_jax.layers import im2col
from aquant_jax.layers.column import Rounding
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, experiment
from launch.lib.metrics import pad

SHAPE, KERNEL, BITS = (32, 56, 56, 64), (3, 3), 4
ROUNDING = Rounding(BITS, "quadratic", "identity", shared_across_taps=True)
CONFIGS = ("configs/digits.py:w2a2", "configs/cifar10_resnet20.py:w2a2")
STEPS = 20


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    command_line.define_path(values, "data_dir", None, "of ResNet-20; none leaves it out")
    timing.define_flags(values)


def measure(rounds: int, data_dir: str | None) -> dict[str, Any]:
    """Figures of the columns and of the networks.

    Args:
        rounds: how often every figure is taken.
        data_dir: of ResNet-20; None leaves it out.

    Returns:
        JSON-able.
    """
    configs = CONFIGS if data_dir else CONFIGS[:1]
    return {
        "benchmark": "backends",
        "rounds": rounds,
        "columns": _columns(rounds),
        "networks": [_network(spec, data_dir or "", rounds) for spec in configs],
        **environment(),
    }


def _columns(rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.maximum(rng.normal(size=SHAPE), 0), jnp.float32)
    quantizer = ActivationQuantizer(jnp.float32(0.2), jnp.float32(0))
    taps = int(np.prod(KERNEL))
    coefficients = {
        name: jnp.asarray(0.1 * rng.normal(size=(taps, SHAPE[-1])), jnp.float32)
        for name in border.get("quadratic").powers
    }
    operands = (x, quantizer, coefficients)
    ways = {"gpu_ops": _custom_call, "rows": _rows, "slices": _slices, "patches": _patches}
    jitted = {name: functools.partial(jax.jit(way), *operands) for name, way in ways.items()}
    same = [np.asarray(call()) == np.asarray(jitted["gpu_ops"]()) for call in jitted.values()]
    times = timing.milliseconds(jitted, rounds)
    medians = {name: timing.summary(values)["median"] for name, values in times.items()}
    return {
        "x": SHAPE,
        "kernel": KERNEL,
        "ms": {name: timing.summary(values) for name, values in times.items()},
        "best_jnp_over_gpu_ops": min(list(medians.values())[1:]) / medians["gpu_ops"],
        "share_of_equal_codes": dict(zip(ways, (float(s.mean()) for s in same), strict=True)),
    }


def _custom_call(
    x: jax.Array, quantizer: ActivationQuantizer, coefficients: Coefficients
) -> jax.Array:
    geometry = gpu_ops.conv_geometry(x.shape, KERNEL, padding="SAME")
    codes = gpu_ops.img2col_border(x, quantizer, coefficients, ROUNDING, geometry)
    return codes.reshape(*SHAPE[:-1], -1)


def _rows(x: jax.Array, quantizer: ActivationQuantizer, coefficients: Coefficients) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    geometry = gpu_ops.conv_geometry(padded.shape, KERNEL, padding="VALID")
    codes = im2col.column_codes(padded, quantizer, coefficients, geometry, ROUNDING)
    return jnp.concatenate([code.astype(jnp.int8) for code in codes], axis=-1)


def _slices(x: jax.Array, quantizer: ActivationQuantizer, coefficients: Coefficients) -> jax.Array:
    u = jnp.pad(to_units(x, 1.0 / quantizer.step_size), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = SHAPE[1:3]
    us = [u[:, i : i + height, j : j + width] for i, j in np.ndindex(*KERNEL)]
    (shared,) = border.polynomials("quadratic", True, coefficients, us)
    codes = [quantize(u, quantizer.zero_point, BITS, shared).astype(jnp.int8) for u in us]
    return jnp.concatenate(codes, axis=-1)


def _patches(x: jax.Array, quantizer: ActivationQuantizer, coefficients: Coefficients) -> jax.Array:
    patches = jax.lax.conv_general_dilated_patches(
        x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # channel-major
    u = to_units(patches.reshape(*SHAPE, -1), 1.0 / quantizer.step_size)
    rows = {name: c.T.reshape(1, 1, 1, *c.T.shape) for name, c in coefficients.items()}
    shared = jnp.mean(border.get("quadratic").apply(rows, u), axis=-1, keepdims=True)
    codes = quantize(u, quantizer.zero_point, BITS, shared)
    return jnp.swapaxes(codes.astype(jnp.int8), -1, -2).reshape(*SHAPE[:-1], -1)


def _network(spec: str, data_dir: str, rounds: int) -> dict[str, Any]:
    config = command_line.load_config(
        spec, {"recipe.reconstruction.steps": str(STEPS)}, "preset=aquant"
    )
    loaded = experiment.load(config, data_dir)
    quantized = aq.quantize(
        loaded.apply, loaded.variables, loaded.calibration.calibration(256).inputs,
        experiment.recipe_of(config),
        compiler=aq.Compiler(gpu_ops.backend()), observer=aq.Observer(),
    )  # fmt: skip
    ways = {"reference": quantized, "gpu_ops": quantized.with_backend(gpu_ops.backend())}
    runs = {name: jax.jit(lambda x, way=way: way(x)) for name, way in ways.items()}
    size, outputs = config.eval_batch_size, {name: [] for name in ways}
    for images, labels in loaded.dataset.batches(size):
        for name, run in runs.items():
            outputs[name].append(np.asarray(run(pad(images, size)))[: len(labels)])
    logits = {name: np.concatenate(parts) for name, parts in outputs.items()}
    gap = np.abs(logits["gpu_ops"] - logits["reference"]).max(axis=1)
    batch = jnp.asarray(pad(images, size))
    calls = {name: functools.partial(run, batch) for name, run in runs.items()}
    times = {name: timing.summary(v) for name, v in timing.milliseconds(calls, rounds).items()}
    classes = {name: values.argmax(axis=1) for name, values in logits.items()}
    return {
        "config": spec,
        "images": len(gap),
        "same_class": int((classes["gpu_ops"] == classes["reference"]).sum()),
        "largest_gap_over_range": float(gap.max() / np.ptp(logits["reference"])),
        "images_with_a_gap_above_1e-5": int((gap > 1e-5 * np.ptp(logits["reference"])).sum()),
        "batch": size,
        "ms_a_batch": times,
        "reference_over_gpu_ops": times["reference"]["median"] / times["gpu_ops"]["median"],
    }


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    timing.report(measure(values.rounds, values.data_dir), values.out)


if __name__ == "__main__":
    sys.exit(main())
