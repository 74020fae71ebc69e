"""Calls on arrays whose mesh has explicit axes, to which traced operations belong.

A network may reshape the axis that is split, which JAX refuses there. So it runs with these axes
left to the compiler, as on a mesh of automatic ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def with_auto_axes(run: Callable[..., Any], network: Any, x: Any) -> Any:
    """``run(network, x)``; outputs with as many samples as `x` are split as its samples are.

    Args:
      run: compiled by `jax.jit`.
      network: its first argument.
      x: a batch, a pytree of arrays.
    """
    arrays = [leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array)]
    explicit = {name: None for array in arrays for name in _explicit_axes(array)}
    if not explicit:
        return run(network, x)
    first = max(filter(_explicit_axes, arrays), key=np.ndim)
    sharding = jax.typeof(first).sharding

    def plain(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))

    def split(output: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = sharding.spec[:1] if output.shape[:1] == first.shape[:1] else ()
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    splits = jax.tree.map(split, run.eval_shape(network, jax.tree.map(plain, x)))
    automatic = jax.sharding.auto_axes(axes=tuple(explicit), out_sharding=splits)
    return automatic(run)(network, x)


def _explicit_axes(leaf: jax.Array) -> tuple[str, ...]:
    """The explicit axes of the mesh of an array."""
    mesh = jax.typeof(leaf).sharding.mesh
    pairs = zip(mesh.axis_names, mesh.axis_types or (), strict=False)
    return tuple(name for name, kind in pairs if kind == AxisType.Explicit)
