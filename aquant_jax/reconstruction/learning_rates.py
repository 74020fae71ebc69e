"""Learning rates: the optax transformations of the learned parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import max_code
from aquant_jax.layers.fake_quant import LayerSpec
from aquant_jax.plan.block_program import BlockProgram
from aquant_jax.recipe import Recipe, Reconstruction
from aquant_jax.reconstruction.weights import init_borders


def make_optimizer(program: BlockProgram, learning: Reconstruction) -> optax.GradientTransformation:
    """Adam with a schedule of its own for alpha, step sizes, weight scales and coefficients."""
    steps = max(learning.steps, 1)

    def schedule(rate: float, kind: str, warmup: float = 0.0) -> optax.Schedule:
        begin = int(warmup * steps)
        after = optax.constant_schedule(rate)
        if kind == "cosine":
            after = optax.cosine_decay_schedule(rate, steps - begin)
        return optax.join_schedules([optax.constant_schedule(0.0), after], [begin])

    factors = [
        {name: coefficient_rate(spec, learning, name) for name in coefficients}
        for spec, coefficients in zip(program.specs, init_borders(program), strict=True)
    ]

    def scale_borders(updates: Any, _: Any) -> Any:
        return {**updates, "border": jax.tree.map(jnp.multiply, updates["border"], factors)}

    border_rate = schedule(learning.border_lr, learning.border_schedule, learning.border_warmup)
    parts: dict[Hashable, optax.GradientTransformation] = {
        "alpha": optax.adam(learning.weight_lr),
        "step": optax.adam(schedule(learning.step_lr, learning.step_schedule)),
        "border": optax.adam(border_rate),
    }
    if learning.weight_scale_lr > 0:
        scale_rate = schedule(learning.weight_scale_lr, learning.step_schedule)
        parts["scale"] = optax.adam(scale_rate)
    groups = optax.multi_transform(parts, lambda params: {name: name for name in params})
    return optax.chain(_under_default_types(groups), optax.stateless(scale_borders))


def make_finetune_optimizer(
    specs: Mapping[str, LayerSpec], recipe: Recipe
) -> optax.GradientTransformation:
    """Adam with a cosine schedule for the parameters of `finetune_step.Finetuner`."""
    learning = recipe.reconstruction
    schedule = optax.cosine_decay_schedule(1.0, max(learning.whole_network_steps, 1))
    bits = min(recipe.weight_bits, recipe.act_bits or recipe.weight_bits)
    factor = max_code(2) / max_code(bits)
    rate, codes = factor * learning.finetune_lr, factor * learning.finetune_weight_lr

    def of_layer(path: str, own: dict[str, Any]) -> dict[str, Any]:
        border = {n: rate * coefficient_rate(specs[path], learning, n) for n in own["border"]}
        rates = {"bias": rate, "scale": rate, "codes": codes, "border": border}
        return jax.tree.map(jnp.multiply, own, {name: rates[name] for name in own})

    def scale(updates: Any, _: Any) -> Any:
        steps = {key: rate * update for key, update in updates["steps"].items()}
        layers = {path: of_layer(path, own) for path, own in updates["layers"].items()}
        return {"layers": layers, "steps": steps}

    return optax.chain(_under_default_types(optax.adam(schedule)), optax.stateless(scale))


def _under_default_types(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Trace `optimizer` under standard promotion in 32 bits, whatever is in force around it.

    optax's Adam raises a Python float to an int32 power. Strict promotion forbids this, and with
    ``jax_enable_x64`` its result is float64, which would change the last bit of an update.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def coefficient_rate(spec: LayerSpec, learning: Reconstruction, name: str) -> float:
    """Factor on a coefficient's learning rate: ``gain * (range / Qmax)^(power - 1)``."""
    power = borders.get(spec.border or "constant").powers.get(name)
    if power is None or learning.border_range is None:
        return learning.border_gain
    ratio = learning.border_range / max_code(spec.act_bits)
    return learning.border_gain * ratio ** (power - 1)
