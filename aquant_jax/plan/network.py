"""Preparation of a network: checked, traced, folded, planned and split into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from aquant_jax.errors import InputError
from aquant_jax.graph.fold import Folded, fold, folded_weights
from aquant_jax.graph.ir import Graph, find_position_axes, sample_first
from aquant_jax.graph.partition import Block, partition
from aquant_jax.graph.trace import trace
from aquant_jax.plan import checks
from aquant_jax.plan.assign import Plan, make_plan
from aquant_jax.recipe import Recipe


class Network(NamedTuple):
    """A traced, folded network with its plan and its blocks.

    Attributes:
      graph: the folded graph.
      variables: the pytree that `prepare` was given, in the byte order of this machine.
      folded: weight and bias of every layer, by weight path.
      plan: the quantized layers and activations.
      blocks: in the order of reconstruction.
      recipe: the recipe that `prepare` was given.
      samples: number of samples of the calibration set.
      batch: number of samples that a program runs at once.
      valid_mask: False at padding; None without padding.
    """

    graph: Graph
    variables: Any
    folded: dict[str, Folded]
    plan: Plan
    blocks: list[Block]
    recipe: Recipe
    samples: int
    batch: int
    valid_mask: Bool[np.ndarray, "samples positions"] | None = None


@jax.transfer_guard("allow")
def prepare(
    apply: Callable[..., Any],
    variables: Any,
    calibration: Any,
    recipe: Recipe,
    mask: str | None = None,
) -> Network:
    """Check the arguments of `quantize`, trace the network, fold it and split it into blocks.

    Args:
      apply, variables, calibration, recipe, mask: see `quantize`.

    Raises:
      InputError: a recipe of another type; variables or calibration samples that are no numbers,
        not finite, deleted or tracers (named by path); an empty or too small calibration set; a
        network that cannot be traced or has no weighted op; a quantized layer with complex
        operands; a regex of the recipe that matches nothing; a leaf that is not a mask.
    """
    checks.check_recipe(recipe)
    calibration = checks.host_arrays(calibration)
    samples = checks.check_calibration(calibration, recipe)
    variables = checks.check_variables(variables)
    checks.check_not_traced()
    batch = min(recipe.reconstruction.batch_size, samples)
    unfolded, other = (
        trace(apply, variables, batch_shapes(calibration, count)) for count in (batch, batch + 1)
    )
    sampled = sample_first(unfolded, other, batch)
    checks.check_outputs(unfolded, sampled, recipe)
    valid_mask = None
    if mask is not None:
        valid_mask = checks.check_mask(calibration, mask)
        position_axes = _position_axes(unfolded, apply, variables, calibration, mask, sampled)
        unfolded = unfolded._replace(position_axes=position_axes)
    graph = fold(unfolded)
    blocks = partition(graph, recipe.granularity, recipe.blocks, sampled)
    plan = make_plan(graph, recipe)
    folded = folded_weights(unfolded, variables)
    return Network(graph, variables, folded, plan, blocks, recipe, samples, batch, valid_mask)


def batch_shapes(calibration: Any, samples: int) -> Any:
    """Shapes and dtypes of `samples` samples of a calibration set."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((samples, *a.shape[1:]), a.dtype), calibration
    )


def _position_axes(
    graph: Graph,
    apply: Callable[..., Any],
    variables: Any,
    calibration: Any,
    mask: str,
    sampled: frozenset[int],
) -> dict[int, tuple[int, ...]]:
    """The axes of the values of `graph` that number the positions of `mask`."""
    length = checks.leaf(calibration, mask).shape[1]
    batch = graph.avals[graph.inputs[0]].shape[0]

    def shorten(leaf: np.ndarray) -> np.ndarray:
        has_positions = leaf.ndim > 1 and leaf.shape[1] == length
        return leaf[:, :-1] if has_positions else leaf

    shorter = jax.tree.map(shorten, calibration)
    try:
        other = trace(apply, variables, batch_shapes(shorter, batch))
    except InputError as error:
        raise InputError(
            f"mask {mask!r}: sequence axes are found by tracing the network with sequences of "
            f"{length - 1} instead of {length}, and it does not take these: {error}"
        ) from error
    position_axes = find_position_axes(graph, other, sampled)
    if not any(value in graph.weight_dependent for value in position_axes):
        raise InputError(f"mask {mask!r}: no activation has its {length} positions on an axis")
    return position_axes


def describe(net: Network) -> str:
    """A text: the blocks, the activations that the rules add, and the peak of cached memory."""
    lines = [f"{i:3d}  {block}" for i, block in enumerate(net.blocks)]
    peak = checks.cache_bytes(net.graph, net.blocks, net.samples) / 2**20
    last = f"cached activations: {peak:.1f} MiB at the peak"
    added = [tensor for tensor in net.plan.tensors.values() if tensor.key not in net.plan.layers]
    also = [f"     {tensor.key}: {tensor.bits} bits" for tensor in added]
    head = [f"{len(also)} activations rounded to nearest besides the inputs of layers:"]
    return "\n".join([f"{len(net.blocks)} blocks:", *lines, *(head + also if also else []), last])
