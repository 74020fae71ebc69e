"""Layers of an ONNX model in the form in which a runtime multiplies int8.

Both runtimes multiply int8 where a MatMul reads two DequantizeLinear, OpenVINO also where a Conv
does. For onnxruntime, a convolution quantizes its activation once, gathers columns of codes, and
multiplies these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import (
    ActivationQuantizer,
    max_code,
    product,
    to_units,
)
from aquant_jax.deployment.onnx_primitives import (
    columns,
    conv,
    dequantize_linear,
    matmul,
    quantize_linear,
    split,
    window_sum,
)
from aquant_jax.deployment.onnx_runtimes import ONNXRUNTIME
from aquant_jax.graph.ir import Op
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.epilogue import Epilogue, Results, channel_border
from aquant_jax.layers.fake_quant import LayerSpec, LayerState, needs_columns
from aquant_jax.layers.integer import (
    QuantizedWeights,
    in_integers,
    in_whole_numbers,
    quantized_weights,
)

THIN = 16  # a runtime gathers columns slowly from pixels of fewer channels
INT8 = np.iinfo(np.int8)


class WholeWeights(NamedTuple):
    """The weights of a layer as the whole numbers that a runtime multiplies.

    Attributes:
      codes: ``code - zero_point`` as int8: a matrix ``[K, O]``, or ``[O, C / groups, *kernel]``.
        Where int8 does not hold that, ``code - 128``; a matrix then has a last column of ones,
        which sums the activation.
      zero_point: what brings `codes` back to codes of the layer; broadcasts.
      excess: ``zero_point - 128``, one a channel, where `codes` are ``code - 128``; else None.
      scale: what their DequantizeLinear multiplies them with, along the last axis; None for 1.
    """

    codes: np.ndarray
    zero_point: np.ndarray
    excess: np.ndarray | None
    scale: np.ndarray | None = None


def whole_weights(op: Op, spec: LayerSpec, state: LayerState, runtime: str) -> WholeWeights | None:
    """The weights of a layer that a runtime multiplies in int8; None for one in float.

    onnxruntime multiplies convolutions in int8 as products of matrices, but not grouped ones, and
    gathers the columns of few channels slowly.
    """
    if not in_whole_numbers(op, spec) or not in_integers(op, spec):
        return None
    weights = quantized_weights(op, spec, state)
    codes, zero_point = (np.asarray(a, np.int32) for a in (weights.codes, weights.zero_point))
    taps, inner = int(np.prod(codes.shape[:-2])), codes.shape[-2]
    grouped = op.layer.kind == "conv" and op.params["feature_group_count"] > 1
    own_columns = spec.border is not None and needs_columns(op, spec)
    matrix = runtime == ONNXRUNTIME or op.layer.kind == "dense" or own_columns
    whole, excess = codes - zero_point, None
    fits = INT8.min <= whole.min(initial=0) and whole.max(initial=0) <= INT8.max
    if (grouped and (matrix or not fits)) or (matrix and taps > 1 and inner < THIN):
        return None
    if not fits:
        whole, excess = codes + INT8.min, (zero_point + INT8.min).astype(np.float32)
    whole, zero_point = whole.astype(np.int8), zero_point.astype(np.int8)
    if not matrix:
        kernel = np.moveaxis(whole, (-1, -2), (0, 1))
        return WholeWeights(kernel, zero_point.reshape(-1, *[1] * (kernel.ndim - 1)), excess)
    rows = whole.reshape(taps * inner, -1)
    if not fits:
        return WholeWeights(np.pad(rows, ((0, 0), (0, 1)), constant_values=1), zero_point, excess)
    # onnxruntime scales the sums in the same pass, by one product: the same bits.
    scale = np.asarray(weights.scale) if runtime == ONNXRUNTIME else None
    return WholeWeights(rows, zero_point, None, scale)


class Int8Layer(NamedTuple):
    """Runs a layer in operations that runtimes know.

    Attributes:
      weight: what the DequantizeLinear of `stored` gives.
      stored: its weights.
    """

    weight: Float32[AnyArray, "..."]
    stored: WholeWeights

    def convolve_codes(
        self,
        x: Float32[AnyArray, "N *spatial C"],
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
        epilogue: Epilogue,
    ) -> Results:
        """`backend.Backend.convolve_codes` of an activation; `weights` give its scale alone."""
        weight, stored = self
        own = rounding.border is not None and not rounding.per_channel and geometry.gathers
        zero, matrix = int(quantizer.zero_point), weight.ndim == 2
        units = _units(x, quantizer, rounding)
        if not geometry.gathers:
            # OpenVINO fails where a strided convolution of one tap shares its input with a layer.
            units = columns(units, geometry, 0)
            geometry = geometry._replace(spatial=geometry.out, strides=(1,) * len(geometry.out))
        if own:
            whole = _border_columns(units, zero, coefficients, geometry, rounding)
            codes = quantize_linear(whole, zero)
        else:
            border = channel_border(rounding, coefficients, units)
            codes = quantize_linear(_whole(units, zero, rounding.bits, border), zero)
            codes = columns(codes, geometry, zero) if matrix else codes
        step = 1.0 if stored.scale is None else float(quantizer.step_size)
        values = dequantize_linear(codes, zero, step)
        total = matmul(values, weight) if matrix else conv(values, weight, geometry)
        if stored.scale is not None:
            return epilogue.apply(total)
        lead = (1,) * (total.ndim - 1)
        if stored.excess is not None:
            if matrix:
                total, sums = split(total, (len(stored.excess), 1))
            else:
                sums = window_sum(values, geometry)
            total -= sums * stored.excess.reshape(*lead, -1)
        scale = quantizer.step_size * weights.scale
        return epilogue.apply(product(total, scale.reshape(*lead, -1)))


def _units(
    x: Float32[AnyArray, "*shape"], quantizer: ActivationQuantizer, rounding: Rounding
) -> Float32[Array, "*shape"]:
    """`uniform.to_units`, whose clip only a border sees."""
    inv_step = 1.0 / quantizer.step_size
    return jnp.multiply(x, inv_step) if rounding.border is None else to_units(x, inv_step)


def _whole(
    units: Float32[AnyArray, "*shape"], zero_point: int, bits: int, border: Any
) -> Float32[Array, "*shape"]:
    """``code - zero_point``, of the codes of `uniform.quantize`."""
    return jnp.clip(jnp.ceil(units - border), -zero_point, max_code(bits) - zero_point)


def _border_columns(
    units: Float32[AnyArray, "N *spatial C"],
    zero_point: int,
    coefficients: Coefficients,
    geometry: ConvGeometry,
    rounding: Rounding,
) -> Float32[Array, "N *out K"]:
    """Columns of ``code - zero_point`` with a border per element, or per channel and pixel."""
    u = columns(units, geometry, 0)
    if not rounding.shared_across_taps:  # every element is a channel with one tap
        flat = {name: own.reshape(1, -1) for name, own in coefficients.items()}
        (border,) = rounding.borders(rounding.polynomials(flat, [u]), 1)
        return _whole(u, zero_point, rounding.bits, border)
    us = split(u, (units.shape[-1],) * geometry.taps) if geometry.taps > 1 else [u]
    bounds = rounding.borders(rounding.polynomials(coefficients, us), len(us))
    taps = [_whole(u, zero_point, rounding.bits, b) for u, b in zip(us, bounds, strict=True)]
    return jnp.concatenate(taps, axis=-1)


def convolve_float(
    x: Float32[AnyArray, "N *padded C"],
    keep: None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    kernel: Float32[AnyArray, "taps groups Cg Og"],
    geometry: ConvGeometry,
    rounding: Rounding,
) -> Float32[Array, "N *out O"]:
    """`im2col.convolve`, in operations that runtimes know."""
    taps, groups, inner, outer = kernel.shape
    units, zero = to_units(x, 1.0 / quantizer.step_size), int(quantizer.zero_point)
    whole = _border_columns(units, zero, coefficients, geometry, rounding)
    values = product(whole, jnp.expand_dims(quantizer.step_size, range(whole.ndim)))
    if groups == 1:
        return matmul(values, kernel.reshape(taps * inner, outer))
    rows = values.reshape(*values.shape[:-1], taps, groups, inner)
    total = jnp.einsum("...tgi,tgio->...go", rows, kernel)
    return total.reshape(*total.shape[:-2], groups * outer)
