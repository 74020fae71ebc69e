"""Deployed layers in integer arithmetic: codes times codes, summed exactly, dequantized once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Inexact, UInt8

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import ActivationQuantizer, dequantize, product, to_units
from aquant_jax.graph.ir import Op
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.conv_layout import (
    conv_result,
    grouped_kernel,
    padded_input,
    spatial_kernel,
)
from aquant_jax.layers.fake_quant import (
    LayerInput,
    LayerSpec,
    LayerState,
    Weights,
    add_bias,
    contracted_axes,
    dequantize_weight,
    output_channels,
    per_channel,
    quantize_elements,
    rounding_of,
    run_layer,
)


class QuantizedWeights(NamedTuple):
    """The weights of a convolution over columns: ``scale * (codes - zero_point)`` (a pytree).

    Attributes:
      codes: weight codes, with the input channels of one group.
      scale: one per output channel.
      zero_point: integer codes, one per output channel.
      bits: of the codes, 2 to 8.
    """

    codes: UInt8[Array, "*kernel Cg O"]
    scale: Float32[Array, "O"]
    zero_point: Float32[Array, "O"]
    bits: int

    def dequantized(self, groups: int) -> Float32[Array, "taps {groups} Cg Og"]:
        """Real weights in the layout of `im2col.convolve`."""
        codes = grouped_kernel(self.codes, groups)
        scale, zero = (a.reshape(1, groups, 1, -1) for a in (self.scale, self.zero_point))
        return dequantize(codes.astype(jnp.float32), scale, zero)


def integer_weight(op: Op, state: LayerState) -> Float32[Array, "..."]:
    """The integers ``codes - zero_point`` of a deployed layer, laid out as the op's operand."""
    return state.codes.astype(jnp.float32) - per_channel(op, state.zero_point)


def run_deployed_layer(
    op: Op,
    spec: LayerSpec,
    inputs: LayerInput,
    state: LayerState,
    *,
    real: Callable[[Op, LayerState], jax.Array] = dequantize_weight,
    integer: Callable[[Op, LayerState], jax.Array] = integer_weight,
    convolve: Callable[..., jax.Array] = im2col.convolve,
) -> Inexact[Array, "..."]:
    """Run a deployed layer in float32: the reference implementation.

    The integers ``q - z`` of both operands are multiplied in float32, and their sum is scaled once:
    ``y = (sum (q_x - z_x) (q_w - z_w)) s_x s_w + b``. Such sums are exact in any order below 2^24,
    so every backend gives the same sums, a GPU that multiplies in TF32 included. A layer of another
    dtype multiplies real values.

    Args:
      op: the weighted op.
      spec: its static part.
      inputs: its activation.
      state: its codes, scales, bias and border.
      real, integer: read its weights as real values, and as integers ``q - z``.
      convolve: see `fake_quant.run_layer`.

    Returns:
      The output, in the layout of the op.
    """
    quantizer = inputs.quantizer
    single = all(d == jnp.float32 for d in op.params["operand_dtypes"])
    if quantizer is None or spec.weight_bits is None or not single:
        weights = Weights(real(op, state), state.bias, state.border)
        return run_layer(op, spec, inputs, weights, convolve)
    one, no_bias = jnp.float32(1.0), jnp.zeros_like(state.bias)
    units = to_units(inputs.x, 1.0 / quantizer.step_size)
    weights = Weights(integer(op, state), no_bias, state.border)
    unscaled = LayerInput(units, ActivationQuantizer(one, quantizer.zero_point), inputs.keep)
    total = run_layer(op, spec, unscaled, weights, convolve)
    scale = output_channels(op, total, quantizer.step_size * state.scale)
    return add_bias(op, product(total, scale), state.bias)


def run_integer_layer(
    op: Op,
    spec: LayerSpec,
    inputs: LayerInput,
    state: LayerState,
    *,
    convolve: Callable[..., jax.Array],
) -> Inexact[Array, "..."]:
    """Run a deployed layer by a convolution of codes.

    A layer with a float input or float weights, a dense layer with batch axes, and a layer with an
    empty batch run in the reference implementation. Where a convolution has one border a channel,
    its input is quantized first; the convolution rounds the quantized values to nearest, which
    gives their codes.

    Args:
      op, spec, inputs, state: see `run_deployed_layer`; no element may stay unquantized.
      convolve: has the contract of `backend.Backend.convolve_codes`.

    Returns:
      The output, in the layout of the op.
    """
    quantizer = inputs.quantizer
    batched = op.layer.kind == "dense" and op.params["dimension_numbers"][1][op.layer.x_position]
    if quantizer is None or spec.weight_bits is None or batched or not inputs.x.size:
        return run_deployed_layer(op, spec, inputs, state)
    x, border, rounding = inputs.x.astype(jnp.float32), state.border, rounding_of(spec)
    if op.layer.kind == "conv" and spec.border and spec.border_granularity == "channel":
        x = quantize_elements(op, spec, x, quantizer, border)
        border, rounding = {}, rounding._replace(border=None)
    weights = QuantizedWeights(state.codes, state.scale, state.zero_point, spec.weight_bits)
    multiply = functools.partial(
        convolve, quantizer=quantizer, coefficients=border, rounding=rounding
    )
    run = _conv if op.layer.kind == "conv" else _dense
    return add_bias(op, run(op, x, weights, multiply), state.bias)


def _conv(
    op: Op,
    x: Float32[AnyArray, "..."],
    weights: QuantizedWeights,
    multiply: Callable[..., jax.Array],
) -> Float[Array, "..."]:
    padded, geometry = padded_input(op, x)
    weights = weights._replace(codes=spatial_kernel(op, weights.codes))
    return conv_result(op, multiply(padded, weights=weights, geometry=geometry))


def _dense(
    op: Op,
    x: Float32[AnyArray, "..."],
    weights: QuantizedWeights,
    multiply: Callable[..., jax.Array],
) -> Float[Array, "..."]:
    """A dense layer as a convolution with one tap, whose images the first free axis numbers."""
    contract, _ = op.params["dimension_numbers"]
    axes, weight_axes = contracted_axes(op), contract[1 - op.layer.x_position]
    free = [axis for axis in range(x.ndim) if axis not in axes]
    sizes = [x.shape[axis] for axis in free]
    elements = int(np.prod([x.shape[axis] for axis in axes]))
    images, pixels = (*sizes, 1)[0], math.prod(sizes[1:])
    rows = jnp.transpose(x, (*free, *axes)).reshape(images, pixels, 1, elements)
    codes = jnp.transpose(weights.codes, (*weight_axes, *op.layer.channel_axes))
    weights = weights._replace(codes=codes.reshape(1, 1, elements, -1))
    y = multiply(rows, weights=weights, geometry=ConvGeometry.pointwise(pixels))
    channels = [op.layer.weight_shape[axis] for axis in op.layer.channel_axes]
    y = y.reshape(*sizes, *channels)
    if op.layer.x_position == 1:  # the weight's axes come first
        y = jnp.moveaxis(y, range(len(sizes)), range(len(channels), y.ndim))
    return y
