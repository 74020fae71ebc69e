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
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]

    def taps(self, x: jax.Array) -> list[jax.Array]:
        """One array ``[rows, C]`` per tap, in row-major tap order."""
        grid = self._grid(x.shape[1:-1])
        phases = self._phases(x, grid)
        places = [self._place(tap, grid) for tap in np.ndindex(*self.kernel)]
        rows = phases.shape[1] - max(offset for _, offset in places)
        return [phases[phase, offset : offset + rows] for phase, offset in places]

    def crop(self, y: jax.Array, padded: tuple[int, ...]) -> jax.Array:
        """Rows ``[rows, O]`` as images ``[N, *out, O]``; `padded` is the shape of the input."""
        grid = self._grid(padded[1:-1])
        missing = padded[0] * int(np.prod(grid)) - y.shape[0]
        images = jnp.pad(y, ((0, missing), (0, 0))).reshape(padded[0], *grid, y.shape[-1])
        return images[(slice(None), *(slice(size) for size in self.out))]

    def _grid(self, spatial):
        return tuple(-(-size // s) for size, s in zip(spatial, self.strides, strict=True))

    def _phases(self, x, grid):
        """``[phases, N * grid, C]``: space to depth by the strides."""
        rank = len(grid)
        extra = [g * s - n for g, s, n in zip(grid, self.strides, x.shape[1:-1], strict=True)]
        x = jnp.pad(x, ((0, 0), *((0, e) for e in extra), (0, 0)))
        split = [size for pair in zip(grid, self.strides, strict=True) for size in pair]
        x = x.reshape(x.shape[0], *split, x.shape[-1])
        x = x.transpose(*range(2, 2 * rank + 1, 2), 0, *range(1, 2 * rank, 2), 2 * rank + 1)
        return x.reshape(int(np.prod(self.strides)), -1, x.shape[-1])

    def _place(self, tap, grid) -> tuple[int, int]:
        """Phase and row offset of a tap."""
        phase = offset = 0
        for at, size, stride, dilation in zip(tap, grid, self.strides, self.dilation, strict=True):
            phase = phase * stride + at * dilation % stride
            offset = offset * size + at * dilation // stride
        return phase, offset
