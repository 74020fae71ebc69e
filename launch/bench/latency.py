"""Latency of a network's convolutions: ``python -m launch.bench latency [--model=resnet18]``.

Every convolution of the network (a dense layer is a 1x1 one), alone, at ``batch_size`` images of
``size`` x ``size``: as im2col and a matrix product, without and with the quadratic border fused
into im2col (the paper's comparison, Fig. 3), in float32 as in Caffe and in int8, where "without"
rounds to nearest in the same kernel; as XLA's own convolution in float32 and bfloat16; and on a GPU
by the tuned kernel, from bfloat16 to bfloat16 (layers that it does not serve: in int8), without and
with the border. Figures are medians of ``rounds`` runs, taken in turns; a run calls with other
inputs each time, 64 MiB of them but at most 16 (the weights stay); on a GPU it is of 20 calls,
which are waited for together. Layers of one shape are measured once and counted as often as they
occur.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpu_ops
from aquant_jax import models
from aquant_jax.graph.trace import trace
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import plots

BITS = 4
CACHE = 2**26  # bytes
MOST_BUFFERS = 16
FULL = jax.lax.Precision.HIGHEST  # of float32: a GPU would multiply it in TF32
REPEAT = {"cpu": 1, "gpu": 20}  # calls a run: waiting for one costs as much as a small kernel
OVERHEADS = {
    "border fp32 over im2col fp32": ("border fp32", "im2col fp32"),
    "border int8 over nearest int8": ("border int8", "nearest int8"),
    "border int8 over im2col fp32": ("border int8", "im2col fp32"),
    "border int8 over xla bf16": ("border int8", "xla bf16"),
    "border tuned over nearest tuned": ("border tuned", "nearest tuned"),
    "border tuned over xla bf16": ("border tuned", "xla bf16"),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        model: of the zoo.
        size: side of the input's square.
        batch_size: images.
        rounds: runs of each figure.
        fused: whether a channel's taps share their border; the paper's latencies are without.
    """

    model: str
    size: int
    batch_size: int
    rounds: int
    fused: bool


class Way(NamedTuple):
    """One way to convolve: a function of x, in its dtype, and of more operands, and those."""

    run: Callable
    operands: tuple
    dtype: Any = jnp.float32


class Convolution(NamedTuple):
    """Geometry of one convolution: x is [N, H, W, C], the kernel [kh, kw, C / groups, O]."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def window(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel[:2], "strides": self.strides, "padding": self.padding,
            "dilation": self.dilation, "groups": self.groups,
        }  # fmt: skip


def measure(work: Workload) -> dict[str, Any]:
    """Milliseconds of every layer and of all of them.

    Args:
        work: what to measure.

    Returns:
        JSON-able.

    Raises:
        InputError: an unknown model.
    """
    paths = collections.defaultdict(list)
    for path, convolution in convolutions(work).items():
        paths[convolution].append(path)
    layers = [
        {"layers": names, **convolution._asdict(), "ms": _times(convolution, work)}
        for convolution, names in paths.items()
    ]
    total = {
        way: sum(len(layer["layers"]) * layer["ms"][way]["median"] for layer in layers)
        for way in layers[0]["ms"]
    }
    return {
        "benchmark": "latency",
        **dataclasses.asdict(work),
        "bits": BITS,
        "layers": layers,
        "total_ms": total,
        "overhead_percent": {
            name: 100 * (total[one] / total[other] - 1)
            for name, (one, other) in OVERHEADS.items()
            if one in total
        },
        "tuned": "run" if "border tuned" in total else "not run: it needs an NVIDIA GPU",
        **environment(),
    }


def convolutions(work: Workload) -> dict[str, Convolution]:
    """Every weighted op of a network, by weight path."""
    apply, variables = models.create(work.model)
    images = jax.ShapeDtypeStruct((work.batch_size, work.size, work.size, 3), jnp.float32)
    graph = trace(apply, variables, images)
    return {
        op.layer.path: _convolution(op, graph.avals[op.x].shape)
        for op in graph.ops if op.layer is not None
    }  # fmt: skip


def _convolution(op, x: tuple[int, ...]) -> Convolution:
    weight, params = op.layer.weight_shape, op.params
    if op.layer.kind == "dense":
        kernel = (1, 1, *weight)
        return Convolution((x[0], 1, 1, x[-1]), kernel, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    lhs, rhs, _ = params["dimension_numbers"]
    outer, inner, *spatial = (weight[axis] for axis in rhs)
    return Convolution(
        tuple(x[axis] for axis in (lhs[0], *lhs[2:], lhs[1])), (*spatial, inner, outer),
        tuple(params["window_strides"]), tuple(params["padding"]), tuple(params["rhs_dilation"]),
        params["feature_group_count"],
    )  # fmt: skip


def _times(convolution: Convolution, work: Workload) -> dict[str, dict[str, float]]:
    size = 4 * int(np.prod(convolution.x))
    number = min(MOST_BUFFERS, 2 + CACHE // size)
    keys = jax.random.split(jax.random.key(0), number)
    calls = {}
    for name, way in _ways(convolution, work.fused).items():
        inputs = [jax.random.normal(key, convolution.x, way.dtype) for key in keys]
        compiled, turns = jax.jit(way.run), itertools.cycle(inputs)
        calls[name] = lambda run=compiled, own=way.operands, turns=turns: run(next(turns), *own)
    found = timing.milliseconds(calls, work.rounds, REPEAT[jax.default_backend()])
    return {name: timing.summary(times) for name, times in found.items()}


def _ways(at: Convolution, fused: bool) -> dict[str, Way]:
    """What is compared."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=at.kernel), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 2**BITS, at.kernel), jnp.uint8)
    shape = (int(np.prod(at.kernel[:2])), at.x[-1])
    borders = {
        name: jnp.asarray(0.1 * rng.normal(size=shape) + (name == "b0") / 2, jnp.float32)
        for name in ("b0", "b1", "b2")
    }
    step, zero = jnp.float32(0.2), jnp.float32(7)
    scale = (jnp.ones(at.kernel[-1]), jnp.full(at.kernel[-1], 8.0))
    quadratic: dict[str, Any] = {"border": "quadratic", "fused": fused, "bits": BITS}
    own: dict[str, Any] = {
        key: value for key, value in at.window().items() if key not in ("kernel", "groups")
    }

    def plain(x, kernel):
        return _product(gpu_ops.img2col(x, **at.window()), kernel, at.groups)

    def border(x, kernel, step, zero, borders):
        how = {**at.window(), **quadratic, "output": "float32"}
        found = gpu_ops.img2col_border(x, step, zero, borders, **how)
        return _product(found, kernel, at.groups)

    def integer(how):
        return lambda x, step, zero, borders, *weights: gpu_ops.conv_border_int8(
            x, step, zero, borders, *weights, weight_bits=BITS, **own, **how
        )

    def xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, at.strides, at.padding, rhs_dilation=at.dilation,
            feature_group_count=at.groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=FULL,
        )  # fmt: skip

    weights = (codes, *scale)
    nearest = Way(integer({"bits": BITS}), (step, zero, None, *weights))
    rounded = Way(integer(quadratic), (step, zero, borders, *weights))
    ways = {
        "im2col fp32": Way(plain, (kernel,)),
        "border fp32": Way(border, (kernel, step, zero, borders)),
        "nearest int8": nearest,
        "border int8": rounded,
        "xla fp32": Way(xla, (kernel,)),
        "xla bf16": Way(xla, (kernel.astype(jnp.bfloat16),), jnp.bfloat16),
    }
    if jax.default_backend() == "gpu":
        ways["nearest tuned"] = _tuned(own, nearest, {"bits": BITS})
        ways["border tuned"] = _tuned(own, rounded, quadratic)
    return ways


