"""Activations of the calibration set at the boundary between two blocks, two bytes a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HEADROOM = 2.0**12  # the first batch's maximum maps here; float16 ends at 65,504


class Cache(NamedTuple):
    """One activation of all calibration samples (a pytree).

    Attributes:
      values: ``[N, ...]``; float32 is stored as float16 times a power of two, which is exact for
        codes; anything else as it came.
      scale: that power of two.
    """

    values: jax.Array
    scale: jax.Array

    def take(self, index: Any, dtype: Any) -> jax.Array:
        """The samples at `index`, in `dtype`."""
        values = self.values[index]
        if self.values.dtype != jnp.float16:
            return values.astype(dtype)
        return (values.astype(jnp.float32) * self.scale).astype(dtype)


def take(caches: Sequence[Cache], index: Any, dtypes: Sequence[Any]) -> list[jax.Array]:
    """The samples at `index` of every cache, in these dtypes."""
    return [cache.take(index, dtype) for cache, dtype in zip(caches, dtypes, strict=True)]


def store(batches: Iterable[Sequence[Any]], samples: int) -> tuple[Cache, ...]:
    """Caches of the values that come in `batches` of samples, first axis first.

    Samples of the last batch beyond `samples` are dropped.
    """
    arrays: list[np.ndarray] = []
    scales: list[float] = []
    position = 0
    for batch in batches:
        host = [np.asarray(value) for value in batch]
        if not arrays:
            scales = [_scale(value) for value in host]
            arrays = [np.empty((samples, *v.shape[1:]), _stored_dtype(v)) for v in host]
        count = min(host[0].shape[0], samples - position)
        for array, value, scale in zip(arrays, host, scales, strict=True):
            part = value[:count]
            if array.dtype == np.float16:
                part = np.clip(part.astype(np.float32) / scale, -65504.0, 65504.0)
            array[position : position + count] = part
        position += count
    pairs = zip(arrays, scales, strict=True)
    return tuple(Cache(jnp.asarray(array), jnp.float32(scale)) for array, scale in pairs)


def _stored_dtype(value: np.ndarray) -> Any:
    return np.float16 if value.dtype == np.float32 else value.dtype


def _scale(value: np.ndarray) -> float:
    if value.dtype != np.float32:
        return 1.0
    top = float(np.max(np.abs(value), initial=0.0))
    return 2.0 ** np.ceil(np.log2(top / HEADROOM)) if 0 < top < np.inf else 1.0
