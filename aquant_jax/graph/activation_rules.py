"""Activation rules: they find activations to quantize besides the inputs of weighted ops.

In an attention network these are the operands of products of two activations, the sums of residual
branches, and the results of normalisations, softmax and activation functions. The rules match the
computation, not the names of modules, so they apply to any network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from aquant_jax.graph.ir import INVERSE, PRODUCTS, STATIC_GATHER, TRANSFORM, Graph, Op
from aquant_jax.graph.subgraph import source_tensor
from aquant_jax.graph.targets import needed_ops

_MOVES = {
    *PRODUCTS, "transpose", "rev", "gather", STATIC_GATHER, "sort", "concatenate", INVERSE,
}  # fmt: skip
_PARTS = {"slice", "split"}
_SUMS = {"add", "sub", "add_any"}
_ROOTS = {"rsqrt", "sqrt"}
_POWERS = {"exp", "exp2"}
_NONLINEAR = {
    "tanh", "erf", "erfc", "logistic", "max", "min", "clamp", "sin", "cos", "log1p", "select_n",
}  # fmt: skip


class ActivationMatch(NamedTuple):
    """A tensor that a rule matches, and its name.

    Attributes:
      value: id of the tensor.
      key: ``PATH:RULE``: the last weighted op that the tensor comes from (``input`` if none) and
        the rule that matches it; with ``#2``, ``#3`` ... when there are several.
    """

    value: int
    key: str


def match_rules(graph: Graph, rules: Sequence[str]) -> list[ActivationMatch]:
    """The tensors that the named rules match, in the order of the graph; each tensor once.

    Args:
      graph: folded or not.
      rules: names in `RULES`; where several match a tensor, the first of them names it.
    """
    view = _View(graph)
    order = {op.layer.path: i for i, op in enumerate(graph.ops) if op.layer is not None}
    made = {out: i for i, op in enumerate(graph.ops) for out in op.outputs}
    transformed = {op.reads[0]: op.outputs[0] for op in graph.ops if op.name == TRANSFORM}
    made_for_targets = {out for op in needed_ops(graph) for out in op.outputs}
    known = graph.weight_dependent & made_for_targets
    rule_of: dict[int, str] = {}
    for rule in rules:
        for value in RULES[rule](view):
            tensor = source_tensor(view.producers, value)
            tensor = transformed.get(tensor, tensor)
            if tensor in known and jnp.issubdtype(graph.avals[tensor].dtype, jnp.floating):
                rule_of.setdefault(tensor, rule)
    used: dict[str, int] = {}
    matches = []
    for value in sorted(rule_of, key=lambda v: made.get(v, -1)):
        paths = sorted(view.sources.get(value, ()), key=order.__getitem__)
        key = f"{paths[-1] if paths else 'input'}:{rule_of[value]}"
        used[key] = used.get(key, 0) + 1
        matches.append(ActivationMatch(value, key if used[key] == 1 else f"{key}#{used[key]}"))
    return matches


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
    """A graph, and the questions that the rules ask about it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers, self.consumers = graph.producers(), graph.consumers()
        self.sources = weighted_sources(graph)
        self.plain = [op for op in graph.ops if op.layer is None]

    def operands(self, op: Op) -> list[int]:
        """The weight-dependent values that `op` reads, each once."""
        return [value for value in dict.fromkeys(op.reads) if value in self.graph.weight_dependent]

    def shape(self, value: int) -> tuple[Any, ...]:
        return self.graph.avals[value].shape

    def climbs_to(self, value: int, matches: Callable[[Op], bool]) -> bool:
        """Whether `value` comes from an op that `matches`.

        The ops on the way, that op included, have one weight-dependent operand each.
        """
        while (op := self.producers.get(value)) is not None:
            operands = self.operands(op)
            if op.layer is not None or len(operands) != 1:
                return False
            if matches(op):
                return True
            (value,) = operands
        return False

    def follow(self, value: int) -> int:
        """The end of the element-wise computation that `value` is part of.

        The computation continues while the only reader of a value is one op of the same shape that
        combines it with weights or with values from the same layers.
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
        operands = self.operands(step)
        alike = all(self.sources[i] == self.sources[value] for i in operands)
        masked = any(i in self.graph.dynamic for i in step.reads if i not in operands)
        same = self.shape(step.outputs[0]) == self.shape(value)
        return step if alike and same and not masked else None

    def element_wise(self, op: Op) -> bool:
        """Whether every element of `op` comes from elements of weighted ops at the same index.

        Statistics of fewer elements may contribute, as in a normalisation.
        """
        stack, seen = [(op, math.prod(self.shape(op.outputs[0])))], set()
        while stack:
            step, size = stack.pop()
            if step.layer is not None or step.outputs[0] in seen:
                continue
            seen.add(step.outputs[0])
            operands = self.operands(step)
            if step.name in _PARTS and len(operands) == 1:  # a gate and its values from one layer
                size = math.prod(self.shape(operands[0]))
            full = [i for i in operands if math.prod(self.shape(i)) == size]
            if not full or step.name in _MOVES or any(i not in self.producers for i in full):
                return False
            stack.extend((self.producers[i], size) for i in full)
        return True


def _matmuls(view: _View) -> Iterator[int]:
    """Both operands of a product of two activations."""
    for op in view.plain:
        if op.name in PRODUCTS and all(i in view.graph.weight_dependent for i in op.inputs):
            yield from op.reads


def _sums(view: _View) -> Iterator[int]:
    """Sums of two branches: of tensors that come from different layers."""
    for op in view.plain:
        operands = view.operands(op)
        if op.name in _SUMS and len(operands) == 2 and len(set(map(view.shape, operands))) == 1:
            left, right = (view.sources[value] for value in operands)
            if left != right:
                yield op.outputs[0]


def _softmaxes(view: _View) -> Iterator[int]:
    """Exponentials divided by their own sum."""
    for op in view.plain:
        operands = view.operands(op)
        if op.name != "div" or len(operands) != 2:
            continue
        power, total = operands
        made = view.producers.get(power)

        def is_sum(above: Op, power: int = power) -> bool:
            return above.name == "reduce_sum" and power in above.reads

        if made is not None and made.name in _POWERS and view.climbs_to(total, is_sum):
            yield op.outputs[0]


def _norms(view: _View) -> Iterator[int]:
    """Tensors divided by the root of a statistic, with the scale and offset that follow."""
    for op in view.plain:
        operands = view.operands(op)
        if op.name in ("mul", "div") and len(operands) == 2:
            rooted = (
                view.climbs_to(value, lambda above: above.name in _ROOTS) for value in operands
            )
            if any(rooted):
                yield view.follow(op.outputs[0])


def _activations(view: _View) -> Iterator[int]:
    """Results of activation functions: non-linear functions of every element."""
    for op in view.plain:
        if op.primitives & _NONLINEAR and view.operands(op) and view.element_wise(op):
            yield view.follow(op.outputs[0])


RULES: dict[str, Callable[[_View], Iterator[int]]] = {
    "matmul": _matmuls,
    "sum": _sums,
    "norm": _norms,
    "softmax": _softmaxes,
    "activation": _activations,
}