def _tuned(window: dict[str, Any], integer: Way, how: dict[str, Any]) -> Way:
    """The tuned kernel or, for a layer that it does not serve, `integer`, from bfloat16 to it."""
    try:
        layer = gpu_ops.fold_convolution(*integer.operands, weight_bits=BITS, **how)
    except ValueError:
        return Way(
            lambda x, *own: integer.run(x, *own).astype(jnp.bfloat16), integer.operands,
            jnp.bfloat16,
        )  # fmt: skip
    return Way(
        lambda x, layer: gpu_ops.conv_border_tuned(x, layer, **window), (layer,), jnp.bfloat16
    )


def _product(columns: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """Columns [N, OH, OW, G, K] times a kernel [kh, kw, C / G, O]."""
    outer = kernel.shape[-1] // groups
    weights = kernel.reshape(-1, groups, outer).swapaxes(0, 1)
    y = jnp.einsum("nhwgk,gko->nhwgo", columns, weights, precision=FULL)
    return y.reshape(*columns.shape[:3], -1)


def table(results: dict[str, Any]) -> str:
    """The layers in Markdown."""
    ways = list(results["total_ms"])
    lines = [
        f"| layers | x | kernel | {' | '.join(ways)} |",
        "| --- | --- | --- |" + " ---: |" * len(ways),
    ]
    for layer in results["layers"]:
        cells = [f"{layer['ms'][way]['median']:.3f}" for way in ways]
        sizes = ["x".join(map(str, layer[key])) for key in ("x", "kernel")]
        names = f"{layer['layers'][0]} (x{len(layer['layers'])})"
        lines.append(f"| {' | '.join([names, *sizes, *cells])} |")
    cells = [f"{value:.3f}" for value in results["total_ms"].values()]
    return "\n".join([*lines, f"| all, ms | | | {' | '.join(cells)} |"])


def plot(results: dict[str, Any], path: Path) -> None:
    """One bar a way, its layers stacked: the paper's Fig. 3."""
    ways = list(results["total_ms"])
    parts = {
        layer["layers"][0]: [len(layer["layers"]) * layer["ms"][way]["median"] for way in ways]
        for layer in results["layers"]
    }
    plots.stacked_bars(ways, parts, f"{results['model']}, {results['device']}: ms", path)
