"""Which layers suffer: the network's output error with one layer quantized at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.range_search import tensor_state
from aquant_jax.graph.subgraph import root, run, static_inputs
from aquant_jax.layers.fake_quant import run_layer
from aquant_jax.plan.block_program import forward, make_unit
from aquant_jax.plan.checks import check_calibration
from aquant_jax.plan.network import prepare
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.weights import (
    deployed_weights,
    float_weights,
    make_grids,
    nearest_layers,
)


class Sensitivity(NamedTuple):
    """Squared error of the network's output over the output's own square, for one layer alone."""

    path: str
    error: float


def sensitivity(apply: Callable, variables, calibration, recipe: Recipe) -> list[Sensitivity]:
    """Output error of every layer quantized alone (weights and input, to nearest).

    Args:
      apply, variables, calibration: see `quantize`; the first ``recipe.init_samples`` are used.
      recipe: gives bits and exceptions; nothing is learned.

    Returns:
      One entry a layer, the most sensitive first.

    Raises:
      InputError: see `quantize`.
    """
    calibration = jax.tree.map(np.asarray, calibration)
    check_calibration(calibration, recipe.replace(steps=0))
    samples = min(len(jax.tree.leaves(calibration)[0]), recipe.init_samples)
    calibration = jax.tree.map(lambda leaf: leaf[:samples], calibration)
    net = prepare(apply, variables, calibration, recipe.replace(batch_size=samples, steps=0))
    unit = make_unit(net.graph, net.plan, (), net.graph.outputs)
    grids = make_grids(unit, net.folded)
    exact = float_weights(unit, net.folded)
    rounded = deployed_weights(unit, nearest_layers(unit, grids))
    side = _side(net, unit, calibration)
    static = static_inputs(net.graph, unit.program, net.variables)
    tensors = _observe(net, unit, exact, calibration)
    place = {op.layer.path: i for i, op in enumerate(unit.program.weighted)}

    @jax.jit
    def outputs(chosen, rounded, exact, tensors, side, static):
        def weighted(op, x):
            i = place[op.layer.path]
            spec, dtype = unit.specs[i], unit.avals[op.outputs[0]].dtype
            tensor = tensors[unit.tensor_of[op.x]] if spec.tensor else None
            alone = run_layer(op, spec, x, rounded[i], tensor, dtype=dtype)
            whole = run_layer(op, spec, x, exact[i], None, dtype=dtype)
            return jnp.where(chosen == i, alone, whole)

        return run(unit.program, (), side, static, weighted)

    # Arguments, not constants: XLA would spend minutes folding the float network otherwise.
    arguments = (rounded, exact, tensors, side, static)
    reference = outputs(-1, *arguments)
    found = [
        Sensitivity(spec.path, _error(outputs(i, *arguments), reference))
        for i, spec in enumerate(unit.specs)
    ]
    return sorted(found, key=lambda entry: -entry.error)


def _side(net, unit, calibration):
    leaves = dict(zip(net.graph.inputs, jax.tree.leaves(calibration), strict=True))
    return [jnp.asarray(leaves[value]) for value in unit.program.side]


def _observe(net, unit, weights, calibration):
    """Initial states of all tensors of the network."""
    roots = {index: root(unit.producers, value) for value, index in unit.tensor_of.items()}
    seer = make_unit(net.graph, net.plan, (), tuple(roots.values()))
    order = [spec.path for spec in unit.specs]
    own = [weights[order.index(spec.path)] for spec in seer.specs]
    static = static_inputs(net.graph, seer.program, net.variables)
    see = jax.jit(lambda own, side, static: forward(seer, own, None, (), side, static))
    values = dict(zip(roots, see(own, _side(net, seer, calibration), static), strict=True))
    return [tensor_state(np.asarray(values[i]), t.bits) for i, t in enumerate(unit.tensors)]


def _error(outputs, reference) -> float:
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(outputs, reference, strict=True) if jnp.issubdtype(b.dtype, jnp.floating)
    ]  # fmt: skip
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))
