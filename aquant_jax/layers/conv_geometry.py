"""The taps of a convolution's window over its input."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Window(NamedTuple):
    """Geometry of the taps over a padded input ``[N, *spatial, C]`` (static).

    A tap is read as a run of consecutive rows of the flattened input, one row per pixel, instead of
    as a slice of its image: pixels whose window would leave the image are computed too, and cropped
    from the result. With strides, every phase of the image is such a list of rows. Contiguous rows
    are what XLA vectorises; sliced images cost three times as much.

    Attributes:
      images, spatial: leading and spatial sizes of the padded input.
      kernel, strides, dilation: of the window, per spatial axis.
    """

    images: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def out(self) -> tuple[int, ...]:
        """Spatial sizes of the result."""
        sizes = zip(self.spatial, self.kernel, self.strides, self.dilation, strict=True)
        return tuple((size - (k - 1) * d - 1) // s + 1 for size, k, s, d in sizes)

    @property
    def grid(self) -> tuple[int, ...]:
        """Spatial sizes of one phase."""
        return tuple(-(-size // s) for size, s in zip(self.spatial, self.strides, strict=True))

    def flatten(self, x: jax.Array) -> list[jax.Array]:
        """The rows ``[N * grid, C]`` of every phase: space to depth by the strides."""
        rank = len(self.grid)
        pairs = list(zip(self.grid, self.strides, strict=True))
        extra = [g * s - size for (g, s), size in zip(pairs, self.spatial, strict=True)]
        x = jnp.pad(x, ((0, 0), *((0, e) for e in extra), (0, 0)))
        x = x.reshape(self.images, *(size for pair in pairs for size in pair), x.shape[-1])
        x = x.transpose(*range(2, 2 * rank + 1, 2), 0, *range(1, 2 * rank, 2), 2 * rank + 1)
        return list(x.reshape(int(np.prod(self.strides)), -1, x.shape[-1]))

    def taps(self, phases: list[jax.Array]) -> list[jax.Array]:
        """One array ``[rows, C]`` per tap, in row-major tap order, from the rows of the phases."""
        places = [self._place(tap) for tap in np.ndindex(*self.kernel)]
        rows = phases[0].shape[0] - max(offset for _, offset in places)
        return [phases[phase][offset : offset + rows] for phase, offset in places]

    def crop(self, y: jax.Array) -> jax.Array:
        """The rows ``[rows, O]`` of a result as images ``[N, *out, O]``."""
        missing = self.images * int(np.prod(self.grid)) - y.shape[0]
        y = jnp.pad(y, ((0, missing), (0, 0))).reshape(self.images, *self.grid, y.shape[-1])
        return y[(slice(None), *(slice(size) for size in self.out))]

    def _place(self, tap) -> tuple[int, int]:
        """Phase and row offset of a tap."""
        phase = offset = 0
        sizes = zip(tap, self.grid, self.strides, self.dilation, strict=True)
        for at, size, stride, dilation in sizes:
            phase = phase * stride + at * dilation % stride
            offset = offset * size + at * dilation // stride
        return phase, offset
