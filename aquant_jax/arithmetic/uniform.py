"""The arithmetic of uniform quantization: straight-through rounding, grids, quantize, dequantize.

Everything is float32 and pure. "Nearest" means ``ceil(u - 0.5)`` everywhere in this library, so
that a constant border of 0.5 and rounding to nearest agree on ties too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

NEAREST = 0.5
# Above 2^23 every float32 is an integer.
MAX_UNITS = float(2**23)
LOWEST = float(np.finfo(np.float32).min)
MIN_BITS, MAX_BITS = 2, 8


class TensorState(NamedTuple):
    """Grid of one quantized activation tensor (a pytree).

    Attributes:
      step_size: positive float32 scalar, in units of the tensor.
      zero_point: float32 scalar holding an integer code in ``[0, 2^bits - 1]``.
    """

    step_size: jax.Array
    zero_point: jax.Array


def max_code(bits: int) -> float:
    """Largest unsigned code, ``2^bits - 1``."""
    return float(2**bits - 1)


@jax.custom_jvp
def ste_ceil(x: jax.Array) -> jax.Array:
    """``ceil`` whose gradient is the identity (straight-through estimator, Bengio et al. 2013)."""
    return jnp.ceil(x)


@ste_ceil.defjvp
def _ste_ceil_jvp(primals, tangents):
    return ste_ceil(*primals), tangents[0]


def clip_codes(raw: jax.Array, bits: int) -> jax.Array:
    """Clip to ``[0, 2^bits - 1]``, as `clip` does."""
    return clip(raw, 0.0, max_code(bits))


def clip(values: jax.Array, low: float, high: float) -> jax.Array:
    """Clip to ``[low, high]``; the gradient passes inside the range, its ends included.

    Codes sit on the ends all the time, where the derivative of `jnp.clip` is one half.
    """
    return jnp.where(values < low, low, jnp.where(values > high, high, values))


@jax.custom_jvp
def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a * b``, rounded before anything is added to it.

    XLA contracts a product and the addition that follows it to one fused operation where it sees
    both in one loop. A value within rounding of its border would then get another code under jit
    than in numpy, or by another backend. A maximum between the two, here with the lowest float32,
    keeps it from doing so; the gradient is the plain product's.
    """
    return jnp.maximum(a * b, LOWEST)


@product.defjvp
def _product_jvp(primals, tangents):
    a, b = primals
    da, db = tangents
    return product(a, b), da * b + a * db


def to_units(x: jax.Array, inv_step: ArrayLike) -> jax.Array:
    """``u = clip(x / s)`` in units of the step size, given ``inv_step = float32(1 / s)``.

    The clip also keeps the product from being contracted, see `product`.

    >>> to_units(jnp.float32(3.0), jnp.float32(2.0)).item()
    6.0
    """
    return jnp.clip(x.astype(jnp.float32) * inv_step, -MAX_UNITS, MAX_UNITS)


def quantize(
    u: jax.Array, zero_point: ArrayLike, bits: int, border: ArrayLike = NEAREST
) -> jax.Array:
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


def dequantize(codes: jax.Array, step_size: jax.Array, zero_point: jax.Array) -> jax.Array:
    """``s * (q - z)``, the real values that the codes stand for."""
    return product(step_size, codes - zero_point)


def fake_quantize(
    x: jax.Array, state: TensorState, bits: int, border: ArrayLike = NEAREST
) -> jax.Array:
    """Quantize and dequantize `x` (any float dtype, any shape); float32 out.

    Its autodiff is LSQ's: the step size gets ``q - z - u`` inside the range and ``q - z`` outside
    (Esser et al. 2019, Eq. 3), `x` gets one inside and zero outside.
    """
    codes = quantize(to_units(x, 1.0 / state.step_size), state.zero_point, bits, border)
    return dequantize(codes, state.step_size, state.zero_point)


def scale_gradient(x: jax.Array, factor: ArrayLike) -> jax.Array:
    """`x` unchanged, its gradient multiplied by `factor` (LSQ's gradient scale)."""
    return x * factor + jax.lax.stop_gradient(x - x * factor)


def lsq_gradient_scale(numel: int, bits: int) -> float:
    """``1 / sqrt(numel * Qmax)``: LSQ's gradient scale for a tensor of `numel` elements a step."""
    return float(1.0 / (numel * max_code(bits)) ** 0.5)
