"""The plan of a recipe for a graph: every layer's static part and every quantized activation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import jax.numpy as jnp

from aquant_jax.arithmetic.uniform import MAX_BITS
from aquant_jax.errors import InputError
from aquant_jax.graph.activation_rules import match_rules, weighted_sources
from aquant_jax.graph.ir import ALIASES, LOOP_CARRY, Graph, Op
from aquant_jax.graph.subgraph import source_tensor
from aquant_jax.layers.fake_quant import LayerSpec
from aquant_jax.plan.coverage import coverage
from aquant_jax.recipe import Override, Recipe, border_of

EVERYTHING = (".*", "")  # patterns of an override that leaves a whole network in float on purpose


class Tensor(NamedTuple):
    """A quantized activation tensor.

    Attributes:
      key: its name, see `Plan`.
      bits: 2 to 8.
    """

    key: str
    bits: int


class Plan(NamedTuple):
    """The quantized layers and activations of a graph.

    Attributes:
      layers: the static part of every weighted op, by weight path.
      tensors: every quantized activation, by value id. Its key is the path of its first weighted
        reader or, if it has none, the key of the rule's match (see
        `activation_rules.ActivationMatch`).
    """

    layers: dict[str, LayerSpec]
    tensors: dict[int, Tensor]


def make_plan(graph: Graph, recipe: Recipe) -> Plan:
    """The plan of `recipe` for a folded graph.

    Raises:
      InputError: an override matches nothing, is not a regular expression, or sets the bits of a
        float input; a layer with complex operands is not left in float; overrides leave all layers
        in float; `require_all`, and a weighted op stays float.
    """
    producers = graph.producers()
    matches = match_rules(graph, recipe.activations)
    keys = [match.key for match in matches]
    overrides = _match(graph, recipe, keys)
    layers = _layer_specs(graph, recipe, overrides)
    _check_complex(graph, layers)
    _check_coverage(graph, recipe, layers)
    _check_act_bits(recipe, layers, overrides)
    tensors: dict[int, Tensor] = {}
    for op in graph.ops:
        if op.layer is not None and (spec := layers[op.layer.path]).tensor is not None:
            tensors[source_tensor(producers, op.x)] = Tensor(spec.tensor, spec.act_bits)
    rounded = _read_rounded(graph, layers)
    for value, key in matches:
        bits = _act_bits(recipe, overrides[key])
        floats = bool(overrides[key]) and overrides[key][-1].keep_float
        if value in rounded and not floats and bits is not None:
            tensors.setdefault(value, Tensor(key, bits))
    return Plan(layers, tensors)


def _read_rounded(graph: Graph, layers: dict[str, LayerSpec]) -> frozenset[int]:
    """Tensors that a quantized layer or another op reads: not only float layers and the output."""
    producers, tensors = graph.producers(), set()
    for op in graph.ops:
        if op.layer is not None:
            reads = [] if layers[op.layer.path].tensor is None else [op.x]
        else:
            reads = [] if op.name in ALIASES else op.reads
        tensors.update(source_tensor(producers, value) for value in reads)
    return frozenset(tensors)


def _layer_specs(
    graph: Graph, recipe: Recipe, overrides: Mapping[str, Sequence[Override]]
) -> dict[str, LayerSpec]:
    """The static part of every layer, by weight path."""
    producers = graph.producers()
    ops = [op for op in graph.ops if op.layer is not None]
    above = _weighted_ancestors(graph)
    raw = _raw_values(graph)
    first = {op.layer.path for op in ops if source_tensor(producers, op.x) in raw}
    last = {op.layer.path for op in ops} - {path for op in ops for path in above[op.layer.path]}
    specs: dict[str, LayerSpec] = {}
    owner: dict[int, str] = {}
    for op in ops:
        path = op.layer.path
        value = source_tensor(producers, op.x)
        floats = bool(overrides[path]) and overrides[path][-1].keep_float
        quantized = not floats and (value not in raw or recipe.quantize_input)
        quantized &= _act_bits(recipe, overrides[path]) is not None
        tensor = owner.setdefault(value, path) if quantized else None
        bits = _weight_bits(recipe, path, first, last, overrides[path])
        border, granularity = border_of(recipe, overrides[path])
        specs[path] = LayerSpec(
            path=path,
            kind=op.layer.kind,
            weight_bits=None if floats else bits,
            tensor=tensor,
            act_bits=recipe.act_bits or MAX_BITS,
            border=border if tensor else None,
            phi=recipe.phi,
            border_granularity=granularity,
            weight_group=None if floats else _weight_group(recipe, op),
        )
    return _share_act_bits(recipe, specs, above, first, last, overrides)


def _raw_values(graph: Graph) -> frozenset[int]:
    """The model's input and functions of it that no weighted op computes, such as a scaled input.

    A value that the input looks up in a table, such as an embedding, is not among them.
    """
    raw = set(graph.inputs)
    for op in graph.ops:
        reads = [value for value in op.reads if value in graph.dynamic]
        table = op.inputs[0] if op.name == "gather" else None
        looked_up = isinstance(table, int) and table not in graph.dynamic
        carried = op.name == LOOP_CARRY  # the steps of a loop have made it, but for the first
        if reads and op.layer is None and not (looked_up or carried) and raw.issuperset(reads):
            raw.update(op.outputs)
    return frozenset(raw)


def _check_complex(graph: Graph, specs: Mapping[str, LayerSpec]) -> None:
    """InputError for a quantized layer with complex operands."""
    for op in graph.ops:
        if op.layer is None or specs[op.layer.path].weight_bits is None:
            continue
        for dtype in op.params["operand_dtypes"]:
            if jnp.issubdtype(dtype, jnp.complexfloating):
                raise InputError(
                    f"{op.layer.path} multiplies {dtype} values; only real ones can be quantized: "
                    "leave the layer in float with an override (keep_float)"
                )


def _check_coverage(graph: Graph, recipe: Recipe, specs: Mapping[str, LayerSpec]) -> None:
    """InputError for overrides that leave nothing to quantize, and a float op not allowed."""
    floats = [path for path, spec in specs.items() if spec.weight_bits is None]
    on_purpose = any(override.pattern in EVERYTHING for override in recipe.overrides)
    if len(floats) == len(specs) and not on_purpose:
        raise InputError(
            f"overrides: keep_float leaves nothing to quantize of {', '.join(floats)}; the pattern "
            f"{EVERYTHING[0]!r} makes a float network on purpose"
        )
    if recipe.require_all and (floats or graph.unquantized):
        raise InputError(f"require_all: {coverage(specs.values(), graph.unquantized)}")


def _check_act_bits(
    recipe: Recipe, specs: Mapping[str, LayerSpec], overrides: Mapping[str, Sequence[Override]]
) -> None:
    """InputError for an override that sets the bits of float inputs only."""
    for override in recipe.overrides:
        names = [name for name, matched in overrides.items() if override in matched]
        floats = all(name in specs and specs[name].tensor is None for name in names)
        if override.act_bits is not None and floats:
            raise InputError(
                f"overrides: {override.pattern!r} sets act_bits to {override.act_bits}, but the "
                f"input of {', '.join(names)} stays float"
            )


def _match(graph: Graph, recipe: Recipe, keys: Sequence[str]) -> dict[str, list[Override]]:
    """The overrides of every layer and activation; only patterns with a colon match activations."""
    paths = [layer.path for layer in graph.layers]
    overrides: dict[str, list[Override]] = {name: [] for name in (*paths, *keys)}
    for override in recipe.overrides:
        names = [*paths, *keys] if ":" in override.pattern else list(paths)
        try:
            matches = [name for name in names if re.search(override.pattern, name)]
            floats = [op for op in graph.unquantized if re.search(override.pattern, op.path)]
        except re.error as error:
            raise InputError(f"overrides: {override.pattern!r}: {error}") from error
        if not matches and floats and not override.keep_float:
            reasons = "; ".join(map(str, floats))
            raise InputError(f"overrides: {override.pattern!r} cannot quantize {reasons}")
        if not matches and not floats:
            raise InputError(f"overrides: {override.pattern!r} matches none of {names}")
        for name in matches:
            overrides[name].append(override)
    return overrides


def _weighted_ancestors(graph: Graph) -> dict[str, frozenset[str]]:
    """The layers that each layer's input comes from with no other layer between, by path."""
    sources = weighted_sources(graph)
    nothing: frozenset[str] = frozenset()
    return {op.layer.path: sources.get(op.x, nothing) for op in graph.ops if op.layer is not None}


