"""The choice of channel transforms: those with the least error of what reads a tensor.

Candidates are compared on some rows of the float network's tensors, a row for every pixel: by what
each tap of the layers that read a tensor adds to its output, with both operands rounded to nearest,
and by the tensor itself where other ops read it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.range_search import search_activation_range
from aquant_jax.arithmetic.uniform import (
    ActivationQuantizer,
    dequantize,
    fake_quantize,
    max_code,
    quantize,
)
from aquant_jax.errors import ReconstructionError
from aquant_jax.graph.ir import ALIASES
from aquant_jax.graph.subgraph import bind_inputs
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.plan import block_program
from aquant_jax.plan.channel_transform import (
    ChannelTransform,
    absorb,
    forward,
    inverse,
    transformable,
)
from aquant_jax.plan.network import Network, take_samples
from aquant_jax.plan.transform_readers import by_channel, groups, takes_shift

ROWS = 2048  # of a tensor, on which candidates are compared
THRESHOLDS = 12  # ranges to which the channels of larger range are scaled down
SMALLEST = 0.05  # the least of these is the range that this share of the channels stays below


class _Sample(NamedTuple):
    """The least and the largest value of each channel of a tensor, and some of its rows."""

    low: Float[np.ndarray, "C"]
    high: Float[np.ndarray, "C"]
    rows: Float[np.ndarray, "rows C"]


class _Reading(NamedTuple):
    """How a tensor is read: the compiled error's static part.

    Attributes:
      bits: of the tensor.
      weight_bits: of every layer that reads it; None for float.
      restored: whether other ops read it too.
    """

    bits: int
    weight_bits: tuple[int | None, ...]
    restored: bool


def find_transforms(net: Network, leaves: Mapping[int, Any]) -> dict[str, ChannelTransform]:
    """The transforms of the tensors, by key, where one is better than none.

    Args:
      net: without transforms; its recipe names the kinds to choose from.
      leaves: of the calibration set, by value id.

    Raises:
      ReconstructionError: a tensor holds NaN or infinity.
    """
    layers = transformable(net.graph, net.plan)
    plain = [op for op in net.graph.ops if op.layer is None and op.name not in ALIASES]
    read = {value for op in plain for value in op.reads}
    transforms = {}
    for value, sample in zip(layers, _observe(net, list(layers), leaves), strict=True):
        tensor = net.plan.tensors[value]
        paths = [op.layer.path for op in layers[value]]
        weights = tuple(by_channel(op, net.folded[op.layer.path].weight) for op in layers[value])
        weight_bits = tuple(net.plan.layers[path].weight_bits for path in paths)
        reading = _Reading(tensor.bits, weight_bits, value in read)
        shape = net.graph.avals[value].shape
        shifts = all(takes_shift(op, shape) for op in layers[value])
        mixes = all(groups(op) == 1 for op in layers[value])
        candidates = list(_candidates(sample, net.recipe.transforms, shifts, mixes))
        errors = [_error(sample.rows, candidate, weights, reading) for candidate in candidates]
        best = int(np.argmin(errors))
        if best > 0:
            transforms[tensor.key] = candidates[best]
    return transforms


def hadamard(channels: int) -> Float[np.ndarray, "C C"]:
    """An orthogonal matrix of equal Hadamard blocks, whose size is the power of 2 in `channels`."""
    size = channels & -channels
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    matrix = np.kron(np.eye(channels // size), block / np.sqrt(size))
    return matrix.astype(np.float32)


def _candidates(
    sample: _Sample, kinds: Sequence[str], shifts: bool, mixes: bool
) -> Iterator[ChannelTransform]:
    """The transforms to compare; the first changes nothing.

    Args:
      sample: of the tensor.
      kinds: of the recipe.
      shifts, mixes: whether every layer that reads the tensor can read it shifted, or rotated.
    """
    zeros, ones = np.zeros_like(sample.low), np.ones_like(sample.low)
    yield ChannelTransform(zeros, ones)
    centre, radius = (sample.high + sample.low) / 2, (sample.high - sample.low) / 2
    if not shifts:
        centre, radius = zeros, np.maximum(sample.high, -sample.low)
    largest, smallest = radius.max(), np.quantile(radius, SMALLEST)
    if "shift_scale" in kinds and smallest > 0:
        for threshold in np.geomspace(largest, smallest, THRESHOLDS, dtype=np.float32):
            yield ChannelTransform(centre, np.maximum(ones, radius / threshold))
    if "hadamard" in kinds and mixes:
        yield ChannelTransform(zeros, ones, hadamard(len(zeros)))


def _error(
    rows: Float[np.ndarray, "rows C"],
    transform: ChannelTransform,
    weights: tuple[Float[AnyArray, "_ _ _ _"], ...],
    reading: _Reading,
) -> float:
    """Sum of the relative squared errors of all that reads a tensor, given some of its rows and
    the weights of the layers among its readers."""
    x = forward(rows, transform)
    quantizer = search_activation_range(x, reading.bits)
    return float(_rounded_error(rows, x, transform, quantizer, weights, reading))


@functools.partial(jax.jit, static_argnames="reading")
def _rounded_error(
    rows: Float[AnyArray, "rows C"],
    x: Float[AnyArray, "rows C"],
    transform: ChannelTransform,
    quantizer: ActivationQuantizer,
    weights: tuple[Float[AnyArray, "_ _ _ _"], ...],
    reading: _Reading,
) -> Float[Array, ""]:
    rounded = fake_quantize(x, quantizer, reading.bits)
    error = jnp.float32(0)
    if reading.restored:
        error += _relative_error(inverse(rounded, transform), rows)
    for weight, bits in zip(weights, reading.weight_bits, strict=True):
        exact = absorb(weight, transform)
        nearest = exact if bits is None else _to_nearest(exact, bits)
        error += _relative_error(_per_tap(rounded, nearest), _per_tap(x, exact))
    return error


def _per_tap(
    rows: Float[AnyArray, "rows C"], weights: Float[AnyArray, "taps groups Cg Og"]
) -> Float[Array, "rows n"]:
    """What every tap of a layer adds to its output channels."""
    grouped = rows.reshape(rows.shape[0], weights.shape[1], -1)
    return jnp.einsum("rgc,tgco->rtgo", grouped, weights).reshape(rows.shape[0], -1)


def _relative_error(
    values: Float[AnyArray, "rows n"], exact: Float[AnyArray, "rows n"]
) -> Float[Array, ""]:
    """Mean squared error relative to the variance of the columns."""
    spread = jnp.sum(jnp.square(exact - jnp.mean(exact, 0, keepdims=True)))
    return jnp.sum(jnp.square(values - exact)) / jnp.maximum(spread, 1e-30)


def _to_nearest(
    weights: Float[AnyArray, "taps groups Cg Og"], bits: int
) -> Float[Array, "taps groups Cg Og"]:
    """Weights rounded to nearest, the range of an output channel from its least to its largest."""
    low = jnp.minimum(jnp.min(weights, (0, 2), keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(weights, (0, 2), keepdims=True), 0.0)
    scale = jnp.maximum(high - low, np.float32(1e-30)) / max_code(bits)
    zero_point = jnp.round(-low / scale)
    return dequantize(quantize(weights / scale, zero_point, bits), scale, zero_point)


def _observe(net: Network, values: Sequence[int], leaves: Mapping[int, Any]) -> list[_Sample]:
    """Samples of tensors of the float network, without padding."""
    program = block_program.make_block_program(net.graph, net.plan, (), values)
    folded = [net.folded[spec.path] for spec in program.specs]
    weights = [Weights(jnp.asarray(weight), jnp.asarray(bias), {}) for weight, bias in folded]

    @jax.jit
    def run(batch: Mapping[int, Any]) -> tuple[jax.Array, ...]:
        inputs = bind_inputs(net.graph, program.subgraph, net.variables, batch)
        return block_program.forward(program, weights, None, inputs)

    count = min(net.recipe.reconstruction.init_samples, net.samples)
    starts = range(0, count, net.batch)
    rng = np.random.default_rng(0)
    parts: list[list[_Sample]] = [[] for _ in values]
    for start in starts:
        numbers = np.arange(start, start + net.batch) % net.samples
        outputs = run({i: take_samples(leaf, numbers) for i, leaf in leaves.items()})
        for part, tensor, axes in zip(parts, outputs, program.position_axes, strict=True):
            rows = _valid_rows(net, numbers, tensor, axes)
            some = rng.permutation(len(rows))[: -(-ROWS // len(starts))]
            part.append(_Sample(rows.min(0), rows.max(0), rows[some]))
    for value, part in zip(values, parts, strict=True):
        if not all(np.isfinite(sample.high - sample.low).all() for sample in part):
            key = net.plan.tensors[value].key
            raise ReconstructionError(f"{key}: its float input holds NaN or infinity")
    return [
        _Sample(np.min(low, 0), np.max(high, 0), np.concatenate(rows))
        for low, high, rows in (zip(*part, strict=True) for part in parts)
    ]


def _valid_rows(
    net: Network, numbers: np.ndarray, tensor: jax.Array, axes: tuple[int, ...]
) -> Float[np.ndarray, "rows C"]:
    """The rows of a tensor that are not padding, of the samples with these numbers."""
    values = np.asarray(tensor, np.float32)
    if net.valid_mask is not None and axes:
        valid = block_program.valid_elements(net.valid_mask[numbers], axes, values.ndim)
        values = values[np.broadcast_to(valid[..., 0], values.shape[:-1])]
    return values.reshape(-1, values.shape[-1])
