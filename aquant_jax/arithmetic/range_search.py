"""Initial scales: the range search that minimises mean ``|x - x_q|^2.4`` (BRECQ's MSE observer).

A hundred shrunken ranges are tried and, where the values have both signs, every zero point (from 7
bits on those around the best of sixteen).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import TensorState, max_code

RANGES = 100
POWER = 2.4
BINS = 4096
FULL_BITS = 6  # up to which every zero point is tried
COARSE_ZEROS = 16
NEAR_RANGES = 3


class WeightGrid(NamedTuple):
    """Per-channel grid: `scale` and `zero_point`, float32 ``[channels]``."""

    scale: jax.Array
    zero_point: jax.Array


def _candidates(low: np.ndarray, high: np.ndarray, bits: int) -> list[np.ndarray]:
    """Fractions of the range, and zero points, to try; one-sided values fix the zero point.

    From 7 bits on the first round tries every second, fourth or sixteenth... zero point, sixteen in
    all, and the second what lies around the best of them.
    """
    top = int(max_code(bits))
    fractions = np.arange(1, RANGES + 1) / RANGES
    if np.all(low >= 0.0):
        return [_pairs(fractions, np.zeros(1))]
    if np.all(high <= 0.0):
        return [_pairs(fractions, np.full(1, top))]
    if bits <= FULL_BITS:
        return [_pairs(fractions, np.arange(top + 1))]
    stride = (top + 1) // COARSE_ZEROS
    near = np.arange(-NEAR_RANGES, NEAR_RANGES + 1) / RANGES
    coarse = np.arange(stride // 2, top + 1, stride)
    return [_pairs(fractions, coarse), _pairs(near, np.arange(-stride, stride + 1))]


def _pairs(fractions: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    grid = np.stack(np.meshgrid(fractions, zeros, indexing="ij"), -1).reshape(-1, 2)
    return grid.astype(np.float32)


def _search(values, mass, span, rounds: list[np.ndarray], bits: int):
    """Best (scale, zero point) for each row of `values` [rows, n], weighted by `mass`."""
    best = jnp.zeros((2, values.shape[0]), jnp.float32)
    for offsets in rounds:
        best = _around(values, mass, span, best, offsets, bits)
    return jnp.asarray(span) * best[0] / np.float32(max_code(bits)), best[1]


@functools.partial(jax.jit, static_argnames="bits")
def _around(values, mass, span, centre, offsets, bits):
    """The best fraction and zero point of each row ``[2, rows]``, at `offsets` from its centre."""

    def cost(fraction, zero):
        scale = (span * fraction / max_code(bits))[:, None]
        zero = zero[:, None]
        codes = jnp.clip(jnp.ceil(values / scale - 0.5) + zero, 0.0, max_code(bits))
        error = jnp.abs(values - scale * (codes - zero))
        power = jnp.exp2(POWER * jnp.log2(jnp.maximum(error, 1e-30)))
        return jnp.sum(power * mass, axis=1)

    def body(best, offset):
        score, fraction, zero = best
        f = jnp.clip(centre[0] + offset[0], np.float32(1 / RANGES), 1.0)
        z = jnp.clip(centre[1] + offset[1], 0.0, max_code(bits))
        found = cost(f, z)
        better = found < score
        pairs = ((found, score), (f, fraction), (z, zero))
        return tuple(jnp.where(better, new, old) for new, old in pairs), None

    rows = values.shape[0]
    start = (jnp.full(rows, jnp.inf), jnp.ones(rows), jnp.zeros(rows))
    (_, fraction, zero), _ = jax.lax.scan(body, start, offsets)
    return jnp.stack([fraction, zero])


def weight_grid(weight: np.ndarray, bits: int) -> WeightGrid:
    """Scale and zero point of every output channel.

    Args:
      weight: float32 ``[channels, elements]``.
      bits: 2 to 8.
    """
    low = np.minimum(weight.min(axis=1), 0.0)
    high = np.maximum(weight.max(axis=1), 0.0)
    span = np.where(high > low, high - low, 1.0).astype(np.float32)
    rounds = _candidates(low, high, bits)
    scale, zero = _search(weight, np.ones((1, 1), np.float32), span, rounds, bits)
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
    rounds = _candidates(np.array([low]), np.array([high]), bits)
    span = np.array([high - low], np.float32)
    scale, zero = _search(centres[None], mass[None], span, rounds, bits)
    return TensorState(scale[0], zero[0])
