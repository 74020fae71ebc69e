"""A quantized layer in numpy, for inspection and plots."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aquant_jax.terminal import table

COLUMNS = ("layer", "kind", "weights", "bits", "step size", "zero point", "border")


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

    @property
    def cells(self) -> list[str]:
        """The texts under `COLUMNS`; 16 bits stand for float, as in the names of variants."""
        exact = self.weight_bits is self.act_bits is None
        bits = "float" if exact else f"w{self.weight_bits or 16}a{self.act_bits or 16}"
        step = "" if self.step_size is None else f"{self.step_size:.4g}"
        zero = "" if self.zero_point is None else str(self.zero_point)
        border = f"{self.border_function} {self.border_granularity}" if self.border else ""
        return [self.path, self.kind, "x".join(map(str, self.shape)), bits, step, zero, border]

    def __repr__(self) -> str:
        return f"LayerSummary({' '.join(filter(None, self.cells))})"


class Summary(list[LayerSummary]):
    """The layers of a network: a list that prints a line a layer, and in rich a table."""

    def __repr__(self) -> str:
        rows = [COLUMNS, *(layer.cells for layer in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __rich__(self) -> Any:
        right = ("step size", "zero point")
        columns = {name: "right" if name in right else "left" for name in COLUMNS}
        return table(f"{len(self)} layers", columns, [layer.cells for layer in self])
