"""AdaRound: learned rounding of weights (Nagel et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import clip_codes

ZETA, GAMMA = 1.1, -0.1


def soft_rounding(alpha: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """``h = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)`` (AdaRound Eq. 23)."""
    return jnp.clip(jax.nn.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def init_alpha(units: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """The alpha whose soft rounding is the fraction of `units`: the inverse of Eq. 23.

    Args:
      units: weights divided by their scale.
    """
    fraction = units - jnp.floor(units)
    return -jnp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)


def nearest_codes(
    units: Float[AnyArray, "*shape"], zero_point: Float[ArrayLike, "..."], bits: int
) -> Float[Array, "*shape"]:
    """Codes of weights rounded to nearest: ``clip(ceil(w / s - 0.5) + z, 0, 2^bits - 1)``.

    Args:
      units: ``w / s``, weights divided by their scale.
      zero_point: z, broadcastable against `units`.
      bits: 2 to 8.

    Returns:
      Codes as floats, like those of `soft_codes` and `hard_codes`.
    """
    return clip_codes(jnp.ceil(units - 0.5) + zero_point, bits)


def soft_codes(
    units: Float[AnyArray, "*shape"],
    alpha: Float[AnyArray, "*shape"],
    zero_point: Float[ArrayLike, "..."],
    bits: int,
) -> Float[Array, "*shape"]:
    """Differentiable codes: ``clip(floor(w / s) + h(alpha) + z, 0, 2^bits - 1)`` (Eq. 22).

    Args:
      units: ``w / s``, weights divided by their scale.
      alpha: the rounding variable of each weight.
      zero_point: z, broadcastable against `units`.
      bits: 2 to 8.
    """
    return clip_codes(jnp.floor(units) + soft_rounding(alpha) + zero_point, bits)


def hard_codes(
    units: Float[AnyArray, "*shape"],
    alpha: Float[AnyArray, "*shape"],
    zero_point: Float[ArrayLike, "..."],
    bits: int,
) -> Float[Array, "*shape"]:
    """The limit of `soft_codes`, with the same arguments: h is 1 where alpha > 0, otherwise 0."""
    up = (alpha > 0).astype(units.dtype)
    return clip_codes(jnp.floor(units) + up + zero_point, bits)


def regularizer(alpha: Float[AnyArray, "..."], beta: Float[ArrayLike, ""]) -> Float[Array, ""]:
    """``sum(1 - |2 h - 1|^beta)``, which drives every h to 0 or 1 as beta falls (Eq. 24)."""
    distance = jnp.abs(2.0 * soft_rounding(alpha) - 1.0)
    return jnp.sum(1.0 - distance**beta)


def beta_schedule(
    progress: Float[AnyArray, "*shape"], warmup: float, start: float, end: float
) -> Float[Array, "*shape"]:
    """Beta during reconstruction: constant, then linear.

    Args:
      progress: fraction of the steps that are done, in [0, 1].
      warmup: the progress up to which beta is `start`.
      start: the first value.
      end: the value at progress 1.
    """
    fraction = jnp.clip((progress - warmup) / (1.0 - warmup), 0.0, 1.0)
    return start + (end - start) * fraction
