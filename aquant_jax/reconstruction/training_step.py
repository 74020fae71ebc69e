"""One optimisation step of a block: the whole of Algorithm 1 on one mini-batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aquant_jax.arithmetic.adaround import soft_codes
from aquant_jax.arithmetic.uniform import ActivationQuantizer, lsq_gradient_scale, scale_gradient
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.layers.fake_quant import Weights, per_channel
from aquant_jax.layers.rematerialize import rematerialized
from aquant_jax.plan.block_program import BlockProgram, differentiating, forward, random_keep
from aquant_jax.recipe import Reconstruction
from aquant_jax.reconstruction.activation_cache import Cache, take
from aquant_jax.reconstruction.devices import take_batch
from aquant_jax.reconstruction.loss import output_loss, rounding_loss
from aquant_jax.reconstruction.weights import WeightQuantizer

MIN_STEP_SHRINK = 1e-2  # a step size never falls below this share of its initial value
Params = dict[str, list[Any]]


class CalibrationData(NamedTuple):
    """The activations that a block is reconstructed on (a pytree).

    Attributes:
      quantized, floating: its inputs, from the quantized prefix and from the float network.
      targets: its float outputs.
      learn_from: numbers of the samples to draw batches from.
      model_inputs: the leaves of the model's input that it reads, ``[samples, ...]`` or scalar.
      constants: the arrays of the network that it reads.
      valid_mask: bool ``[samples, positions]``, False at padding; None without padding.
    """

    quantized: tuple[Cache, ...]
    floating: tuple[Cache, ...]
    targets: tuple[Cache, ...]
    learn_from: np.ndarray
    model_inputs: Sequence[jax.Array] = ()
    constants: Sequence[jax.Array] = ()
    valid_mask: jax.Array | None = None

    @property
    def samples(self) -> tuple[Any, ...]:
        """What has a sample axis."""
        return self.quantized, self.floating, self.targets, self.model_inputs, self.valid_mask

    def with_samples(self, samples: tuple[Any, ...]) -> CalibrationData:
        """The same with other `samples`."""
        quantized, floating, targets, model_inputs, valid_mask = samples
        return self._replace(
            quantized=quantized, floating=floating, targets=targets, model_inputs=model_inputs,
            valid_mask=valid_mask,
        )  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "activations"],
    meta_fields=["trained"],
)
@dataclasses.dataclass(frozen=True)
class Quantizers:
    """The quantizers of a block where reconstruction starts (a pytree).

    Attributes:
      weights: one per layer.
      activations: one per quantized tensor.
      trained: whether the step size of each tensor is learned in this block (static).
    """

    weights: tuple[WeightQuantizer, ...]
    activations: tuple[ActivationQuantizer, ...]
    trained: tuple[bool, ...]


class Trainer(NamedTuple):
    """The static part of a step."""

    program: BlockProgram
    learning: Reconstruction
    optimizer: optax.GradientTransformation
    layer: Callable[..., jax.Array]


def train_steps(
    trainer: Trainer,
    carry: tuple[Params, Any],
    quantizers: Quantizers,
    data: CalibrationData,
    key: jax.Array,
    steps: jax.Array,
    index: jax.Array,
) -> tuple[tuple[Params, Any], jax.Array]:
    """Several steps of one call: losses ``[steps]``."""
    body = functools.partial(_step, trainer, quantizers, data, key)
    if steps.shape[0] == 1:
        carry, loss = body(carry, (steps[0], index[0]))
        return carry, loss[None]
    return jax.lax.scan(body, carry, (steps, index))


def _step(
    trainer: Trainer,
    quantizers: Quantizers,
    data: CalibrationData,
    key: jax.Array,
    carry: tuple[Params, Any],
    step_and_index: tuple[jax.Array, jax.Array],
) -> tuple[tuple[Params, Any], jax.Array]:
    """One optimisation step; the whole of Algorithm 1 on one mini-batch."""
    step, index = step_and_index
    loss, gradients = gradients_of(trainer, carry[0], quantizers, data, key, (step, 0, index))
    return update(trainer, carry, quantizers, gradients), loss


def gradients_of(
    trainer: Trainer,
    params: Params,
    quantizers: Quantizers,
    data: CalibrationData,
    key: jax.Array,
    where: tuple[jax.Array, jax.Array | int, jax.Array],
) -> tuple[jax.Array, Params]:
    """The reconstruction loss of a part of a mini-batch, and the gradient of the whole loss.

    Args:
      trainer, params, quantizers, data: of the block.
      key: of the run.
      where: the step, the number of the part, and the samples in it.

    Raises:
      InputError: see `differentiating`.
    """
    program, learning = trainer.program, trainer.learning
    step, part, index = where
    mixing, dropping = jax.random.split(jax.random.fold_in(key, step))
    begin = int(np.ceil(learning.steps * (1.0 - learning.final_full_quant_fraction)))
    full = step >= begin if learning.final_full_quant_fraction > 0 else False
    draw = functools.partial(_draw_part, learning.accumulate, part)
    boundary = _mix(trainer, data, index, functools.partial(draw, mixing), full)
    model = [take_batch(leaf, index) for leaf in data.model_inputs]
    inputs = BlockInputs(boundary, model, data.constants)
    targets = take(data.targets, index, program.dtypes(program.subgraph.outputs))
    valid_mask = None if data.valid_mask is None else data.valid_mask[index]
    draw_of = {value: i for i, value in enumerate(program.tensor_of)}

    def keep(value: int, shape: tuple[int, ...]) -> jax.Array:
        return draw(dropping, draw_of[value], 1.0 - learning.quant_drop_prob, shape) | full

    def loss_fn(params: Params) -> tuple[jax.Array, jax.Array]:
        weights = _soft_weights(program, quantizers.weights, params)
        activations = _scaled_steps(trainer, quantizers.activations, params["step"])
        mask = keep if learning.quant_drop_prob > 0 else None
        layer = rematerialized(trainer.layer) if learning.rematerialize else trainer.layer
        outputs = forward(program, weights, activations, inputs, mask, layer)
        error = output_loss(program, outputs, targets, learning.loss_power, valid_mask)
        return error + rounding_loss(learning, params["alpha"], step), error

    with differentiating(program):
        (_, loss), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, gradients


def update(
    trainer: Trainer, carry: tuple[Params, Any], quantizers: Quantizers, gradients: Params
) -> tuple[Params, Any]:
    """Parameters and optimizer state after an update."""
    params, state = carry
    updates, state = trainer.optimizer.update(gradients, state, params)
    stepped: Any = optax.apply_updates(params, updates)
    return _with_step_floor(stepped, quantizers.activations), state


def _draw_part(
    parts: int, part: Any, key: jax.Array, number: int, probability: float, shape: tuple[int, ...]
) -> jax.Array:
    """The rows of a part in the mask of a whole batch."""
    key, count = jax.random.fold_in(key, number), shape[0]
    if parts == 1:
        return random_keep(key, probability, shape)
    whole = random_keep(key, probability, (parts * count, *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(whole, part * count, count)


def _with_step_floor(params: Params, start: Sequence[ActivationQuantizer]) -> Params:
    floors = [
        None if step is None else quantizer.step_size * MIN_STEP_SHRINK
        for step, quantizer in zip(params["step"], start, strict=True)
    ]
    return {**params, "step": jax.tree.map(jnp.maximum, params["step"], floors)}


def _mix(
    trainer: Trainer, data: CalibrationData, index: jax.Array, draw: Callable, full: Any
) -> list[jax.Array]:
    """The block's input from the quantized prefix, with random elements from the float network."""
    dtypes = trainer.program.dtypes(trainer.program.subgraph.boundary_inputs)
    quantized = take(data.quantized, index, dtypes)
    if trainer.learning.input_mixing == 0:
        return quantized
    mixed = []
    for i, value in enumerate(quantized):
        probability = trainer.learning.input_mixing
        chosen = draw(i, probability, value.shape) & jnp.logical_not(full)
        mixed.append(jnp.where(chosen, data.floating[i].take(index, dtypes[i]), value))
    return mixed


