"""The weight quantizers of a block, and the layers that they deploy."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.adaround import hard_codes, init_alpha, nearest_codes
from aquant_jax.arithmetic.range_search import FULL_BITS, search_weight_range
from aquant_jax.graph.fold import Folded
from aquant_jax.graph.ir import Op
from aquant_jax.layers.fake_quant import (
    LayerState,
    Weights,
    border_shape,
    dequantize_weight,
    per_channel,
    weight_rows,
)
from aquant_jax.plan.block_program import BlockProgram
from aquant_jax.reconstruction.devices import count, read, split_channels, split_rows

# Scales and zero points of a weight, by what they depend on.
Ranges = dict[Hashable, list[np.ndarray]]


class WeightQuantizer(NamedTuple):
    """The float weights of one layer and their quantizer (a pytree).

    Attributes:
      weight: float32, the operand of the op.
      bias: float32, one per output channel.
      scale, zero_point: float32 ``[grids]``, see `LayerState`, or None for a float layer.
    """

    weight: jax.Array
    bias: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None


def make_weight_quantizers(
    program: BlockProgram,
    folded: Mapping[str, Folded],
    known: Ranges,
    full_bits: int = FULL_BITS,
) -> tuple[WeightQuantizer, ...]:
    """Weight quantizers of a block's layers by MSE search.

    Args:
      program: of the block.
      folded: weights by path.
      known: scales that were searched before, of any network; new ones are added.
      full_bits: see `search_weight_range`.
    """
    quantizers = []
    for op, spec in zip(program.subgraph.weighted, program.specs, strict=True):
        weight, bias = folded[spec.path]
        scales = (None, None)
        if spec.weight_bits is not None:
            rows = weight_rows(op, weight, spec.weight_group)
            scales = map(jnp.asarray, _scales(rows, spec.weight_bits, known, full_bits))
        quantizers.append(WeightQuantizer(_on_devices(op, weight), jnp.asarray(bias), *scales))
    return tuple(quantizers)


def _scales(rows: np.ndarray, bits: int, known: Ranges, full_bits: int) -> list[np.ndarray]:
    """Scale and zero point of each row."""
    key = hashlib.sha256(rows.data).digest(), rows.shape, bits, count(), bits <= full_bits
    if key not in known:
        found = search_weight_range(rows, bits, split_rows, full_bits)
        known[key] = [read(part)[: len(rows)] for part in found]
    return known[key]


def nearest_layers(
    program: BlockProgram, quantizers: Sequence[WeightQuantizer]
) -> tuple[LayerState, ...]:
    """Layers rounded to nearest: the start of reconstruction, and its fallback."""
    return deploy(program, quantizers, None, init_borders(program))


def init_borders(program: BlockProgram) -> list[dict[str, jax.Array]]:
    """Coefficients of the constant border 0.5 for every layer (empty dict for nearest)."""
    coefficients = []
    for op, spec in zip(program.subgraph.weighted, program.specs, strict=True):
        if spec.border is None:
            coefficients.append({})
            continue
        shape = border_shape(op, spec.border_granularity, program.avals[op.x].shape)
        half = borders.get_phi(spec.phi).half
        coefficients.append(borders.get(spec.border).init(shape, half))
    return coefficients


def alpha_of(op: Op, quantizer: WeightQuantizer) -> jax.Array | None:
    """Initial alpha of a layer; None for a float layer."""
    if quantizer.scale is None:
        return None
    return _fractions(quantizer.weight, per_channel(op, quantizer.scale))


@jax.jit
def _fractions(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return init_alpha(weight / scale)


@functools.partial(jax.jit, static_argnames="bits")
def _codes(
    weight: jax.Array, scale: jax.Array, zero_point: jax.Array, alpha: jax.Array | None, bits: int
) -> jax.Array:
    units = weight / scale
    if alpha is None:
        codes = nearest_codes(units, zero_point, bits)
    else:
        codes = hard_codes(units, alpha, zero_point, bits)
    return codes.astype(jnp.uint8)


def deploy(
    program: BlockProgram,
    quantizers: Sequence[WeightQuantizer],
    alphas: Sequence[jax.Array | None] | None,
    coefficients: Sequence[dict[str, jax.Array]],
) -> tuple[LayerState, ...]:
    """Deployed layers: codes by hard rounding of `alphas`, or to nearest where that is None."""
    layers = []
    for i, (op, spec) in enumerate(zip(program.subgraph.weighted, program.specs, strict=True)):
        weight, bias, scale, zero_point = quantizers[i]
        if scale is None or zero_point is None or spec.weight_bits is None:
            empty = jnp.zeros(0, jnp.float32)
            layers.append(LayerState(weight, empty, empty, bias, coefficients[i]))
            continue
        scales, zeros = per_channel(op, scale), per_channel(op, zero_point)
        alpha = None if alphas is None else alphas[i]
        codes = _codes(weight, scales, zeros, alpha, spec.weight_bits)
        layers.append(LayerState(codes, scale, zero_point, bias, coefficients[i]))
    return tuple(layers)


def deployed_weights(program: BlockProgram, layers: Sequence[LayerState]) -> list[Weights]:
    """The real weights that deployed layers compute with."""
    return [
        Weights(dequantize_weight(op, layer), layer.bias, layer.border)
        for op, layer in zip(program.subgraph.weighted, layers, strict=True)
    ]


def float_weights(program: BlockProgram, folded: Mapping[str, Folded]) -> list[Weights]:
    """The weights of the float network, from the `folded` weights by path."""
    weights = []
    for op, spec in zip(program.subgraph.weighted, program.specs, strict=True):
        weight, bias = folded[spec.path]
        weights.append(Weights(_on_devices(op, weight), jnp.asarray(bias), {}))
    return weights


def _on_devices(op: Op, weight: Any) -> jax.Array:
    return split_channels(weight, op.layer.channel_axes)
