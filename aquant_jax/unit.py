"""One unit of a network, ready to run: its program, its layers and its quantized tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.graph import Graph
from aquant_jax.layer import LayerSpec, run_layer
from aquant_jax.numerics import TensorState, fake_quantize
from aquant_jax.program import Program, cut, root, run, same_elements, signature
from aquant_jax.recipe import Override, Recipe


class Tensor(NamedTuple):
    """A quantized activation tensor: the path of its first weighted reader, and its bits."""

    key: str
    bits: int


class Unit(NamedTuple):
    """A slice of a folded graph with its quantizers.

    Attributes:
      program: what it computes.
      specs: one per weighted op of the program.
      tensors: the quantized tensors that it reads.
      tensor_of: index into `tensors` of every value that is a view of one.
      avals: shape and dtype of the graph's values.
      producers: the graph's ops by output.
      key: equal for units that compute the same function.
    """

    program: Program
    specs: tuple[LayerSpec, ...]
    tensors: tuple[Tensor, ...]
    tensor_of: dict[int, int]
    avals: dict[int, Any]
    producers: dict[int, Any]
    key: str


def make_unit(graph: Graph, specs: dict[str, LayerSpec], live, outputs) -> Unit:
    """The unit that computes `outputs` from `live`."""
    program, producers = cut(graph, live, outputs), graph.producers()
    own = tuple(specs[op.layer.path] for op in program.weighted)
    owners: dict[int, Tensor] = {}
    for op in (op for op in graph.ops if op.layer is not None):
        spec = specs[op.layer.path]
        if spec.tensor is not None:
            owners[root(producers, op.x)] = Tensor(spec.tensor, spec.act_bits)
    reads = {value: root(producers, value) for op in program.ops for value in op.reads}
    tensors = tuple(dict.fromkeys(owners[r] for r in reads.values() if r in owners))
    tensor_of = {v: tensors.index(owners[r]) for v, r in reads.items() if r in owners}
    local = [s._replace(path="", tensor=s.tensor and "") for s in own]
    wiring = [tensor_of.get(value) for op in program.ops for value in op.reads]
    key = f"{signature(graph, program)}\n{local}\n{[t.bits for t in tensors]}\n{wiring}"
    return Unit(program, own, tensors, tensor_of, graph.avals, producers, key)


def forward(
    unit: Unit,
    weights: Sequence[Any],
    tensors: Sequence[TensorState] | None,
    live: Sequence[jax.Array],
    side: Sequence[jax.Array],
    static: Sequence[jax.Array],
    keep: Callable[[int, tuple[int, ...]], jax.Array] | None = None,
    layer: Callable[..., jax.Array] = run_layer,
) -> tuple[jax.Array, ...]:
    """Run a unit.

    Args:
      unit: what to run.
      weights: one per weighted op, what `layer` takes.
      tensors: one per quantized tensor; None runs the unit in float.
      live, side, static: see `program.run`.
      keep: draws the mask of elements that are quantized, given a value id and a shape.
      layer: runs one layer, as `layer.run_layer` does.

    Returns:
      The program's outputs.
    """
    place = {op.layer.path: i for i, op in enumerate(unit.program.weighted)}
    mask = _masks(unit, keep)

    def weighted(op, x):
        index = place[op.layer.path]
        spec = unit.specs[index]
        dtype = unit.avals[op.outputs[0]].dtype
        tensor = None
        if tensors is not None and spec.tensor is not None:
            tensor = tensors[unit.tensor_of[op.x]]
        kept = mask(op.x, x.shape) if tensor is not None else None
        return layer(op, spec, x, weights[index], tensor, kept, dtype)

    def read(value_id, value):
        if tensors is None or value_id not in unit.tensor_of:
            return value
        index = unit.tensor_of[value_id]
        rounded = fake_quantize(value, tensors[index], unit.tensors[index].bits)
        kept = mask(value_id, value.shape)
        if kept is not None:
            rounded = jnp.where(kept, rounded, value.astype(jnp.float32))
        return rounded.astype(value.dtype)

    return run(unit.program, live, side, static, weighted, read)


def _masks(unit: Unit, keep):
    """`keep` drawn once a tensor, whose views then share the draw: (value id, shape) -> mask."""
    masks: dict[int, jax.Array] = {}

    def mask(value_id, shape):
        if keep is None:
            return None
        if value_id not in masks:
            view = same_elements(unit.producers, value_id)
            if view is None or value_id in unit.program.live:
                masks[value_id] = keep(value_id, shape)
            else:
                source = view.reads[0]
                masks[value_id] = view.call(mask(source, unit.avals[source].shape))[0]
        return masks[value_id]

    return mask


def layer_specs(graph: Graph, recipe: Recipe) -> dict[str, LayerSpec]:
    """The static part of every layer under `recipe`, by weight path.

    Raises:
      InputError: an override matches no layer or is no regular expression.
    """
    producers = graph.producers()
    ops = [op for op in graph.ops if op.layer is not None]
    overrides = _match(recipe, [op.layer.path for op in ops])
    above = _weighted_ancestors(graph)
    raw = _raw_values(graph)
    first = {op.layer.path for op in ops if root(producers, op.x) in raw}
    last = {op.layer.path for op in ops} - {path for op in ops for path in above[op.layer.path]}
    specs: dict[str, LayerSpec] = {}
    owner: dict[int, str] = {}
    for op in ops:
        path = op.layer.path
        value = root(producers, op.x)
        floats = bool(overrides[path]) and overrides[path][-1].keep_float
        quantized = not floats and (value not in raw or recipe.quantize_input)
        tensor = owner.setdefault(value, path) if quantized else None
        bits = _weight_bits(recipe, path, first, last, overrides[path])
        specs[path] = LayerSpec(
            path=path,
            kind=op.layer.kind,
            weight_bits=None if floats else bits,
            tensor=tensor,
            act_bits=recipe.act_bits,
            border=recipe.border if tensor else None,
            phi=recipe.phi,
            fused=recipe.fused,
        )
    _check_act_bits(recipe, specs, overrides)
    return _share_act_bits(recipe, specs, above, first, last, overrides)


def _raw_values(graph: Graph) -> frozenset[int]:
    """The input's own numbers, scaled or shifted perhaps: no weighted op made them.

    What is looked up in a table by the input, such as an embedding, is not among them.
    """
    raw = set(graph.inputs)
    for op in graph.ops:
        reads = [value for value in op.reads if value in graph.dynamic]
        table = op.inputs[0] if op.name == "gather" else None
        looked_up = isinstance(table, int) and table not in graph.dynamic
        if reads and op.layer is None and not looked_up and raw.issuperset(reads):
            raw.update(op.outputs)
    return frozenset(raw)


def _check_act_bits(recipe: Recipe, specs, overrides) -> None:
    for override in recipe.overrides:
        mine = [path for path, matched in overrides.items() if override in matched]
        if override.act_bits is not None and all(specs[path].tensor is None for path in mine):
            raise InputError(
                f"overrides: {override.pattern!r} sets act_bits to {override.act_bits}, but the "
                f"input of {', '.join(mine)} stays float"
            )


def _match(recipe: Recipe, paths: list[str]) -> dict[str, list[Override]]:
    found: dict[str, list[Override]] = {path: [] for path in paths}
    for override in recipe.overrides:
        try:
            matches = [path for path in paths if re.search(override.pattern, path)]
        except re.error as error:
            raise InputError(f"overrides: {override.pattern!r}: {error}") from error
        if not matches:
            raise InputError(f"overrides: {override.pattern!r} matches none of {paths}")
        for path in matches:
            found[path].append(override)
    return found


def _weighted_ancestors(graph: Graph) -> dict[str, set[str]]:
    """The layers that each layer's input comes from, with no other layer between."""
    sources: dict[int, set[str]] = {}
    above = {}
    for op in graph.ops:
        reached = set().union(*(sources.get(value, set()) for value in op.reads))
        if op.layer is not None:
            above[op.layer.path] = reached
            reached = {op.layer.path}
        sources.update(dict.fromkeys(op.outputs, reached))
    return above


