"""The tuned convolution for NVIDIA GPUs: quantized in registers, multiplied on tensor cores.

`conv_border_int8` is its reference implementation. Here the border, the step size and the zero
point are folded, in float64, into one polynomial of the activation: a code is then one or two
multiply-adds, a clip and a rounding. Where the polynomial comes within rounding of an integer, a
code may differ by one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import NEAREST, ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import arguments, partition, targets
from gpu_ops.conv_border_int8 import SHIFT
from gpu_ops.geometry import NO_PADDING, check_geometry, columns_shape

# Channels that a step multiplies; the number of outputs must be a multiple of the tile.
STEP, TILE = 32, 64
# The most taps of a window: their codes and weights must fit the shared memory.
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
      shared_across_taps: whether taps share their border.
    """

    weights: jax.Array
    inv_step: jax.Array
    folded: jax.Array
    scale: jax.Array
    offset: jax.Array
    kernel: tuple[int, int] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    degree: int = dataclasses.field(metadata={"static": True})
    shared_across_taps: bool = dataclasses.field(metadata={"static": True})


def fold_convolution(
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    weights: QuantizedWeights,
    rounding: Rounding,
    bias: AnyArray | None = None,
) -> TunedConvolution:
    """The layer of `conv_border_tuned`, folded once from the operands of `conv_border_int8`.

    Args:
      quantizer, coefficients, rounding: of the activation; see `gpu_ops.img2col_border`.
      weights: codes ``[kh, kw, C, O]``.
      bias: floats ``[O]``, or None.

    Raises:
      ValueError: an argument that does not fit, as there, and one that only `conv_border_int8`
        serves: channels not divisible by 32 or outputs not divisible by 64, weights of 8
        bits, a phi other than ``identity``, more than 24 taps.
    """
    geometry = _kernel_alone(weights.codes)
    channels, outer = weights.codes.shape[2:]
    arguments.check_weights(weights, geometry, channels, rounding)
    arguments.check_addend("bias", bias, (outer,))
    _check_served(weights, geometry.taps, rounding)
    polynomial, degree, shared = _polynomial(coefficients, rounding, (geometry.taps, channels))
    step, zero_point = map(float, arguments.check_quantizer(quantizer, rounding.bits))
    folded = _fold(polynomial, step, zero_point, shared)
    whole = np.asarray(weights.codes, np.int64) - np.asarray(weights.zero_point, np.int64)
    scale = np.float64(step) * np.asarray(weights.scale, np.float64)
    shift = (SHIFT if rounding.bits == 8 else 0) - zero_point
    offset = scale * shift * whole.sum(axis=(0, 1, 2))
    offset = offset if bias is None else offset + np.asarray(bias, np.float64)
    steps = whole.reshape(geometry.taps, -1, STEP, outer).transpose(1, 0, 3, 2)
    return TunedConvolution(
        jnp.asarray(steps, jnp.int8), jnp.float32(1.0 / step), jnp.asarray(folded, jnp.float32),
        jnp.asarray(scale, jnp.float32), jnp.asarray(offset, jnp.float32),
        (geometry.kernel[0], geometry.kernel[1]), rounding.bits, degree, shared,
    )  # fmt: skip


def _kernel_alone(codes: AnyArray) -> ConvGeometry:
    """The geometry of a kernel ``[kh, kw, C, O]`` over an input of its own size."""
    if len(codes.shape) != 4:
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, not uint8 [kh, kw, C, O]")
    kernel = codes.shape[:2]
    return ConvGeometry(kernel, kernel, (1, 1), (1, 1), NO_PADDING)


def _check_served(weights: QuantizedWeights, taps: int, rounding: Rounding) -> None:
    """ValueError where only `conv_border_int8` serves."""
    channels, outer = weights.codes.shape[2:]
    for name, value, good, wanted in (
        ("the number of channels", channels, channels % STEP == 0, f"a multiple of {STEP}"),
        ("the number of outputs", outer, outer % TILE == 0, f"a multiple of {TILE}"),
        ("weight_bits", weights.bits, weights.bits < 8, "below 8"),
        ("phi", rounding.phi, rounding.phi == "identity", "'identity'"),
        ("the number of taps", taps, taps <= MOST_TAPS, f"at most {MOST_TAPS}"),
    ):
        if not good:
            raise ValueError(f"{name} is {value!r}, not {wanted}; conv_border_int8 serves it")


