"""Activations of the calibration set at the boundary between two blocks, two bytes a value."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.reconstruction.devices import empty, read, split_batch, write

HEADROOM = 2.0**12  # the first batch's maximum maps here; float16 ends at 65,504


class Cache(NamedTuple):
    """One activation of all calibration samples (a pytree).

    Attributes:
      values: ``[N, ...]``, or a few samples more on several devices; float32 is stored as float16
        times a power of two, which is exact for codes; anything else as it came.
      scale: that power of two.
    """

    values: jax.Array
    scale: jax.Array

    def take(self, index: Any, dtype: Any) -> jax.Array:
        """The samples at `index`, in `dtype`."""
        values = split_batch(self.values[index])
        if self.values.dtype != jnp.float16:
            return values.astype(dtype)
        return (values.astype(jnp.float32) * self.scale).astype(dtype)


def take(caches: Sequence[Cache], index: Any, dtypes: Sequence[Any]) -> list[jax.Array]:
    """The samples at `index` of every cache, in these dtypes."""
    return [cache.take(index, dtype) for cache, dtype in zip(caches, dtypes, strict=True)]


def store(batches: Iterable[Sequence[Any]], samples: int) -> tuple[Cache, ...]:
    """Caches of the values that come in `batches` of samples, first axis first.

    They are made where the values are: on a GPU, none of them passes through the host but the first
    batch, for its maximum. Samples of the last batch beyond `samples` are dropped.
    """
    arrays: list[jax.Array] = []
    scales: list[np.float32] = []
    position = 0
    for batch in batches:
        if not arrays:
            scales = [_scale(value) for value in batch]
            arrays = [empty(samples, v.shape[1:], _stored_dtype(v)) for v in batch]
        count = min(len(batch[0]), len(arrays[0]) - position)
        arrays = [
            _write(array, value if count == len(value) else value[:count], scale, position)
            for array, value, scale in zip(arrays, batch, scales, strict=True)
        ]
        position += count
    pairs = zip(arrays, scales, strict=True)
    return tuple(Cache(array, jnp.asarray(scale)) for array, scale in pairs)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, value: jax.Array, scale: jax.Array, position: int) -> jax.Array:
    """`array` with the samples `value` from `position` on."""
    if array.dtype == jnp.float16:
        value = jnp.clip(value.astype(jnp.float32) / scale, -65504.0, 65504.0)
    return write(array, value.astype(array.dtype), position)


def _stored_dtype(value: Any) -> Any:
    return np.float16 if value.dtype == np.float32 else value.dtype


def _scale(value: Any) -> np.float32:
    if value.dtype != np.float32:
        return np.float32(1.0)
    top = float(np.max(np.abs(read(value)), initial=0.0))
    finite = 0 < top < np.inf
    return np.float32(2.0 ** np.ceil(np.log2(top / HEADROOM)) if finite else 1.0)