def _weight_bits(recipe, path, first, last, overrides) -> int:
    bits = recipe.weight_bits
    if path in first and recipe.first_weight_bits is not None:
        bits = recipe.first_weight_bits
    if path in last and recipe.last_weight_bits is not None:
        bits = recipe.last_weight_bits
    for override in overrides:
        bits = override.weight_bits or bits
    return bits


def _share_act_bits(recipe, specs, above, first, last, overrides) -> dict[str, LayerSpec]:
    """Give all readers of a tensor its bits."""
    bits: dict[str, int] = {}
    readers: dict[str, list[str]] = {}
    for path, spec in specs.items():
        if spec.tensor is not None:
            readers.setdefault(spec.tensor, []).append(path)
    for tensor, paths in readers.items():
        bits[tensor] = recipe.act_bits
        if recipe.first_output_bits and all(above[p] and above[p] <= first for p in paths):
            bits[tensor] = recipe.first_output_bits
        if recipe.last_act_bits and all(path in last for path in paths):
            bits[tensor] = recipe.last_act_bits
        for override in recipe.overrides:  # the last match of any reader wins
            if any(override in overrides[path] for path in paths):
                bits[tensor] = override.act_bits or bits[tensor]
    return {
        path: spec._replace(act_bits=bits[spec.tensor]) if spec.tensor else spec
        for path, spec in specs.items()
    }


def random_keep(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """Bernoulli mask; for one half, every random bit is used, which is six times faster on CPU."""
    if probability != 0.5:
        return jax.random.bernoulli(key, probability, shape)
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return (bits == 1).reshape(-1)[:size].reshape(shape)
