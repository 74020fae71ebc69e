"""Whether an allocation can keep to a budget: one line that names the least and the most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aquant_jax.allocation.choices import Budget
from aquant_jax.allocation.layer_choices import LayerChoices
from aquant_jax.allocation.solve import SLACK, Problem, cheapest, least_error
from aquant_jax.arithmetic.uniform import MAX_BITS
from aquant_jax.errors import InputError

AVERAGES = {"weight_bits": 1.0, "act_bits": 1.0}
SIDES = {"weight_bits": "average_bits of weights", "act_bits": "average_bits of activations"}


def weights_of(cost: str) -> dict[str, float]:
    """The costs of `costs.Costs` that a cost of a budget is the sum of."""
    return dict(AVERAGES) if cost == "average_bits" else {cost: 1.0}


def limit_text(name: str, limit: float) -> str:
    """A limit of a cost, as a user gives it.

    >>> limit_text("act_bits", 3.5), limit_text("bytes", 2000)
    ('average_bits of activations 3.5', 'bytes 2,000')
    """
    return f"{SIDES.get(name, name)} {limit:,.10g}"


def extremes(problem: Problem, name: str) -> tuple[float, float]:
    """The least and the most of a cost."""
    least, most = (problem.costs.total(name, cheapest(problem, {name: s})) for s in (1.0, -1.0))
    return least, most


def check_free(layers: Sequence[LayerChoices]) -> None:
    """InputError if the recipe fixes every layer, so that none has a choice."""
    if all(a.weights_fixed and a.input_fixed and len(a.choices) == 1 for a in layers):
        fixed = ", ".join(f"{a.path} at {a.choices[0]}" for a in layers)
        raise InputError(
            f"the recipe fixes every layer, {fixed}; first_weight_bits, last_weight_bits and "
            "last_act_bits of None leave the first and the last one free"
        )


def check_limits(
    problem: Problem,
    layers: Sequence[LayerChoices],
    limits: Mapping[str, float],
    without_overrides: Callable[[], Problem],
) -> None:
    """Check that some allocation keeps to each limit, and that not all do.

    Args:
      problem: the choices and their costs.
      layers: of the network.
      limits: by name of the cost.
      without_overrides: the problem in which no override fixes a layer.

    Raises:
      InputError: a limit is below the least, of which overrides may be the cause, or above the
        most.
    """
    ends = {name: extremes(problem, name) for name in limits}
    for name, limit in limits.items():
        least, most = ends[name]
        counted = name in SIDES and most > MAX_BITS
        floats = " (a float counts with the bits of its dtype)" if counted else ""
        if all(bound > ends[other][1] * (1 + SLACK) for other, bound in limits.items()):
            raise InputError(
                f"budget: {limit_text(name, limit)} is above the most, {most:,.10g}{floats}; the "
                f"least is {least:,.10g}; any choice keeps to it, so no budget is needed"
            )
        if limit * (1 + SLACK) >= least:
            continue
        message = (
            f"budget: {limit_text(name, limit)} is below the least, {least:,.10g}; the most is "
            f"{most:,.10g}{floats}"
        )
        fixed = [f"{a.path} at {a.choices[0]}" for a in layers if a.by_override]
        free = without_overrides() if fixed else problem
        if name in free.costs.layers and extremes(free, name)[0] <= limit * (1 + SLACK):
            message += f"; overrides fix {', '.join(fixed)}"
        raise InputError(message)


def check_degradation(problem: Problem, budget: Budget) -> None:
    """InputError for a degradation that no allocation keeps, or that the cheapest one does."""
    limit = budget.degradation
    if limit is None:
        return
    least = problem.degradation(least_error(problem, {}))
    most = problem.degradation(cheapest(problem, weights_of(budget.counted)))
    if not least <= limit * (1 + SLACK) or limit > most * (1 + SLACK):
        low = limit < least
        advice = "" if low else ", which keeps to it: no budget is needed for that"
        raise InputError(
            f"budget: degradation {limit:g} is {'below the least' if low else 'above the most'}; "
            f"it is {least:g} at the least, and {most:g} of the allocation of least "
            f"{budget.counted}{advice}"
        )
