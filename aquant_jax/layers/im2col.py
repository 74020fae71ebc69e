"""Convolution over im2col columns, where every column element has its own rounding border.

A border that differs from tap to tap gives one activation different codes in different columns.
Hence the convolution runs over columns: one matmul per tap, accumulated, so that the columns of
all taps are never in memory at once. `im2col_gradient` holds the derivative.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.broadcast import channel_sums
from aquant_jax.arithmetic.uniform import ActivationQuantizer, dequantize, quantize, to_units
from aquant_jax.layers.column import Rounding, contract
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.im2col_gradient import Pullback, pin


def column_codes(
    x: Float32[AnyArray, "N *padded C"],
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    geometry: ConvGeometry,
    rounding: Rounding,
) -> list[Float32[Array, "N *out C"]]:
    """Codes of the column elements, one array per tap.

    Args:
      x: activation, already padded.
      quantizer: step size and zero point.
      coefficients: border coefficients ``(taps, C)`` by name.
      geometry: over the padded input.
      rounding: bits and border.
    """
    us = geometry.tap_rows(
        [to_units(rows, 1.0 / quantizer.step_size) for rows in geometry.flatten(x)]
    )
    bounds = rounding.borders(rounding.polynomials(coefficients, us), len(us))
    return [
        geometry.crop(quantize(u, quantizer.zero_point, rounding.bits, bound), x.shape[0])
        for u, bound in zip(us, bounds, strict=True)
    ]


def convolve(
    x: Float32[AnyArray, "N *padded C"],
    keep: Bool[AnyArray, "N *padded C"] | None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    kernel: Float32[AnyArray, "taps groups Cg Og"],
    geometry: ConvGeometry,
    rounding: Rounding,
) -> Float32[Array, "N *out groups*Og"]:
    """Quantize the columns of `x` with their borders and multiply them with `kernel`.

    Args:
      x: activation, already padded.
      keep: False leaves an element unquantized (QDrop); None quantizes all.
      quantizer: step size and zero point.
      coefficients: border coefficients ``(taps, C)`` by name.
      kernel: real weights; ``Cg`` and ``Og`` are the input and output channels of one group.
      geometry: over the padded input.
      rounding: bits and border.
    """
    keep_rows = None if keep is None else geometry.flatten(keep)
    phases = geometry.flatten(x)
    y: Any = _multiply(phases, keep_rows, quantizer, coefficients, kernel, geometry, rounding)
    return geometry.crop(y, x.shape[0])


def _products(
    phases: list[Float32[Array, "phase_rows C"]],
    keep: list[Bool[Array, "phase_rows C"]] | None,
    quantizer: ActivationQuantizer,
    polynomials: list[Float32[Array, "rows C"]],
    kernel: Float32[AnyArray, "taps groups Cg Og"],
    geometry: ConvGeometry,
    rounding: Rounding,
) -> Float32[Array, "rows groups*Og"]:
    """Rows of the result, given the polynomials."""
    us = geometry.tap_rows([to_units(rows, 1.0 / quantizer.step_size) for rows in phases])
    bounds = rounding.borders(polynomials, len(us))
    masks = [None] * len(us) if keep is None else geometry.tap_rows(keep)
    total = jnp.float32(0.0)
    taps = zip(us, bounds, masks, geometry.tap_rows(phases), kernel, strict=True)
    for u, bound, mask, value, weight in taps:
        codes = quantize(u, quantizer.zero_point, rounding.bits, bound)
        column = dequantize(codes, quantizer.step_size, quantizer.zero_point)
        column = column if mask is None else jnp.where(mask, column, value)
        total = total + contract(column, weight)
    return total


# Inputs of `_multiply` without its static arguments, and the polynomials.
_Saved = tuple[
    list[Float32[Array, "phase_rows C"]],
    list[Bool[Array, "phase_rows C"]] | None,
    ActivationQuantizer,
    Coefficients,
    Float32[Array, "taps groups Cg Og"],
    list[Float32[Array, "rows C"]],
]
_Gradients = tuple[
    list[Float32[Array, "phase_rows C"]],
    None,
    ActivationQuantizer,
    Coefficients,
    Float32[Array, "taps groups Cg Og"],
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _multiply(
    phases: list[Float32[Array, "phase_rows C"]],
    keep: list[Bool[Array, "phase_rows C"]] | None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    kernel: Float32[Array, "taps groups Cg Og"],
    geometry: ConvGeometry,
    rounding: Rounding,
) -> Float32[Array, "rows groups*Og"]:
    """`convolve` on the rows of the phases."""
    return _forward(phases, keep, quantizer, coefficients, kernel, geometry, rounding)[0]


def _forward(
    phases: list[Float32[Array, "phase_rows C"]],
    keep: list[Bool[Array, "phase_rows C"]] | None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    kernel: Float32[Array, "taps groups Cg Og"],
    geometry: ConvGeometry,
    rounding: Rounding,
) -> tuple[Float32[Array, "rows groups*Og"], _Saved]:
    us = geometry.tap_rows([to_units(rows, 1.0 / quantizer.step_size) for rows in phases])
    polynomials = pin(quantizer, rounding.polynomials(coefficients, us))
    y = _products(phases, keep, quantizer, polynomials, kernel, geometry, rounding)
    return y, (phases, keep, quantizer, coefficients, kernel, polynomials)


def _backward(
    geometry: ConvGeometry, rounding: Rounding, saved: _Saved, dy: Float32[Array, "rows O"]
) -> _Gradients:
    pull = Pullback(*saved, geometry, rounding)
    quantizer, phases = pull.quantizer, pull.phases
    dcolumns = pull.column_gradients(dy)
    dpolynomials, dstep = pull.code_gradients(dcolumns)
    dpolynomials = pin(quantizer, dpolynomials)
    dcoefficients = pull.coefficient_gradients(dpolynomials)
    dus = pull.unit_gradients(dpolynomials)
    inv_step = 1.0 / quantizer.step_size
    for du, rows in zip(dus, phases, strict=True):
        dstep = dstep - jnp.sum(channel_sums(du * rows)) * inv_step * inv_step
    direct = pull.direct_gradients(dcolumns)
    dphases = [d + du * inv_step for d, du in zip(direct, dus, strict=True)]
    dquantizer = ActivationQuantizer(dstep, jnp.zeros_like(quantizer.zero_point))
    return pin(quantizer, dphases), None, dquantizer, dcoefficients, pull.kernel_gradient(dy)


_multiply.defvjp(_forward, _backward)
