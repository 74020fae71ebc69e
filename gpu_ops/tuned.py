"""The tuned convolution for NVIDIA GPUs: quantized in registers, multiplied on tensor cores.

`conv_border_int8` is its definition. Here the border, the step size and the zero point are folded,
in float64, into one polynomial of the activation, so that a code is a multiply-add or two, a clip
and a rounding: where the polynomial comes within rounding of an integer, a code may differ by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gpu_ops import arguments, partition, targets
from gpu_ops.arguments import Padding
from gpu_ops.int8 import SHIFT

# Channels that a step multiplies, and what the result's must be a multiple of.
STEP, TILE = 32, 64
# Taps whose codes and weights fit the shared memory.
MOST_TAPS = 24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TunedConvolution:
    """Weights and border of a layer, as the kernel reads them (a pytree).

    Attributes:
      weights: int8 ``[C / 32, taps, O, 32]``, codes less their zero points.
      inv_step: float32 scalar.
      folded: float32 ``[3, taps, C]``: an element's code is ``ceil(clip(v))`` with
        ``v = (c2 x + c1) x + c0``; where taps share their border ``v = x / s + m`` and m is the sum
        of ``(c2 x + c1) x`` over the taps plus the first tap's c0.
      scale, offset: float32 ``[O]``; the result is ``scale * sum + offset``.
      kernel: sizes of the window.
      bits: of the activation.
      degree: 1 where every c2 is zero, else 2.
      shared: whether taps share their border.
    """

    weights: jax.Array
    inv_step: jax.Array
    folded: jax.Array
    scale: jax.Array
    offset: jax.Array
    kernel: tuple[int, int] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    degree: int = dataclasses.field(metadata={"static": True})
    shared: bool = dataclasses.field(metadata={"static": True})


def fold_convolution(
    step_size: ArrayLike,
    zero_point: ArrayLike,
    coefficients: Mapping[str, jax.Array] | None,
    codes: jax.Array,
    scale: jax.Array,
    weight_zero_point: jax.Array,
    *,
    weight_bits: int,
    bits: int,
    border: str = "none",
    phi: str = "identity",
    fused: bool = True,
    bias: jax.Array | None = None,
) -> TunedConvolution:
    """What `conv_border_tuned` takes, made once from what `conv_border_int8` takes.

    Args:
      step_size, zero_point, coefficients, bits, border, phi, fused: of the activation; see
        `gpu_ops.img2col_border`.
      codes, scale, weight_zero_point, weight_bits, bias: see `gpu_ops.conv_border_int8`.

    Raises:
      ValueError: what does not fit, as there, and what only `conv_border_int8` serves: groups,
        channels that are no multiple of 32 or outputs that are none of 64, weights of 8 bits, a
        phi other than ``identity``, more than 24 taps.
    """
    height, width, channels, outer = codes.shape if len(codes.shape) == 4 else (0, 0, 0, 0)
    like_x = jax.ShapeDtypeStruct((1, 1, 1, channels), jnp.bfloat16)
    arguments.check_weights(like_x, codes, scale, weight_zero_point, weight_bits, bits)
    arguments.check_added("bias", bias, (outer,))
    taps = height * width
    _check_served(channels, outer, weight_bits, phi, taps)
    stacked = arguments.stack(coefficients or {}, border, (taps, channels))
    step, zero = map(float, arguments.grid(step_size, zero_point, bits))
    polynomial = np.zeros((3, taps, channels))
    polynomial[: len(stacked)] = stacked
    if border == "none":
        polynomial[0] = 0.5
    shared = fused and taps > 1 and len(stacked) > 1
    if fused and not shared:
        polynomial[0] = polynomial[0].mean(axis=0)
    folded = _fold(polynomial, step, zero, shared)
    whole = np.asarray(codes, np.int64) - np.asarray(weight_zero_point, np.int64)
    real = np.float64(step) * np.asarray(scale, np.float64)
    shift = (SHIFT if bits == 8 else 0) - zero
    offset = real * shift * whole.sum(axis=(0, 1, 2))
    offset = offset if bias is None else offset + np.asarray(bias, np.float64)
    steps = whole.reshape(taps, -1, STEP, outer).transpose(1, 0, 3, 2)
    return TunedConvolution(
        jnp.asarray(steps, jnp.int8), jnp.float32(1.0 / step), jnp.asarray(folded, jnp.float32),
        jnp.asarray(real, jnp.float32), jnp.asarray(offset, jnp.float32),
        (height, width), bits, 2 if len(stacked) > 2 else 1, shared,
    )  # fmt: skip


def _check_served(channels: int, outer: int, weight_bits: int, phi: str, taps: int) -> None:
    for name, value, good, wanted in (
        ("the number of channels", channels, channels % STEP == 0, f"a multiple of {STEP}"),
        ("the number of outputs", outer, outer % TILE == 0, f"a multiple of {TILE}"),
        ("weight_bits", weight_bits, weight_bits < 8, "below 8"),
        ("phi", phi, phi == "identity", "'identity'"),
        ("the number of taps", taps, taps <= MOST_TAPS, f"at most {MOST_TAPS}"),
    ):
        if not good:
            raise ValueError(f"{name} is {value!r}, not {wanted}; conv_border_int8 serves it")


def _fold(polynomial: np.ndarray, step: float, zero: float, shared: bool) -> np.ndarray:
    """``z + x / s - B`` by powers of x, ``[3, taps, C]``; shared, without x / s and as a mean."""
    powers = np.float64(step) ** np.arange(3).reshape(3, 1, 1)
    negated = -polynomial / powers
    if shared:
        negated = negated / polynomial.shape[1]
        negated[0] = negated[0].sum(axis=0)
    else:
        negated[1] += 1.0 / step
    negated[0] += zero
    return negated


def conv_border_tuned(
    x: jax.Array,
    layer: TunedConvolution,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding,
    dilation: Sequence[int] = (1, 1),
    residual: jax.Array | None = None,
    relu: bool = False,
) -> jax.Array:
    """`conv_border_int8` in one pass on an NVIDIA GPU, without columns in memory.

    Args:
      x: bfloat16 ``[N, H, W, C]``.
      layer: of `fold_convolution`.
      strides, padding, dilation: see `gpu_ops.img2col_border`.
      residual: bfloat16, of the shape of the result; added before the ReLU. Or None.
      relu: whether the result is cut at zero.

    Returns:
      bfloat16 ``[N, OH, OW, O]``.

    Raises:
      ValueError: what does not fit, by name and with both values.
      JaxRuntimeError: on a CPU, or where gpu_ops was built without CUDA.
    """
    arguments.check_x(x, ("bfloat16",))
    channels = layer.folded.shape[-1]
    if x.shape[-1] != channels:
        raise ValueError(f"x has {x.shape[-1]} channels, the layer {channels}")
    window = arguments.columns_window(x.shape, layer.kernel, strides, padding, dilation, 1, 1)
    shape = (x.shape[0], *window.result[:2], layer.scale.shape[0])
    if residual is not None and (residual.shape != shape or residual.dtype != jnp.bfloat16):
        raise ValueError(f"residual is {residual.dtype} {residual.shape}, not bfloat16 {shape}")
    added = jnp.zeros((0,), jnp.bfloat16) if residual is None else residual
    how = (layer.bits, layer.degree, layer.shared, relu)
    call = partition.compiled(_Call(window, shape[1:], how, residual is not None))
    return call(x, added, layer.weights, layer.inv_step, layer.folded, layer.scale, layer.offset)


class _Call(NamedTuple):
    """A call of `conv_border_tuned`: x, the residual, or nothing of size 0, and the layer's arrays.

    Attributes:
      window: geometry.
      out: shape of one image's result.
      how: bits, degree, shared and relu.
      adds: whether there is a residual.
    """

    window: arguments.ColumnsWindow
    out: tuple[int, ...]
    how: tuple[int, int, bool, bool]
    adds: bool

    results, images = "n a b o", 2

    @property
    def operands(self) -> str:
        return f"n h w c, {self.results if self.adds else 'z'}, s t o i, , d t c, o, o"

    def __call__(self, x, added, *layer):
        result = jax.ShapeDtypeStruct((x.shape[0], *self.out), jnp.bfloat16)
        attributes = {k: v for k, v in self.window.attributes().items() if k != "groups"}
        how = dict(zip(("bits", "degree", "shared", "relu"), self.how, strict=True))
        return targets.call("conv_tuned", result, **attributes, **how)(x, *layer, added)
