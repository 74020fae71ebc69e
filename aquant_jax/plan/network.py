"""A network made ready: checked, traced, folded, planned and split into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.graph.fold import fold, folded_weights
from aquant_jax.graph.ir import Graph, sample_first, token_axes
from aquant_jax.graph.partition import Block, partition
from aquant_jax.graph.trace import trace
from aquant_jax.plan import checks
from aquant_jax.plan.assign import Plan, make_plan
from aquant_jax.recipe import Recipe


class Network(NamedTuple):
    """A traced, folded network and how it is to be quantized.

    Attributes:
      graph: folded.
      variables: of the user.
      folded: weight and bias of every layer, by weight path.
      plan: what is quantized.
      blocks: the units of reconstruction.
      recipe: of the user.
      samples: of the calibration set.
      batch: samples that a program runs at once.
      counted: bool ``[samples, positions]``: the positions of the sequences that are no padding;
        None where nothing is padded.
    """

    graph: Graph
    variables: Any
    folded: dict[str, Any]
    plan: Plan
    blocks: list[Block]
    recipe: Recipe
    samples: int
    batch: int
    counted: np.ndarray | None = None


def prepare(
    apply: Callable, variables, calibration, recipe: Recipe, mask: str | None = None
) -> Network:
    """Check the input, trace the network, fold it and split it into blocks.

    Raises:
      InputError: non-finite variables or calibration samples (named by path), an empty or too
        small calibration set, a network that cannot be traced or has no weighted op, a regex of
        the recipe that matches nothing, a mask that is none.
    """
    samples = checks.check_calibration(calibration, recipe)
    checks.check_variables(variables)
    batch = min(recipe.batch_size, samples)
    unfolded, other = (
        trace(apply, variables, _shapes(calibration, count)) for count in (batch, batch + 1)
    )
    sampled = sample_first(unfolded, other, batch)
    checks.check_outputs(unfolded, sampled, recipe)
    counted = None
    if mask is not None:
        counted = checks.check_mask(calibration, mask)
        tokens = _token_axes(unfolded, apply, variables, calibration, mask, sampled, batch)
        unfolded = unfolded._replace(tokens=tokens)
    graph = fold(unfolded)
    blocks = partition(graph, recipe.unit, recipe.blocks, sampled)
    plan = make_plan(graph, recipe)
    folded = folded_weights(unfolded, variables)
    return Network(graph, variables, folded, plan, blocks, recipe, samples, batch, counted)


def _shapes(calibration, samples: int):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((samples, *a.shape[1:]), a.dtype), calibration
    )


def _token_axes(graph: Graph, apply, variables, calibration, mask, sampled, batch):
    """The axes of the values of `graph` that number what `mask` has on its second axis."""
    length = checks.leaf(calibration, mask).shape[1]

    def shorten(leaf):
        cut = leaf.ndim > 1 and leaf.shape[1] == length
        return leaf[:, :-1] if cut else leaf

    shorter = jax.tree.map(shorten, calibration)
    try:
        other = trace(apply, variables, _shapes(shorter, batch))
    except InputError as error:
        raise InputError(
            f"mask {mask!r}: its axes are told by the network's shapes with sequences of "
            f"{length - 1} instead of {length}, and it does not take these: {error}"
        ) from error
    found = token_axes(graph, other, sampled)
    if not any(value in graph.live for value in found):
        raise InputError(f"mask {mask!r}: no activation has its {length} positions on an axis")
    return found


def describe(net: Network) -> str:
    """The blocks, what the rules of the recipe quantize besides the inputs of layers, and the peak
    memory of the cached activations, as text."""
    lines = [f"{i:3d}  {block}" for i, block in enumerate(net.blocks)]
    peak = checks.cache_bytes(net.graph, net.blocks, net.samples) / 2**20
    last = f"cached activations: {peak:.1f} MiB at the peak"
    sites = [tensor for tensor in net.plan.tensors.values() if tensor.key not in net.plan.layers]
    also = [f"     {tensor.key}: {tensor.bits} bits" for tensor in sites]
    head = [f"{len(also)} activations rounded to nearest besides the inputs of layers:"]
    return "\n".join([f"{len(net.blocks)} blocks:", *lines, *(head + also if also else []), last])
