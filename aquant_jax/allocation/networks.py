"""The network of an allocation: as it is measured, and as its recipe quantizes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aquant_jax.allocation.choices import Choice
from aquant_jax.allocation.layer_choices import LayerChoices, layer_choices, uniform
from aquant_jax.arithmetic.uniform import MAX_BITS
from aquant_jax.plan import checks
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.network import Network
from aquant_jax.recipe import Recipe
from aquant_jax.sensitivity import probed


class Networks(NamedTuple):
    """One network, prepared in two ways.

    Attributes:
      probe: its plan has every tensor that some choice quantizes.
      target: its plan is that of the recipe.
      samples: the first ``init_samples`` of the calibration set.
      layers: what each layer may choose.
    """

    probe: Network
    target: Network
    samples: Any
    layers: tuple[LayerChoices, ...]


def prepare_networks(
    apply: Callable,
    variables: Any,
    calibration: Any,
    choices: Sequence[Choice],
    recipe: Recipe,
    mask: str | None,
    batch: int | None = None,
) -> Networks:
    """The networks of `allocate`, which has the arguments and the errors.

    They run `batch` samples at once, or all of them.
    """
    checks.check_recipe(recipe)
    widest = Choice(MAX_BITS, MAX_BITS if any(choice.act_bits for choice in choices) else None)
    probing = uniform(recipe, widest).replace(border=None)
    probe, samples = probed(apply, variables, calibration, probing, mask, batch)
    target = probe._replace(recipe=recipe, plan=make_plan(probe.graph, recipe))
    return Networks(probe, target, samples, layer_choices(probe.graph, recipe, choices))
