"""Activations of the calibration set at the boundary between two blocks, two bytes a value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.reconstruction.devices import (
    empty,
    read,
    several_processes,
    split_batch,
    split_samples,
    take_batch,
    write,
)
from aquant_jax.storage.mapped_array import MappedArray

HEADROOM = 2.0**12  # the first batch's maximum maps here
LARGEST = 65504.0  # of float16
WIDE = 2.0**24  # a first batch with a larger maximum, such as a mask of -1e9, stays float32
LEAST_EXPONENT = -126  # of a power of two that is a normal float32
Item = TypeVar("Item")
Allocate = Callable[[int, tuple[int, ...], Any], Any]
OnInfinite = Callable[[int, np.ndarray, int], None]


class Cache(NamedTuple):
    """One activation of all calibration samples (a pytree).

    Attributes:
      values: ``[N, ...]``, or a few samples more on several devices; float32 is stored as float16
        times a power of two, which is exact for codes and infinity; anything else as it came. It
        lies on the device, in the memory of the host, or in a file; see `load`.
      scale: that power of two.
    """

    values: jax.Array | np.ndarray | MappedArray
    scale: jax.Array

    def take(self, index: Any, dtype: Any) -> jax.Array:
        """The samples at `index`, in `dtype`."""
        values = split_batch(jnp.asarray(self.values[index]))
        if self.values.dtype != jnp.float16:
            return values.astype(dtype)
        return (values.astype(jnp.float32) * self.scale).astype(dtype)


_taken = jax.jit(Cache.take, static_argnames="dtype")


def take_now(cache: Cache, index: np.ndarray, dtype: Any) -> jax.Array:
    """`Cache.take` in one program, not one for each of its operations."""
    on_device = isinstance(cache.values, jax.Array)
    return _taken(cache, index, dtype) if on_device else cache.take(index, dtype)


def take(caches: Sequence[Cache], index: Any, dtypes: Sequence[Any]) -> list[jax.Array]:
    """The samples at `index` of every cache, in these dtypes."""
    return [cache.take(index, dtype) for cache, dtype in zip(caches, dtypes, strict=True)]


def load(samples: Any, batches: Iterable[np.ndarray]) -> Iterator[tuple[Any, np.ndarray]]:
    """What a program reads of `samples` for every batch, and the rows of that batch in it.

    Where everything lies on the device, that is `samples` and the rows themselves. Otherwise it is
    the rows of this batch, moved to the device; those of the next are read in a thread meanwhile.

    Args:
      samples: a pytree of caches and of arrays with a sample axis; scalars and scales are whole.
      batches: numbers of the samples of every batch.
    """
    if on_device(samples):
        yield from ((samples, rows) for rows in batches)
        return
    leaves, tree = jax.tree.flatten(samples)
    elsewhere = list(map(_is_elsewhere, leaves))

    def read(rows: np.ndarray) -> list[Any]:
        pairs = zip(leaves, elsewhere, strict=True)
        return [leaf[rows] if there else leaf for leaf, there in pairs]

    def place(found: list[Any], rows: np.ndarray) -> tuple[Any, np.ndarray]:
        placed = [
            (split_samples(leaf) if there else take_batch(leaf, rows)) if np.ndim(leaf) else leaf
            for leaf, there in zip(found, elsewhere, strict=True)
        ]
        return tree.unflatten(placed), np.arange(len(rows), dtype=np.int32)

    with ThreadPoolExecutor(1) as pool:
        ahead: list[Any] = []
        for rows in batches:
            ahead.append((pool.submit(read, rows), rows))
            if len(ahead) > 1:
                found, before = ahead.pop(0)
                yield place(found.result(), before)
        for found, rows in ahead:
            yield place(found.result(), rows)


def on_device(samples: Any) -> bool:
    """Whether all arrays of a pytree of caches and of arrays with a sample axis are there."""
    return not any(map(_is_elsewhere, jax.tree.leaves(samples)))


def _is_elsewhere(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | MappedArray) and leaf.ndim > 0


def store(
    batches: Iterable[Sequence[Any]],
    samples: int,
    allocate: Allocate = empty,
    on_infinite: OnInfinite | None = None,
) -> tuple[Cache, ...]:
    """Caches of the values that come in `batches` of samples, first axis first.

    Args:
      batches: of samples; those of the last batch beyond `samples` are dropped.
      samples: how many there are.
      allocate: ``allocate(samples, shape, dtype)`` makes the array of a cache. By default it is
        where the values are: on a GPU, none of them passes through the host but their maxima.
      on_infinite: ``on_infinite(i, values, position)`` gets a batch of value `i`, the first of
        whose samples is number `position`, where it holds NaN or infinity.

    Raises:
      InputError: see `MappedArray`.
    """
    arrays: list[Any] = []
    scales: list[np.float32] = []
    position = 0
    for batch, tops in _with_tops(batches):
        for i in np.flatnonzero(~np.isfinite(tops)).tolist():
            values = np.asarray(read(batch[i]))
            tops[i] = float(np.abs(values).max(where=np.isfinite(values), initial=0))
            if on_infinite is not None:
                on_infinite(i, values, position)
        if not arrays:
            for value, top in zip(batch, tops, strict=True):
                dtype = _stored_dtype(value, top)
                arrays.append(allocate(samples, value.shape[1:], dtype))
                scales.append(np.float32(1.0) if dtype == value.dtype else _scale(top))
        count = min(len(batch[0]), samples - position)
        for i, (value, top) in enumerate(zip(batch, tops, strict=True)):
            if arrays[i].dtype != value.dtype and top > LARGEST * float(scales[i]):
                before, scales[i] = scales[i], _scale(top)
                arrays[i] = _rescaled(arrays[i], before / scales[i], position)
            part = value if count == len(value) else value[:count]
            arrays[i] = _written(arrays[i], part, scales[i], position)
        position += count
    pairs = zip(arrays, scales, strict=True)
    return tuple(Cache(array, jnp.asarray(scale)) for array, scale in pairs)


def _written(array: Any, value: jax.Array, scale: np.float32, position: int) -> Any:
    """`array` with the samples `value` from `position` on."""
    if isinstance(array, jax.Array):
        return _write(array, value, scale, position)
    rows = slice(position, position + len(value))
    array[rows] = np.asarray(read(_encode(value, scale, array.dtype)))
    return array


def _rescaled(array: Any, factor: np.float32, end: int) -> Any:
    """`array`, whose samples before `end` are written, times a power of two."""
    if isinstance(array, jax.Array):
        return _multiply(array, factor)
    for sample in range(end):
        rows = slice(sample, sample + 1)
        array[rows] = (array[rows].astype(np.float32) * factor).astype(array.dtype)
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _multiply(array: jax.Array, factor: jax.Array) -> jax.Array:
    return (array.astype(jnp.float32) * factor).astype(array.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, value: jax.Array, scale: jax.Array, position: int) -> jax.Array:
    return write(array, _encode(value, scale, array.dtype), position)


@functools.partial(jax.jit, static_argnames="dtype")
def _encode(value: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """A value in the form that is stored."""
    return value if value.dtype == dtype else (value.astype(jnp.float32) / scale).astype(dtype)


def _stored_dtype(value: Any, top: float) -> Any:
    return np.float16 if value.dtype == np.float32 and top <= WIDE else value.dtype


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Each item when the next one is there: arrays of the next are computed beside the caller."""
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def _with_tops(
    batches: Iterable[Sequence[Any]],
) -> Iterator[tuple[Sequence[Any], list[float]]]:
    """Every batch and its largest magnitudes, which are read while the next batch is computed."""
    reduced = ((batch, list(map(_reduced, batch))) for batch in batches)
    for batch, values in one_ahead(reduced):
        yield batch, list(map(_top, values))


def _reduced(value: Any) -> Any:
    """Values, or their largest magnitude where that is cheaper to read; None for no floats."""
    if not jnp.issubdtype(value.dtype, jnp.floating) or not value.size:
        return None
    moves = jax.default_backend() != "cpu" or several_processes()
    return _largest(value) if moves or value.dtype != np.float32 else value


def _top(value: Any) -> float:
    """The largest magnitude; zero for what has none."""
    if value is None:
        return 0.0
    values = read(value)
    return float(np.maximum(values.max(), -values.min()))


@jax.jit
def _largest(value: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(value))


def _scale(top: float) -> np.float32:
    """The power of two of values with this largest magnitude; of zeros, the least."""
    exponent = np.ceil(np.log2(top / HEADROOM)) if top else LEAST_EXPONENT
    return np.float32(2.0 ** max(exponent, LEAST_EXPONENT))
