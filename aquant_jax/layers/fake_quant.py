"""One quantized conv or dense: its static part, its state, and the function that runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aquant_jax.arithmetic import border as borders_lib
from aquant_jax.arithmetic.uniform import TensorState, dequantize, fake_quantize, quantize, to_units
from aquant_jax.graph.ir import Op
from aquant_jax.layers.conv_geometry import Window
from aquant_jax.layers.im2col import Rounding, column_codes, contract, convolve


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


class Weights(NamedTuple):
    """What a layer computes with: real weights, bias and border coefficients.

    Attributes:
      weight: the weight operand as real values (soft, hard or dequantized: the caller decides).
      bias: float32 per output channel.
      border: coefficients ``(taps, channels)`` by name; empty for nearest rounding.
    """

    weight: jax.Array
    bias: jax.Array
    border: dict[str, jax.Array]


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


def skeletons(borders: Mapping[str, Sequence[str]]) -> dict[str, LayerState]:
    """States of layers without their arrays, given the names of the coefficients of each."""
    none = jnp.zeros(0)
    return {
        path: LayerState(none, none, none, none, dict.fromkeys(names, none))
        for path, names in borders.items()
    }


def border_shape(op: Op, x_shape: tuple[int, ...]) -> tuple[int, int]:
    """(taps, input channels) of a weighted op: the elements of one im2col column."""
    if op.layer.kind == "dense":
        axes = contracted_axes(op)
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
    own: Weights,
    tensor: TensorState | None,
    keep: jax.Array | None = None,
    dtype=jnp.float32,
    convolve: Callable[..., jax.Array] = convolve,
) -> jax.Array:
    """Run one layer: quantize its input, apply the op, add the bias.

    Args:
      op: the weighted op.
      spec: its static part.
      x: the activation as the op's operand, unquantized.
      own: its weights.
      tensor: grid of the input; None leaves it float.
      keep: bool like `x`; False leaves an element unquantized. None keeps all.
      dtype: dtype of the result.
      convolve: runs a convolution over columns; has the contract of `columns.convolve`.
    """
    if tensor is not None and spec.border and _needs_columns(op):
        padded, kernel, window = conv_operands(op, x.astype(jnp.float32), own.weight)
        # Padding is no element of the tensor: its quantizer is never dropped.
        kept = None if keep is None else _padded(op, keep, fill=True)
        rounding = rounding_of(spec)
        y = conv_result(op, convolve(padded, kept, tensor, own.border, kernel, window, rounding))
    else:
        value = x
        if tensor is not None:
            bound = _broadcast_border(op, spec, x, tensor, own.border)
            value = fake_quantize(x, tensor, spec.act_bits, bound)
            value = value if keep is None else jnp.where(keep, value, x.astype(jnp.float32))
        y = _bind(op, value, own.weight)
    return add_bias(op, y, own.bias, dtype)


def add_bias(op: Op, y: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """The op's result `y` plus `bias` (per output channel), added in float32."""
    return (y.astype(jnp.float32) + output_channels(op, y, bias)).astype(dtype)


def output_channels(op: Op, y: jax.Array, values: jax.Array) -> jax.Array:
    """Per-channel `values` (in the order of the channel axes) shaped to broadcast on `y`."""
    shape = [1] * y.ndim
    for axis in op.layer.output_axes:
        shape[axis] = y.shape[axis]
    return values.reshape(shape)


def input_codes(op, spec, x, tensor, border) -> jax.Array:
    """Integer codes of the layer's input: like `x`, or ``[taps, N, *out, C]`` over columns."""
    if spec.border and _needs_columns(op):
        codes = column_codes(_padded(op, x), tensor, border, _window(op, x), rounding_of(spec))
        return jnp.stack(codes).astype(jnp.uint8)
    bound = _broadcast_border(op, spec, x, tensor, border)
    u = to_units(x, 1.0 / tensor.step_size)
    return quantize(u, tensor.zero_point, spec.act_bits, bound).astype(jnp.uint8)


def dequantize_weight(op: Op, state: LayerState) -> jax.Array:
    """The real weights of a deployed layer, float32."""
    if state.scale.size == 0:
        return state.codes
    scale, zero = per_channel(op, state.scale), per_channel(op, state.zero_point)
    return _dequantize(state.codes, scale, zero)


