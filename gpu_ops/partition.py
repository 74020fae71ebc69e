"""How custom calls run on images that are split over devices, and on mapped axes.

The maps and shardings of `jax.ffi` itself put an axis on every operand, the scalars included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

IMAGES = "n"
MeshAxes = str | tuple[str, ...] | None


class Call(Protocol):
    """A custom call, hashable.

    Attributes:
      operands, results: see `on_images`.
      images: how many operands, from the first, hold images that a mapped axis may be folded into;
        of a call with several results, 0.
    """

    operands: str
    results: str
    images: int

    def __call__(self, *operands: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """The custom call on the arrays that `operands` describes."""
        ...


@functools.cache
def compiled(call: Call) -> Callable[..., Any]:
    """`call`, compiled, with a mapped axis of images folded into N and N sharded where it is."""
    sharded = on_images(call, call.operands, call.results)

    @custom_vmap
    def run(*operands: jax.Array) -> Any:
        return sharded(*operands)

    run.def_vmap(lambda size, batched, *o: folded(run, call.images, size, batched, o))
    return jax.jit(run)


def on_images(call: Callable[..., Any], operands: str, results: str) -> Callable[..., Any]:
    """`call`, running on each device's own images.

    Args:
      call: takes arrays, and gives one or several.
      operands, results: the axes of each array by name, such as ``"n h w c, , t c"``. Arrays whose
        first axis is `n` are split as the first operand is. All other operands are whole
        everywhere. All other results are sums over the images, which are added up; images that
        cannot be split evenly are then whole everywhere.
    """
    axes = [names.split() for names in f"{operands},{results}".split(",")]
    count = len(operands.split(","))
    split = [names[:1] == [IMAGES] for names in axes]
    layout = _Layout(tuple(split[:count]), tuple(split[count:]))

    @custom_partitioning
    def run(*operands: jax.Array) -> Any:
        return call(*operands)

    def infer(mesh: Mesh, operands: Sequence[Any], result: Any) -> Any:
        return layout.shardings(mesh, layout.mesh_axes(mesh, operands))[1]

    def partition(mesh: Mesh, operands: Sequence[Any], result: Any) -> tuple[Any, ...]:
        images = layout.mesh_axes(mesh, operands)
        sources, targets = layout.shardings(mesh, images)
        return mesh, lambda *local: layout.total(call(*local), images), targets, sources

    run.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{operands} -> {results}",
        need_replication_factors=_all_but_images(axes),
    )
    return run


def _all_but_images(axes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The names of all axes but the images, in order, once each."""
    named = dict.fromkeys(axis for names in axes for axis in names)
    return tuple(axis for axis in named if axis != IMAGES)


class _Layout(NamedTuple):
    """For each operand and result of a call: whether it is split over the images."""

    operands: tuple[bool, ...]
    results: tuple[bool, ...]

    def mesh_axes(self, mesh: Mesh, operands: Sequence[Any]) -> MeshAxes:
        """The axes of the mesh that the images are split over; None for whole images."""
        images = (*operands[0].sharding.spec, None)[0]
        # Uneven parts are filled up with garbage, which a sum over the images would count.
        if not all(self.results) and operands[0].shape[0] % _devices(mesh, images):
            return None
        return images

    def shardings(self, mesh: Mesh, images: MeshAxes) -> tuple[tuple[NamedSharding, ...], Any]:
        """Shardings of the operands and of the result or results."""
        parts = NamedSharding(mesh, PartitionSpec(images))
        whole = NamedSharding(mesh, PartitionSpec())
        operands = tuple(parts if split else whole for split in self.operands)
        results = tuple(parts if split else whole for split in self.results)
        return operands, results[0] if len(results) == 1 else results

    def total(self, local: Any, images: MeshAxes) -> Any:
        """The results, given those of each device's images."""
        if images is None or all(self.results):
            return local
        pairs = zip(local, self.results, strict=True)
        return tuple(value if split else jax.lax.psum(value, images) for value, split in pairs)


def _devices(mesh: Mesh, axes: MeshAxes) -> int:
    """How many devices an axis is split over, by the name or names in its `PartitionSpec`."""
    if axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def folded(
    run: Callable[..., Any],
    images: int,
    axis_size: int,
    batched: Sequence[bool],
    operands: Sequence[jax.Array],
) -> tuple[Any, Any]:
    """As `one_by_one`, in one call where only the first `images` operands are mapped.

    Their mapped axis becomes part of N; an operand of size 0 stands for none.
    """
    if any(batched[images:]) or not batched[0]:
        return one_by_one(run, axis_size, batched, operands)

    def fold(value: jax.Array, mapped: bool) -> jax.Array:
        if not value.size and not mapped:
            return value
        every = value if mapped else jnp.broadcast_to(value, (axis_size, *value.shape))
        return every.reshape(-1, *every.shape[2:])

    first = map(fold, operands[:images], batched[:images])
    result = run(*first, *operands[images:])
    return result.reshape(axis_size, -1, *result.shape[1:]), True


def one_by_one(
    run: Callable[..., Any], axis_size: int, batched: Sequence[bool], operands: Sequence[jax.Array]
) -> tuple[Any, Any]:
    """The answer of a `custom_vmap` rule that maps `run` over the operands that are `batched`."""
    every = [
        value if mapped else jnp.broadcast_to(value, (axis_size, *jnp.shape(value)))
        for value, mapped in zip(operands, batched, strict=True)
    ]
    results = jax.lax.map(lambda each: run(*each), every)
    return results, jax.tree.map(lambda _: True, results)
