"""A quantized layer in numpy, for inspection and plots."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class LayerSummary(NamedTuple):
    """One quantized layer, in numpy.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> samples = np.eye(4, dtype=np.float32)
    >>> network = aq.quantize(apply, {"kernel": samples}, samples, aq.recipes.nearest(8, 8))
    >>> layer = network.summary()[0]
    >>> layer.path, layer.kind, layer.shape, layer.weight_bits, layer.codes.dtype
    ('kernel', 'dense', (4, 4), 8, dtype('uint8'))

    Attributes:
      path: of its weight.
      kind: "conv" or "dense".
      shape: of the weight.
      weight_bits, act_bits: None where float.
      step_size, zero_point: of its input tensor, or None.
      weight_scale, weight_zero_point: per output channel, or None.
      border: coefficients ``(taps, channels)`` by name, or None for nearest rounding.
      border_function: its name, or None.
      phi: map from the polynomial to the border.
      border_granularity: see `Recipe`.
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
    border_function: str | None
    phi: str
    border_granularity: str
    codes: np.ndarray
