"""Reconstruction of one unit: Algorithm 1 as an optax loop over pytrees of quantizer state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic import packing
from aquant_jax.arithmetic.adaround import beta_schedule, regularizer, soft_codes
from aquant_jax.arithmetic.uniform import TensorState, lsq_gradient_scale, max_code, scale_gradient
from aquant_jax.errors import ReconstructionError
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerState, Weights, per_channel
from aquant_jax.plan.block_program import Unit, counts, forward, random_keep
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.activation_cache import Cache
from aquant_jax.reconstruction.weights import Grids, alpha_of, deploy, init_borders

LOG_EVERY = 20
GPU_CHUNK = 100  # steps a scan; on CPU a scan around a convolution is 30 times slower than a loop
MIN_STEP_SHRINK = 1e-2  # a step size never falls below this share of where it started


class Data(NamedTuple):
    """Cached activations of a unit: its inputs from the quantized prefix and from the float
    network, the leaves of the model's input that it reads, the float targets, and the positions
    that are no padding (bool ``[samples, positions]``), where there is any."""

    quantized: tuple[Cache, ...]
    floating: tuple[Cache, ...]
    side: tuple[jax.Array, ...]
    targets: tuple[Cache, ...]
    counted: jax.Array | None = None


class Result(NamedTuple):
    """Outcome of `optimize`: deployed layers, tensor states, and ``[k, 2]`` (step, loss)."""

    layers: tuple[LayerState, ...]
    tensors: tuple[TensorState, ...]
    curve: np.ndarray


def optimize(
    unit: Unit,
    grids: Sequence[Grids],
    tensors: Sequence[TensorState],
    trained: Sequence[bool],
    data: Data,
    static: Sequence[jax.Array],
    recipe: Recipe,
    seed: int,
    compiler: Compiler,
    on_step: Callable[[int, float], None],
) -> Result:
    """Learn weight rounding, step sizes and borders of one unit.

    Args:
      unit: what to reconstruct.
      grids: weight side of its layers.
      tensors: initial states of its quantized tensors; those not `trained` stay as they are.
      data: cached activations.
      static: values of ``unit.program.static``.
      recipe: every knob.
      seed: of batches and masks.
      compiler: where compiled steps are shared, and the backend that they run on.
      on_step: told (step, reconstruction loss) now and then.

    Raises:
      ReconstructionError: the loss is not finite.
    """
    trained = tuple(trained)
    optimizer = _optimizer(unit, recipe)
    params = _initial(unit, grids, tensors, trained)
    fixed = (tuple(grids), tuple(tensors), tuple(static))
    advance = compiler.get(
        ("step", unit.key, recipe, trained),
        lambda: functools.partial(_steps, unit, recipe, optimizer, compiler.layer),
        donate_argnums=0,
    )
    carry = (params, optimizer.init(params))
    samples = data.targets[0].values.shape[0]
    index = _batches(np.random.default_rng(seed), samples, recipe)
    key, chunk = jax.random.key(seed), steps_a_call()
    losses: list[jax.Array] = []
    curve = []
    for start in range(0, recipe.steps, chunk):
        steps = np.arange(start, min(start + chunk, recipe.steps), dtype=np.int32)
        carry, loss = advance(carry, fixed, data, key, steps, index[start : start + chunk])
        losses.append(loss)
        done = int(steps[-1]) + 1
        if done % LOG_EVERY == 0 or done == recipe.steps or chunk > 1:
            recent = np.concatenate([np.atleast_1d(np.asarray(value)) for value in losses])
            losses = []
            _check_finite(recent, unit, done, recipe.steps)
            curve.append((done, float(recent.mean())))
            on_step(done, curve[-1][1])
    params = carry[0]
    final = [
        state if step is None else state._replace(step_size=step)
        for state, step in zip(tensors, params["step"], strict=True)
    ]
    coefficients = [_stored(own, recipe.border_format) for own in params["border"]]
    layers = deploy(unit, grids, params["alpha"], coefficients)
    return Result(layers, tuple(final), np.array(curve, np.float32).reshape(-1, 2))


def steps_a_call() -> int:
    """Steps that run in one call, as a scan, on the default device."""
    return 1 if jax.default_backend() == "cpu" else GPU_CHUNK


def _initial(unit: Unit, grids, tensors, trained) -> dict[str, list]:
    """What is learned, where it starts."""
    return {
        "alpha": [alpha_of(op, g) for op, g in zip(unit.program.weighted, grids, strict=True)],
        "step": [
            jnp.copy(t.step_size) if own else None for t, own in zip(tensors, trained, strict=True)
        ],
        "border": init_borders(unit),
    }


def _check_finite(losses: np.ndarray, unit: Unit, done: int, steps: int) -> None:
    if not np.isfinite(losses).all():
        raise ReconstructionError(
            f"{', '.join(s.path for s in unit.specs)}: the reconstruction loss is "
            f"{losses[~np.isfinite(losses)][0]} near step {done} of {steps}"
        )


def _stored(coefficients, format: str):
    """Coefficients as they are saved."""
    return {
        name: jnp.asarray(packing.decode(*packing.encode(np.asarray(own), format)))
        for name, own in coefficients.items()
    }


def output_loss(recipe: Recipe, unit: Unit, outputs, targets, counted=None) -> jax.Array:
    """``|y - target|^p`` summed over channels and averaged over the rest, for all targets.

    What is padding (not `counted`, bool ``[batch, positions]``) has no part in the average.
    """
    op = unit.program.weighted[-1]
    total = jnp.float32(0.0)
    for output, target, tokens in zip(outputs, targets, unit.tokens, strict=True):
        if not jnp.issubdtype(output.dtype, jnp.floating):
            continue
        error = jnp.abs(output.astype(jnp.float32) - target.astype(jnp.float32))
        axes = [axis for axis in op.layer.output_axes if axis < output.ndim]
        channels = np.prod([output.shape[axis] for axis in axes or [output.ndim - 1]])
        power = error**2 if recipe.loss_power == 2.0 else error**recipe.loss_power
        where = None if counted is None else counts(counted, tokens, output.ndim)
        mean = jnp.mean(power, where=where if tokens else None)
        total = total + mean * np.float32(channels)
    return total


def _optimizer(unit: Unit, recipe: Recipe) -> optax.GradientTransformation:
    steps = max(recipe.steps, 1)

    def schedule(rate, kind, warmup=0.0):
        begin = int(warmup * steps)
        after = optax.constant_schedule(rate)
        if kind == "cosine":
            after = optax.cosine_decay_schedule(rate, steps - begin)
        return optax.join_schedules([optax.constant_schedule(0.0), after], [begin])

    factors = [
        {name: _coefficient_rate(spec, recipe, name) for name in coefficients}
        for spec, coefficients in zip(unit.specs, init_borders(unit), strict=True)
    ]

    def scale_borders(updates, _):
        return {**updates, "border": jax.tree.map(jnp.multiply, updates["border"], factors)}

    border_rate = schedule(recipe.border_lr, recipe.border_schedule, recipe.border_warmup)
    parts: dict[Hashable, optax.GradientTransformation] = {
        "alpha": optax.adam(recipe.weight_lr),
        "step": optax.adam(schedule(recipe.step_lr, recipe.step_schedule)),
        "border": optax.adam(border_rate),
    }
    groups = optax.multi_transform(parts, lambda params: {name: name for name in params})
    return optax.chain(groups, optax.stateless(scale_borders))


def _coefficient_rate(spec, recipe: Recipe, name: str) -> float:
    """Factor on a coefficient's learning rate: gain * (range / Qmax)^(power - 1)."""
    power = borders.get(spec.border).powers.get(name)
    if power is None or recipe.border_range is None:
        return recipe.border_gain
    return recipe.border_gain * (recipe.border_range / max_code(spec.act_bits)) ** (power - 1)


