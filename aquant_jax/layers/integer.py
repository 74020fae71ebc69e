"""Deployed layers in integer arithmetic: codes times codes, summed exactly, dequantized once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Inexact, UInt8

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import ActivationQuantizer, dequantize, product, to_units
from aquant_jax.graph.ir import Op
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.conv_layout import (
    conv_geometry,
    conv_result,
    grouped_kernel,
    insert,
    inserts,
    layer_kernel,
    to_images,
)
from aquant_jax.layers.epilogue import NO_EPILOGUE, Codes, Epilogue, Results, for_columns
from aquant_jax.layers.fake_quant import (
    LayerInput,
    LayerSpec,
    LayerState,
    Weights,
    add_bias,
    dequantize_weight,
    output_channels,
    per_channel,
    rounding_of,
    run_layer,
)
from aquant_jax.layers.products import multiply


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


def read_weight(op: Op, state: LayerState, whole: bool) -> Inexact[Array, "..."]:
    """The weights of a deployed layer, laid out as the op's operand: the integers
    ``codes - zero_point``, or real values."""
    if not whole:
        return dequantize_weight(op, state)
    return state.codes.astype(jnp.float32) - per_channel(op, state.zero_point)


def run_deployed_layer(
    op: Op,
    spec: LayerSpec,
    inputs: LayerInput,
    state: LayerState,
    *,
    read: Callable[[Op, LayerState, bool], jax.Array] = read_weight,
    convolve: Callable[..., jax.Array] = im2col.convolve,
    multiply: Callable[..., jax.Array] = multiply,
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
      read: has the contract of `read_weight`.
      convolve, multiply: see `fake_quant.run_layer`.

    Returns:
      The output, in the layout of the op.
    """
    quantizer = inputs.quantizer
    if quantizer is None or not in_whole_numbers(op, spec):
        weights = Weights(read(op, state, False), state.bias, state.border)
        return run_layer(op, spec, inputs, weights, convolve, multiply)
    one, no_bias = jnp.float32(1.0), jnp.zeros_like(state.bias)
    units = to_units(inputs.x, 1.0 / quantizer.step_size)
    weights = Weights(read(op, state, True), no_bias, state.border)
    unscaled = LayerInput(units, ActivationQuantizer(one, quantizer.zero_point), inputs.keep)
    total = run_layer(op, spec, unscaled, weights, convolve, multiply)
    scale = output_channels(op, total, quantizer.step_size * state.scale)
    return add_bias(op, product(total, scale), state.bias)


def in_whole_numbers(op: Op, spec: LayerSpec) -> bool:
    """Whether a layer multiplies ``q - z``: its input and weights are quantized, and float32, and
    every output channel has one grid."""
    single = all(dtype == jnp.float32 for dtype in op.params["operand_dtypes"])
    return _has_codes(spec) and single


def in_integers(op: Op, spec: LayerSpec) -> bool:
    """Whether a layer can multiply codes: its input and weights are quantized, every output channel
    has one grid, and it is no dense layer with batch axes."""
    batched = op.layer.kind == "dense" and op.params["dimension_numbers"][1][op.layer.x_position]
    return _has_codes(spec) and not batched


def _has_codes(spec: LayerSpec) -> bool:
    quantized = spec.tensor is not None and spec.weight_bits is not None
    return quantized and spec.weight_group is None and spec.kind != "experts"


