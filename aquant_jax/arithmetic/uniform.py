"""The arithmetic of uniform quantization: straight-through rounding, quantize, dequantize.

Everything is float32 and pure. "Nearest" means ``ceil(u - 0.5)`` everywhere in this library, so
that a constant border of 0.5 and rounding to nearest agree on ties too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.broadcast import differentiated

NEAREST = 0.5
# Above 2^23 every float32 is an integer.
MAX_UNITS = float(2**23)
LOWEST = float(np.finfo(np.float32).min)
MIN_BITS, MAX_BITS = 2, 8


class ActivationQuantizer(NamedTuple):
    """The quantizer of one activation tensor (a pytree).

    Attributes:
      step_size: positive float32 scalar, in units of the tensor.
      zero_point: float32 scalar holding an integer code in ``[0, 2^bits - 1]``.
    """

    step_size: Float[Array, ""]
    zero_point: Float[Array, ""]


def max_code(bits: int) -> float:
    """Largest unsigned code, ``2^bits - 1``."""
    return float(2**bits - 1)


@jax.custom_jvp
def ste_ceil(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """``ceil`` whose gradient is the identity (straight-through estimator, Bengio et al. 2013)."""
    return jnp.ceil(x)


@ste_ceil.defjvp
def _ste_ceil_jvp(
    primals: tuple[Float[AnyArray, "*shape"]], tangents: tuple[Float[Array, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    return ste_ceil(*primals), tangents[0]


def clip_codes(raw: Float[AnyArray, "*shape"], bits: int) -> Float[Array, "*shape"]:
    """Clip to ``[0, 2^bits - 1]``, with the gradient of `clip`."""
    return clip(raw, 0.0, max_code(bits))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def clip(values: Float[AnyArray, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """Clip to ``[low, high]``; the gradient passes inside the range, its ends included.

    Codes often lie on the ends, where the derivative of `jnp.clip` is one half.
    """
    return jnp.clip(values, low, high)


@clip.defjvp
def _clip_jvp(
    low: float,
    high: float,
    primals: tuple[Float[AnyArray, "*shape"]],
    tangents: tuple[Float[Array, "*shape"]],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    (values,), (tangent,) = primals, tangents
    outside = (values < low) | (values > high)
    return clip(values, low, high), jnp.where(outside, 0.0, tangent)


@jax.custom_jvp
def product(a: Float[AnyArray, "..."], b: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """``a * b`` with broadcasting, rounded to float32 before anything is added to it.

    XLA fuses a product and a following addition into one operation with one rounding where both are
    in one loop. A value close to its border would then get different codes under jit, in numpy and
    on another backend. The maximum with the lowest float32 between the two operations prevents the
    fusion. The gradient is that of the plain product.
    """
    return jnp.maximum(a * b, LOWEST)


@product.defjvp
def _product_jvp(
    primals: tuple[Float[AnyArray, "..."], Float[AnyArray, "..."]],
    tangents: tuple[Float[Array, "..."], Float[Array, "..."]],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    a, b = primals
    da, db = tangents
    return product(a, b), da * b + a * db


def to_units(
    x: Float[AnyArray, "*shape"], inv_step: Float[ArrayLike, "..."]
) -> Float[Array, "*shape"]:
    """``u = clip(x / s)`` in units of the step size, given ``inv_step = float32(1 / s)``.

    The clip also prevents the fusion that `product` describes.

    >>> to_units(jnp.float32(3.0), jnp.float32(2.0)).item()
    6.0
    """
    return clip(x.astype(jnp.float32) * inv_step, -MAX_UNITS, MAX_UNITS)


def quantize(
    u: Float[AnyArray, "*shape"],
    zero_point: Float[ArrayLike, "..."],
    bits: int,
    border: Float[ArrayLike, "..."] = NEAREST,
) -> Float[Array, "*shape"]:
    """Codes of `u`: ``q = clip(ceil(u - B) + z, 0, 2^bits - 1)`` (paper Sec. 2 and Algorithm 1).

    Args:
      u: values in units of the step size, any shape.
      zero_point: the integer code of zero, as a float.
      bits: static number of bits.
      border: rounding border, broadcastable against `u`.

    Returns:
      Codes as float32, so that the straight-through gradient can flow; same shape as `u`.

    >>> quantize(jnp.array([0.4, 0.5, 0.6, 9.0]), 0.0, bits=2)
    Array([0., 0., 1., 3.], dtype=float32)
    """
    return clip_codes(ste_ceil(u - border) + zero_point, bits)


def dequantize(
    codes: Float[AnyArray, "*shape"],
    step_size: Float[AnyArray, "..."],
    zero_point: Float[AnyArray, "..."],
) -> Float[Array, "*shape"]:
    """``s * (q - z)``, the real values that the codes stand for.

    Args:
      codes: q, as floats.
      step_size: s, broadcastable against `codes`.
      zero_point: z, broadcastable against `codes`.
    """
    return product(step_size, codes - zero_point)


def fake_quantize(
    x: Float[AnyArray, "*shape"],
    state: ActivationQuantizer,
    bits: int,
    border: Float[ArrayLike, "..."] = NEAREST,
) -> Float[Array, "*shape"]:
    """Quantize and dequantize an activation.

    The gradient is that of LSQ (Esser et al. 2019, Eq. 3): the step size gets ``q - z - u`` inside
    the range and ``q - z`` outside; `x` gets one inside and zero outside.

    Args:
      x: the activation, of any float dtype.
      state: its quantizer.
      bits: static number of bits.
      border: rounding border, broadcastable against `x`.

    Returns:
      float32, of the shape of `x`.
    """

    def run(
        x: Float[AnyArray, "*shape"],
        state: ActivationQuantizer,
        border: Float[ArrayLike, "..."],
        spread: Callable[..., Any],
    ) -> Float[Array, "*shape"]:
        u = to_units(x, spread(1.0 / state.step_size, x.shape))
        codes = quantize(u, state.zero_point, bits, border)
        return dequantize(codes, spread(state.step_size, x.shape), state.zero_point)

    return differentiated(run, x, state, border)


def scale_gradient(
    x: Float[Array, "*shape"], factor: Float[ArrayLike, ""]
) -> Float[Array, "*shape"]:
    """`x` unchanged, its gradient multiplied by `factor` (LSQ's gradient scale)."""
    return x * factor + jax.lax.stop_gradient(x - x * factor)


def lsq_gradient_scale(numel: int, bits: int) -> float:
    """LSQ's gradient scale ``1 / sqrt(numel * Qmax)`` for a tensor of `numel` elements a step."""
    return float(1.0 / (numel * max_code(bits)) ** 0.5)
