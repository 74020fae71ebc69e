"""Partition of a network into the units that are reconstructed one after another."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from aquant_jax.errors import InputError
from aquant_jax.graph.ir import ALIASES, Graph, Op

_PRODUCTS = ("dot", "conv")
_POOLS = ("reduce_window", "argmax", "argmin", "cum", "gather", "concatenate")


class Block(NamedTuple):
    """One unit of reconstruction.

    Attributes:
      name: common path of its layers.
      layers: paths of its weighted ops.
      start: the values that it takes from the block before (none for the first).
      end: the values that it hands on; the model's output for the last.
      targets: the values whose error it minimises.
    """

    name: str
    layers: tuple[str, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    targets: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.layers)}"


def partition(
    graph: Graph,
    unit: str,
    patterns: Sequence[str] = (),
    sampled: frozenset[int] | None = None,
) -> list[Block]:
    """Split a folded graph.

    Args:
      graph: from `fold`.
      unit: "block" cuts where exactly one activation is live, so a residual block stays whole, and
        merges the layers of one repeated module (``blocks_3/...``); "layer" cuts after each layer,
        with its activation function, or the residual sum and normalisation behind it.
      patterns: path regexes that replace the merging by module: consecutive units whose layers
        match the same text of the same regex become one.
      sampled: the values whose first axis numbers the samples: only these can be cached, so only
        there the network is cut. None means all.

    Raises:
      InputError: a pattern matches no layer, or is no regular expression.
    """
    weighted = [index for index, op in enumerate(graph.ops) if op.layer is not None]
    live = _live_after(graph)
    allowed = [sampled is None or sampled.issuperset(values) for values in live]
    if unit != "layer":
        # Nor behind a view: its tensor would be quantized in the block that does not consume it.
        views = {out for op in graph.ops if op.name in ALIASES for out in op.outputs}
        single = [len(values) == 1 and not views.issuperset(values) for values in live]
        allowed = [ok and one for ok, one in zip(allowed, single, strict=True)]
    cuts = [c for c in _cuts(graph, live, weighted, allowed, unit == "layer") if c is not None]
    keys = _keys(graph, patterns)
    if unit != "layer":
        cuts = _merge(graph, weighted, cuts, keys)
    return _blocks(graph, live, weighted, cuts, sampled, per_layer=unit == "layer")


def _live_after(graph: Graph) -> list[tuple[int, ...]]:
    """Values that depend on input and weight, made by ops[:i + 1] and read by an op after."""
    last_read: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        for value in op.reads:
            last_read[value] = index
    alive: dict[int, None] = {}
    table = []
    for index, op in enumerate(graph.ops):
        for out in op.outputs:
            if out in graph.live and last_read.get(out, -1) > index:
                alive[out] = None
        table.append(tuple(v for v in alive if last_read[v] > index))
    return table


def _cuts(graph, live, weighted, allowed, per_layer):
    for a, b in itertools.pairwise(weighted):
        first = next((i for i in range(a, b) if allowed[i]), None)
        yield None if first is None else _advance(graph, live, allowed, first, b, per_layer)


def _advance(graph: Graph, live, allowed, first: int, stop: int, per_layer: bool) -> int:
    """The last cut position that only activation functions and normalisations separate from
    `first`; behind a normalisation, a single layer hands on nothing but its output."""
    best, shapes, normalised = first, _shapes(graph, live[first]), False
    for index in range(first + 1, stop):
        op = graph.ops[index]
        if _ends(graph, op, shapes):
            break
        normalised |= _reduces(op)
        wanted = shapes[:1] if per_layer and normalised else shapes
        if allowed[index] and _shapes(graph, live[index]) == wanted:
            best = index
    return best


def _ends(graph: Graph, op: Op, shapes) -> bool:
    """Whether an activation of one of the shapes goes no further than `op` as what it is.

    A statistic of a normalisation is reduced and reshaped, but comes back to the activation.
    """
    reads = [i for i in op.reads if i in graph.live]
    if not reads or op.name.startswith(_PRODUCTS):
        return bool(reads)
    moves = op.name in ALIASES or op.name.startswith(_POOLS)
    return moves and any(graph.avals[i].shape in shapes for i in reads)


def _reduces(op: Op) -> bool:
    return op.name.startswith("reduce") and not op.name.startswith(_POOLS)


def _shapes(graph, values):
    return sorted(graph.avals[v].shape for v in values)


def _keys(graph: Graph, patterns: Sequence[str]) -> dict[str, str | None]:
    """The text that layers must share to be merged, by path."""
    paths = [layer.path for layer in graph.layers]
    if not patterns:
        return {path: _module(path, paths) for path in paths}
    keys: dict[str, str | None] = dict.fromkeys(paths)
    for pattern in patterns:
        try:
            found = {path: match for path in paths if (match := re.search(pattern, path))}
        except re.error as error:
            raise InputError(f"blocks: {pattern!r} is not a regular expression: {error}") from error
        if not found:
            raise InputError(f"blocks: {pattern!r} matches none of the weights {paths}")
        keys.update({path: f"{pattern}:{match.group()}" for path, match in found.items()})
    return keys


def _module(path: str, paths: list[str]) -> str | None:
    """The repeated module around the layer's own: ``blocks_3`` of ``blocks_3/conv1/kernel``."""
    owner = path.split("/")[:-2]
    if not owner or not re.search(r"\d", owner[-1]):
        return None
    prefix = "/".join(owner) + "/"
    return None if all(other.startswith(prefix) for other in paths) else prefix


