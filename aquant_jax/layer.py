"""One quantized conv or dense: its static part, its state, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aquant_jax import border as borders_lib
from aquant_jax.columns import Rounding, column_codes, convolve
from aquant_jax.graph import Op
from aquant_jax.numerics import TensorState, dequantize, fake_quantize, quantize, to_units
from aquant_jax.window import Window


class LayerSpec(NamedTuple):
    """What is static about a quantized layer.

    Attributes:
      path: path of its weight.
      kind: "conv" or "dense".
      weight_bits: 2 to 8, or None for float weights.
      tensor: key of the quantized tensor that feeds it, or None for a float input.
      act_bits: bits of that tensor.
      border: name of its border function; None rounds to nearest.
      phi: see `border.PHIS`.
      fused: whether the border is averaged over a channel's taps.
    """

    path: str
    kind: str
    weight_bits: int | None
    tensor: str | None
    act_bits: int
    border: str | None
    phi: str
    fused: bool


class LayerState(NamedTuple):
    """State of a layer as it is deployed (a pytree).

    Attributes:
      codes: uint8 weight codes, laid out as the op's operand; float32 weights of a float layer.
      scale, zero_point: float32, one per output channel (empty for a float layer).
      bias: float32, one per output channel.
      border: coefficients ``(taps, channels)`` by name; empty for nearest rounding.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    bias: jax.Array
    border: dict[str, jax.Array]


def border_shape(op: Op, x_shape: tuple[int, ...]) -> tuple[int, int]:
    """(taps, input channels) of a weighted op: the elements of one im2col column."""
    if op.layer.kind == "dense":
        axes = _contracted(op)
        return 1, int(np.prod([x_shape[a] for a in axes]))
    numbers = op.params["dimension_numbers"]
    taps = int(np.prod([op.layer.weight_shape[a] for a in numbers.rhs_spec[2:]]))
    return taps, x_shape[numbers.lhs_spec[1]]


def per_channel(op: Op, values: jax.Array) -> jax.Array:
    """Per-channel `values` (in the order of the channel axes) shaped to broadcast on the weight."""
    axes = op.layer.channel_axes
    shape = [1] * len(op.layer.weight_shape)
    for axis in axes:
        shape[axis] = op.layer.weight_shape[axis]
    sizes = [op.layer.weight_shape[axis] for axis in axes]
    order = tuple(int(i) for i in np.argsort(axes))
    return jnp.transpose(values.reshape(sizes), order).reshape(shape)


def channel_rows(op: Op, weight: np.ndarray) -> np.ndarray:
    """The weight operand as ``[channels, elements]``."""
    axes = op.layer.channel_axes
    moved = np.moveaxis(weight, axes, range(len(axes)))
    return np.ascontiguousarray(moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1))


def run_layer(
    op: Op,
    spec: LayerSpec,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    tensor: TensorState | None,
    border: dict[str, jax.Array],
    keep: jax.Array | None = None,
    dtype=jnp.float32,
    convolve: Callable[..., jax.Array] = convolve,
) -> jax.Array:
    """Run one layer: quantize its input, apply the op, add the bias.

    Args:
      op: the weighted op.
      spec: its static part.
      x: the activation as the op's operand, unquantized.
      weight: the weight operand as real values (soft, hard or dequantized: the caller decides).
      bias: float32 per output channel.
      tensor: grid of the input; None leaves it float.
      border: coefficients; empty for nearest rounding.
      keep: bool like `x`; False leaves an element unquantized. None keeps all.
      dtype: dtype of the result.
      convolve: runs a convolution over columns; has the contract of `columns.convolve`.
    """
    if tensor is not None and spec.border and _needs_columns(op):
        y = _column_convolution(op, spec, x, weight, tensor, border, keep, convolve)
    else:
        value = x
        if tensor is not None:
            bound = _broadcast_border(op, spec, x, tensor, border)
            value = fake_quantize(x, tensor, spec.act_bits, bound)
            value = value if keep is None else jnp.where(keep, value, x.astype(jnp.float32))
        y = _bind(op, value, weight)
    shape = [1] * y.ndim
    for axis in op.layer.output_axes:
        shape[axis] = y.shape[axis]
    return (y.astype(jnp.float32) + bias.reshape(shape)).astype(dtype)


