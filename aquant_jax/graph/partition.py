"""Partition of a network into blocks, which are reconstructed one after another."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from aquant_jax.errors import InputError
from aquant_jax.graph.ir import ALIASES, Graph, Op
from aquant_jax.graph.targets import needed_ops

_PRODUCTS = ("dot", "conv", "ragged_dot")
_LONG = 8  # more layers than a residual branch has
_POOLS = ("reduce_window", "argmax", "argmin", "cum", "gather", "concatenate")


class Block(NamedTuple):
    """One block of a network.

    Attributes:
      name: common path of its layers.
      layers: paths of its weighted ops.
      start: the values that it takes from the previous block; none for the first block.
      end: the values that the next block takes; the targets of the network for the last block.
      targets: the values whose error reconstruction minimises.
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
    granularity: str,
    patterns: Sequence[str] = (),
    sampled: frozenset[int] | None = None,
) -> list[Block]:
    """Split a folded graph.

    Args:
      graph: from `fold`.
      granularity: "block" cuts where a single activation crosses, so a residual block stays whole
        (an activation that earlier blocks have handed on, for many layers, may cross beside it),
        and merges the layers of one repeated module (``blocks_3/...``). "layer" cuts after each
        layer and the activation function, or residual sum and normalisation, that follows it.
      patterns: path regexes that replace the merging by module: consecutive layers that match the
        same text of the same regex form one block.
      sampled: the values whose first axis numbers the samples. Only these can be cached, so the
        network is cut nowhere else. None allows all values.

    Raises:
      InputError: a pattern matches no layer, or is not a regular expression.
    """
    graph = graph._replace(ops=needed_ops(graph), outputs=graph.target_outputs)
    weighted = [index for index, op in enumerate(graph.ops) if op.layer is not None]
    crossing = crossing_values(graph)
    allowed = [sampled is None or sampled.issuperset(values) for values in crossing]
    # A loop is never cut.
    loops = [op.loop and op.loop.outermost for op in graph.ops]
    for index, (loop, after) in enumerate(itertools.pairwise(loops)):
        allowed[index] &= loop is None or loop != after
    if granularity != "layer":
        allowed = _single(graph, crossing, allowed)
    cuts = list(_cuts(graph, crossing, weighted, allowed, granularity == "layer"))
    keys = _keys(graph, patterns)
    if granularity != "layer":
        cuts = _merge(graph, weighted, cuts, keys)
    return _blocks(graph, crossing, weighted, cuts, sampled, per_layer=granularity == "layer")


def crossing_values(graph: Graph) -> list[tuple[int, ...]]:
    """For every i, the weight-dependent values that ops[:i + 1] make and later ops read."""
    last_read: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        for value in op.reads:
            last_read[value] = index
    pending: dict[int, None] = {}
    table = []
    for index, op in enumerate(graph.ops):
        for out in op.outputs:
            if out in graph.weight_dependent and last_read.get(out, -1) > index:
                pending[out] = None
        pending = {value: None for value in pending if last_read[value] > index}
        table.append(tuple(pending))
    return table


def _single(
    graph: Graph, crossing: Sequence[tuple[int, ...]], allowed: Sequence[bool]
) -> list[bool]:
    """The positions among those `allowed` where a single new value crosses.

    Besides it, values may cross that were the single one before and stay live over more than
    `_LONG` layers: the output of an encoder, or a skip connection of a UNet.
    """
    lives = _lives(graph)
    # No cut behind a view: its tensor would be quantized in a block that does not consume it.
    views = {out for op in graph.ops if op.name in ALIASES for out in op.outputs}
    known: set[int] = set()
    single = []
    for values, ok in zip(crossing, allowed, strict=True):
        new = [value for value in values if value not in known or lives[value] <= _LONG]
        single.append(ok and len(new) == 1 and not views.issuperset(new))
        known.update(new if single[-1] else ())
    return single


def _lives(graph: Graph) -> dict[int, int]:
    """For every value, how many weighted ops run from the one that makes it to its last reader."""
    count, born, lives = 0, {}, {}
    for op in graph.ops:
        lives.update({value: count - born[value] for value in op.reads if value in born})
        count += op.layer is not None
        born.update(dict.fromkeys(op.outputs, count))
        lives.update(dict.fromkeys(op.outputs, 0))
    return lives


def _cuts(
    graph: Graph,
    crossing: Sequence[tuple[int, ...]],
    weighted: Sequence[int],
    allowed: Sequence[bool],
    per_layer: bool,
) -> Iterator[int]:
    """Indices of the ops after which the network is cut, at most one between two layers."""
    for a, b in itertools.pairwise(weighted):
        first = next((i for i in range(a, b) if allowed[i]), None)
        if first is not None:
            yield _advance(graph, crossing, allowed, (first, b), per_layer)


