"""One quantized conv or dense: its static part, its state, and the function that runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Inexact, Shaped, UInt8

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.broadcast import differentiated
from aquant_jax.arithmetic.uniform import (
    ActivationQuantizer,
    dequantize,
    fake_quantize,
    to_units,
)
from aquant_jax.graph.ir import Op
from aquant_jax.layers import im2col
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_layout import (
    conv_geometry,
    conv_operands,
    conv_result,
    inserts,
    pad,
)
from aquant_jax.layers.products import multiply


class LayerSpec(NamedTuple):
    """The static part of a quantized layer.

    Attributes:
      path: path of its weight.
      kind: see `ir.Layer`.
      weight_bits: 2 to 8, or None for float weights.
      tensor: key of the quantized tensor that is its input, or None for a float input.
      act_bits: bits of that tensor; nothing reads it without one.
      border: name of its border function; None rounds to nearest.
      phi: see `border.PHIS`.
      border_granularity: see `border.GRANULARITIES`.
      weight_group: inputs of an output channel that share a grid; None for all of them.
    """

    path: str
    kind: str
    weight_bits: int | None
    tensor: str | None
    act_bits: int
    border: str | None
    phi: str
    border_granularity: str
    weight_group: int | None = None


class Weights(NamedTuple):
    """The real weights, bias and border coefficients of a layer (a pytree).

    Attributes:
      weight: the weight operand as real values, from soft codes, from hard codes or in float.
      bias: one value per output channel.
      border: coefficients by name; empty for nearest rounding.
    """

    weight: Inexact[Array, "..."]
    bias: Float32[Array, "..."]
    border: dict[str, Float32[Array, "taps C"]]


class LayerState(NamedTuple):
    """State of a deployed layer (a pytree).

    Attributes:
      codes: weight codes, laid out as the op's operand; the weights themselves in a float layer,
        which may be complex.
      scale, zero_point: one per output channel, or per group of its inputs (the last group of a
        channel stands before the first of the next); empty for a float layer.
      bias: one value per output channel.
      border: coefficients by name; empty for nearest rounding.
    """

    codes: UInt8[Array, "..."] | Inexact[Array, "..."]
    scale: Float32[Array, "channels"]
    zero_point: Float32[Array, "channels"]
    bias: Float32[Array, "..."]
    border: dict[str, Float32[Array, "taps C"]]


def skeletons(borders: Mapping[str, Sequence[str]]) -> dict[str, LayerState]:
    """Layer states with empty arrays, given the names of the coefficients of each layer."""
    none = jnp.zeros(0)
    return {
        path: LayerState(none, none, none, none, dict.fromkeys(names, none))
        for path, names in borders.items()
    }


def border_shape(op: Op, granularity: str, x_shape: tuple[Any, ...]) -> tuple[int, int]:
    """Shape (taps, input channels) of a weighted op's coefficients.

    Args:
      op: the weighted op.
      granularity: see `border.GRANULARITIES`; "channel" has one tap.
      x_shape: shape of its activation, whose first size may be symbolic.
    """
    if op.layer.kind != "conv":
        return 1, math.prod(x_shape[axis] for axis in op.layer.column_axes)
    numbers = op.params["dimension_numbers"]
    spatial = [op.layer.weight_shape[a] for a in numbers.rhs_spec[2:]]
    taps = 1 if granularity == "channel" else int(np.prod(spatial))
    return taps, x_shape[numbers.lhs_spec[1]]


def per_channel(op: Op, values: Shaped[AnyArray, "grids"]) -> Shaped[Array, "..."]:
    """Values of a weight's grids, shaped to broadcast on the weight.

    Args:
      op: the weighted op.
      values: one per output channel, in the order of the channel axes; or one per group of a
        channel's inputs, see `LayerState`.
    """
    axes, shape = op.layer.channel_axes, op.layer.weight_shape
    sizes = [shape[axis] for axis in axes]
    groups = values.size // math.prod(sizes)
    if groups == 1:
        wide = [size if axis in axes else 1 for axis, size in enumerate(shape)]
        order = tuple(int(i) for i in np.argsort(axes))
        return jnp.transpose(values.reshape(sizes), order).reshape(wide)
    inner = [axis for axis in range(len(shape)) if axis not in axes]
    elements = math.prod(shape[axis] for axis in inner)
    spread = jnp.broadcast_to(values[:, None], (values.size, elements // groups))
    spread = spread.reshape(*sizes, *(shape[axis] for axis in inner))
    return jnp.transpose(spread, tuple(int(i) for i in np.argsort([*axes, *inner])))


def weight_rows(
    op: Op, weight: Shaped[np.ndarray, "..."], group: int | None = None
) -> Shaped[np.ndarray, "grids elements"]:
    """The weight operand as one row for each grid: for an output channel, or `group` elements."""
    axes = op.layer.channel_axes
    moved = np.moveaxis(weight, axes, range(len(axes)))
    rows = moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1)
    return np.ascontiguousarray(rows.reshape(-1, group or rows.shape[1]))


class LayerInput(NamedTuple):
    """The activation of a layer, and how it is quantized (a pytree).

    Attributes:
      x: the activation as the op's operand, unquantized.
      quantizer: its step size and zero point; None leaves it float.
      keep: mask of the shape of `x`; False leaves an element unquantized (QDrop). None quantizes
        all.
    """

    x: Inexact[AnyArray, "..."]
    quantizer: ActivationQuantizer | None = None
    keep: Bool[AnyArray, "..."] | None = None


def run_layer(
    op: Op,
    spec: LayerSpec,
    inputs: LayerInput,
    weights: Weights,
    convolve: Callable[..., jax.Array] = im2col.convolve,
    multiply: Callable[..., jax.Array] = multiply,
) -> Inexact[Array, "..."]:
    """Run one layer: quantize its input, apply the op, add the bias.

    Args:
      op: the weighted op.
      spec: its static part.
      inputs: its activation.
      weights: real weights, bias and border coefficients.
      convolve: runs a convolution over columns; has the contract of `im2col.convolve`.
      multiply: runs any other op; has the contract of `products.multiply_op`.

    Returns:
      The output, in the layout of the op.
    """
    x, quantizer, keep = inputs
    if quantizer is not None and spec.border and needs_columns(op, spec):
        padded, kernel, geometry = conv_operands(op, x.astype(jnp.float32), weights.weight)
        # QDrop drops elements of the tensor; not padding, which is always quantized.
        mask = None if keep is None else pad(op, keep, fill=True)
        operands = (padded, mask, quantizer, weights.border, kernel)
        y = conv_result(op, convolve(*operands, geometry, rounding_of(spec)))
    else:
        value = x
        if quantizer is not None:
            value = quantize_elements(op, spec, x, quantizer, weights.border)
            value = value if keep is None else jnp.where(keep, value, x.astype(jnp.float32))
        y = multiply(op, value, weights.weight)
    return add_bias(op, y, weights.bias)


def add_bias(
    op: Op, y: Inexact[Array, "*shape"], bias: Float32[AnyArray, "..."]
) -> Inexact[Array, "*shape"]:
    """The op's result `y` plus `bias` (per output channel), float32 or wider or complex; experts
    have none."""
    dtype = np.promote_types(y.dtype, np.float32)
    if op.layer.kind == "experts":
        return y.astype(dtype)
    return y.astype(dtype) + output_channels(op, y, bias).astype(dtype)


def output_channels(
    op: Op, y: Shaped[AnyArray, "..."], values: Shaped[AnyArray, "..."]
) -> Shaped[AnyArray, "..."]:
    """Per-channel `values` (in the order of the channel axes) shaped to broadcast on `y`."""
    shape = [1] * y.ndim
    for axis in op.layer.output_axes:
        shape[axis] = y.shape[axis]
    return values.reshape(shape)


def dequantize_weight(op: Op, state: LayerState) -> Inexact[Array, "..."]:
    """The real weights of a deployed layer, laid out as the op's operand; its codes may be floats,
    through which a gradient flows."""
    if state.scale.size == 0:
        return state.codes
    scale, zero = per_channel(op, state.scale), per_channel(op, state.zero_point)
    return _dequantize(state.codes, scale, zero)


@jax.jit
def _dequantize(
    codes: UInt8[AnyArray, "*shape"] | Float32[AnyArray, "*shape"],
    scale: Float32[AnyArray, "..."],
    zero_point: Float32[AnyArray, "..."],
) -> Float32[Array, "*shape"]:
    return dequantize(codes.astype(jnp.float32), scale, zero_point)


def rounding_of(spec: LayerSpec) -> Rounding:
    """The bits and the border of a column's elements."""
    granularity = spec.border_granularity
    per_channel = spec.kind == "conv" and spec.border is not None and granularity == "channel"
    return Rounding(spec.act_bits, spec.border, spec.phi, granularity == "mean", per_channel)


