"""The part of a recipe that says how the quantizers are learned."""

from __future__ import annotations

import dataclasses

import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.recipe_checks import check_choice, check_ranges, check_types

SCHEDULES = ("constant", "cosine")
FINETUNE_LOSSES = ("mse", "kl")
_FRACTIONS = (
    "input_mixing", "quant_drop_prob", "final_full_quant_fraction", "border_warmup",
    "rounding_warmup",
)  # fmt: skip
_POSITIVE = (
    "batch_size", "accumulate", "init_samples", "weight_lr", "step_lr", "border_lr", "loss_power",
    "border_gain", "border_range", "beta_start", "beta_end", "finetune_lr", "finetune_eval_every",
)  # fmt: skip
_COUNTS = (
    "steps", "rounding_weight", "weight_scale_lr", "border_tolerance", "finetune_steps",
    "finetune_weight_lr",
)  # fmt: skip

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How the quantizers of a block are learned. The defaults are those of the public QDrop code.

    A restart (``quantize(restart_from=...)``) may change these fields.

    >>> import aquant_jax as aq
    >>> aq.recipes.aquant(steps=400).reconstruction == aq.Reconstruction(
    ...     steps=400, input_mixing=0.5, quant_drop_prob=0.5, final_full_quant_fraction=0.5
    ... )
    True

    Attributes:
      steps: optimisation steps per block; 0 rounds to nearest.
      batch_size: samples per step.
      input_mixing: probability that an element of a block's input is the float network's.
      quant_drop_prob: probability that an element inside a block stays unquantized (QDrop).
      final_full_quant_fraction: fraction of the steps, at the end, without mixing or dropping.
        Borders and step sizes then see the network that is deployed.
      weight_lr, step_lr, border_lr: Adam learning rates of alpha, step sizes and coefficients.
      weight_scale_lr: Adam learning rate of the logarithm of every weight scale, one per output
        channel, as in Genie (Jeon et al. 2023): alpha and the codes stay those of the searched
        scale, and the learned scale multiplies them. 0 keeps the searched scales. Its schedule is
        `step_schedule`.
      step_schedule, border_schedule: "constant" or "cosine" (to zero).
      border_gain: factor on the learning rate of every coefficient. Under Adam it is equivalent to
        learning p with B = phi(1/2 + gain * p).
      border_range: scales the learning rates as if u ran from 0 to this value instead of Qmax: one
        step of Adam then moves the border by the same share of the tensor's range at every
        bit-width. None disables it.
      border_warmup: fraction of the steps before the coefficients start to move.
      rounding_weight: lambda of the rounding loss.
      rounding_warmup: fraction of the steps without rounding loss.
      beta_start, beta_end: exponent of the rounding loss.
      border_tolerance: for ``border="auto"``: the cheapest border is kept whose error is at most
        this share above that of a quadratic border an element.
      accumulate: number of equal parts of a batch whose gradients are added up, so that a step
        holds the activations of one part at a time. The masks are those of the whole batch; the
        loss is the mean over the parts. It must divide `batch_size`.
      rematerialize: whether gradients compute every layer a second time instead of keeping the
        values inside it. A step then holds less and takes longer, and its last bits may differ.
      loss_power: the reconstruction loss is mean ``|error|^loss_power``, summed over channels.
      init_samples: samples for the initial step sizes.
      finetune_steps: steps of the whole-network stage after the last block, on batches of
        `batch_size`; 0 leaves it out, None takes as many as `steps`.
      finetune_lr: Adam learning rate of that stage at 2 bits: relative for step sizes and weight
        scales, absolute for biases; of coefficients as for `border_lr`.
      finetune_weight_lr: Adam learning rate of the weight codes in that stage at 2 bits, in codes,
        with straight-through gradients; 0 keeps the codes. At other bits both rates are
        3 / (2^bits - 1) of these, where bits are the fewer of ``weight_bits`` and ``act_bits``.
        They fall to zero as a cosine.
      finetune_loss: "kl" from the float network's class probabilities, for outputs that are logits
        over the last axis; "mse", the mean squared error relative to the mean square of the output.
      finetune_held_out: fraction of the calibration set on which the best step of that stage is
        chosen, and the borders of ``border="auto"``. Where either is at work, nothing is learned
        from these samples.
      finetune_eval_every: steps between two evaluations, each of which is also a step from which
        an interrupted run resumes.
    """

    steps: int = 20_000
    batch_size: int = 32
    input_mixing: float = 0.0
    quant_drop_prob: float = 0.0
    final_full_quant_fraction: float = 0.0
    weight_lr: float = 1e-3
    step_lr: float = 4e-5
    border_lr: float = 1e-3
    weight_scale_lr: float = 0.0
    step_schedule: str = "cosine"
    border_schedule: str = "constant"
    border_gain: float = 1.0
    border_range: float | None = 3.0
    border_warmup: float = 0.0
    rounding_weight: float = 0.01
    rounding_warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    border_tolerance: float = 0.02
    accumulate: int = 1
    rematerialize: bool = False
    loss_power: float = 2.0
    init_samples: int = 256
    finetune_steps: int | None = 0
    finetune_lr: float = 2e-3
    finetune_weight_lr: float = 2e-2
    finetune_loss: str = "mse"
    finetune_held_out: float = 0.1
    finetune_eval_every: int = 100

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("step_schedule", "border_schedule"):
            check_choice(self, name, SCHEDULES)
        check_choice(self, "finetune_loss", FINETUNE_LOSSES)
        check_ranges(self, _FRACTIONS, lambda v: 0.0 <= v < 1.0, "in [0, 1)")
        positive = "positive and finite as a float32"
        check_ranges(self, _POSITIVE, lambda v: _LEAST <= v <= _MOST, positive)
        check_ranges(self, _COUNTS, lambda v: 0 <= v <= _MOST, "0 or more, and finite as a float32")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate is {self.accumulate}, which does not divide batch_size "
                f"{self.batch_size}"
            )
        check_ranges(self, ("finetune_held_out",), lambda v: 0.0 < v < 1.0, "in (0, 1)")

    @property
    def of_a_step(self) -> Reconstruction:
        """What a step of a block depends on: what other stages alone read has its defaults."""
        return dataclasses.replace(self, **_NOT_OF_A_STEP)

    @property
    def whole_network_steps(self) -> int:
        """Steps of the whole-network stage."""
        return self.steps if self.finetune_steps is None else self.finetune_steps


_NOT_OF_A_STEP = {
    field.name: field.default
    for field in dataclasses.fields(Reconstruction)
    if field.name.startswith("finetune_") or field.name in ("border_tolerance", "init_samples")
}
