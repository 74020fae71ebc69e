"""How custom calls run on images that are split over devices, and on mapped axes.

The maps and shardings of `jax.ffi` itself put an axis on every operand, the scalars included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

IMAGES = "n"


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
def compiled(call: Call) -> Callable:
    """`call`, compiled, with a mapped axis of images folded into N and N sharded where it is."""
    sharded = on_images(call, call.operands, call.results)

    @custom_vmap
    def run(*operands):
        return sharded(*operands)

    run.def_vmap(lambda size, batched, *o: folded(run, call.images, size, batched, o))
    return jax.jit(run)


def on_images(call: Callable, operands: str, results: str) -> Callable:
    """`call`, running on each device's own images.

    Args:
      call: takes arrays, and gives one or several.
      operands, results: the axes of each array by name, such as ``"n h w c, , t c"``. Arrays whose
        first axis is `n` are split as the first operand is; other operands are whole everywhere,
        and other results are sums over the images, which are added up (images that cannot be split
        evenly are then whole everywhere).
    """
    taken, given = ([axes.split() for axes in names.split(",")] for names in (operands, results))
    split = [axes[:1] == [IMAGES] for axes in given]

    @custom_partitioning
    def run(*operands):
        return call(*operands)

    def places(mesh, operands):
        images = (*operands[0].sharding.spec, None)[0]
        # Uneven parts are filled up with rubbish, which a sum over the images would count.
        if not all(split) and operands[0].shape[0] % _devices(mesh, images):
            images = None
        own, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((images,), ()))
        first = (tuple(own if s else whole for s in split)) if len(split) > 1 else own
        return images, tuple(own if axes[:1] == [IMAGES] else whole for axes in taken), first

    def infer(mesh, operands, result):
        return places(mesh, operands)[2]

    def partition(mesh, operands, result):
        images, sources, targets = places(mesh, operands)

        def lower(*local):
            found = call(*local)
            if images is None or all(split):
                return found
            pairs = zip(found, split, strict=True)
            return tuple(value if s else jax.lax.psum(value, images) for value, s in pairs)

        return mesh, lower, targets, sources

    factors = dict.fromkeys(axis for axes in (*taken, *given) for axis in axes)
    run.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{operands} -> {results}",
        need_replication_factors=tuple(axis for axis in factors if axis != IMAGES),
    )
    return run


def _devices(mesh, axes) -> int:
    """How many devices an axis is split over, by the name or names in its `PartitionSpec`."""
    if axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def folded(run: Callable, images: int, axis_size: int, batched, operands):
    """As `one_by_one`, in one call where only the first `images` operands are mapped.

    Their mapped axis becomes part of N; an operand of size 0 stands for none.
    """
    if any(batched[images:]) or not batched[0]:
        return one_by_one(run, axis_size, batched, operands)

    def fold(value, mapped):
        if not value.size and not mapped:
            return value
        every = value if mapped else jnp.broadcast_to(value, (axis_size, *value.shape))
        return every.reshape(-1, *every.shape[2:])

    first = map(fold, operands[:images], batched[:images])
    found = run(*first, *operands[images:])
    return found.reshape(axis_size, -1, *found.shape[1:]), True


def one_by_one(run: Callable, axis_size: int, batched, operands):
    """What a rule of `custom_vmap` gives that maps `run` over the operands that are `batched`."""
    every = [
        value if mapped else jnp.broadcast_to(value, (axis_size, *jnp.shape(value)))
        for value, mapped in zip(operands, batched, strict=True)
    ]
    found = jax.lax.map(lambda each: run(*each), every)
    return found, jax.tree.map(lambda _: True, found)