def quantize_elements(
    op: Op,
    spec: LayerSpec,
    x: Float[AnyArray, "*shape"],
    quantizer: ActivationQuantizer,
    border: Coefficients,
) -> Float32[Array, "*shape"]:
    """Quantize and dequantize `x` itself: every element has one border, whatever tap reads it."""
    if not (name := spec.border):
        return fake_quantize(x, quantizer, spec.act_bits)
    axes = op.layer.column_axes
    if op.layer.kind == "conv":
        axes = (op.params["dimension_numbers"].lhs_spec[1],)
    order = tuple(int(i) for i in np.argsort(axes))
    sizes = [x.shape[axis] for axis in axes]
    others = [axis for axis in range(x.ndim) if axis not in axes]

    def spread_out(row: Float32[AnyArray, "C"], spread: Callable[..., Any]) -> Any:
        """One value a channel, to broadcast on `x`."""
        if tuple(axes) == (x.ndim - 1,):
            return spread(row, x.shape)
        return jnp.expand_dims(jnp.transpose(row.reshape(sizes), order), others)

    def run(
        x: Float[AnyArray, "*shape"],
        quantizer: ActivationQuantizer,
        border: Coefficients,
        spread: Callable[..., Any],
    ) -> Float32[Array, "*shape"]:
        u = to_units(x, spread(1.0 / quantizer.step_size, x.shape))
        rows = {key: spread_out(c[0], spread)[None] for key, c in border.items()}
        (bound,) = borders.borders(name, spec.phi, False, rows, [u])
        return fake_quantize(x, quantizer, spec.act_bits, bound)

    return differentiated(run, x, quantizer, border)


def needs_columns(op: Op, spec: LayerSpec) -> bool:
    """Whether the borders of a layer are those of its columns, see `ConvGeometry.gathers`, or of
    inserted zeros, which are column elements too."""
    if op.layer.kind != "conv" or spec.border_granularity == "channel":
        return False
    any_size = (1,) * len(op.layer.weight_shape)
    return inserts(op) or conv_geometry(op, any_size).gathers
