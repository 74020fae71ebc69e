"""Preparation of a network: checked, traced, folded, planned and split into blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.border_start import check_start
from aquant_jax.errors import InputError
from aquant_jax.graph.fold import fold, folded_weights
from aquant_jax.graph.ir import Graph, find_position_axes, sample_first
from aquant_jax.graph.partition import partition
from aquant_jax.graph.targets import find_repeated, find_targets, focus
from aquant_jax.graph.trace import trace
from aquant_jax.plan import checks
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.channel_transform import transformed
from aquant_jax.plan.hints import check_apply, trace_with_hint
from aquant_jax.plan.independence import find_mixing, warn_if_samples_mix
from aquant_jax.plan.network import Network, batch_shapes, batch_size, count_samples
from aquant_jax.plan.transform_search import find_transforms
from aquant_jax.recipe import Recipe


@jax.transfer_guard("allow")
def prepare(
    apply: Callable[..., Any],
    variables: Any,
    calibration: Any,
    recipe: Recipe,
    mask: str | None = None,
) -> Network:
    """Check the arguments of `quantize`, trace the network, fold it and split it into blocks.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> variables = {"kernel": np.ones((4, 3), np.float32)}
    >>> net = aq.prepare(apply, variables, np.ones((64, 4), np.float32), aq.recipes.aquant())
    >>> [block.layers for block in net.blocks]
    [('kernel',)]

    Args:
      apply, variables, calibration, recipe, mask: see `quantize`.

    Raises:
      InputError: a recipe of another type; variables or calibration samples that are no numbers,
        not finite, deleted or tracers (named by path); an empty or too small calibration set; a
        network that cannot be traced or has no weighted op; a quantized layer with complex
        operands; a regex of the recipe that matches nothing; a leaf that is not a mask.
    """
    checks.check_recipe(recipe)
    check_apply(apply)
    calibration = checks.host_arrays(calibration)
    checks.check_calibration(calibration, recipe)
    variables = checks.check_variables(variables)
    checks.check_not_traced()
    apply, variables = _with_key_data(apply, variables)
    net = _prepare(apply, variables, calibration, recipe, mask)
    warn_if_samples_mix(net, calibration)
    if not recipe.transforms:
        return net
    leaves = zip(net.graph.inputs, jax.tree.leaves(calibration), strict=True)
    transforms = find_transforms(net, dict(leaves))
    if not transforms:
        return net
    apply = transformed(apply, recipe, transforms)
    net = _prepare(apply, variables, calibration, recipe, mask)
    return net._replace(transforms=transforms)


def _with_key_data(apply: Callable[..., Any], variables: Any) -> tuple[Callable[..., Any], Any]:
    """The function of variables whose random keys are given as numbers, which can be saved, and
    these variables."""
    leaves, treedef = jax.tree.flatten(variables)
    keys = {i: jax.random.key_impl(leaf) for i, leaf in enumerate(leaves) if _is_key(leaf)}
    if not keys:
        return apply, variables

    def of_numbers(variables: Any, x: Any) -> Any:
        given = jax.tree.leaves(variables)
        for i, kind in keys.items():
            given[i] = jax.random.wrap_key_data(given[i], impl=kind)
        return apply(treedef.unflatten(given), x)

    for i in keys:
        leaves[i] = jax.random.key_data(leaves[i])
    return of_numbers, treedef.unflatten(leaves)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _prepare(
    apply: Callable[..., Any], variables: Any, calibration: Any, recipe: Recipe, mask: str | None
) -> Network:
    """The network of an inference function, whose arguments are checked."""
    samples = count_samples(calibration)
    batch = batch_size(recipe, samples)
    unfolded = trace_with_hint(apply, variables, calibration, batch)
    other = _of_more_samples(apply, variables, calibration, unfolded)
    sampled, targets = sample_first(unfolded, other), find_targets(unfolded, other)
    unfolded = focus(unfolded, targets, find_repeated(unfolded, other))
    checks.check_outputs(unfolded, sampled, recipe)
    valid_mask = None
    if mask is not None:
        valid_mask = checks.check_mask(calibration, mask)
        position_axes = _position_axes(unfolded, apply, variables, calibration, mask, sampled)
        unfolded = unfolded._replace(position_axes=position_axes)
    graph = fold(unfolded)
    blocks = partition(graph, recipe.granularity, recipe.blocks, sampled)
    plan = make_plan(graph, recipe)
    for border in {spec.border for spec in plan.layers.values()}:
        check_start(border, recipe.phi)
    folded = folded_weights(unfolded, variables)
    return Network(
        apply, graph, variables, folded, plan, blocks, recipe, samples, batch, targets, valid_mask,
        mixing=find_mixing(unfolded, other),
    )  # fmt: skip


def _of_more_samples(
    apply: Callable[..., Any], variables: Any, calibration: Any, graph: Graph
) -> Graph:
    """The graph for one sample more than `graph`; for twice as many where a mesh divides them, or
    the function, which splits them, computes something else for one more."""
    for samples in (graph.samples + 1, 2 * graph.samples):
        with contextlib.suppress(InputError):
            other = trace(apply, variables, batch_shapes(calibration, samples))
            if len(other.avals) == len(graph.avals):
                return other
    try:
        return trace(apply, variables, batch_shapes(calibration, graph.samples + 1))
    except InputError as error:
        raise InputError(
            f"the network takes {graph.samples} samples; it must take any number: {error}"
        ) from error.__cause__


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

    def shorten(leaf: np.ndarray) -> np.ndarray:
        has_positions = leaf.ndim > 1 and leaf.shape[1] == length
        return leaf[:, :-1] if has_positions else leaf

    shorter = jax.tree.map(shorten, calibration)
    try:
        other = trace(apply, variables, batch_shapes(shorter, graph.samples))
    except InputError as error:
        raise InputError(
            f"mask {mask!r}: sequence axes are found by tracing the network with sequences of "
            f"{length - 1} instead of {length}, and it does not take these: {error}"
        ) from error
    position_axes = find_position_axes(graph, other, sampled)
    if not any(value in graph.weight_dependent for value in position_axes):
        raise InputError(f"mask {mask!r}: no activation has its {length} positions on an axis")
    return position_axes