def input_codes(op, spec, x, tensor, border) -> jax.Array:
    """Integer codes of the layer's input: like `x`, or ``[taps, N, *out, C]`` over columns."""
    if spec.border and _needs_columns(op):
        canonical, window = _canonical(op, x)
        codes = column_codes(canonical, tensor, border, window, _rounding(spec))
        return jnp.stack(codes).astype(jnp.uint8)
    bound = _broadcast_border(op, spec, x, tensor, border)
    u = to_units(x, 1.0 / tensor.step_size)
    return quantize(u, tensor.zero_point, spec.act_bits, bound).astype(jnp.uint8)


def dequantize_weight(op: Op, state: LayerState) -> jax.Array:
    """The real weights of a deployed layer, float32."""
    if state.scale.size == 0:
        return state.codes
    scale, zero = per_channel(op, state.scale), per_channel(op, state.zero_point)
    return dequantize(state.codes.astype(jnp.float32), scale, zero)


def _rounding(spec: LayerSpec) -> Rounding:
    return Rounding(spec.act_bits, spec.border or "constant", spec.phi, spec.fused)


def _contracted(op: Op) -> tuple[int, ...]:
    """Axes of the activation that number column elements."""
    contract, batch = op.params["dimension_numbers"]
    side = op.layer.x_position
    return (*batch[side], *contract[side])


def _bind(op: Op, value: jax.Array, weight: jax.Array) -> jax.Array:
    """The op itself on new operands, in the dtypes that it was traced with."""
    operands = [value, weight] if op.layer.x_position == 0 else [weight, value]
    dtypes = op.params["operand_dtypes"]
    (y,) = op.call(*(a.astype(d) for a, d in zip(operands, dtypes, strict=True)))
    return y


def _broadcast_border(op, spec, x, tensor, border):
    """Border of every element of `x` for ops with one tap; 0.5 when there is none to learn."""
    if not spec.border:
        return 0.5
    if op.layer.kind == "dense":
        axes = _contracted(op)
    else:
        axes = (op.params["dimension_numbers"].lhs_spec[1],)
    shape = [1] * x.ndim
    for axis in axes:
        shape[axis] = x.shape[axis]
    order = tuple(int(i) for i in np.argsort(axes))
    sizes = [x.shape[axis] for axis in axes]
    shaped = {
        name: jnp.transpose(c[0].reshape(sizes), order).reshape(1, *shape)
        for name, c in border.items()
    }
    u = to_units(x, 1.0 / tensor.step_size)
    return borders_lib.borders(spec.border, spec.phi, False, shaped, [u])[0]


def _needs_columns(op: Op) -> bool:
    """Whether one activation meets several taps; padding counts, being a column element too."""
    if op.layer.kind == "dense":
        return False
    spatial = op.params["dimension_numbers"].rhs_spec[2:]
    taps = [op.layer.weight_shape[a] for a in spatial]
    return any(t > 1 for t in taps) or any(p for pair in op.params["padding"] for p in pair)


def _canonical(op: Op, x: jax.Array, fill=0) -> tuple[jax.Array, Window]:
    """`x` as ``[N, *spatial, C]``, padded with `fill`, and the geometry of its taps."""
    numbers, params = op.params["dimension_numbers"], op.params
    lhs = numbers.lhs_spec
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    padding = [(0, 0, 0), *((lo, hi, 0) for lo, hi in params["padding"]), (0, 0, 0)]
    x = lax.pad(x, jnp.asarray(fill, x.dtype), padding)
    kernel = tuple(op.layer.weight_shape[a] for a in numbers.rhs_spec[2:])
    strides, dilation = tuple(params["window_strides"]), tuple(params["rhs_dilation"])
    return x, Window(x.shape[0], x.shape[1:-1], kernel, strides, dilation)


def _column_convolution(op, spec, x, weight, tensor, border, keep, convolve):
    numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    padded, window = _canonical(op, x.astype(jnp.float32))
    # Padding is no element of the tensor: its quantizer is never dropped.
    kept = None if keep is None else _canonical(op, keep, fill=True)[0]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    kernel = jnp.transpose(weight, (*spatial, in_axis, out_axis))
    taps, inner, outer = int(np.prod(window.kernel)), *kernel.shape[-2:]
    kernel = kernel.reshape(taps, inner, groups, outer // groups).transpose(0, 2, 1, 3)
    y = convolve(padded, kept, tensor, border, kernel, window, _rounding(spec))
    batch, feature, *places = numbers.out_spec
    source = np.argsort((batch, *places, feature))
    return jnp.transpose(y, tuple(int(i) for i in source))
