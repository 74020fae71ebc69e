"""Calibration samples that several processes read together, each its share."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PART = 2**22  # bytes that every process sends at once


class SharedSamples:
    """A leaf of a calibration set whose rows lie on the devices of several processes.

    Its shape and dtype are those of all rows. Only the first rows can be read without the other
    processes, by number. All processes call the constructor and the methods together.

    Args:
      array: split along its first axis only.
      first: how many rows every process keeps.
    """

    def __init__(self, array: jax.Array, first: int) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.ndim, self.size = array.ndim, array.size
        shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        self.own = {start: np.asarray(data) for start, data in sorted(shards.items())}
        self._first = self.gather(min(first, len(array)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._first[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, of a leaf that keeps them."""
        assert len(self._first) == len(self)
        return np.array(self._first, dtype)

    def gather(self, count: int) -> np.ndarray:
        """The first rows, on the host of every process."""
        rows = np.empty((count, *self.shape[1:]), self.dtype)
        step = max(1, PART // max(1, rows.nbytes // max(1, count)))
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows[start:stop] = self._between(start, stop)
        return rows

    def _between(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to `stop`, of which each process sends its own."""
        rows = np.zeros((stop - start, *self.shape[1:]), self.dtype)
        found = np.zeros(len(rows), bool)
        for first, part in self.own.items():
            low, high = max(first, start), min(first + len(part), stop)
            if low < high:
                rows[low - start : high - start] = part[low - first : high - first]
                found[low - start : high - start] = True
        return _combined(rows, found)

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """See `row_digests`; each process hashes its own rows, the first time."""
        digests, found = np.zeros((len(self), 32), np.uint8), np.zeros(len(self), bool)
        for start, part in self.own.items():
            rows = slice(start, start + len(part))
            digests[rows], found[rows] = row_digests(part), True
        return _combined(digests, found)


def row_digests(rows: Any) -> np.ndarray:
    """SHA-256 of every row, [rows, 32]: the same however many processes hold the rows."""
    if isinstance(rows, SharedSamples):
        return rows.digests
    joined = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def _combined(rows: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Rows of which every process has `found` some."""
    everywhere, values = multihost_utils.process_allgather((found, rows))
    return np.asarray(values)[np.asarray(everywhere).argmax(0), np.arange(len(rows))]
