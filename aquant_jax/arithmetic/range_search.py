"""Initial scales: the range search that minimises mean ``|x - x_q|^2.4`` (BRECQ's MSE observer).

The search tries a hundred shrunken ranges. Where the values have both signs, it also tries the zero
points: all of them up to 6 bits; from 7 bits, sixteen of them and then those around the best.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real, Shaped

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import ActivationQuantizer, max_code

RANGES = 100
POWER = 2.4
BINS = 4096
FULL_BITS = 6  # every zero point is tried up to this number of bits
COARSE_ZEROS = 16
NEAR_RANGES = 3
PLAIN_EXPONENT = 30  # of ranges that are searched as they are
LARGEST_EXPONENT = 126  # of a factor that is a normal float32, as its inverse is
SMALLEST = np.finfo(np.float32).tiny  # scale: XLA reads smaller numbers as zero
CHUNK = 100  # candidates a call: those of every round and every sign run in one program

Place = Callable[[np.ndarray], Array]

# Score, fraction of the range and zero point of each row.
_Scored = tuple[Float[Array, "rows"], Float[Array, "rows"], Float[Array, "rows"]]


class WeightRange(NamedTuple):
    """The quantizers of a weight's output channels.

    Attributes:
      scale: positive, float32.
      zero_point: float32, holding an integer code.
    """

    scale: Float[Array, "channels"]
    zero_point: Float[Array, "channels"]


def _candidates(
    low: Float[np.ndarray, "rows"],
    high: Float[np.ndarray, "rows"],
    bits: int,
    full_bits: int = FULL_BITS,
) -> list[Float[np.ndarray, "_ 2"]]:
    """Pairs (fraction of the range, zero point) to try in each round, relative to the last best.

    One-sided values fix the zero point. Above `full_bits`, the first round tries sixteen evenly
    spaced zero points and the second round tries those around the best.
    """
    top = int(max_code(bits))
    fractions = np.arange(1, RANGES + 1) / RANGES
    if np.all(low >= 0.0):
        return [_pairs(fractions, np.zeros(1))]
    if np.all(high <= 0.0):
        return [_pairs(fractions, np.full(1, top))]
    if bits <= full_bits:
        return [_pairs(fractions, np.arange(top + 1))]
    stride = (top + 1) // COARSE_ZEROS
    near = np.arange(-NEAR_RANGES, NEAR_RANGES + 1) / RANGES
    coarse = np.arange(stride // 2, top + 1, stride)
    return [_pairs(fractions, coarse), _pairs(near, np.arange(-stride, stride + 1))]


def _pairs(
    fractions: Float[np.ndarray, "m"], zeros: Real[np.ndarray, "n"]
) -> Float[np.ndarray, "m*n 2"]:
    """Every pair (fraction, zero point), float32."""
    pairs = np.stack(np.meshgrid(fractions, zeros, indexing="ij"), -1).reshape(-1, 2)
    return pairs.astype(np.float32)


def _search(
    values: Float[np.ndarray, "rows n"],
    mass: Float[ArrayLike, "#rows #n"],
    span: Float[np.ndarray, "rows"],
    rounds: list[Float[np.ndarray, "_ 2"]],
    bits: int,
    place: Place = jnp.asarray,
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """Best scale and zero point of each row.

    Args:
      values: the values to quantize.
      mass: weight of each value in the mean.
      span: range of each row.
      rounds: see `_candidates`.
      bits: 2 to 8.
      place: see `search_weight_range`.
    """
    lift = _lift(span)
    operands = place(values * lift[:, None]), mass, place(span * lift)
    none, ones, worst = (place(np.full(len(values), x, np.float32)) for x in (0, 1, np.inf))
    fraction, zero = none, none
    with jax.disable_jit(False):  # op by op, thousands of candidates take minutes
        for offsets in rounds:
            centre, best = (fraction, zero), (worst, ones, none)
            for start in range(0, len(offsets), CHUNK):
                best = _around(operands, centre, best, _chunk(offsets, start), bits)
            _, fraction, zero = best
        return _scale(place(span), fraction, np.float32(max_code(bits))), zero


@jax.jit
def _scale(
    span: Float[Array, "rows"], fraction: Float[Array, "rows"], top: Float[ArrayLike, ""]
) -> Float[Array, "rows"]:
    return jnp.maximum(span * fraction / top, SMALLEST)


def _lift(span: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    """A power of two for each range, so that its errors to the power of 2.4 are float32 numbers."""
    exponent = np.clip(np.floor(np.log2(span)), -LARGEST_EXPONENT, LARGEST_EXPONENT)
    return np.where(np.abs(exponent) < PLAIN_EXPONENT, 1.0, np.exp2(-exponent)).astype(np.float32)


def _chunk(offsets: Float[np.ndarray, "m 2"], start: int) -> Float[np.ndarray, "_ 2"]:
    """`CHUNK` of the offsets; the last one fills up the last chunk, and a repeat never wins."""
    return offsets[np.minimum(np.arange(start, start + CHUNK), len(offsets) - 1)]


@functools.partial(jax.jit, static_argnames="bits")
def _around(
    operands: tuple[Float[Array, "rows n"], Float[Array, "#rows #n"], Float[Array, "rows"]],
    centre: tuple[Float[Array, "rows"], Float[Array, "rows"]],
    best: _Scored,
    offsets: Float[Array, "candidates 2"],
    bits: int,
) -> _Scored:
    """The `best` of each row so far, or what is better at `offsets` from its `centre`.

    Args:
      operands: values, mass and span, see `_search`.
      centre: fraction and zero point.
      best: score, fraction and zero point.
      offsets: see `_candidates`.
      bits: 2 to 8.
    """
    values, mass, span = operands

    def cost(fraction: Float[Array, "rows"], zero: Float[Array, "rows"]) -> Float[Array, "rows"]:
        scale = (span * fraction / max_code(bits))[:, None]
        zero = zero[:, None]
        codes = jnp.clip(jnp.ceil(values / scale - 0.5) + zero, 0.0, max_code(bits))
        error = jnp.abs(values - scale * (codes - zero))
        power = jnp.exp2(POWER * jnp.log2(jnp.maximum(error, 1e-30)))
        return jnp.sum(power * mass, axis=1)

    def body(best: _Scored, offset: Float[AnyArray, "2"]) -> tuple[_Scored, None]:
        score, fraction, zero = best
        f = jnp.clip(centre[0] + offset[0], np.float32(1 / RANGES), 1.0)
        z = jnp.clip(centre[1] + offset[1], 0.0, max_code(bits))
        new_score = cost(f, z)
        better = new_score < score
        score = jnp.where(better, new_score, score)
        return (score, jnp.where(better, f, fraction), jnp.where(better, z, zero)), None

    return jax.lax.scan(body, best, offsets)[0]


def search_weight_range(
    weight: Float[np.ndarray, "channels elements"],
    bits: int,
    place: Place = jnp.asarray,
    full_bits: int = FULL_BITS,
) -> WeightRange:
    """Scale and zero point of every output channel.

    Args:
      weight: float32, one row per output channel.
      bits: 2 to 8.
      place: puts an array on devices. It may split the rows and repeat them to fill up; the results
        have as many, on the same devices.
      full_bits: every zero point is tried up to this number of bits.
    """
    low = np.minimum(weight.min(axis=1), 0.0)
    high = np.maximum(weight.max(axis=1), 0.0)
    span = np.where(high > low, high - low, 1.0).astype(np.float32)
    rounds = _candidates(low, high, bits, full_bits)
    scale, zero = _search(weight, np.ones((1, 1), np.float32), span, rounds, bits, place)
    return WeightRange(scale, zero)


class Histogram(NamedTuple):
    """The values of an activation tensor in 4,096 bins of equal width.

    Attributes:
      low, high: the ends of the bins; zero is between them.
      bins: float64, the number of values in each bin and their sum.
    """

    low: float
    high: float
    bins: Float[np.ndarray, "2 bins"]

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether there are values below zero, and above; histograms with the same sides have the
        same candidates."""
        return self.low < 0.0, self.high > 0.0


