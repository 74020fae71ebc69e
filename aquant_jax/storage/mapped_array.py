"""An array in a file without a name, so that its space is free again however the process ends."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aquant_jax.errors import InputError, byte_size, reason


class MappedArray:
    """An array in a file, of which only the rows that are read or written are in memory.

    Rows are copied by the kernel: to map them costs a page fault for every few pages.

    Args:
      folder: where the file lies; created if necessary.
      shape: of the array.
      dtype: of the array.

    Raises:
      InputError: the folder cannot be written, or its disk has too little space.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype, self.ndim = shape, np.dtype(dtype), len(shape)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with this
            weakref.finalize(self, self._file.close)
            # A write to a mapped file on a full disk would kill the process.
            os.posix_fallocate(self._file.fileno(), 0, max(self.nbytes, 1))
        except OSError as error:
            free = shutil.disk_usage(folder).free if folder.is_dir() else 0
            raise InputError(
                f"{folder}: {byte_size(self.nbytes)} of cached activations cannot be kept "
                f"there ({reason(error)}); {byte_size(free)} are free"
            ) from error

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The rows at an index, copied."""
        numbers = np.arange(len(self))[rows]
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        self._each_row(os.preadv, numbers, found)
        return found

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        numbers = np.arange(len(self))[rows]
        self._each_row(os.pwritev, numbers, np.ascontiguousarray(values, self.dtype))

    def whole(self) -> np.ndarray:
        """All of it, mapped as long as the result lives."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self._file, self.dtype, "r+", shape=self.shape)

    def _each_row(self, call: Callable[..., int], numbers: np.ndarray, values: np.ndarray) -> None:
        """Reads or writes the rows of these numbers."""
        elements = math.prod(self.shape[1:])
        rows = values.reshape(len(numbers), elements).view(np.uint8)
        for number, row in zip(numbers.tolist(), rows, strict=True):
            if call(self._file.fileno(), [row], number * row.nbytes) != row.nbytes:
                raise OSError(f"row {number} of {row.nbytes} bytes is incomplete")
