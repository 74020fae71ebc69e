"""Reports of the reconstruction of blocks, and the propagated error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from aquant_jax.reconstruction.activation_cache import Cache, take_now
from aquant_jax.reconstruction.devices import read

CLUSTERS = 16
SAMPLES = 256  # of the propagated error, as long as they have no more values than
MOST_VALUES = 2**20


class BlockReport(NamedTuple):
    """How the reconstruction of one block went.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> samples = np.eye(4, dtype=np.float32)
    >>> network = aq.quantize(apply, {"kernel": samples}, samples, aq.recipes.nearest(8, 8))
    >>> [(report.name, report.steps) for report in network.reports]
    [('kernel', 0)]

    Attributes:
      index, name, layers: of the block.
      steps: optimisation steps taken.
      loss_curve: ``[k, 2]``: step, reconstruction loss (mean since the row before).
      start_error, final_error: loss of the block on the calibration set, weights rounded, from the
        quantized prefix's activations: rounded to nearest, and as deployed.
      fell_back_to_nearest: reconstruction did not reduce the error, so nearest rounding is used.
      seconds: wall clock.
      propagated: ``[16, 4]``: clusters of the block's input by magnitude: mean ``|x'|``, mean and
        standard deviation of the propagated error ``x' - x``, count (Fig. 2); empty for the first.
      candidates: for ``border="auto"``: border, number of coefficients and error on the samples
        held out, in the order in which they were tried, the reference first.
      devices: that it ran on.
    """

    index: int
    name: str
    layers: tuple[str, ...]
    steps: int
    loss_curve: np.ndarray
    start_error: float
    final_error: float
    fell_back_to_nearest: bool
    seconds: float
    propagated: np.ndarray
    candidates: tuple[tuple[str, int, float], ...] = ()
    devices: int = 1

    @property
    def warning(self) -> str | None:
        """What a user should know about it."""
        fell_back = "reconstruction did not reduce the error; using nearest rounding"
        return fell_back if self.fell_back_to_nearest else None


class FinetuneReport(NamedTuple):
    """How the whole-network stage went.

    It is the last of ``network.reports`` where the recipe has such a stage, as `aquant_plus` does.

    >>> import aquant_jax as aq
    >>> aq.recipes.aquant_plus(steps=400).reconstruction.whole_network_steps
    400

    Attributes:
      index: number of blocks before it.
      name, layers: of the network.
      steps: optimisation steps taken.
      loss_curve: ``[k, 2]``: step, loss (mean since the row before).
      held_out_curve: ``[k, 2]``: step, loss of the deployed network on the samples held out.
      start_error, final_error: that loss before the stage, and as deployed.
      best_step: the step that is deployed; 0 keeps the start, which no step improved on.
      seconds: wall clock.
      devices: that it ran on.
    """

    index: int
    name: str
    layers: tuple[str, ...]
    steps: int
    loss_curve: np.ndarray
    held_out_curve: np.ndarray
    start_error: float
    final_error: float
    best_step: int
    seconds: float
    devices: int = 1

    @property
    def warning(self) -> str | None:
        """What a user should know about it."""
        kept = "no step reduced the error on the samples held out; keeping the start"
        return None if self.best_step else kept


Report = BlockReport | FinetuneReport


class History(tuple):
    """Reports of the blocks. All histories compare equal: how a network was made does not change
    what it computes, and must not make jit compile it again."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History)

    def __hash__(self) -> int:
        return hash(History)


def propagated_error(
    quantized: Sequence[Cache], floating: Sequence[Cache], samples: int
) -> np.ndarray:
    """``[16, 4]`` for `BlockReport`, from some of the `samples` of a block's first input (Fig. 2).

    The real and the imaginary part of a complex value count as two values. Infinities do not count.
    """
    if not quantized:
        return np.zeros((0, 4), np.float32)
    dtype = np.complex64 if jnp.iscomplexobj(floating[0].values) else np.float32
    shape = floating[0].values.shape[1:]
    rows = np.arange(min(SAMPLES, samples, max(1, MOST_VALUES // math.prod(shape))))
    noised, exact = (
        np.asarray(read(take_now(caches[0], rows, dtype))).ravel().view(np.float32)
        for caches in (quantized, floating)
    )
    finite = np.isfinite(noised) & np.isfinite(exact)
    noised, exact = noised[finite], exact[finite]
    magnitude, error = np.abs(noised), noised - exact
    edges = np.linspace(0.0, magnitude.max(initial=0.0), CLUSTERS + 1)[1:-1]
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