def _soft_weights(
    program: BlockProgram, quantizers: Sequence[WeightQuantizer], params: Params
) -> list[Weights]:
    """Weights with soft rounding, differentiable in alpha and in the logarithms of the scales."""
    weights = []
    for i, (op, spec) in enumerate(zip(program.subgraph.weighted, program.specs, strict=True)):
        value, bias, scale, zero_point = quantizers[i]
        if scale is not None and zero_point is not None and spec.weight_bits is not None:
            scales, zeros = per_channel(op, scale), per_channel(op, zero_point)
            codes = soft_codes(value / scales, params["alpha"][i], zeros, spec.weight_bits)
            value = scales * (codes - zeros)
            if "scale" in params:
                value = value * per_channel(op, jnp.exp(params["scale"][i]))
        weights.append(Weights(value, bias, params["border"][i]))
    return weights


def _scaled_steps(
    trainer: Trainer,
    activations: Sequence[ActivationQuantizer],
    steps: Sequence[jax.Array | None],
) -> list[ActivationQuantizer]:
    """Quantizers with the learned step sizes, whose gradients have LSQ's scale."""
    program, parts = trainer.program, trainer.learning.accumulate
    value_of = {index: value for value, index in reversed(program.tensor_of.items())}
    scaled = []
    for i, (quantizer, step) in enumerate(zip(activations, steps, strict=True)):
        if step is not None:
            numel = parts * int(np.prod(program.avals[value_of[i]].shape))
            factor = lsq_gradient_scale(numel, program.tensors[i].bits)
            quantizer = quantizer._replace(step_size=scale_gradient(step, factor))
        scaled.append(quantizer)
    return scaled
