"""A `shard_map` as a program of one device: shards are an axis, over which its body is mapped.

``vmap`` with the names of the mesh gives collectives their meaning, so that the program computes
what the devices compute together. Where weights are sharded, every shard has grids of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax

from aquant_jax.graph.equations import (
    INLINED_CALLS,
    ClosedJaxpr,
    closed_jaxpr,
    function_of,
    inner_jaxpr,
)

SHARD_MAP = "shard_map"
_TO_VARYING = {"pvary", "pcast"}  # these change a type alone


def unsharded(eqn: jex.JaxprEqn) -> ClosedJaxpr | None:
    """The program of one device; None where `vmap` cannot stand for the devices.

    Args:
      eqn: a `shard_map`.
    """
    manual, mesh = eqn.params["newly_manual_axes"], eqn.params["mesh"]
    sizes = {name: mesh.shape[name] for name in mesh.axis_names if name in manual}
    specs, body = eqn.params["in_specs"], closed_jaxpr(eqn.params["jaxpr"])
    shapes = [_shape_of(var) for var in eqn.invars]
    where = [_axes_of(spec, a.ndim) for spec, a in zip(specs, shapes, strict=True)]

    def mapped(*shards: Any) -> list[Any]:
        return _evaluate(body, shards)

    function: Callable[..., Sequence[Any]] = mapped
    for name, size in reversed(sizes.items()):
        in_axes = tuple(0 if name in itertools.chain(*axes) else None for axes in where)
        function = jax.vmap(function, in_axes, axis_name=name, axis_size=size)

    def run(*arrays: Any) -> list[Any]:
        shards = [_split(a, axes, sizes) for a, axes in zip(arrays, where, strict=True)]
        made = zip(function(*shards), eqn.params["out_specs"], eqn.outvars, strict=True)
        return [_join(a, _axes_of(spec, _shape_of(var).ndim), sizes) for a, spec, var in made]

    try:
        return jax.make_jaxpr(run)(*shapes)
    except Exception:  # a body may do what no `vmap` can
        return None


def _shape_of(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _axes_of(spec: Any, rank: int) -> list[tuple[str, ...]]:
    """The names of the mesh over which each axis of an array is sharded."""
    names = [() if n is None else n if isinstance(n, tuple) else (n,) for n in spec]
    return [*names, *[()] * (rank - len(names))]


def _split(array: Any, axes: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> Any:
    """An array of shards, which its first axes number, in the order of `sizes`."""
    shape: list[Any] = []
    places: dict[str, int] = {}
    for size, names in zip(array.shape, axes, strict=True):
        places.update({name: len(shape) + i for i, name in enumerate(names)})
        counts = [sizes[name] for name in names]
        shape += [*counts, size // math.prod(counts)]
    first = [places[name] for name in sizes if name in places]
    rest = [axis for axis in range(len(shape)) if axis not in first]
    return lax.transpose(lax.reshape(array, shape), (*first, *rest))


def _join(array: Any, axes: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> Any:
    """The inverse of `_split`, of one of the shards that are equal."""
    used = set(itertools.chain(*axes))
    array = array[tuple(slice(None) if name in used else 0 for name in sizes)]
    first = [name for name in sizes if name in used]
    order: list[int] = []
    shape: list[Any] = []
    for axis, names in enumerate(axes, len(first)):
        order += [*(first.index(name) for name in names), axis]
        shape.append(math.prod(sizes[name] for name in names) * array.shape[axis])
    return lax.reshape(lax.transpose(array, order), shape)


def _evaluate(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """The outputs of a body under `vmap`, which knows no types of varying values."""
    jaxpr = closed.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val) if isinstance(atom, jex.Literal) else env[atom]

    (plain,) = jax.make_jaxpr(lax.neg)(0.0).eqns  # those of the body have a mesh as their context
    for eqn in jaxpr.eqns:
        operands, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        if name in _TO_VARYING:
            outputs = operands
        elif name == "psum_invariant":
            outputs = lax.psum(operands, eqn.params["axes"])
        elif name in INLINED_CALLS and (inner := inner_jaxpr(eqn)) is not None:
            outputs = _evaluate(inner, operands)  # custom gradients too, whose types vary
        else:
            params = {key: _retraced(value) for key, value in eqn.params.items()}
            outputs = function_of(eqn.replace(params=params, ctx=plain.ctx), jaxpr)(*operands)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _retraced(value: Any) -> Any:
    """A parameter of an equation, in whose jaxprs no type varies."""
    if type(value) in (tuple, list):
        return type(value)(map(_retraced, value))
    if not isinstance(value, ClosedJaxpr | jex.Jaxpr):
        return value
    closed = closed_jaxpr(value)
    shapes = map(_shape_of, closed.jaxpr.invars)
    traced = jax.make_jaxpr(lambda *arguments: _evaluate(closed, arguments))(*shapes)
    return traced if isinstance(value, ClosedJaxpr) else traced.jaxpr
