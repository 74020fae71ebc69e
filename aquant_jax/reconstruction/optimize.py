"""Reconstruction of one block: Algorithm 1 as an optax loop over pytrees of quantizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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
from aquant_jax.reconstruction.activation_cache import load, on_device
from aquant_jax.reconstruction.devices import read, settled
from aquant_jax.reconstruction.learning_rates import make_optimizer
from aquant_jax.reconstruction.training_step import (
    CalibrationData,
    Params,
    Quantizers,
    Trainer,
    gradients_of,
    train_steps,
    update,
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
    trainer = Trainer(
        program, learning.of_a_step, make_optimizer(program, learning), compiler.layer
    )
    params = start = initial_params(program, quantizers, learning)
    losses: list[jax.Array] = []
    curve = []
    what = f"{', '.join(spec.path for spec in program.specs)}: the reconstruction loss"
    take_steps = _steps if learning.accumulate == 1 else _accumulated_steps
    for done, after, loss in take_steps(trainer, start, quantizers, data, seed, compiler):
        params = after
        losses.append(settled(loss))
        if done % LOG_EVERY == 0 or done == learning.steps or len(loss) > 1:
            mean = mean_loss(losses, what, done, learning.steps)
            losses = []
            curve.append((done, mean))
            on_step(done, mean)
    rows = np.array(curve, np.float32).reshape(-1, 2)
    return _result(program, quantizers, params, recipe.border_format, rows)


Steps = Iterator[tuple[int, Params, jax.Array]]


def _steps(
    trainer: Trainer, params: Params, quantizers: Quantizers, data: CalibrationData, seed: int,
    compiler: Compiler,
) -> Steps:  # fmt: skip
    """Every call: the steps that are done, the parameters, and the losses of the call's steps."""
    learning, key = trainer.learning, jax.random.key(seed)
    name = ("step", trainer.program.key, learning, quantizers.trained)
    advance = compiler.get(name, lambda: functools.partial(train_steps, trainer), donate_argnums=0)
    carry = (params, trainer.optimizer.init(params))
    drawn = _drawn(seed, data, learning)
    chunk = steps_a_call() if on_device(data.samples) else 1
    calls = [drawn[start : start + chunk] for start in range(0, len(drawn), chunk)]
    done = 0
    loaded = load(data.samples, (rows.ravel() for rows in calls))
    for rows, (samples, index) in zip(calls, loaded, strict=True):
        steps = np.arange(done, done + len(rows), dtype=np.int32)
        read = data.with_samples(samples)
        carry, loss = advance(carry, quantizers, read, key, steps, index.reshape(rows.shape))
        done += len(rows)
        yield done, carry[0], loss


def _accumulated_steps(
    trainer: Trainer, params: Params, quantizers: Quantizers, data: CalibrationData, seed: int,
    compiler: Compiler,
) -> Steps:  # fmt: skip
    """`_steps`, every one with the gradients of several parts of its batch added up."""
    learning, key = trainer.learning, jax.random.key(seed)
    name = (trainer.program.key, learning, quantizers.trained)
    gradients_fn = compiler.get(
        ("gradients", *name), lambda: functools.partial(gradients_of, trainer)
    )
    update_fn = compiler.get(("update", *name), lambda: functools.partial(update, trainer))
    carry, parts = (params, trainer.optimizer.init(params)), learning.accumulate
    drawn = _drawn(seed, data, learning).reshape(learning.steps * parts, -1)
    loaded = enumerate(load(data.samples, drawn))
    for number, (samples, index) in loaded:
        step, part = divmod(number, parts)
        where = np.int32(step), np.int32(part), index
        read = data.with_samples(samples)
        result = settled(gradients_fn(carry[0], quantizers, read, key, where))
        total = result if part == 0 else jax.tree.map(jnp.add, total, result)
        if part == parts - 1:
            loss, gradients = jax.tree.map(lambda value: value / parts, total)
            carry = settled(update_fn(carry, quantizers, gradients))
            yield step + 1, carry[0], loss[None]


def _drawn(seed: int, data: CalibrationData, learning: Reconstruction) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return draw_batches(rng, data.learn_from, learning.steps, learning.batch_size)


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
