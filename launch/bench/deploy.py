"""What deployment costs: ``python -m launch.bench deploy [--data_dir=DIR]``.

columns: ``gpu_ops.img2col_border`` (int8 codes, 4 bits, fused quadratic borders) against the best
of what jnp can say: runs of rows (``aquant_jax.layers.im2col``), shifted slices of the images, and
``conv_general_dilated_patches``.
networks: the embedded digits network and, where ``data_dir`` has it, ResNet-20, quantized by a few
steps of aquant at W2A2, run by the definition and by ``with_backend(gpu_ops.backend())`` on all
test images: on how many they predict the same class, and milliseconds a batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import border
from aquant_jax.arithmetic.uniform import TensorState, quantize, to_units
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import Window
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, experiment
from launch.lib.metrics import pad

SHAPE, KERNEL, BITS = (32, 56, 56, 64), (3, 3), 4
CONFIGS = ("configs/digits.py:w2a2", "configs/cifar10_resnet20.py:w2a2")
STEPS = 20


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
        "benchmark": "deploy",
        "rounds": rounds,
        "columns": _columns(rounds),
        "networks": [_network(spec, data_dir or "", rounds) for spec in configs],
        **environment(),
    }


def _columns(rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.maximum(rng.normal(size=SHAPE), 0), jnp.float32)
    tensor = TensorState(jnp.float32(0.2), jnp.float32(0))
    taps = int(np.prod(KERNEL))
    coefficients = {
        name: jnp.asarray(0.1 * rng.normal(size=(taps, SHAPE[-1])), jnp.float32)
        for name in border.get("quadratic").powers
    }
    operands = (x, tensor, coefficients)
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


def _custom_call(x, tensor, coefficients):
    found = gpu_ops.img2col_border(
        x, tensor.step_size, tensor.zero_point, coefficients, kernel=KERNEL, padding="SAME",
        bits=BITS, border="quadratic",
    )  # fmt: skip
    return found.reshape(*SHAPE[:-1], -1)


def _rows(x, tensor, coefficients):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    window = Window(SHAPE[0], padded.shape[1:3], KERNEL, (1, 1), (1, 1))
    rounding = im2col.Rounding(BITS, "quadratic", "identity", True)
    codes = im2col.column_codes(padded, tensor, coefficients, window, rounding)
    return jnp.concatenate([code.astype(jnp.int8) for code in codes], axis=-1)


def _slices(x, tensor, coefficients):
    u = jnp.pad(to_units(x, 1.0 / tensor.step_size), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = SHAPE[1:3]
    us = [u[:, i : i + height, j : j + width] for i, j in np.ndindex(*KERNEL)]
    (shared,) = border.polynomials("quadratic", True, coefficients, us)
    codes = [quantize(own, tensor.zero_point, BITS, shared).astype(jnp.int8) for own in us]
    return jnp.concatenate(codes, axis=-1)


def _patches(x, tensor, coefficients):
    patches = jax.lax.conv_general_dilated_patches(
        x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # channel-major
    u = to_units(patches.reshape(*SHAPE, -1), 1.0 / tensor.step_size)
    own = {name: c.T.reshape(1, 1, 1, *c.T.shape) for name, c in coefficients.items()}
    shared = jnp.mean(border.get("quadratic").apply(own, u), axis=-1, keepdims=True)
    codes = quantize(u, tensor.zero_point, BITS, shared)
    return jnp.swapaxes(codes.astype(jnp.int8), -1, -2).reshape(*SHAPE[:-1], -1)


def _network(spec: str, data_dir: str, rounds: int) -> dict[str, Any]:
    config = command_line.load_config(spec, {"recipe.steps": str(STEPS)}, "preset=aquant")
    loaded = experiment.load(config, data_dir)
    quantized = aq.quantize(
        loaded.apply, loaded.variables, loaded.calibration.calibration(256).inputs,
        experiment.recipe_of(config), compiler=aq.Compiler(gpu_ops.backend()), progress=False,
    )  # fmt: skip
    ways = {"definition": quantized, "gpu_ops": quantized.with_backend(gpu_ops.backend())}
    runs = {name: jax.jit(lambda x, way=way: way(x)) for name, way in ways.items()}
    size, found = config.eval_batch_size, {name: [] for name in ways}
    for images, labels in loaded.dataset.batches(size):
        for name, run in runs.items():
            found[name].append(np.asarray(run(pad(images, size)))[: len(labels)])
    logits = {name: np.concatenate(parts) for name, parts in found.items()}
    gap = np.abs(logits["gpu_ops"] - logits["definition"]).max(axis=1)
    batch = jnp.asarray(pad(images, size))
    calls = {name: functools.partial(run, batch) for name, run in runs.items()}
    times = {name: timing.summary(v) for name, v in timing.milliseconds(calls, rounds).items()}
    classes = {name: values.argmax(axis=1) for name, values in logits.items()}
    return {
        "config": spec,
        "images": len(gap),
        "same_class": int((classes["gpu_ops"] == classes["definition"]).sum()),
        "largest_gap_over_range": float(gap.max() / np.ptp(logits["definition"])),
        "images_with_a_gap_above_1e-5": int((gap > 1e-5 * np.ptp(logits["definition"])).sum()),
        "batch": size,
        "ms_a_batch": times,
        "definition_over_gpu_ops": times["definition"]["median"] / times["gpu_ops"]["median"],
    }
