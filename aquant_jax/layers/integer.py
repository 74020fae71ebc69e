"""Deployed layers in integer arithmetic: codes times codes, summed exactly, dequantized once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import TensorState, dequantize, product, to_units
from aquant_jax.graph.ir import Op
from aquant_jax.layers.conv_geometry import Window
from aquant_jax.layers.fake_quant import (
    LayerSpec,
    LayerState,
    Weights,
    add_bias,
    contracted_axes,
    conv_operands,
    conv_result,
    dequantize_weight,
    output_channels,
    per_channel,
    rounding_of,
    run_layer,
)
from aquant_jax.layers.im2col import convolve


class KernelCodes(NamedTuple):
    """The weights of a convolution over columns: ``scale * (codes - zero_point)``.

    Attributes:
      codes: uint8 ``[taps, groups, C / groups, O / groups]``.
      scale, zero_point: float32 ``[O]``; zero points are whole numbers.
      bits: of the codes, 2 to 8.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    bits: int

    def real(self) -> jax.Array:
        """The weights as `columns.convolve` takes them."""
        _, groups, _, outer = self.codes.shape
        scale, zero = (a.reshape(1, groups, 1, outer) for a in (self.scale, self.zero_point))
        return dequantize(self.codes.astype(jnp.float32), scale, zero)


def whole_weight(op: Op, state: LayerState) -> jax.Array:
    """The whole numbers ``codes - zero_point`` of a deployed layer, float32."""
    return state.codes.astype(jnp.float32) - per_channel(op, state.zero_point)


def run_deployed_layer(
    op: Op,
    spec: LayerSpec,
    x: jax.Array,
    state: LayerState,
    tensor: TensorState | None,
    keep: None = None,
    dtype=jnp.float32,
    *,
    real: Callable[[Op, LayerState], jax.Array] = dequantize_weight,
    whole: Callable[[Op, LayerState], jax.Array] = whole_weight,
    convolve: Callable[..., jax.Array] = convolve,
) -> jax.Array:
    """`layer.run_layer` of a deployed layer: what it computes by definition.

    The whole numbers ``q - z`` of both operands are multiplied in float32 and their sum is scaled
    once. Below 2^24 such sums are exact in any order, so every backend gives the same ones, and so
    does a GPU that multiplies in TF32. A layer of another dtype multiplies real values.

    Args:
      op, spec, x, tensor, keep, dtype: as there; nothing is dropped from a deployed layer.
      state: what is deployed.
      real, whole: how its weights are had, as values or as whole numbers.
      convolve: see `layer.run_layer`.
    """
    single = all(d == jnp.float32 for d in op.params["operand_dtypes"])
    if tensor is None or spec.weight_bits is None or not single:
        own = Weights(real(op, state), state.bias, state.border)
        return run_layer(op, spec, x, own, tensor, keep, dtype, convolve)
    one, nothing = jnp.float32(1.0), jnp.zeros_like(state.bias)
    units = to_units(x, 1.0 / tensor.step_size)
    own = Weights(whole(op, state), nothing, state.border)
    grid = TensorState(one, tensor.zero_point)
    total = run_layer(op, spec, units, own, grid, keep, convolve=convolve)
    scale = output_channels(op, total, tensor.step_size * state.scale)
    return add_bias(op, product(total, scale), state.bias, dtype)


def run_integer_layer(
    op: Op,
    spec: LayerSpec,
    x: jax.Array,
    state: LayerState,
    tensor: TensorState | None,
    keep: None = None,
    dtype=jnp.float32,
    *,
    convolve: Callable[..., jax.Array],
) -> jax.Array:
    """`layer.run_layer` of a deployed layer, by a convolution of codes.

    A layer with a float input or float weights, a dense layer with batch axes, and a layer of an
    empty batch run by definition.

    Args:
      op, spec, x, tensor, keep, dtype: as there; nothing is dropped from a deployed layer.
      state: what is deployed.
      convolve: takes ``(x, tensor, coefficients, kernel, window, rounding)`` with `x` float32
        ``[N, *padded, C]`` and a `KernelCodes`; no coefficients mean rounding to nearest. Returns
        what `columns.convolve` does for the dequantized kernel, float32 ``[N, *out, O]``.
    """
    batched = op.layer.kind == "dense" and op.params["dimension_numbers"][1][op.layer.x_position]
    if tensor is None or spec.weight_bits is None or batched or not x.size:
        return run_deployed_layer(op, spec, x, state, tensor, keep, dtype)

    def multiply(columns: jax.Array, codes: jax.Array, window: Window) -> jax.Array:
        kernel = KernelCodes(codes, state.scale, state.zero_point, spec.weight_bits or 0)
        return convolve(columns, tensor, state.border, kernel, window, rounding_of(spec))

    run = _conv if op.layer.kind == "conv" else _dense
    return add_bias(op, run(op, x.astype(jnp.float32), state.codes, multiply), state.bias, dtype)


def _conv(op: Op, x: jax.Array, codes: jax.Array, multiply) -> jax.Array:
    return conv_result(op, multiply(*conv_operands(op, x, codes)))


def _dense(op: Op, x: jax.Array, codes: jax.Array, multiply) -> jax.Array:
    """A dense layer is a convolution with one tap: its first free axis numbers the images."""
    contract, _ = op.params["dimension_numbers"]
    axes, weight_axes = contracted_axes(op), contract[1 - op.layer.x_position]
    free = [axis for axis in range(x.ndim) if axis not in axes]
    sizes = [x.shape[axis] for axis in free]
    elements = int(np.prod([x.shape[axis] for axis in axes]))
    images, pixels = (*sizes, 1)[0], math.prod(sizes[1:])
    rows = jnp.transpose(x, (*free, *axes)).reshape(images, pixels, 1, elements)
    kernel = jnp.transpose(codes, (*weight_axes, *op.layer.channel_axes))
    kernel = kernel.reshape(1, 1, elements, -1)
    y = multiply(rows, kernel, Window(images, (pixels, 1), (1, 1), (1, 1), (1, 1)))
    channels = [op.layer.weight_shape[axis] for axis in op.layer.channel_axes]
    y = y.reshape(*sizes, *channels)
    if op.layer.x_position == 1:  # the weight's axes come first
        y = jnp.moveaxis(y, range(len(sizes)), range(len(channels), y.ndim))
    return y