def _batches(rng, samples: int, recipe: Recipe) -> np.ndarray:
    """Sample indices of every step: ``[steps, batch_size]``, without repeats in a batch."""
    size = min(recipe.batch_size, samples)
    draws = [rng.choice(samples, size, replace=False) for _ in range(recipe.steps)]
    return np.array(draws, np.int32)


def _steps(unit, recipe, optimizer, layer, carry, fixed, data, key, steps, index):
    body = functools.partial(_step, unit, recipe, optimizer, layer, fixed, data, key)
    if steps.shape[0] == 1:
        carry, loss = body(carry, (steps[0], index[0]))
        return carry, loss[None]
    return jax.lax.scan(body, carry, (steps, index))


def _step(unit, recipe, optimizer, layer, fixed, data, key, carry, step_and_index):
    """One optimisation step; the whole of Algorithm 1 on one mini-batch."""
    step, index = step_and_index
    params, state = carry
    grids, tensors, static = fixed
    mixing, dropping = jax.random.split(jax.random.fold_in(key, step))
    begin = int(np.ceil(recipe.steps * (1.0 - recipe.settle)))
    settled = step >= begin if recipe.settle > 0 else False
    live = _mix(unit, recipe, data, index, mixing, settled)
    side = [leaf[index] for leaf in data.side]
    counted = None if data.counted is None else data.counted[index]
    dtypes = [unit.avals[i].dtype for i in unit.program.outputs]
    targets = [t.take(index, d) for t, d in zip(data.targets, dtypes, strict=True)]
    local = {value: i for i, value in enumerate(unit.tensor_of)}

    def keep(value, shape):
        drawn = jax.random.fold_in(dropping, local[value])
        return random_keep(drawn, 1.0 - recipe.drop, shape) | settled

    def loss_fn(params):
        weights = _soft_weights(unit, grids, params)
        states = _trained_states(unit, tensors, params["step"])
        mask = keep if recipe.drop > 0 else None
        outputs = forward(unit, weights, states, live, side, static, mask, layer)
        reconstruction = output_loss(recipe, unit, outputs, targets, counted)
        return reconstruction + _rounding_loss(recipe, params["alpha"], step), reconstruction

    (_, loss), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    stepped: Any = optax.apply_updates(params, updates)
    floors = [
        None if s is None else t.step_size * MIN_STEP_SHRINK
        for s, t in zip(stepped["step"], tensors, strict=True)
    ]
    stepped["step"] = jax.tree.map(jnp.maximum, stepped["step"], floors)
    return (stepped, state), loss


