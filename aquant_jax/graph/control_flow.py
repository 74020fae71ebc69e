"""Loops and branches with weighted ops in them, as a trace flattens them.

A loop over stacked weights is unrolled: a layer of its own at each step. A loop whose steps share
their weights stays rolled (`ir.Loop`). Of branches, all are computed, and one is selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from aquant_jax.graph.equations import ClosedJaxpr, closed_jaxpr, inner_jaxpr, scan_parts
from aquant_jax.graph.experts import SELECTS, VIEWS
from aquant_jax.graph.ir import (
    LOOP_CARRY,
    LOOP_RESULT,
    LOOP_SLICE,
    LOOP_STACK,
    PRODUCTS,
    Atom,
    Loop,
    Op,
)


class Kind(NamedTuple):
    """On what a value in a loop or branch depends.

    Attributes:
      dynamic: on the model's input.
      weight: on the variables.
      varies: on the step of the loop.
      selected: it consists of weights that the input selects.
    """

    dynamic: bool = False
    weight: bool = False
    varies: bool = False
    selected: bool = False

    @property
    def static(self) -> bool:
        """Whether it depends on the variables alone."""
        return self.weight and not self.dynamic


@runtime_checkable
class Flattener(Protocol):
    """A trace under way: what it knows of values, and how ops are added."""

    avals: dict[int, Any]
    loop: Loop | None
    iteration: str
    loops: int
    trainable: bool

    def new(self, aval: Any) -> int:
        """The id of a new value."""
        ...

    def flatten(self, closed: ClosedJaxpr, inputs: Sequence[Atom]) -> list[Atom]:
        """Appends the equations of a jaxpr, and returns the atoms of its outputs."""
        ...

    def append(self, op: Op, dynamic: bool, weight: bool) -> None:
        """Appends one op, whose outputs depend on the input and on a weight if it says so."""
        ...

    def kind(self, atom: Atom) -> Kind:
        """On what a value depends."""
        ...

    def close_loop(self) -> None:
        """Ends a rolled loop."""
        ...

    def slice_of(self, stack: int, index: int) -> int:
        """A slice of stacked weights, as a weight of its own."""
        ...


def products(jaxpr: jex.Jaxpr, kinds: Sequence[Kind]) -> tuple[set[Kind], list[Kind]]:
    """The kinds of the weights that a product with the input reads, and of the outputs.

    Args:
      jaxpr: of a loop's step, of a branch or of a call.
      kinds: of its inputs.
    """
    env = dict(zip(jaxpr.invars, kinds, strict=True))
    met: set[Kind] = set()
    for eqn in jaxpr.eqns:
        reads = [Kind() if isinstance(a, jex.Literal) else env.get(a, Kind()) for a in eqn.invars]
        name = eqn.primitive.name
        outputs = [_join(reads)._replace(selected=False)] * len(eqn.outvars)
        if name in VIEWS:
            outputs = reads[:1]
        elif name in SELECTS and reads[0].static and outputs[0].dynamic:
            outputs = [Kind(True, True, reads[0].varies, selected=True)]
        if name in PRODUCTS and any(kind.dynamic for kind in reads):
            met.update(kind for kind in reads if kind.static or kind.selected)
        for inner, given in _inner(eqn, reads):
            more, made = products(inner, given)
            met |= more
            if len(made) == len(outputs):
                outputs = [_join(pair) for pair in zip(outputs, made, strict=True)]
        env.update(zip(eqn.outvars, outputs, strict=True))
    results = [Kind() if isinstance(a, jex.Literal) else env.get(a, Kind()) for a in jaxpr.outvars]
    return met, results


def flatten_control_flow(
    trace: Flattener, eqn: jex.JaxprEqn, inputs: Sequence[Atom]
) -> list[Atom] | None:
    """Appends the ops of a loop or branch with weighted ops in it.

    Args:
      trace: gets the ops.
      eqn: any equation.
      inputs: its operands.

    Returns:
      The atoms of its outputs; None for any other equation, which stays one op.
    """
    reads = [trace.kind(atom) for atom in inputs]
    if eqn.primitive.name == "cond":
        met = set().union(*(products(*pair)[0] for pair in _inner(eqn, reads)))
        return _select(trace, eqn, inputs) if met else None
    if eqn.primitive.name != "scan" or not any(kind.dynamic for kind in reads):
        return None
    consts, carries, _ = (len(part) for part in scan_parts(eqn, inputs))
    steps = [
        kind if i < consts or kind.dynamic else kind._replace(varies=True)
        for i, kind in enumerate(reads)
    ]
    body = closed_jaxpr(eqn.params["jaxpr"]).jaxpr
    met, _ = _fixed_point(body, steps, consts, carries)
    if any(kind.varies for kind in met) and eqn.params["length"]:
        return _unroll(trace, eqn, inputs)
    return _roll(trace, eqn, inputs) if met or not trace.trainable else None


def _inner(eqn: jex.JaxprEqn, reads: Sequence[Kind]) -> list[tuple[jex.Jaxpr, list[Kind]]]:
    """The jaxprs that an equation runs, with the kinds of their inputs."""
    params, name = eqn.params, eqn.primitive.name
    if name == "cond":
        return [(closed_jaxpr(branch).jaxpr, list(reads[1:])) for branch in params["branches"]]
    inner = inner_jaxpr(eqn)
    if inner is None:
        return []
    jaxpr, kinds = inner.jaxpr, list(reads)
    if len(jaxpr.invars) != len(kinds):
        return []
    if name == "scan":
        consts, carries, _ = (len(part) for part in scan_parts(eqn, reads))
        _fixed_point(jaxpr, kinds, consts, carries)
    return [(jaxpr, kinds)]


def _fixed_point(
    body: jex.Jaxpr, kinds: list[Kind], consts: int, carries: int
) -> tuple[set[Kind], list[Kind]]:
    """`products` of a loop's step; `kinds` get what its carries become."""
    while True:
        met, outputs = products(body, kinds)
        end = consts + carries
        after = [_join(pair) for pair in zip(kinds[consts:end], outputs[:carries], strict=True)]
        if after == kinds[consts:end]:
            return met, outputs
        kinds[consts:end] = after