def _act_bits(recipe: Recipe, overrides: Sequence[Override]) -> int | None:
    """The bits of an activation, but for those of the first and last layers; None for float."""
    bits = recipe.act_bits
    for override in overrides:
        bits = override.act_bits or bits
    return bits


def _weight_group(recipe: Recipe, op: Op) -> int | None:
    """The inputs of an output channel that share a grid; None for all of them.

    Raises:
      InputError: the groups do not fill the inputs of a dense layer.
    """
    size, layer = recipe.weight_group, op.layer
    if size is None or layer.kind == "conv":
        return None
    shape, axes = layer.weight_shape, layer.channel_axes
    elements = math.prod(n for axis, n in enumerate(shape) if axis not in axes)
    if elements % size:
        raise InputError(
            f"weight_group {size} does not divide the {elements} inputs of {layer.path}"
        )
    return size if size < elements else None


def _weight_bits(
    recipe: Recipe, path: str, first: Set[str], last: Set[str], overrides: Sequence[Override]
) -> int:
    """The bits of one layer's weights."""
    bits = recipe.weight_bits
    if path in first and recipe.first_weight_bits is not None:
        bits = recipe.first_weight_bits
    if path in last and recipe.last_weight_bits is not None:
        bits = recipe.last_weight_bits
    for override in overrides:
        bits = override.weight_bits or bits
    return bits


def _share_act_bits(
    recipe: Recipe,
    specs: Mapping[str, LayerSpec],
    above: Mapping[str, frozenset[str]],
    first: Set[str],
    last: Set[str],
    overrides: Mapping[str, Sequence[Override]],
) -> dict[str, LayerSpec]:
    """The specs, in which all readers of a tensor have the bits of the tensor."""
    bits: dict[str, int] = {}
    readers: dict[str, list[str]] = {}
    for path, spec in specs.items():
        if spec.tensor is not None:
            readers.setdefault(spec.tensor, []).append(path)
    for tensor, paths in readers.items():
        bits[tensor] = recipe.act_bits or MAX_BITS
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
