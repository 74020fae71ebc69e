"""The terms of a block's loss, output error and AdaRound's regularizer, and a whole network's."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.adaround import beta_schedule, regularizer
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.plan.block_program import BlockProgram, valid_elements
from aquant_jax.recipe import Reconstruction

SMALLEST_SQUARE = 1e-12  # of outputs that are all zero
LEAST_LOGIT = -1e9  # of a class at padding
MASK = 1e8  # a magnitude from here on, the same in both networks, is that of a mask


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
        output, target = _without_masks(output, target)
        error = jnp.abs(output - target).astype(jnp.float32)
        axes = [axis for axis in op.layer.output_axes if axis < output.ndim]
        channels = np.prod([output.shape[axis] for axis in axes or [output.ndim - 1]])
        powers = error**2 if power == 2.0 else error**power
        valid = None
        if valid_mask is not None and positions:
            valid = valid_elements(valid_mask, positions, output.ndim)
        total = total + jnp.mean(powers, where=valid) * np.float32(channels)
    return total


def _without_masks(
    output: jax.Array, target: jax.Array, fill: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Both in float32 or wider, with `fill` where both are masked: the same huge number."""
    dtype = np.promote_types(output.dtype, np.float32)
    output, target = output.astype(dtype), target.astype(dtype)  # first: float16 ends below MASK
    masked = (jnp.abs(target) > MASK) & (output == target)
    return jnp.where(masked, fill, output), jnp.where(masked, fill, target)


def rounding_loss(
    learning: Reconstruction, alphas: Sequence[jax.Array | None], step: jax.Array
) -> jax.Array:
    """AdaRound's regularizer at a step: zero during the warm-up, then with falling beta."""
    progress = jnp.asarray(step, jnp.float32) / learning.steps
    beta = beta_schedule(progress, learning.rounding_warmup, learning.beta_start, learning.beta_end)
    total = sum(regularizer(alpha, beta) for alpha in alphas if alpha is not None)
    on = (progress >= learning.rounding_warmup).astype(jnp.float32)
    return learning.rounding_weight * on * total


def network_loss(
    kind: str,
    position_axes: Sequence[tuple[int, ...]],
    outputs: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    valid_mask: jax.Array | None = None,
) -> jax.Array:
    """The distance of a network's outputs from the float network's, summed over the outputs.

    Args:
      kind: "kl", the Kullback-Leibler divergence of class probabilities over the last axis, mean
        over the rest; "mse", the squared error over the squares of the targets.
      position_axes: the sequence axes of each output.
      outputs, targets: inexact, in pairs.
      valid_mask: bool ``[batch, positions]``; padding is left out.
    """
    total = jnp.float32(0.0)
    for output, target, positions in zip(outputs, targets, position_axes, strict=True):
        valid = None
        if valid_mask is not None and positions:
            valid = valid_elements(valid_mask, positions, output.ndim)
        if kind == "kl":
            total = total + _divergence(output, target, valid)
        else:
            output, target = _without_masks(output, target)
            error = jnp.abs(output - target) ** 2
            size = jnp.mean(jnp.abs(target) ** 2, where=valid)
            total = total + jnp.mean(error, where=valid) / jnp.maximum(size, SMALLEST_SQUARE)
    return total


def _divergence(output: jax.Array, target: jax.Array, valid: AnyArray | None) -> jax.Array:
    """Mean KL divergence of the classes of `output` from those of `target`."""
    logits, wanted = _without_masks(output, target, LEAST_LOGIT)
    rows = None
    if valid is not None:
        valid = jnp.broadcast_to(valid, output.shape)
        rows = jnp.any(valid, -1)
        logits, wanted = (jnp.where(valid, v, LEAST_LOGIT) for v in (logits, wanted))
    logits, wanted = jax.nn.log_softmax(logits), jax.nn.log_softmax(wanted)
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - logits), -1), where=rows)
