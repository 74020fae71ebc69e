"""AdaRound: learned rounding of weights (Nagel et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.uniform import clip_codes

ZETA, GAMMA = 1.1, -0.1


def soft_rounding(alpha: jax.Array) -> jax.Array:
    """``h = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)`` (AdaRound Eq. 23)."""
    return jnp.clip(jax.nn.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def init_alpha(units: jax.Array) -> jax.Array:
    """The alpha whose soft rounding is the fraction of `units` (weights over their scale)."""
    fraction = units - jnp.floor(units)
    return -jnp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)


def nearest_codes(units: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """Codes of weights rounded to nearest, float32 in ``[0, 2^bits - 1]``."""
    return clip_codes(jnp.ceil(units - 0.5) + zero_point, bits)


def soft_codes(units: jax.Array, alpha: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """Differentiable codes: ``clip(floor(w / s) + h(alpha) + z, 0, 2^bits - 1)`` (Eq. 22)."""
    return clip_codes(jnp.floor(units) + soft_rounding(alpha) + zero_point, bits)


def hard_codes(units: jax.Array, alpha: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """What `soft_codes` converges to: h is one where alpha is above zero, else zero."""
    up = (alpha > 0).astype(units.dtype)
    return clip_codes(jnp.floor(units) + up + zero_point, bits)


def regularizer(alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """``sum(1 - |2 h - 1|^beta)``, which drives every h to 0 or 1 as beta falls (Eq. 24)."""
    distance = jnp.abs(2.0 * soft_rounding(alpha) - 1.0)
    return jnp.sum(1.0 - distance**beta)


def beta_schedule(progress: jax.Array, warmup: float, start: float, end: float) -> jax.Array:
    """Beta at `progress` in [0, 1] of the run: `start` until `warmup`, then linear to `end`."""
    fraction = jnp.clip((progress - warmup) / (1.0 - warmup), 0.0, 1.0)
    return start + (end - start) * fraction