def _mix(unit, recipe, data, index, key, settled):
    """The unit's input: the quantized prefix's, each element the float network's by chance."""
    live = []
    for i, (quantized, floating) in enumerate(zip(data.quantized, data.floating, strict=True)):
        dtype = unit.avals[unit.program.live[i]].dtype
        value = quantized.take(index, dtype)
        if recipe.input_mixing > 0:
            chosen = random_keep(jax.random.fold_in(key, i), recipe.input_mixing, value.shape)
            chosen = chosen & jnp.logical_not(settled)
            value = jnp.where(chosen, floating.take(index, dtype), value)
        live.append(value)
    return live


def _soft_weights(unit, grids, params) -> list[Weights]:
    weights = []
    for i, (op, spec) in enumerate(zip(unit.program.weighted, unit.specs, strict=True)):
        grid, value = grids[i], grids[i].weight
        if grid.scale is not None:
            scale, zero = per_channel(op, grid.scale), per_channel(op, grid.zero_point)
            codes = soft_codes(value / scale, params["alpha"][i], zero, spec.weight_bits)
            value = scale * (codes - zero)
        weights.append(Weights(value, grid.bias, params["border"][i]))
    return weights


def _trained_states(unit, tensors, steps):
    states = []
    sizes = {index: value for value, index in reversed(unit.tensor_of.items())}
    for i, (state, step) in enumerate(zip(tensors, steps, strict=True)):
        if step is not None:
            numel = int(np.prod(unit.avals[sizes[i]].shape))
            factor = lsq_gradient_scale(numel, unit.tensors[i].bits)
            state = state._replace(step_size=scale_gradient(step, factor))
        states.append(state)
    return states


def _rounding_loss(recipe: Recipe, alphas, step):
    progress = step.astype(jnp.float32) / recipe.steps
    beta = beta_schedule(progress, recipe.rounding_warmup, recipe.beta_start, recipe.beta_end)
    total = sum(regularizer(alpha, beta) for alpha in alphas if alpha is not None)
    on = (progress >= recipe.rounding_warmup).astype(jnp.float32)
    return recipe.rounding_weight * on * total
