"""Which outputs of a network reconstruction can see: those whose values belong to samples.

Others, such as an auxiliary loss, are computed when the network runs, and are no target. Weighted
ops that reach no target stay float.
"""

from __future__ import annotations

from collections.abc import Sequence

from aquant_jax.graph.ir import Graph, Op, Unquantized
from aquant_jax.graph.subgraph import extract_subgraph

REASON = "no output with samples depends on it"


def find_targets(graph: Graph, other: Graph) -> tuple[int, ...]:
    """The positions of the outputs that are targets.

    Args:
      graph: the network.
      other: the same function, traced with more samples. An output that depends on the input and on
        a weight, and has the same shape in both, has no samples.
    """

    def belongs(position: int) -> bool:
        value, more = graph.outputs[position], other.outputs[position]
        if not isinstance(value, int) or value not in graph.weight_dependent:
            return True
        return not isinstance(more, int) or graph.avals[value].shape != other.avals[more].shape

    return tuple(position for position in range(len(graph.outputs)) if belongs(position))


def focus(graph: Graph, targets: Sequence[int] | None) -> Graph:
    """`graph` with these outputs as targets, and without layers that reach none of them.

    Args:
      graph: from a trace; not folded.
      targets: positions of outputs; None for all of them.
    """
    if targets is None or len(targets) == len(graph.outputs):
        return graph
    graph = graph._replace(targets=tuple(graph.outputs[position] for position in targets))
    needed = {out for op in needed_ops(graph) for out in op.outputs}
    lost = [op for op in graph.ops if op.layer is not None and not needed.intersection(op.outputs)]
    float_ops = {op.outputs: op._replace(layer=None) for op in lost}
    return graph._replace(
        ops=tuple(float_ops.get(op.outputs, op) for op in graph.ops),
        unquantized=(
            *graph.unquantized, *(Unquantized(op.layer.path, op.name, REASON) for op in lost),
        ),
    )  # fmt: skip


def needed_ops(graph: Graph) -> tuple[Op, ...]:
    """The ops that the targets depend on."""
    return extract_subgraph(graph, (), graph.target_outputs).ops