def _polynomial(
    coefficients: Coefficients, rounding: Rounding, shape: tuple[int, int]
) -> tuple[np.ndarray, int, bool]:
    """The border as float64 ``[3, taps, C]``, its degree, 1 or 2, and whether the taps share it.

    A constant border that taps share is their mean at every tap.
    """
    stacked = np.asarray(arguments.stack_coefficients(coefficients, rounding.border, shape))
    polynomial = np.zeros((3, *shape))
    polynomial[: len(stacked)] = stacked
    if rounding.border is None:
        polynomial[0] = NEAREST
    shared = rounding.shared_across_taps and shape[0] > 1 and len(stacked) > 1
    if rounding.shared_across_taps and not shared:
        polynomial[0] = polynomial[0].mean(axis=0)
    return polynomial, 2 if len(stacked) > 2 else 1, shared


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
    x: AnyArray,
    layer: TunedConvolution,
    geometry: ConvGeometry,
    *,
    residual: AnyArray | None = None,
    relu: bool = False,
) -> jax.Array:
    """`conv_border_int8` in one pass on an NVIDIA GPU, without columns in memory.

    Args:
      x: bfloat16 ``[N, H, W, C]``.
      layer: of `fold_convolution`; it holds the bias.
      geometry: of the convolution, with one group; see `gpu_ops.conv_geometry`.
      residual: bfloat16, of the shape of the result; added before the ReLU. Or None.
      relu: whether the result is cut at zero.

    Returns:
      bfloat16 ``[N, OH, OW, O]``.

    Raises:
      ValueError: an argument that does not fit, by name and with both values.
      JaxRuntimeError: on a CPU, or where gpu_ops was built without CUDA.
    """
    arguments.check_x(x, ("bfloat16",))
    geometry = check_geometry(geometry, x.shape)
    _check_layer(layer, geometry, x.shape[-1])
    columns_shape(geometry, x.shape[-1], align=1)
    out = (*geometry.out, layer.scale.shape[0])
    shape = (x.shape[0], *out)
    if residual is not None and (residual.shape != shape or residual.dtype != jnp.bfloat16):
        raise ValueError(f"residual is {residual.dtype} {residual.shape}, not bfloat16 {shape}")
    addend = jnp.zeros((0,), jnp.bfloat16) if residual is None else residual
    options = _Options(layer.bits, layer.degree, layer.shared_across_taps, relu)
    call = partition.compiled(_TunedCall(geometry, out, options, residual is not None))
    return call(x, addend, layer.weights, layer.inv_step, layer.folded, layer.scale, layer.offset)


def _check_layer(layer: TunedConvolution, geometry: ConvGeometry, channels: int) -> None:
    """ValueError unless the layer is one of this geometry."""
    for name, value, wanted in (
        ("x has {} channels, the layer {}", channels, layer.folded.shape[-1]),
        ("the geometry has kernel {}, the layer {}", geometry.kernel, layer.kernel),
        ("groups is {}, not {}; conv_border_int8 serves it", geometry.groups, 1),
    ):
        if value != wanted:
            raise ValueError(name.format(value, wanted))


class _Options(NamedTuple):
    """Attributes of the kernel besides the geometry."""

    bits: int
    degree: int
    shared_across_taps: bool
    relu: bool


class _TunedCall(NamedTuple):
    """A call of `conv_border_tuned` on x, the residual, of size 0 if there is none, and the layer.

    Attributes:
      geometry: of the convolution.
      out: shape of one image's result.
      options: of the kernel.
      adds: whether there is a residual.
    """

    geometry: ConvGeometry
    out: tuple[int, ...]
    options: _Options
    adds: bool

    results, images = "n a b o", 2

    @property
    def operands(self) -> str:
        return f"n h w c, {self.results if self.adds else 'z'}, s t o i, , d t c, o, o"

    def __call__(self, x: AnyArray, addend: jax.Array, *layer: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((x.shape[0], *self.out), jnp.bfloat16)
        attributes = targets.geometry_attributes(self.geometry)
        del attributes["groups"]
        attributes |= self.options._asdict()
        return targets.call("conv_tuned", result, **attributes)(x, *layer, addend)
