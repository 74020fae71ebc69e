"""Measures the latency of each convolution of a network.

A dense layer counts as a 1x1 convolution. Each layer runs alone, as im2col and a matrix product
with and without the quadratic border (the paper's Fig. 3), in float32 and int8 ("channel": one a
channel, "nearest": none), as XLA's own convolution in float32 and bfloat16, and on a GPU by the
tuned kernel. Figures are medians, taken in turns; each run reads other inputs. Layers of one shape
are measured once and counted as often as they occur. --out also writes a table and a plot.

Example:

    python -m launch.bench.latency --model=resnet18 --batch_size=32 --rounds=100 --out=latency.json
"""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import gpu_ops
from aquant_jax import models
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.ir import Op
from aquant_jax.graph.trace import trace
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.conv_layout import conv_geometry
from aquant_jax.layers.integer import QuantizedWeights
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line, plots

BITS = 4
CACHE = 2**26  # bytes of inputs, so that none of them stays in a cache
MOST_BUFFERS = 16
FULL = jax.lax.Precision.HIGHEST  # of float32: a GPU would multiply it in TF32
REPEAT = {"cpu": 1, "gpu": 20}  # calls a run: waiting for one costs as much as a small kernel
OVERHEADS = {
    "border fp32 over im2col fp32": ("border fp32", "im2col fp32"),
    "border int8 over nearest int8": ("border int8", "nearest int8"),
    "channel int8 over nearest int8": ("channel int8", "nearest int8"),
    "border int8 over im2col fp32": ("border int8", "im2col fp32"),
    "border int8 over xla bf16": ("border int8", "xla bf16"),
    "border tuned over nearest tuned": ("border tuned", "nearest tuned"),
    "border tuned over xla bf16": ("border tuned", "xla bf16"),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """The measured workload; its fields are the flags.

    Attributes:
        model, size, batch_size: network of the zoo, side of its input, images.
        rounds: runs of each figure.
        border_granularity: "element" or "mean", of the ways that are called border.
    """

    model: str
    size: int
    batch_size: int
    rounds: int
    border_granularity: str


class Way(NamedTuple):
    """One way to convolve: a function of x, in its dtype, and of more operands, and those."""

    run: Callable[..., jax.Array]
    operands: tuple[Any, ...]
    dtype: Any = jnp.float32


class Layer(NamedTuple):
    """A convolution: shapes of x ``[N, H, W, C]`` and kernel ``[kh, kw, C / groups, O]``."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    geometry: ConvGeometry


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("model", "resnet18", "in the zoo", flag_values=values)
    flags.DEFINE_integer("size", 224, "side of the network's input", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "images", 1, flag_values=values)
    flags.DEFINE_alias("batch", "batch_size", flag_values=values)
    kinds = ["element", "mean"]
    flags.DEFINE_enum("border_granularity", "element", kinds, "of a recipe", flag_values=values)
    timing.define_flags(values)


def measure(work: Workload) -> dict[str, Any]:
    """Milliseconds of every layer and of all of them, JSON-able.

    Raises:
        InputError: an unknown model.
    """
    paths = collections.defaultdict(list)
    for path, layer in convolutions(work).items():
        paths[layer].append(path)
    layers = [
        {"layers": names, **_description(layer), "ms": _times(layer, work)}
        for layer, names in paths.items()
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
            for name, (one, other) in OVERHEADS.items() if one in total
        },
        "tuned": "run" if "border tuned" in total else "not run: it needs an NVIDIA GPU",
        **environment(),
    }  # fmt: skip


def _description(layer: Layer) -> dict[str, Any]:
    geometry = layer.geometry._asdict()
    names = ("strides", "padding", "dilation", "groups")
    return {"x": layer.x, "kernel": layer.kernel, **{n: geometry[n] for n in names}}


def convolutions(work: Workload) -> dict[str, Layer]:
    """Every weighted op of a network, by weight path."""
    apply, variables = models.create(work.model)
    images = jax.ShapeDtypeStruct((work.batch_size, work.size, work.size, 3), jnp.float32)
    graph = trace(apply, variables, images)
    return {
        op.layer.path: _layer(op, graph.avals[op.x].shape)
        for op in graph.ops if op.layer is not None
    }  # fmt: skip


def _layer(op: Op, x: tuple[int, ...]) -> Layer:
    weight = op.layer.weight_shape
    if op.layer.kind == "dense":
        return Layer((x[0], 1, 1, x[-1]), (1, 1, *weight), ConvGeometry.pointwise(1))
    lhs, rhs, _ = op.params["dimension_numbers"]
    outer, inner, *spatial = (weight[axis] for axis in rhs)
    shape = tuple(x[axis] for axis in (lhs[0], *lhs[2:], lhs[1]))
    return Layer(shape, (*spatial, inner, outer), conv_geometry(op, x))


def _times(layer: Layer, work: Workload) -> dict[str, dict[str, float]]:
    size = 4 * int(np.prod(layer.x))
    keys = jax.random.split(jax.random.key(0), min(MOST_BUFFERS, 2 + CACHE // size))
    calls = {}
    for name, way in ways(layer, work.border_granularity).items():
        inputs = [jax.random.normal(key, layer.x, way.dtype) for key in keys]
        compiled, turns = jax.jit(way.run), itertools.cycle(inputs)
        calls[name] = lambda run=compiled, rest=way.operands, turns=turns: run(next(turns), *rest)
    times = timing.milliseconds(calls, work.rounds, REPEAT[jax.default_backend()])
    return {name: timing.summary(values) for name, values in times.items()}


def ways(layer: Layer, border_granularity: str) -> dict[str, Way]:
    """The compared ways to run a layer, by name."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=layer.kernel), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 2**BITS, layer.kernel), jnp.uint8)
    shape = (layer.geometry.taps, layer.x[-1])
    borders = {
        name: jnp.asarray(0.1 * rng.normal(size=shape) + (name == "b0") / 2, jnp.float32)
        for name in ("b0", "b1", "b2")
    }
    quantizer = ActivationQuantizer(jnp.float32(0.2), jnp.float32(7))
    weights = (codes, jnp.ones(codes.shape[-1]), jnp.full(codes.shape[-1], 8.0))
    first_tap = {name: b[:1] for name, b in borders.items()}
    nearest, channel = Rounding(BITS), Rounding(BITS, "quadratic", per_channel=True)
    rounding = Rounding(BITS, "quadratic", shared_across_taps=border_granularity == "mean")
    chosen = {
        **_float_ways(layer, rounding, kernel, (quantizer, borders)),
        "nearest int8": _integer(layer, nearest, (quantizer, {}, weights)),
        "border int8": _integer(layer, rounding, (quantizer, borders, weights)),
        "channel int8": _integer(layer, channel, (quantizer, first_tap, weights)),
    }
    if jax.default_backend() == "gpu":
        chosen["nearest tuned"] = tuned(layer, nearest, chosen["nearest int8"])
        chosen["border tuned"] = tuned(layer, rounding, chosen["border int8"])
    return chosen


def _float_ways(
    layer: Layer, rounding: Rounding, kernel: jax.Array, activation: tuple[Any, ...]
) -> dict[str, Way]:
    geometry = layer.geometry

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _product(gpu_ops.img2col(x, geometry), kernel, geometry.groups)

    def border(x: jax.Array, kernel: jax.Array, quantizer: Any, borders: Any) -> jax.Array:
        columns = gpu_ops.img2col_border(
            x, quantizer, borders, rounding, geometry, output="float32"
        )
        return _product(columns, kernel, geometry.groups)

    def xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, geometry.strides, geometry.padding, rhs_dilation=geometry.dilation,
            feature_group_count=geometry.groups, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=FULL,
        )  # fmt: skip

    return {
        "im2col fp32": Way(plain, (kernel,)),
        "border fp32": Way(border, (kernel, *activation)),
        "xla fp32": Way(xla, (kernel,)),
        "xla bf16": Way(xla, (kernel.astype(jnp.bfloat16),), jnp.bfloat16),
    }