def _merge(graph, weighted, cuts, keys) -> list[int]:
    """Drop the cuts between layers with one key."""
    paths = {index: graph.ops[index].layer.path for index in weighted}
    groups: dict[str, list[int]] = {}
    for index in weighted:
        if keys[paths[index]] is not None:
            groups.setdefault(keys[paths[index]], []).append(index)
    inside = [(min(group), max(group)) for group in groups.values()]
    return [c for c in cuts if not any(low <= c < high for low, high in inside)]


def _blocks(graph, live, weighted, cuts, sampled, per_layer) -> list[Block]:
    made = {out: index for index, op in enumerate(graph.ops) for out in op.outputs}
    ids = dict.fromkeys(out for out in graph.outputs if isinstance(out, int))
    outputs = tuple(out for out in ids if out in graph.live)
    bounds = [-1, *cuts, len(graph.ops) - 1]
    blocks, start = [], ()
    for low, high in itertools.pairwise(bounds):
        inside = [graph.ops[i] for i in weighted if low < i <= high]
        last = high == bounds[-1]
        # Finished outputs are handed on to the last block, whose end is the network's output.
        done = (out for out in outputs if made[out] <= high and out not in live[high])
        end = (*live[high], *done)
        layers = tuple(op.layer.path for op in inside)
        targets = tuple(value for value in end if value not in start) or end
        between = graph.ops[made[inside[-1].outputs[0]] + 1 : high + 1]
        if per_layer and not last and not any(_reduces(op) for op in between):
            target = _layer_target(graph, inside[-1], end)
            targets = target if sampled is None or sampled.issuperset(target) else targets
        blocks.append(Block(_common(layers), layers, start, end, targets))
        start = end
    return blocks


def _layer_target(graph, op, end) -> tuple[int, ...]:
    """The layer's output, after the activation function where nothing else reads it before."""
    consumers, (value,) = graph.consumers(), op.outputs
    while value not in end and len(consumers.get(value, ())) == 1:
        step = graph.ops[consumers[value][0]]
        dynamic = [i for i in step.reads if i in graph.dynamic]
        if step.layer is not None or len(dynamic) != 1 or len(step.outputs) != 1:
            break
        if graph.avals[step.outputs[0]].shape != graph.avals[value].shape:
            break
        (value,) = step.outputs
    return (value,)


def _common(paths: tuple[str, ...]) -> str:
    """The longest common module path, or the layer's own module."""
    split = [path.split("/") for path in paths]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if len(paths) == 1 and len(common) > 1:
        common = common[:-1]
    return "/".join(common) or " + ".join(dict.fromkeys(parts[0] for parts in split))
