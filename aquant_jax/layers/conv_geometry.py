"""The geometry of a convolution, and its taps as runs of rows of the flattened input."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from aquant_jax.arithmetic.array_types import AnyArray


class ConvGeometry(NamedTuple):
    """Geometry of a convolution over an input ``[N, *spatial, C]`` (static, hashable).

    A tap is read as a run of consecutive rows of the flattened padded input, one row per pixel, not
    as a slice of the image. Pixels whose window would leave the image are computed too, and cropped
    from the result. With strides, every phase of the image is such a list of rows. XLA vectorises
    over contiguous rows; slices of images take three times as long.

    Attributes:
      spatial: spatial sizes of the input, before padding.
      kernel, strides, dilation: of the window, per spatial axis.
      padding: (low, high) per spatial axis.
      groups: number of channel groups.
    """

    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int = 1

    @classmethod
    def pointwise(cls, pixels: int) -> ConvGeometry:
        """A 1x1 convolution over `pixels` pixels, the form in which dense layers run."""
        return cls((pixels, 1), (1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))

    def without_padding(self) -> ConvGeometry:
        """The same convolution over an input that is padded already."""
        return self._replace(spatial=self.padded, padding=((0, 0),) * len(self.kernel))

    @property
    def padded(self) -> tuple[int, ...]:
        """Spatial sizes of the padded input."""
        pairs = zip(self.spatial, self.padding, strict=True)
        return tuple(size + low + high for size, (low, high) in pairs)

    @property
    def span(self) -> tuple[int, ...]:
        """Extent of the dilated kernel."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def out(self) -> tuple[int, ...]:
        """Spatial sizes of the result."""
        sizes = zip(self.padded, self.span, self.strides, strict=True)
        return tuple((size - span) // stride + 1 for size, span, stride in sizes)

    @property
    def taps(self) -> int:
        """Number of taps."""
        return int(np.prod(self.kernel))

    @property
    def gathers(self) -> bool:
        """Whether a column holds more than the channels of one pixel: other taps, or padding."""
        return self.taps > 1 or any(map(any, self.padding))

    @property
    def phase(self) -> tuple[int, ...]:
        """Spatial sizes of one phase of the padded input."""
        return tuple(-(-size // s) for size, s in zip(self.padded, self.strides, strict=True))

    def flatten(self, x: Shaped[AnyArray, "N *padded C"]) -> list[Shaped[Array, "rows C"]]:
        """The rows of every phase of a padded input (space to depth): ``[N * phase, C]`` each."""
        rank = len(self.kernel)
        pairs = list(zip(self.phase, self.strides, strict=True))
        extra = [p * s - size for (p, s), size in zip(pairs, self.padded, strict=True)]
        x = jnp.pad(x, ((0, 0), *((0, e) for e in extra), (0, 0)))
        x = x.reshape(x.shape[0], *(size for pair in pairs for size in pair), x.shape[-1])
        x = x.transpose(*range(2, 2 * rank + 1, 2), 0, *range(1, 2 * rank, 2), 2 * rank + 1)
        return list(x.reshape(int(np.prod(self.strides)), -1, x.shape[-1]))

    def tap_rows(self, phases: list[Shaped[Array, "rows C"]]) -> list[Shaped[Array, "tap_rows C"]]:
        """The rows that each tap reads, in row-major tap order.

        Args:
          phases: the rows of the phases, see `flatten`.
        """
        offsets = [self._phase_and_offset(tap) for tap in np.ndindex(*self.kernel)]
        rows = phases[0].shape[0] - max(offset for _, offset in offsets)
        return [phases[phase][offset : offset + rows] for phase, offset in offsets]

    def crop(self, y: Shaped[Array, "rows O"], images: Any) -> Shaped[Array, "N *out O"]:
        """The rows of a result as images.

        Args:
          y: one row per row of a tap, see `tap_rows`.
          images: N, a symbolic dimension while `jax.export` traces.
        """
        missing = images * int(np.prod(self.phase)) - y.shape[0]
        y = jnp.pad(y, ((0, missing), (0, 0))).reshape(images, *self.phase, y.shape[-1])
        return y[(slice(None), *(slice(size) for size in self.out))]

    def _phase_and_offset(self, tap: tuple[int, ...]) -> tuple[int, int]:
        """Phase and row offset of a tap."""
        phase = offset = 0
        sizes = zip(tap, self.phase, self.strides, self.dilation, strict=True)
        for at, size, stride, dilation in sizes:
            phase = phase * stride + at * dilation % stride
            offset = offset * size + at * dilation // stride
        return phase, offset