def convolve_layer(
    op: Op,
    spec: LayerSpec,
    x: Float32[AnyArray, "..."] | Codes,
    quantizer: ActivationQuantizer,
    state: LayerState,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    convolve: Callable[..., Results],
) -> Results:
    """A conv or dense layer, brought to the one form that a backend runs.

    Args:
      op, spec, state: of a layer that is `in_integers`.
      x: its activation as the op's operand. Codes need a layer that `keeps_layout`.
      quantizer: of the activation.
      epilogue: without the bias, which is the layer's. Anything but the default needs a layer that
        `keeps_layout`.
      convolve: has the contract of `backend.Backend.convolve_codes`.

    Returns:
      The results, in the layout of the op.
    """
    form = _conv_form(op, x) if op.layer.kind == "conv" else _dense_form(op, x)
    epilogue = epilogue._replace(
        bias=state.bias.reshape(-1), residual=jax.tree.map(form.to_images, epilogue.residual)
    )
    x, border, rounding = form.x, state.border, rounding_of(spec)
    if op.layer.kind == "conv" and inserts(op):
        if isinstance(x, Codes):
            x = x._replace(codes=insert(op, x.codes, x.quantizer.zero_point))
        else:  # quantized first where an inserted zero has the code of the zero point
            x, border, rounding = for_columns(x, quantizer, border, rounding)
            x = insert(op, x)
    weights = quantized_weights(op, spec, state)
    results = convolve(x, quantizer, border, weights, form.geometry, rounding, epilogue)
    return jax.tree.map(form.from_images, results)


def quantized_weights(op: Op, spec: LayerSpec, state: LayerState) -> QuantizedWeights:
    """The weights of a layer that is `in_integers`, in the form that a backend runs."""
    assert spec.weight_bits is not None
    codes = layer_kernel(op, state.codes)
    return QuantizedWeights(codes, state.scale, state.zero_point, spec.weight_bits)


def keeps_layout(op: Op) -> bool:
    """Whether the axes of a layer's operands are in the order of the form that a backend runs:
    samples first and channels last."""
    if op.layer.kind == "conv":
        numbers = op.params["dimension_numbers"]
        rank = len(numbers.lhs_spec)
        order = (0, rank - 1, *range(1, rank - 1))
        return tuple(numbers.lhs_spec) == tuple(numbers.out_spec) == order
    axes, channels = op.layer.column_axes, len(op.layer.channel_axes)
    rank = len(op.layer.output_axes) and max(op.layer.output_axes) + 1
    last = tuple(op.layer.output_axes) == tuple(range(rank - channels, rank))
    return op.layer.x_position == 0 and len(axes) == 1 and axes[0] == rank - channels and last


class _Form(NamedTuple):
    """A layer as a convolution over images ``[N, *spatial, C]``.

    Attributes:
      x, geometry: of the convolution.
      to_images: reshapes a value in the layout of the layer's output like the result.
      from_images: brings a result to that layout.
    """

    x: Any
    geometry: ConvGeometry
    to_images: Callable[[jax.Array], jax.Array]
    from_images: Callable[[jax.Array], jax.Array]


def _conv_form(op: Op, x: Any) -> _Form:
    geometry = conv_geometry(op, jax.tree.leaves(x)[0].shape)
    x = x if isinstance(x, Codes) else to_images(op, x)
    return _Form(x, geometry, lambda y: y, functools.partial(conv_result, op))


def _dense_form(op: Op, x: Any) -> _Form:
    """A dense layer as a convolution with one tap, whose images the first free axis numbers."""
    axes = op.layer.column_axes
    values = x.codes if isinstance(x, Codes) else x
    free = [axis for axis in range(values.ndim) if axis not in axes]
    sizes = [values.shape[axis] for axis in free]
    elements = int(np.prod([values.shape[axis] for axis in axes]))
    images, pixels = (*sizes, 1)[0], math.prod(sizes[1:])
    rows = jnp.transpose(values, (*free, *axes)).reshape(images, pixels, 1, elements)
    channels = [op.layer.weight_shape[axis] for axis in op.layer.channel_axes]

    def from_images(y: jax.Array) -> jax.Array:
        y = y.reshape(*sizes, *channels)
        if op.layer.x_position == 1:  # the weight's axes come first
            y = jnp.moveaxis(y, range(len(sizes)), range(len(channels), y.ndim))
        return y

    def to_images(y: jax.Array) -> jax.Array:
        return y.reshape(images, pixels, 1, -1) if y.ndim else y

    x = x._replace(codes=rows) if isinstance(x, Codes) else rows
    return _Form(x, ConvGeometry.pointwise(pixels), to_images, from_images)