def make_histogram(values: Float[np.ndarray, "n"], ends: tuple[float, float]) -> Histogram:
    """The histogram of float32 values between these ends."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if high == low:
        return Histogram(low, high, np.zeros((2, BINS)))
    lift = float(_lift(np.array([high - low]))[0])
    lifted = (values - low) * np.float32(lift)
    index = np.minimum((lifted * (BINS / ((high - low) * lift))).astype(np.int32), BINS - 1)
    bins = [np.bincount(index, weights, BINS) for weights in (None, values)]
    return Histogram(low, high, np.array(bins, np.float64))


def search_histograms(
    histograms: Sequence[Histogram], bits: int, place: Place = jnp.asarray
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """Step size and zero point of every tensor.

    Args:
      histograms: of the tensors, with the same sides, at least one.
      bits: 2 to 8.
      place: see `search_weight_range`.
    """
    low, high, bins = (np.array(part) for part in zip(*histograms, strict=True))
    count, total = bins[:, 0], bins[:, 1]
    centres = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    mass = (count / count.sum(axis=1, keepdims=True)).astype(np.float32)
    rounds = _candidates(low, high, bits)
    span = (high - low).astype(np.float32)
    return _search(centres.astype(np.float32), place(mass), span, rounds, bits, place)


def search_activation_range(
    values: Shaped[ArrayLike, "..."], bits: int, ends: tuple[float, float] | None = None
) -> ActivationQuantizer:
    """Step size and zero point of an activation tensor.

    The search runs over a histogram of 4,096 bins, each represented by the mean of its values, so
    its cost does not grow with the number of samples.

    Args:
      values: calibration values, finite.
      bits: 2 to 8.
      ends: the lowest and the highest value, where `values` are a sample; None takes theirs.

    Returns:
      The quantizer; step size 1 and zero point 0 where every value is zero.
    """
    flat = np.asarray(values, np.float32).ravel()
    histogram = make_histogram(flat, ends or (float(flat.min()), float(flat.max())))
    if not any(histogram.sides):
        return ActivationQuantizer(jnp.float32(1.0), jnp.float32(0.0))
    scale, zero = search_histograms([histogram], bits)
    return ActivationQuantizer(scale[0], zero[0])