def _advance(
    graph: Graph,
    crossing: Sequence[tuple[int, ...]],
    allowed: Sequence[bool],
    bounds: tuple[int, int],
    per_layer: bool,
) -> int:
    """The last position for a cut in `bounds`.

    Only activation functions and normalisations stand between it and the first position. With
    `per_layer`, only the layer's output may cross behind a normalisation.
    """
    first, stop = bounds
    best, shapes, normalised = first, _shapes(graph, crossing[first]), False
    for index in range(first + 1, stop):
        op = graph.ops[index]
        if _ends(graph, op, shapes):
            break
        normalised |= _reduces(op)
        wanted = shapes[:1] if per_layer and normalised else shapes
        if allowed[index] and _shapes(graph, crossing[index]) == wanted:
            best = index
    return best


def _ends(graph: Graph, op: Op, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether `op` ends the activations of these shapes: it multiplies, reshapes or pools them.

    The statistics of a normalisation have other shapes, so reshaping those ends nothing.
    """
    reads = [i for i in op.reads if i in graph.weight_dependent]
    if not reads or op.name.startswith(_PRODUCTS):
        return bool(reads)
    moves = op.name in ALIASES or op.name.startswith(_POOLS)
    return moves and any(graph.avals[i].shape in shapes for i in reads)


def _reduces(op: Op) -> bool:
    """Whether `op` computes a statistic, as a normalisation does."""
    return op.name.startswith("reduce") and not op.name.startswith(_POOLS)


def _shapes(graph: Graph, values: Sequence[int]) -> list[tuple[int, ...]]:
    return sorted(graph.avals[v].shape for v in values)


def _keys(graph: Graph, patterns: Sequence[str]) -> dict[str, str | None]:
    """The text that layers must share to be merged, by path; None keeps a layer apart."""
    paths = [layer.path for layer in graph.layers]
    if not patterns:
        weighted = [op for op in graph.ops if op.layer is not None]
        return {op.layer.path: op.iteration or _module(op.layer.path, paths) for op in weighted}
    keys: dict[str, str | None] = dict.fromkeys(paths)
    for pattern in patterns:
        try:
            matches = {path: match for path in paths if (match := re.search(pattern, path))}
        except re.error as error:
            raise InputError(f"blocks: {pattern!r} is not a regular expression: {error}") from error
        if not matches:
            raise InputError(f"blocks: {pattern!r} matches none of the weights {paths}")
        keys.update({path: f"{pattern}:{match.group()}" for path, match in matches.items()})
    return keys


def _module(path: str, paths: list[str]) -> str | None:
    """The repeated module around the layer's own: ``blocks_3`` of ``blocks_3/conv1/kernel``."""
    owner = path.split("/")[:-2]
    if not owner or not re.search(r"\d", owner[-1]):
        return None
    prefix = "/".join(owner) + "/"
    return None if all(other.startswith(prefix) for other in paths) else prefix


def _merge(
    graph: Graph, weighted: Sequence[int], cuts: Sequence[int], keys: Mapping[str, str | None]
) -> list[int]:
    """The cuts without those between layers of one key."""
    groups: dict[str, list[int]] = {}
    for index in weighted:
        key = keys[graph.ops[index].layer.path]
        if key is not None:
            groups.setdefault(key, []).append(index)
    inside = [(min(group), max(group)) for group in groups.values()]
    return [c for c in cuts if not any(low <= c < high for low, high in inside)]


def _blocks(
    graph: Graph,
    crossing: Sequence[tuple[int, ...]],
    weighted: Sequence[int],
    cuts: Sequence[int],
    sampled: frozenset[int] | None,
    per_layer: bool,
) -> list[Block]:
    """The blocks between the cuts."""
    made = {out: index for index, op in enumerate(graph.ops) for out in op.outputs}
    ids = dict.fromkeys(out for out in graph.outputs if isinstance(out, int))
    outputs = tuple(out for out in ids if out in graph.weight_dependent)
    bounds = [-1, *cuts, len(graph.ops) - 1]
    blocks, start = [], ()
    for low, high in itertools.pairwise(bounds):
        inside = [graph.ops[i] for i in weighted if low < i <= high]
        last = high == bounds[-1]
        # Finished outputs are passed on to the last block, whose end is the network's output.
        done = (out for out in outputs if made[out] <= high and out not in crossing[high])
        end = (*crossing[high], *done)
        layers = tuple(op.layer.path for op in inside)
        targets = tuple(value for value in end if value not in start) or end
        between = graph.ops[made[inside[-1].outputs[0]] + 1 : high + 1]
        plain = inside[-1].loop is None and not any(_reduces(op) for op in between)
        if per_layer and not last and plain:
            target = _layer_target(graph, inside[-1], end)
            targets = target if sampled is None or sampled.issuperset(target) else targets
        blocks.append(Block(_common(layers), layers, start, end, targets))
        start = end
    return blocks


def _layer_target(graph: Graph, op: Op, end: Sequence[int]) -> tuple[int, ...]:
    """The layer's output, or that of its activation function if nothing else reads the former."""
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
    """The longest common module path, of a single layer that of its module, and the step of a loop
    that all are part of."""
    split = [path.split("/") for path in paths]
    steps = {path[path.find("[") :] if path.endswith("]") else "" for path in paths}
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if len(paths) == 1 and len(common) > 1:
        common = common[:-1]
    name = "/".join(common) or " + ".join(dict.fromkeys(parts[0] for parts in split))
    return name + (steps.pop() if len(steps) == 1 and not name.endswith("]") else "")
