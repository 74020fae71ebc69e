"""Bytes of a network by the part that holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

from aquant_jax.terminal import table

PARTS = ("codes", "quantizers", "borders", "biases", "constants")


class Sizes(NamedTuple):
    """Bytes of a network.

    Attributes:
      floating: folded, in the dtypes of its variables, float32 where it is quantized.
      codes: packed weight codes, and the weights of float layers.
      quantizers: scales and zero points of weights and activations.
      borders: border coefficients.
      biases: float32.
      constants: other arrays that the network reads, such as embeddings.
    """

    floating: int
    codes: int
    quantizers: int
    borders: int
    biases: int
    constants: int

    @property
    def packed(self) -> int:
        """Bytes of the saved arrays, without container and program."""
        return self.codes + self.quantizers + self.borders + self.biases + self.constants

    def __str__(self) -> str:
        share = 100 * self.borders / (self.packed - self.borders)
        listed = ", ".join(f"{name} {getattr(self, name):,}" for name in PARTS)
        return (
            f"float {self.floating:,} bytes, packed {self.packed:,} "
            f"({self.floating / self.packed:.1f} times smaller): {listed}; "
            f"borders add {share:.2f}%"
        )

    def __rich__(self) -> Any:
        total = self.packed
        rows = [["float", f"{self.floating:,}", ""], ["packed", f"{total:,}", "100.0%"]]
        for name in PARTS:
            size = getattr(self, name)
            rows.append([f"  {name}", f"{size:,}", f"{100 * size / total:.1f}%"])
        title = f"{self.floating / total:.1f} times smaller"
        return table(title, {"part": "left", "bytes": "right", "of packed": "right"}, rows)
