"""The two terms of a block's loss: the error of its outputs, and AdaRound's regularizer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.adaround import beta_schedule, regularizer
from aquant_jax.plan.block_program import BlockProgram, valid_elements
from aquant_jax.recipe import Reconstruction


def output_loss(
    program: BlockProgram,
    outputs: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    power: float = 2.0,
    valid_mask: jax.Array | None = None,
) -> jax.Array:
    """``|y - target|^power``, summed over channels, averaged over the rest, summed over targets.

    Args:
      program: the block; its last layer says which axes are channels.
      outputs, targets: its outputs, and those of the float network, real or complex; integer ones
        are ignored.
      power: of the error.
      valid_mask: bool ``[batch, positions]``; padding is excluded from the average.
    """
    op = program.subgraph.weighted[-1]
    total = jnp.float32(0.0)
    for output, target, positions in zip(outputs, targets, program.position_axes, strict=True):
        if not jnp.issubdtype(output.dtype, jnp.inexact):
            continue
        dtype = np.promote_types(output.dtype, np.float32)
        error = jnp.abs(output.astype(dtype) - target.astype(dtype)).astype(jnp.float32)
        axes = [axis for axis in op.layer.output_axes if axis < output.ndim]
        channels = np.prod([output.shape[axis] for axis in axes or [output.ndim - 1]])
        powers = error**2 if power == 2.0 else error**power
        valid = None
        if valid_mask is not None and positions:
            valid = valid_elements(valid_mask, positions, output.ndim)
        total = total + jnp.mean(powers, where=valid) * np.float32(channels)
    return total


def rounding_loss(
    learning: Reconstruction, alphas: Sequence[jax.Array | None], step: jax.Array
) -> jax.Array:
    """AdaRound's regularizer at a step: zero during the warm-up, then with falling beta."""
    progress = jnp.asarray(step, jnp.float32) / learning.steps
    beta = beta_schedule(progress, learning.rounding_warmup, learning.beta_start, learning.beta_end)
    total = sum(regularizer(alpha, beta) for alpha in alphas if alpha is not None)
    on = (progress >= learning.rounding_warmup).astype(jnp.float32)
    return learning.rounding_weight * on * total
