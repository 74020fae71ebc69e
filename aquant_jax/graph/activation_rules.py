"""Activations that no weighted op reads but that may be quantized: where they are in a graph.

In an attention network these are the operands of the products of two activations, the sums of
residual branches, and what normalisations, softmax and activation functions give. They are found by
what is computed, not by names of modules, so any network has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from aquant_jax.graph.ir import STATIC_GATHER, Graph, Op
from aquant_jax.graph.subgraph import root

_PRODUCTS = {"dot_general", "conv_general_dilated"}
_MOVES = {*_PRODUCTS, "transpose", "rev", "gather", STATIC_GATHER, "sort", "concatenate"}
_PARTS = {"slice", "split"}
_SUMS = {"add", "sub", "add_any"}
_ROOTS = {"rsqrt", "sqrt"}
_POWERS = {"exp", "exp2"}
_NONLINEAR = {
    "tanh", "erf", "erfc", "logistic", "max", "min", "clamp", "sin", "cos", "log1p", "select_n",
}  # fmt: skip


class Site(NamedTuple):
    """A place in a network: the tensor there, and how users name it.

    Attributes:
      value: id of the tensor that the rule's value is a view of.
      key: ``PATH:RULE``: the last weighted op that it comes from (``input`` if none), and the rule
        that found it; with ``#2``, ``#3`` ... when there are several.
    """

    value: int
    key: str


def find_sites(graph: Graph, rules: Sequence[str]) -> list[Site]:
    """The sites of the named rules, in the order of the graph; each tensor once.

    Args:
      graph: folded or not.
      rules: names in `RULES`; of a tensor that several find, the first in their order names it.
    """
    view = _View(graph)
    order = {op.layer.path: i for i, op in enumerate(graph.ops) if op.layer is not None}
    made = {out: i for i, op in enumerate(graph.ops) for out in op.outputs}
    found: dict[int, str] = {}
    for rule in rules:
        for value in RULES[rule](view):
            tensor = root(view.producers, value)
            if tensor in graph.live and jnp.issubdtype(graph.avals[tensor].dtype, jnp.floating):
                found.setdefault(tensor, rule)
    used: dict[str, int] = {}
    sites = []
    for value in sorted(found, key=lambda v: made.get(v, -1)):
        paths = sorted(view.sources.get(value, ()), key=order.__getitem__)
        key = f"{paths[-1] if paths else 'input'}:{found[value]}"
        used[key] = used.get(key, 0) + 1
        sites.append(Site(value, key if used[key] == 1 else f"{key}#{used[key]}"))
    return sites


def weighted_sources(graph: Graph) -> dict[int, frozenset[str]]:
    """The layers that each value comes from, with no other layer between."""
    sources: dict[int, frozenset[str]] = {}
    for op in graph.ops:
        reached = frozenset().union(*(sources.get(value, frozenset()) for value in op.reads))
        if op.layer is not None:
            reached = frozenset({op.layer.path})
        sources.update(dict.fromkeys(op.outputs, reached))
    return sources


class _View:
    """A graph with what the rules ask of it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.sources = weighted_sources(graph)
        self.plain = [op for op in graph.ops if op.layer is None]

    def live(self, op: Op) -> list[int]:
        return [value for value in dict.fromkeys(op.reads) if value in self.graph.live]

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.avals[value].shape

    def climbs_to(self, value: int, found: Callable[[Op], bool]) -> bool:
        """Whether an op that satisfies `found` stands above, each with one live operand."""
        while (op := self.producers.get(value)) is not None:
            live = self.live(op)
            if op.layer is not None or len(live) != 1:
                return False
            if found(op):
                return True
            (value,) = live
        return False

    def follow(self, value: int) -> int:
        """The end of the element-wise computation that `value` is part of.

        It goes on while all that reads a value is one op of its shape, which combines it with
        weights or with what comes from the same layers.
        """
        while (step := self._next(value)) is not None:
            (value,) = step.outputs
        return value

    def _next(self, value: int) -> Op | None:
        readers = [self.graph.ops[i] for i in self.consumers.get(value, ())]
        if len(readers) != 1 or value in self.graph.outputs:
            return None
        (step,) = readers
        if step.layer is not None or step.name in _MOVES or len(step.outputs) != 1:
            return None
        live = self.live(step)
        alike = all(self.sources[i] == self.sources[value] for i in live)
        masked = any(i in self.graph.dynamic for i in step.reads if i not in live)
        same = self.shape(step.outputs[0]) == self.shape(value)
        return step if alike and same and not masked else None

    def element_wise(self, op: Op) -> bool:
        """Whether `op` computes every element from those of weighted ops at the same place.

        Statistics of fewer elements may have a part in it, as in a normalisation.
        """
        stack, seen = [(op, math.prod(self.shape(op.outputs[0])))], set()
        while stack:
            step, size = stack.pop()
            if step.layer is not None or step.outputs[0] in seen:
                continue
            seen.add(step.outputs[0])
            live = self.live(step)
            if step.name in _PARTS and len(live) == 1:  # a gate and its values from one layer
                size = math.prod(self.shape(live[0]))
            whole = [i for i in live if math.prod(self.shape(i)) == size]
            if not whole or step.name in _MOVES or any(i not in self.producers for i in whole):
                return False
            stack.extend((self.producers[i], size) for i in whole)
        return True


def _matmuls(view: _View) -> Iterator[int]:
    """Both operands of a product of two activations."""
    for op in view.plain:
        if op.name in _PRODUCTS and all(i in view.graph.live for i in op.inputs):
            yield from op.inputs


def _sums(view: _View) -> Iterator[int]:
    """Sums of two branches: of tensors that do not come from the same layers."""
    for op in view.plain:
        live = view.live(op)
        if op.name in _SUMS and len(live) == 2 and len(set(map(view.shape, live))) == 1:
            left, right = (view.sources[value] for value in live)
            if left != right:
                yield op.outputs[0]


def _softmaxes(view: _View) -> Iterator[int]:
    """An exponential over its own sum."""
    for op in view.plain:
        live = view.live(op)
        if op.name != "div" or len(live) != 2:
            continue
        power, total = live
        made = view.producers.get(power)

        def is_sum(above: Op, power=power) -> bool:
            return above.name == "reduce_sum" and power in above.reads

        if made is not None and made.name in _POWERS and view.climbs_to(total, is_sum):
            yield op.outputs[0]


def _norms(view: _View) -> Iterator[int]:
    """A tensor over a root of what it is measured by, with the scale and offset that follow."""
    for op in view.plain:
        live = view.live(op)
        if op.name in ("mul", "div") and len(live) == 2:
            rooted = (view.climbs_to(value, lambda above: above.name in _ROOTS) for value in live)
            if any(rooted):
                yield view.follow(op.outputs[0])


def _activations(view: _View) -> Iterator[int]:
    """What an activation function gives: a non-linear function of every element."""
    for op in view.plain:
        if op.primitives & _NONLINEAR and view.live(op) and view.element_wise(op):
            yield view.follow(op.outputs[0])


RULES: dict[str, Callable[[_View], Iterator[int]]] = {
    "matmul": _matmuls,
    "sum": _sums,
    "norm": _norms,
    "softmax": _softmaxes,
    "activation": _activations,
}
