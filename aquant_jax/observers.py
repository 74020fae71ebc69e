"""Initial scales: the range search that minimises mean ``|x - x_q|^2.4`` (BRECQ's MSE observer).

A hundred shrunken ranges are tried and, where the values have both signs, every zero point.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.numerics import TensorState, max_code

RANGES = 100
POWER = 2.4
BINS = 4096


class WeightGrid(NamedTuple):
    """Per-channel grid: `scale` and `zero_point`, float32 ``[channels]``."""

    scale: jax.Array
    zero_point: jax.Array


def _candidates(low: np.ndarray, high: np.ndarray, bits: int):
    """Fractions of the range, and zero points, to try; one-sided values fix the zero point."""
    top = max_code(bits)
    if np.all(low >= 0.0):
        zeros = np.zeros(1)
    elif np.all(high <= 0.0):
        zeros = np.full(1, top)
    else:
        zeros = np.arange(top + 1)
    fractions = np.arange(1, RANGES + 1) / RANGES
    grid = np.stack(np.meshgrid(fractions, zeros, indexing="ij"), -1).reshape(-1, 2)
    return grid.astype(np.float32)


@functools.partial(jax.jit, static_argnames="bits")
def _search(values, mass, span, candidates, bits):
    """Best (scale, zero point) for each row of `values` [rows, n], weighted by `mass`."""

    def cost(fraction, zero):
        scale = span * fraction / max_code(bits)
        codes = jnp.clip(jnp.ceil(values / scale[:, None] - 0.5) + zero, 0.0, max_code(bits))
        error = jnp.abs(values - scale[:, None] * (codes - zero))
        power = jnp.exp2(POWER * jnp.log2(jnp.maximum(error, 1e-30)))
        return jnp.sum(power * mass, axis=1), scale

    def body(best, candidate):
        score, scale = cost(candidate[0], candidate[1])
        better = score < best[0]
        return (
            jnp.where(better, score, best[0]),
            jnp.where(better, scale, best[1]),
            jnp.where(better, candidate[1], best[2]),
        ), None

    rows = values.shape[0]
    start = (jnp.full(rows, jnp.inf), jnp.ones(rows), jnp.zeros(rows))
    (_, scale, zero), _ = jax.lax.scan(body, start, candidates)
    return scale, zero


def weight_grid(weight: np.ndarray, bits: int) -> WeightGrid:
    """Scale and zero point of every output channel.

    Args:
      weight: float32 ``[channels, elements]``.
      bits: 2 to 8.
    """
    low = np.minimum(weight.min(axis=1), 0.0)
    high = np.maximum(weight.max(axis=1), 0.0)
    span = np.where(high > low, high - low, 1.0).astype(np.float32)
    candidates = _candidates(low, high, bits)
    scale, zero = _search(weight, np.ones((1, 1), np.float32), span, candidates, bits)
    return WeightGrid(scale, zero)


def tensor_state(values: np.ndarray, bits: int) -> TensorState:
    """Step size and zero point of an activation tensor.

    The search runs over a histogram of 4,096 bins (each stands for the mean of its values), so its
    cost does not grow with the number of samples.

    Args:
      values: any float array of calibration values.
      bits: 2 to 8.
    """
    flat = np.asarray(values, np.float32).ravel()
    low, high = min(float(flat.min()), 0.0), max(float(flat.max()), 0.0)
    if high == low:
        return TensorState(jnp.float32(1.0), jnp.float32(0.0))
    index = np.minimum(((flat - low) * (BINS / (high - low))).astype(np.int32), BINS - 1)
    count = np.bincount(index, minlength=BINS)
    total = np.bincount(index, weights=flat, minlength=BINS)
    used = count > 0
    centres = np.zeros(BINS, np.float32)
    centres[used] = total[used] / count[used]
    mass = (count / flat.size).astype(np.float32)
    candidates = _candidates(np.array([low]), np.array([high]), bits)
    span = np.array([high - low], np.float32)
    scale, zero = _search(centres[None], mass[None], span, candidates, bits)
    return TensorState(scale[0], zero[0])
