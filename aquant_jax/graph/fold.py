"""Fold the affine chain after a conv or dense (batch norm, bias, scale) into its weight and bias.

The fold matches no pattern of batch norm. The chain is the run of per-channel affine ops, each the
only reader of the one before; following it gives the slope and the offset of every channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from aquant_jax.graph.ir import Atom, Graph, Layer, Op
from aquant_jax.graph.subgraph import constant_values

_AFFINE = {"mul", "add", "sub", "div", "neg", "convert_element_type", "copy", "copy_p"}


class Folded(NamedTuple):
    """Weight and bias of a layer after folding.

    Attributes:
      weight: float32, the operand of the op with the slope multiplied in; a complex operand stays
        complex, and nothing is folded into it.
      bias: float32, one value per output channel, shaped like the op's channel axes.
    """

    weight: np.ndarray
    bias: np.ndarray


class _Chain(NamedTuple):
    """The affine ops that follow a weighted op.

    Attributes:
      ops: their indices in the graph.
      operands: the other operand of each; None for an op of one operand.
    """

    ops: tuple[int, ...]
    operands: tuple[Atom | None, ...]


def fold(graph: Graph) -> Graph:
    """`graph` without its affine chains: each weighted op yields its chain's output directly."""
    consumers, producers = graph.consumers(), graph.producers()
    ops: list[Op | None] = list(graph.ops)
    for index, op in enumerate(graph.ops):
        if op.layer is None:
            continue
        chain = _chain(graph, consumers, producers, op)
        if chain.ops:
            ops[index] = op._replace(outputs=graph.ops[chain.ops[-1]].outputs)
            for absorbed in chain.ops:
                ops[absorbed] = None
    return graph._replace(ops=tuple(op for op in ops if op is not None))


def folded_weights(graph: Graph, variables: Any) -> dict[str, Folded]:
    """Weight and bias of every layer after folding, by weight path.

    Args:
      graph: not folded.
      variables: the variables of the network.
    """
    consumers, producers = graph.consumers(), graph.producers()
    chains = {
        op.layer.path: (op, _chain(graph, consumers, producers, op))
        for op in graph.ops if op.layer is not None
    }  # fmt: skip
    ids = {op.layer.weight for op, _ in chains.values()}
    ids |= {i for _, chain in chains.values() for i in chain.operands if isinstance(i, int)}
    values = constant_values(graph, variables, sorted(ids))
    return {path: _fold_one(graph, op, chain, values) for path, (op, chain) in chains.items()}


def _chain(
    graph: Graph, consumers: Mapping[int, list[int]], producers: Mapping[int, Op], op: Op
) -> _Chain:
    outputs = {out for out in graph.outputs if isinstance(out, int)}
    absorbed, operands = [], []
    if op.layer.kind == "experts":  # its output does not tell which expert made what
        return _Chain((), ())
    (value,) = op.outputs
    while value not in outputs and len(consumers.get(value, ())) == 1:
        (index,) = consumers[value]
        step = graph.ops[index]
        if step.layer is not None or not _is_affine(graph, producers, op, step, value):
            break
        absorbed.append(index)
        others = [i for i in step.inputs if not (isinstance(i, int) and i == value)]
        operands.append(others[0] if others else None)
        (value,) = step.outputs
    return _Chain(tuple(absorbed), tuple(operands))


def _is_affine(graph: Graph, producers: Mapping[int, Op], op: Op, step: Op, value: int) -> bool:
    """Whether `step` maps `value` by a slope and an offset per output channel of `op`."""
    if step.name not in _AFFINE or list(step.inputs).count(value) != 1:
        return False
    if not jnp.issubdtype(graph.avals[step.outputs[0]].dtype, jnp.floating):
        return False
    if graph.avals[step.outputs[0]].shape != graph.avals[value].shape:
        return False
    if step.name == "div" and step.inputs[0] != value:
        return False
    others = [i for i in step.inputs if i != value]
    return all(_per_channel(graph, producers, op.layer, i) for i in others)


def _per_channel(graph: Graph, producers: Mapping[int, Op], layer: Layer, atom: Atom) -> bool:
    """Whether a static operand varies along the layer's output channels only."""
    if not isinstance(atom, int):
        return np.ndim(atom.val) == 0
    if atom in graph.dynamic:
        return False
    shape = graph.avals[atom].shape
    wide = {axis for axis, size in enumerate(shape) if size != 1}
    source = producers.get(atom)
    if source is not None and source.name == "broadcast_in_dim":
        dims = source.params["broadcast_dimensions"]
        inner = () if not source.reads else graph.avals[source.reads[0]].shape
        wide = {axis for axis, size in zip(dims, inner, strict=False) if size != 1}
    return not shape or wide <= set(layer.output_axes)


def _fold_one(graph: Graph, op: Op, chain: _Chain, values: Mapping[int, Any]) -> Folded:
    layer = op.layer
    channels = tuple(layer.weight_shape[axis] for axis in layer.channel_axes)
    slope, offset = np.ones(channels), np.zeros(channels)
    for index, operand in zip(chain.ops, chain.operands, strict=True):
        step = graph.ops[index]
        value = None if operand is None else _vector(layer, operand, values, channels)
        slope, offset = _follow(step, operand, slope, offset, value)
    if np.iscomplexobj(values[layer.weight]):
        return Folded(np.asarray(values[layer.weight]), offset.astype(np.float32))
    weight = np.asarray(values[layer.weight], np.float64)
    shape = [1] * weight.ndim
    for axis, size in zip(layer.channel_axes, channels, strict=True):
        shape[axis] = size
    order = np.argsort(layer.channel_axes)
    weight = weight * np.transpose(slope, order).reshape(shape)
    return Folded(weight.astype(np.float32), offset.astype(np.float32))


def _follow(
    step: Op, operand: Atom | None, slope: np.ndarray, offset: np.ndarray, value: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset of the chain after one more op, whose other operand has this value."""
    if step.name == "mul":
        return slope * value, offset * value
    if step.name == "div":
        return slope / value, offset / value
    if step.name == "add":
        return slope, offset + value
    if step.name == "sub":
        negated = step.inputs[0] is operand
        return (-slope, value - offset) if negated else (slope, offset - value)
    if step.name == "neg":
        return -slope, -offset
    return slope, offset


def _vector(
    layer: Layer, operand: Atom, values: Mapping[int, Any], channels: tuple[int, ...]
) -> np.ndarray:
    """A per-channel operand as a scalar or as an array of the channels' shape."""
    if not isinstance(operand, int):
        return np.asarray(operand.val, np.float64)
    array = np.asarray(values[operand], np.float64)
    if array.ndim == 0:
        return array
    keep = tuple(slice(None) if axis in layer.output_axes else 0 for axis in range(array.ndim))
    return np.broadcast_to(array[keep], channels)