def _integer(layer: Layer, rounding: Rounding, operands: tuple[Any, ...]) -> Way:
    def run(x: jax.Array, quantizer: Any, borders: Any, weights: tuple[Any, ...]) -> jax.Array:
        quantized = _quantized(weights)
        operands = (x, quantizer, borders, quantized, rounding, layer.geometry)
        return jax.tree.leaves(gpu_ops.conv_border_int8(*operands))[0]

    return Way(run, operands)


def _quantized(weights: tuple[Any, ...]) -> QuantizedWeights:
    codes, scale, zero_point = weights
    return QuantizedWeights(codes, scale, zero_point, BITS)


def tuned(layer: Layer, rounding: Rounding, integer: Way) -> Way:
    """The tuned kernel, or `integer` for a layer that it does not serve; bfloat16 in and out."""
    quantizer, borders, weights = integer.operands
    try:
        folded = gpu_ops.fold_convolution(quantizer, borders, _quantized(weights), rounding)
    except ValueError:
        in_half = lambda x, *rest: integer.run(x, *rest).astype(jnp.bfloat16)  # noqa: E731
        return Way(in_half, integer.operands, jnp.bfloat16)
    run = lambda x, folded: gpu_ops.conv_border_tuned(x, folded, layer.geometry)  # noqa: E731
    return Way(run, (folded,), jnp.bfloat16)


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


@command_line.program
def main(argv: list[str]) -> None:
    """Measures, reports, and writes table and plot beside the JSON."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    results = measure(timing.workload(Workload, values))
    timing.report(results, values.out)
    if values.out:
        out = Path(values.out)
        out.with_suffix(".md").write_text(table(results) + "\n")
        plot(results, out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