@jax.jit
def _dequantize(codes, scale, zero_point):
    return dequantize(codes.astype(jnp.float32), scale, zero_point)


def rounding_of(spec: LayerSpec) -> Rounding:
    """How a layer's columns are rounded; a layer that rounds to nearest has no coefficients."""
    return Rounding(spec.act_bits, spec.border or "constant", spec.phi, spec.fused)


def contracted_axes(op: Op) -> tuple[int, ...]:
    """Axes of the activation that number column elements."""
    contract, batch = op.params["dimension_numbers"]
    side = op.layer.x_position
    return (*batch[side], *contract[side])


def _bind(op: Op, value: jax.Array, weight: jax.Array) -> jax.Array:
    """The op itself on new operands, in the dtypes that it was traced with."""
    if _is_slow(op):
        return _grouped_convolution(op, value, weight)
    operands = [value, weight] if op.layer.x_position == 0 else [weight, value]
    dtypes = op.params["operand_dtypes"]
    (y,) = op.call(*(a.astype(d) for a, d in zip(operands, dtypes, strict=True)))
    return y


def _is_slow(op: Op) -> bool:
    """XLA's grouped convolutions on CPU take 5 to 40 times as long as a sum over their taps."""
    grouped = op.layer.kind == "conv" and op.params["feature_group_count"] > 1
    floats = all(dtype == jnp.float32 for dtype in op.params["operand_dtypes"])
    return grouped and floats and jax.default_backend() == "cpu"


def _grouped_convolution(op: Op, value: jax.Array, weight: jax.Array) -> jax.Array:
    padded, kernel, window = conv_operands(op, value.astype(jnp.float32), weight)
    taps = zip(window.taps(window.flatten(padded)), kernel, strict=True)
    products = [contract(rows, own) for rows, own in taps]
    return conv_result(op, window.crop(functools.reduce(jnp.add, products)))


def _broadcast_border(op, spec, x, tensor, border):
    """Border of every element of `x` for ops with one tap; 0.5 when there is none to learn."""
    if not spec.border:
        return 0.5
    if op.layer.kind == "dense":
        axes = contracted_axes(op)
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


def conv_operands(op: Op, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, Window]:
    """A convolution over columns: what `columns.convolve` takes.

    Args:
      op: a convolution.
      x: its activation.
      weight: its weight operand, as values or as codes.

    Returns:
      `x` as ``[N, *padded, C]``, the weight as ``[taps, groups, C / groups, O / groups]`` and the
      geometry of the taps.
    """
    out_axis, in_axis, *spatial = op.params["dimension_numbers"].rhs_spec
    groups = op.params["feature_group_count"]
    kernel = jnp.transpose(weight, (*spatial, in_axis, out_axis))
    inner, outer = kernel.shape[-2:]
    kernel = kernel.reshape(-1, inner, groups, outer // groups).transpose(0, 2, 1, 3)
    return _padded(op, x), kernel, _window(op, x)


def conv_result(op: Op, y: jax.Array) -> jax.Array:
    """A result ``[N, *out, O]`` in the layout of the op."""
    batch, feature, *places = op.params["dimension_numbers"].out_spec
    source = np.argsort((batch, *places, feature))
    return jnp.transpose(y, tuple(int(i) for i in source))


def _padded(op: Op, x: jax.Array, fill=0) -> jax.Array:
    """`x` as ``[N, *spatial, C]``, padded with `fill`."""
    lhs = op.params["dimension_numbers"].lhs_spec
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    padding = [(0, 0, 0), *((lo, hi, 0) for lo, hi in op.params["padding"]), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), padding)


def _window(op: Op, x: jax.Array) -> Window:
    """Geometry of the taps over the padded `x`."""
    numbers, params = op.params["dimension_numbers"], op.params
    sizes = (x.shape[axis] for axis in numbers.lhs_spec[2:])
    padded = tuple(n + lo + hi for n, (lo, hi) in zip(sizes, params["padding"], strict=True))
    kernel = tuple(op.layer.weight_shape[a] for a in numbers.rhs_spec[2:])
    strides, dilation = tuple(params["window_strides"]), tuple(params["rhs_dilation"])
    return Window(x.shape[numbers.lhs_spec[0]], padded, kernel, strides, dilation)