def _join(kinds: Sequence[Kind]) -> Kind:
    """The kind of what is computed of values of these kinds."""
    return Kind(*(any(flags) for flags in zip(*kinds, strict=True))) if kinds else Kind()


def _roll(trace: Flattener, eqn: jex.JaxprEqn, inputs: Sequence[Atom]) -> list[Atom]:
    """Appends the ops of one step, and the ends of the loop."""
    consts, carries, stacks = scan_parts(eqn, inputs)
    body = closed_jaxpr(eqn.params["jaxpr"])
    _, carried, sliced = scan_parts(eqn, body.jaxpr.invars)
    trace.loops += 1
    outer = trace.loop
    trace.loop = Loop(trace.loops, eqn.params["length"], eqn.params["reverse"], outer)
    starts = [_end(trace, LOOP_CARRY, i, v.aval) for i, v in zip(carries, carried, strict=True)]
    slices = [_end(trace, LOOP_SLICE, i, v.aval) for i, v in zip(stacks, sliced, strict=True)]
    made = trace.flatten(body, [*consts, *starts, *slices])
    names = [LOOP_RESULT] * len(carries) + [LOOP_STACK] * (len(made) - len(carries))
    outputs = [
        _end(trace, name, value, var.aval)
        for name, value, var in zip(names, made, eqn.outvars, strict=True)
    ]
    trace.loop = outer
    trace.close_loop()
    return outputs


def _end(trace: Flattener, name: str, value: Atom, aval: Any) -> Atom:
    """Appends an op that passes a value into a step, or out of it."""
    out, kind = trace.new(aval), trace.kind(value)
    weight = name != LOOP_SLICE or kind.weight
    op = Op(
        name,
        {"dtype": aval.dtype},
        _identity,
        (value,),
        (out,),
        None,
        frozenset(),
        trace.loop,
        trace.iteration,
    )
    trace.append(op, dynamic=True, weight=weight)
    return out


def _identity(value: Any) -> list[Any]:
    return [value]


def _unroll(trace: Flattener, eqn: jex.JaxprEqn, inputs: Sequence[Atom]) -> list[Atom]:
    """Appends the ops of all steps."""
    consts, carry, stacks = scan_parts(eqn, inputs)
    body, length = closed_jaxpr(eqn.params["jaxpr"]), eqn.params["length"]
    trace.loops += 1
    outer, number = trace.iteration, trace.loops
    made: dict[int, list[Atom]] = {}
    for step in reversed(range(length)) if eqn.params["reverse"] else range(length):
        trace.iteration = f"{outer}{number}[{step}]"
        slices = [_slice(trace, value, step) for value in stacks]
        outputs = trace.flatten(body, [*consts, *carry, *slices])
        carry, made[step] = outputs[: len(carry)], outputs[len(carry) :]
    trace.iteration = outer
    avals = [var.aval for var in body.jaxpr.outvars[len(carry) :]]
    stacked = zip(*(made[step] for step in range(length)), strict=True)
    ys = [
        _call(trace, _stack, values, [aval] * length)
        for aval, values in zip(avals, stacked, strict=True)
    ]
    return [*carry, *ys]


def _slice(trace: Flattener, value: Atom, step: int) -> Atom:
    """The slice of a stacked value that a step reads."""
    assert isinstance(value, int)
    kind, aval = trace.kind(value), trace.avals[value]
    if kind.static and not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):  # no key is a constant
        return trace.slice_of(value, step)
    return _call(trace, lambda a: lax.index_in_dim(a, step, keepdims=False), [value], [aval])


def _stack(*values: jax.Array) -> jax.Array:
    return jnp.stack(values)


def _select(trace: Flattener, eqn: jex.JaxprEqn, inputs: Sequence[Atom]) -> list[Atom]:
    """Appends the ops of all branches, and selects the outputs of one."""
    index, *operands = inputs
    branches = [closed_jaxpr(branch) for branch in eqn.params["branches"]]
    made = zip(*(trace.flatten(branch, operands) for branch in branches), strict=True)
    outputs = []
    for var, values in zip(eqn.outvars, made, strict=True):
        avals = [eqn.invars[0].aval, *[var.aval] * len(branches)]
        outputs.append(_call(trace, lax.select_n, [index, *values], avals))
    return outputs


def _call(
    trace: Flattener,
    function: Callable[..., jax.Array],
    values: Sequence[Atom],
    avals: Sequence[Any],
) -> Atom:
    """Appends the ops of a function of values of these shapes and dtypes."""
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    (out,) = trace.flatten(jax.make_jaxpr(function)(*shapes), values)
    return out
