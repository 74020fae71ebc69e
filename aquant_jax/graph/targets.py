"""Which outputs of a network reconstruction can see: those whose values belong to samples.

Others, such as an auxiliary loss, are computed when the network runs, and are no target. Weighted
ops that reach no target stay float, and so do those whose weight has an axis of samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from aquant_jax.graph.ir import Graph, Op, Unquantized
from aquant_jax.graph.subgraph import extract_subgraph

REASON = "no output with samples depends on it"
REPEATED = "its weight is repeated for every sample"


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


def find_repeated(graph: Graph, other: Graph) -> tuple[Unquantized, ...]:
    """The weighted ops whose weight has an axis of samples: learned queries of an attention.

    Args:
      graph: the network.
      other: the same function, traced with more samples.
    """
    shapes = {layer.path: layer.weight_shape for layer in other.layers}
    return tuple(
        Unquantized(op.layer.path, op.name, REPEATED)
        for op in graph.ops
        if op.layer is not None and shapes.get(op.layer.path) != op.layer.weight_shape
    )


def focus(graph: Graph, targets: Sequence[int] | None, floats: Sequence[Unquantized] = ()) -> Graph:
    """`graph` with these outputs as targets, and without layers that reach none of them.

    Args:
      graph: from a trace; not folded.
      targets: positions of outputs; None for all of them.
      floats: weighted ops that stay float for another reason.
    """
    graph = _without_layers(graph, floats)
    if targets is None or len(targets) == len(graph.outputs):
        return graph
    graph = graph._replace(targets=tuple(graph.outputs[position] for position in targets))
    needed = {out for op in needed_ops(graph) for out in op.outputs}
    lost = [op for op in graph.ops if op.layer is not None and not needed.intersection(op.outputs)]
    return _without_layers(graph, [Unquantized(op.layer.path, op.name, REASON) for op in lost])


def _without_layers(graph: Graph, floats: Sequence[Unquantized]) -> Graph:
    """`graph` with these weighted ops as ordinary ones, which it names."""
    named = {op.path: op for op in floats}
    lost = [layer.path for layer in graph.layers if layer.path in named]
    return graph._replace(
        ops=tuple(
            op._replace(layer=None) if op.layer is not None and op.layer.path in named else op
            for op in graph.ops
        ),
        unquantized=(*graph.unquantized, *(named[path] for path in lost)),
    )


def needed_ops(graph: Graph) -> tuple[Op, ...]:
    """The ops that the targets depend on."""
    return extract_subgraph(graph, (), graph.target_outputs).ops
