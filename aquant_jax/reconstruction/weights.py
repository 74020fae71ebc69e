"""The weight side of a unit: grids, what reconstruction starts from, and what is deployed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.adaround import hard_codes, init_alpha, nearest_codes
from aquant_jax.arithmetic.range_search import weight_grid
from aquant_jax.layers.fake_quant import (
    LayerState,
    Weights,
    border_shape,
    channel_rows,
    dequantize_weight,
    per_channel,
)
from aquant_jax.plan.block_program import Unit


class Grids(NamedTuple):
    """Fixed weight side of one layer: float weight and bias, and per-channel grid (or None)."""

    weight: jax.Array
    bias: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None


def make_grids(unit: Unit, folded) -> tuple[Grids, ...]:
    """Weight grids of a unit's layers by MSE search, from the `folded` weights by path."""
    grids = []
    for op, spec in zip(unit.program.weighted, unit.specs, strict=True):
        weight, bias = folded[spec.path]
        found = (None, None)
        if spec.weight_bits is not None:
            found = weight_grid(channel_rows(op, weight), spec.weight_bits)
        grids.append(Grids(jnp.asarray(weight), jnp.asarray(bias), *found))
    return tuple(grids)


def nearest_layers(unit: Unit, grids: Sequence[Grids]) -> tuple[LayerState, ...]:
    """Layers rounded to nearest: what reconstruction starts from, and falls back to."""
    coefficients = init_borders(unit)
    return deploy(unit, grids, None, coefficients)


def init_borders(unit: Unit) -> list[dict[str, jax.Array]]:
    """Coefficients of the constant border 0.5 for every layer (empty dict for nearest)."""
    found = []
    for op, spec in zip(unit.program.weighted, unit.specs, strict=True):
        if spec.border is None:
            found.append({})
            continue
        shape = border_shape(op, unit.avals[op.x].shape)
        found.append(borders.get(spec.border).init(shape, borders.get_phi(spec.phi).half))
    return found


def alpha_of(op, grid: Grids) -> jax.Array | None:
    """Initial alpha of a layer; None for a float layer."""
    if grid.scale is None:
        return None
    return _fractions(grid.weight, per_channel(op, grid.scale))


@jax.jit
def _fractions(weight, scale):
    return init_alpha(weight / scale)


@functools.partial(jax.jit, static_argnames="bits")
def _codes(weight, scale, zero_point, alpha, bits: int):
    units = weight / scale
    if alpha is None:
        codes = nearest_codes(units, zero_point, bits)
    else:
        codes = hard_codes(units, alpha, zero_point, bits)
    return codes.astype(jnp.uint8)


def deploy(unit: Unit, grids: Sequence[Grids], alphas, coefficients) -> tuple[LayerState, ...]:
    """Deployed layers: codes by hard rounding of `alphas`, or to nearest where that is None."""
    layers = []
    for i, (op, spec) in enumerate(zip(unit.program.weighted, unit.specs, strict=True)):
        grid = grids[i]
        if grid.scale is None or grid.zero_point is None or spec.weight_bits is None:
            nothing = jnp.zeros(0, jnp.float32)
            layers.append(LayerState(grid.weight, nothing, nothing, grid.bias, coefficients[i]))
            continue
        scale, zero = per_channel(op, grid.scale), per_channel(op, grid.zero_point)
        alpha = None if alphas is None else alphas[i]
        codes = _codes(grid.weight, scale, zero, alpha, spec.weight_bits)
        layers.append(LayerState(codes, grid.scale, grid.zero_point, grid.bias, coefficients[i]))
    return tuple(layers)


def deployed_weights(unit: Unit, layers: Sequence[LayerState]) -> list[Weights]:
    """What deployed layers compute with."""
    return [
        Weights(dequantize_weight(op, layer), layer.bias, layer.border)
        for op, layer in zip(unit.program.weighted, layers, strict=True)
    ]


def float_weights(unit: Unit, folded) -> list[Weights]:
    """What the float network computes with, from the `folded` weights by path."""
    pairs = (folded[spec.path] for spec in unit.specs)
    return [Weights(jnp.asarray(weight), jnp.asarray(bias), {}) for weight, bias in pairs]
