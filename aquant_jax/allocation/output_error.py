"""The output error of a quantized network, in the unit in which allocations predict it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aquant_jax.deployment.quantized import Quantized
from aquant_jax.plan.block_program import make_block_program
from aquant_jax.reconstruction.chain import inexact
from aquant_jax.reconstruction.loss import network_loss
from aquant_jax.sensitivity import probed


def output_error(
    quantized: Quantized,
    apply: Callable,
    variables: Any,
    calibration: Any,
    mask: str | None,
    kind: str,
) -> float:
    """What an allocation predicts, of the network that was made of it.

    Args:
      quantized: the network.
      apply, variables, calibration, mask: as it was quantized; the first ``init_samples`` samples
        are used, at once, as for the prediction, or all where there are fewer.
      kind: "kl" or "mse", see `network_loss`.
    """
    recipe = quantized.recipe.replace(transforms=())  # which change no output of the float network
    net, samples = probed(apply, variables, calibration, recipe, mask)
    program = make_block_program(net.graph, net.plan, (), net.graph.target_outputs)
    ids = program.subgraph.outputs
    outputs, targets = (
        inexact(program, ids, [jax.tree.leaves(found)[i] for i in net.targets])
        for found in (quantized.on_host()(samples), jax.jit(apply)(variables, samples))
    )
    axes = inexact(program, ids, program.position_axes)
    valid = None if net.valid_mask is None else jnp.asarray(net.valid_mask)
    return float(network_loss(kind, tuple(axes), outputs, targets, valid))
