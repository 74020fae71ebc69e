"""Whether an allocation can keep to a budget: one line that names the least and the most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aquant_jax.allocation.choices import Budget
from aquant_jax.allocation.layer_choices import LayerChoices
from aquant_jax.allocation.solve import SLACK, Problem, cheapest, least_error
from aquant_jax.errors import InputError

AVERAGES = {"weight_bits": 1.0, "act_bits": 1.0}


def weights_of(cost: str) -> dict[str, float]:
    """The costs of `costs.Costs` that a cost of a budget is the sum of."""
    return dict(AVERAGES) if cost == "average_bits" else {cost: 1.0}


def extremes(problem: Problem, name: str) -> tuple[float, float]:
    """The least and the most of a cost."""
    least, most = (problem.costs.total(name, cheapest(problem, {name: s})) for s in (1.0, -1.0))
    return least, most


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
        if all(bound > ends[other][1] * (1 + SLACK) for other, bound in limits.items()):
            raise InputError(
                f"budget: {name} {limit:,.10g} is above the most, {most:,.10g}; the least is "
                f"{least:,.10g}; any choice keeps to it, so no budget is needed"
            )
        if limit * (1 + SLACK) >= least:
            continue
        message = (
            f"budget: {name} {limit:,.10g} is below the least, {least:,.10g}; the most is "
            f"{most:,.10g}"
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
    most = problem.degradation(cheapest(problem, weights_of(budget.cost)))
    if not least <= limit * (1 + SLACK) or limit > most * (1 + SLACK):
        low = limit < least
        advice = "" if low else ", which keeps to it: no budget is needed for that"
        raise InputError(
            f"budget: degradation {limit:g} is {'below the least' if low else 'above the most'}; "
            f"it is {least:g} at the least, and {most:g} of the allocation of fewest "
            f"{budget.cost}{advice}"
        )
