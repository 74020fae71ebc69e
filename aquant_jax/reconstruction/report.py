"""What is told about a quantized network: layers, blocks, propagated errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aquant_jax.reconstruction.activation_cache import Cache

CLUSTERS = 16


class LayerSummary(NamedTuple):
    """One quantized layer, in numpy.

    Attributes:
      path: path of its weight; kind: "conv" or "dense"; shape: of the weight.
      weight_bits, act_bits: None where float.
      step_size, zero_point: of its input tensor, or None.
      weight_scale, weight_zero_point: per output channel, or None.
      border: coefficients ``(taps, channels)`` by name, or None for nearest rounding.
      phi: map from the polynomial to the border; fused: averaged over a channel's taps.
      codes: uint8 weight codes (float weights of a float layer).
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    act_bits: int | None
    step_size: float | None
    zero_point: int | None
    weight_scale: np.ndarray | None
    weight_zero_point: np.ndarray | None
    border: dict[str, np.ndarray] | None
    phi: str
    fused: bool
    codes: np.ndarray


class BlockReport(NamedTuple):
    """How the reconstruction of one unit went.

    Attributes:
      index, name, layers: which unit.
      steps: optimisation steps taken.
      loss_curve: ``[k, 2]``: step, reconstruction loss (mean since the row before).
      start_error, final_error: loss of the unit on the calibration set, weights rounded, from the
        quantized prefix's activations: rounded to nearest, and as deployed.
      kept_start: reconstruction made it worse, so the nearest start was kept.
      seconds: wall clock.
      propagated: ``[16, 4]``: clusters of the unit's input by magnitude: mean ``|x'|``, mean and
        standard deviation of the propagated error ``x' - x``, count (Fig. 2); empty for the first.
    """

    index: int
    name: str
    layers: tuple[str, ...]
    steps: int
    loss_curve: np.ndarray
    start_error: float
    final_error: float
    kept_start: bool
    seconds: float
    propagated: np.ndarray


class History(tuple):
    """Reports of the blocks; equal to any other, since how a network was made is not part of what
    it computes (and must not make jit compile it again)."""

    def __eq__(self, other):
        return isinstance(other, History)

    def __hash__(self):
        return hash(History)


def propagated_error(quantized: Sequence[Cache], floating: Sequence[Cache]) -> np.ndarray:
    """``[16, 4]`` for `BlockReport`, from 256 samples of a unit's first input (Fig. 2)."""
    if not quantized:
        return np.zeros((0, 4), np.float32)
    noised, exact = (
        np.asarray(cache[0].take(np.arange(min(256, cache[0].values.shape[0])), np.float32)).ravel()
        for cache in (quantized, floating)
    )
    magnitude, error = np.abs(noised), noised - exact
    edges = np.linspace(0.0, magnitude.max(), CLUSTERS + 1)[1:-1]
    cluster = np.digitize(magnitude, edges)
    rows = []
    for c in range(CLUSTERS):
        inside = cluster == c
        if inside.any():
            part = error[inside]
            rows.append((magnitude[inside].mean(), part.mean(), part.std(), inside.sum()))
        else:
            rows.append((np.nan, np.nan, np.nan, 0))
    return np.array(rows, np.float32)
