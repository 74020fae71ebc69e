"""Runnable slices of a graph: `cut` takes the ops between values, `run` evaluates them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from aquant_jax.graph.ir import ALIASES, SHAPE_ONLY, Graph, Op

Weighted = Callable[[Op, Any], Any]
Read = Callable[[int, Any], Any]


class Program(NamedTuple):
    """A slice of a graph.

    Attributes:
      ops: what it evaluates, in order.
      live: value ids that it takes from the previous program.
      side: leaves of the model's input that it reads, as value ids.
      static: leaves of the variables (and constants) that it reads, as value ids.
      outputs: what it computes: value ids or literals.
    """

    ops: tuple[Op, ...]
    live: tuple[int, ...]
    side: tuple[int, ...]
    static: tuple[int, ...]
    outputs: tuple[Any, ...]

    @property
    def weighted(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.layer is not None)


def cut(graph: Graph, live: Sequence[int], outputs: Sequence[Any]) -> Program:
    """The ops that `outputs` need, given `live` (and the model's input and variables)."""
    producers = graph.producers()
    needed: set[int] = set()
    stack = [out for out in outputs if isinstance(out, int)]
    while stack:
        value = stack.pop()
        if value in needed:
            continue
        needed.add(value)
        if value not in live and value in producers:
            stack.extend(producers[value].reads)
    ops = tuple(
        op for op in graph.ops
        if any(out in needed and out not in live for out in op.outputs)
    )  # fmt: skip
    return Program(
        ops,
        tuple(live),
        tuple(i for i in graph.inputs if i in needed and i not in live),
        tuple(i for i in (*graph.variables, *graph.constants) if i in needed),
        tuple(outputs),
    )


def run(
    program: Program,
    live: Sequence[Any],
    side: Sequence[Any],
    static: Sequence[Any],
    weighted: Weighted,
    read: Read = lambda value_id, value: value,
) -> tuple[Any, ...]:
    """Evaluate `program`.

    Args:
      program: what to run.
      live, side, static: values of ``program.live``, ``.side`` and ``.static``.
      weighted: computes a weighted op from its (unquantized) activation.
      read: what every other op sees of a value; ops of `ALIASES` hand values on unread.

    Returns:
      Values of ``program.outputs``.
    """
    env = dict(zip(program.live, live, strict=True))
    env.update(zip(program.side, side, strict=True))
    env.update(zip(program.static, static, strict=True))

    def value(atom, through=False):
        if not isinstance(atom, int):
            return atom.val
        return env[atom] if through else read(atom, env[atom])

    for op in program.ops:
        if op.layer is not None:
            results = [weighted(op, env[op.x])]
        else:
            results = op.call(*(value(i, op.name in ALIASES) for i in op.inputs))
        env.update(zip(op.outputs, results, strict=True))
    # A value that the next program takes goes on unread: it is quantized where it is consumed.
    return tuple(value(out, through=True) for out in program.outputs)


def root(producers: dict[int, Op], value: int) -> int:
    """The tensor that `value` is a reshaped, padded, cast or max-pooled view of."""
    while value in producers:
        op = producers[value]
        if op.layer is not None or op.name not in ALIASES or not op.reads:
            break
        value = op.reads[0]
    return value


def same_elements(producers: dict[int, Op], value: int) -> Op | None:
    """The op that `value` is a mere rearrangement by, if it is one."""
    op = producers.get(value)
    return op if op is not None and op.layer is None and op.name in SHAPE_ONLY else None


def static_values(graph: Graph, variables, ids: Sequence[int]) -> dict[int, jax.Array]:
    """Evaluate values that do not depend on the input."""
    program = cut(graph, (), tuple(ids))
    values = run(program, (), (), static_inputs(graph, program, variables), _no_weighted)
    return dict(zip(ids, values, strict=True))


def static_inputs(graph: Graph, program: Program, variables) -> list[Any]:
    """The values of ``program.static``."""
    by_id = dict(zip(graph.variables, jax.tree.leaves(variables), strict=True)) | graph.constants
    return [by_id[i] for i in program.static]


def _no_weighted(op, x):
    raise AssertionError(f"{op.layer.path} is not static")


def signature(graph: Graph, program: Program) -> str:
    """A text that is equal for programs that compute the same function of their arguments."""
    local: dict[int, int] = {}

    def name(atom):
        if not isinstance(atom, int):
            return f"={atom.val!r}"
        aval = graph.avals[atom]
        return f"v{local.setdefault(atom, len(local))}:{aval.dtype}{aval.shape}"

    lines = [" ".join(map(name, group)) for group in program[1:4]]
    for op in program.ops:
        # Function objects print their address; the jaxprs printed beside them tell them apart.
        params = re.sub(r" at 0x[0-9a-f]+|id=\d+", "", str(sorted(op.params.items(), key=str)))
        values = [name(i) for i in op.inputs if not (op.layer and i == op.layer.weight)]
        weight = op.layer and (op.layer.kind, op.layer.weight_shape, op.layer.x_position)
        lines.append(f"{' '.join(map(name, op.outputs))} = {op.name} {values} {weight} {params}")
    return "\n".join([*lines, " ".join(map(name, program.outputs))])
