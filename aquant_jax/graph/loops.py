"""Rolled loops: how the ops of a graph that are steps of a loop run.

A loop is a region of consecutive ops. `LOOP_SLICE` and `LOOP_CARRY` give what a step reads: its
part of a stacked value, and what the step before hands on. `LOOP_RESULT` (one for each carry, in
the same order) and `LOOP_STACK` take what a step makes, and give the last carry and the stacked
values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from aquant_jax.graph.ir import (
    LOOP_CARRY,
    LOOP_RESULT,
    LOOP_SLICE,
    LOOP_STACK,
    Atom,
    Loop,
    Op,
)

_ENDS = {LOOP_SLICE, LOOP_CARRY, LOOP_RESULT, LOOP_STACK}


@runtime_checkable
class Values(Protocol):
    """The values that ops read and make."""

    @property
    def values(self) -> dict[int, Any]:
        """Those of the graph, by id."""
        ...

    def read(self, atom: Atom) -> Any:
        """What an op reads."""

    def through(self, atom: Atom) -> Any:
        """What an op reads that passes a tensor on."""

    def copy(self) -> Any:
        """The same values, to which those of a step are added."""


def run_ops(
    ops: Sequence[Op],
    values: Values,
    run_op: Callable[[Op, Any], None],
    wanted: Collection[Atom] = (),
    outer: Loop | None = None,
) -> None:
    """Run ops one after the other, and loops step by step.

    Args:
      ops: of a graph, or of one step of the loop `outer`.
      values: get those that the ops make.
      run_op: ``run_op(op, values)`` runs one op.
      wanted: values of single steps to keep too, stacked along their last axis.
      outer: the loop whose step they are.
    """
    for loop, group in itertools.groupby(ops, lambda op: _child(op, outer)):
        if loop is None:
            for op in group:
                run_op(op, values)
        else:
            _run_loop(loop, list(group), values, run_op, wanted)


def regions(ops: Sequence[Op]) -> list[list[Op]]:
    """The ops in groups that run together: those of a loop, or a single one."""

    def owner(pair: tuple[int, Op]) -> Any:
        index, op = pair
        return index if op.loop is None else op.loop.outermost

    return [[op for _, op in group] for _, group in itertools.groupby(enumerate(ops), owner)]


def _child(op: Op, outer: Loop | None) -> Loop | None:
    """The loop directly in `outer` that an op is part of; None for an op of `outer` itself."""
    loop = op.loop
    while loop is not None and loop != outer and loop.outer != outer:
        loop = loop.outer
    return None if loop == outer else loop


def _run_loop(
    loop: Loop,
    ops: Sequence[Op],
    values: Values,
    run_op: Callable[[Op, Any], None],
    wanted: Collection[Atom],
) -> None:
    """Run all steps of a loop."""
    ends = {name: [op for op in ops if op.name == name and op.loop == loop] for name in _ENDS}
    steps = [op for op in ops if op.name not in _ENDS or op.loop != loop]
    made = {out for op in ops for out in op.outputs}
    made -= {out for name in (LOOP_RESULT, LOOP_STACK) for op in ends[name] for out in op.outputs}
    kept = [value for value in wanted if isinstance(value, int) and value in made]

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        inside = values.copy()
        inside.values.update(zip(_outputs(ends[LOOP_CARRY]), carry, strict=True))
        inside.values.update(zip(_outputs(ends[LOOP_SLICE]), slices, strict=True))
        run_ops(steps, inside, run_op, wanted, loop)
        made = [inside.read(op.inputs[0]) for op in ends[LOOP_RESULT]]
        carry = [_cast(new, old.dtype) for new, old in zip(made, carry, strict=True)]
        stacked = [inside.read(op.inputs[0]) for op in ends[LOOP_STACK]]
        return carry, [*stacked, *(inside.values[value] for value in kept)]

    init = [_cast(values.read(op.inputs[0]), op.params["dtype"]) for op in ends[LOOP_CARRY]]
    slices = [_flip(values.through(op.inputs[0]), loop) for op in ends[LOOP_SLICE]]
    carry, stacked = lax.scan(step, init, slices, loop.length)
    stacked = [_flip(value, loop) for value in stacked]
    count = len(ends[LOOP_STACK])
    values.values.update(zip(_outputs(ends[LOOP_RESULT]), carry, strict=True))
    values.values.update(zip(_outputs(ends[LOOP_STACK]), stacked[:count], strict=True))
    last = [jnp.moveaxis(value, 0, -1) for value in stacked[count:]]
    values.values.update(zip(kept, last, strict=True))


def _outputs(ops: Sequence[Op]) -> Iterator[int]:
    return (out for op in ops for out in op.outputs)


def _flip(value: Any, loop: Loop) -> jax.Array:
    """A stacked value in the order of the steps; a `scan` of ONNX has no other."""
    return lax.rev(value, (0,)) if loop.reverse else jnp.asarray(value)


def _cast(value: Any, dtype: Any) -> jax.Array:
    """`value` in a type that may be that of random keys."""
    same = isinstance(value, jax.Array) and value.dtype == dtype
    return value if same else jnp.asarray(value, dtype)
