"""Reconstruction of one block: Algorithm 1 as an optax loop over pytrees of quantizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic import packing
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.plan.block_program import BlockProgram
from aquant_jax.recipe import Recipe, Reconstruction
from aquant_jax.reconstruction.devices import read, settled
from aquant_jax.reconstruction.learning_rates import make_optimizer
from aquant_jax.reconstruction.training_step import (
    CalibrationData,
    Params,
    Quantizers,
    Trainer,
    train_steps,
)
from aquant_jax.reconstruction.weights import alpha_of, deploy, init_borders

LOG_EVERY = 20
GPU_CHUNK = 100  # steps a scan; on CPU a scan around a convolution is 30 times slower than a loop


class Result(NamedTuple):
    """Outcome of `optimize`.

    Attributes:
      layers: deployed.
      activations: quantizers of the tensors, with learned step sizes.
      curve: float32 ``[k, 2]``: step, mean reconstruction loss since the row before.
    """

    layers: tuple[LayerState, ...]
    activations: tuple[ActivationQuantizer, ...]
    curve: np.ndarray


def optimize(
    program: BlockProgram,
    quantizers: Quantizers,
    data: CalibrationData,
    recipe: Recipe,
    seed: int,
    compiler: Compiler,
    on_step: Callable[[int, float], None],
) -> Result:
    """Learn weight rounding and scales, step sizes and borders of one block.

    Args:
      program: the block.
      quantizers: where they start.
      data: cached activations.
      recipe: every setting.
      seed: of batches and masks.
      compiler: where compiled steps are shared, and the backend that they run on.
      on_step: receives (step, reconstruction loss) every `LOG_EVERY` steps.

    Raises:
      ReconstructionError: the loss is not finite.
    """
    learning = recipe.reconstruction
    trainer = Trainer(program, recipe, make_optimizer(program, learning), compiler.layer)
    advance = compiler.get(
        ("step", program.key, recipe, quantizers.trained),
        lambda: functools.partial(train_steps, trainer),
        donate_argnums=0,
    )
    params = initial_params(program, quantizers, learning)
    carry = (params, trainer.optimizer.init(params))
    rng = np.random.default_rng(seed)
    index = draw_batches(rng, data.learn_from, learning.steps, learning.batch_size)
    key, chunk = jax.random.key(seed), steps_a_call()
    losses: list[jax.Array] = []
    curve = []
    what = f"{', '.join(spec.path for spec in program.specs)}: the reconstruction loss"
    for start in range(0, learning.steps, chunk):
        steps = np.arange(start, min(start + chunk, learning.steps), dtype=np.int32)
        carry, loss = advance(carry, quantizers, data, key, steps, index[start : start + chunk])
        losses.append(settled(loss))
        done = int(steps[-1]) + 1
        if done % LOG_EVERY == 0 or done == learning.steps or chunk > 1:
            mean = mean_loss(losses, what, done, learning.steps)
            losses = []
            curve.append((done, mean))
            on_step(done, mean)
    rows = np.array(curve, np.float32).reshape(-1, 2)
    return _result(program, quantizers, carry[0], recipe.border_format, rows)


def steps_a_call() -> int:
    """Steps that run in one call, as a scan, on the default device."""
    return 1 if jax.default_backend() == "cpu" else GPU_CHUNK


def draw_batches(
    rng: np.random.Generator, samples: np.ndarray, steps: int, batch_size: int
) -> np.ndarray:
    """`samples` of every step: int32 ``[steps, batch_size]``, without repeats in a batch."""
    size = min(batch_size, len(samples))
    draws = [rng.choice(samples, size, replace=False) for _ in range(steps)]
    return np.array(draws, np.int32)


def initial_params(
    program: BlockProgram, quantizers: Quantizers, learning: Reconstruction
) -> Params:
    """The learned parameters at the start.

    Those of a weight scale are the logarithms of its change, and exist only where it is learned.
    """
    ops = program.subgraph.weighted
    pairs = zip(quantizers.activations, quantizers.trained, strict=True)
    params = {
        "alpha": [alpha_of(op, q) for op, q in zip(ops, quantizers.weights, strict=True)],
        "step": [jnp.copy(q.step_size) if trained else None for q, trained in pairs],
        "border": init_borders(program),
    }
    if learning.weight_scale_lr > 0:
        scales = (q.scale for q in quantizers.weights)
        params["scale"] = [None if scale is None else jnp.zeros_like(scale) for scale in scales]
    return params


def _result(
    program: BlockProgram,
    quantizers: Quantizers,
    params: Params,
    border_format: str,
    curve: np.ndarray,
) -> Result:
    activations = tuple(
        q if step is None else q._replace(step_size=step)
        for q, step in zip(quantizers.activations, params["step"], strict=True)
    )
    coefficients = [as_stored(layer, border_format) for layer in params["border"]]
    layers = deploy(program, quantizers.weights, params["alpha"], coefficients)
    if "scale" in params:
        layers = tuple(map(_with_scale, layers, params["scale"]))
    return Result(layers, activations, curve)


def _with_scale(layer: LayerState, logarithm: jax.Array | None) -> LayerState:
    """A layer with its learned scale; a float layer stays the same."""
    if logarithm is None:
        return layer
    return layer._replace(scale=layer.scale * jnp.exp(logarithm))


def mean_loss(losses: Sequence[jax.Array], what: str, done: int, steps: int) -> float:
    """The mean of the losses since the last call, after `done` of `steps` steps.

    Raises:
      ReconstructionError: one is not finite; the message starts with `what`.
    """
    values = np.concatenate([np.atleast_1d(np.asarray(loss)) for loss in losses])
    if not np.isfinite(values).all():
        bad = values[~np.isfinite(values)][0]
        raise ReconstructionError(f"{what} is {bad} near step {done} of {steps}")
    return float(values.mean())


def as_stored(coefficients: dict[str, jax.Array], border_format: str) -> dict[str, jax.Array]:
    """Coefficients rounded to the format in which they are saved."""
    return {
        name: jnp.asarray(packing.decode(*packing.encode(np.asarray(read(values)), border_format)))
        for name, values in coefficients.items()
    }
