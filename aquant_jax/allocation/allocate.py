"""`allocate`: bits and borders of every layer, for the least output error within a budget."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aquant_jax.allocation.choices import Budget, Choice, check_choices
from aquant_jax.allocation.costs import (
    Latencies,
    check_latencies,
    rule_tensors,
    ruled_inputs,
)
from aquant_jax.allocation.feasible import (
    check_degradation,
    check_free,
    check_limits,
    extremes,
    limit_text,
    weights_of,
)
from aquant_jax.allocation.latency import layer_latencies
from aquant_jax.allocation.layer_choices import (
    LayerChoices,
    Recipes,
    base_recipe,
    chosen_overrides,
    layer_choices,
    uniform,
)
from aquant_jax.allocation.measure import Meter, measure, open_measurements
from aquant_jax.allocation.networks import prepare_networks
from aquant_jax.allocation.origins import (
    from_runs,
    named_runs,
    origins_of,
    round_learned,
    round_nearest,
    uniform_choices,
)
from aquant_jax.allocation.repair import learns_blocks, repaired
from aquant_jax.allocation.result import Allocation, Entry, FrontPoint
from aquant_jax.allocation.solve import (
    InfeasibleError,
    Problem,
    cheapest,
    least_error,
    make_problem,
)
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.errors import InputError, check_type
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan import checks
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.network import Network
from aquant_jax.quantize import quantize
from aquant_jax.recipe import Recipe, aquant
from aquant_jax.reconstruction.fingerprint import fingerprint

FRONT_POINTS = 10
FLOAT_INPUTS = 0.999  # of the elements of a block's input, while it is learned


@jax.transfer_guard("allow")
def allocate(
    apply: Callable,
    variables: Any,
    calibration: Any,
    budget: Budget,
    choices: Sequence[Choice],
    *,
    recipe: Recipe | None = None,
    mask: str | None = None,
    steps: int = 0,
    seed: int = 0,
    compiler: Compiler | None = None,
    latencies: Latencies | None = None,
    resume: str | Path | None = None,
) -> Allocation:
    """Choose bits and borders of every layer, for the least predicted error within a budget.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: ((x @ variables["a"]) @ variables["b"]) @ variables["c"]
    >>> variables = {name: np.eye(4, dtype=np.float32) for name in "abc"}
    >>> budget, choices = aq.Budget(average_bits=3), [aq.Choice(2, 2), aq.Choice(3, 3)]
    >>> aq.allocate(apply, variables, np.eye(4, dtype=np.float32), budget, choices).recipe.overrides
    (Override(pattern='^b$', weight_bits=2, act_bits=2, ...

    The error of each layer at each choice alone is measured at the network's output, and so is the
    interaction of layers of one block; a mixed-integer program then chooses.

    Args:
      apply, variables, calibration, mask: see `quantize`; errors are measured on the first
        ``recipe.reconstruction.init_samples`` samples.
      budget: the limit.
      choices: what a layer may have; readers of one tensor choose the same ``act_bits``.
      recipe: that the allocation extends; None takes ``recipes.aquant()``. The layers that it fixes
        (first and last ones, overrides) keep their bits, and count in the budget. Its
        ``finetune_loss`` says how the outputs are compared. If it learns whole blocks, these repair
        part of the errors before them, which count less for it.
      steps: 0 measures layers that are rounded to nearest. Otherwise the network is first
        reconstructed at as many uniform choices as there are bits, with so many steps a block, on
        the same samples, and layers are measured as these runs left them. Borders are learned in
        them where choices name borders, which only this tells apart.
      seed, compiler: of these runs.
      latencies: milliseconds of every layer at every choice, as `layer_latencies` gives them, for a
        budget of latency; None measures them on this device.
      resume: folder that keeps every measurement; the same call measures only what is missing.

    Returns:
      The allocation; ``.recipe`` is for `quantize`.

    Raises:
      InputError: see `quantize`; no choice, or none for any layer; choices that differ in their
        borders alone, without `steps`; a budget below the least or above the most; a layer that an
        override fixes against the budget; outputs that are no logits, with ``finetune_loss="kl"``;
        the folder cannot be written, or holds the measurements of another call.
      ReconstructionError: the float network computes NaN, or an error is not finite.
    """
    recipe, choices = recipe or aquant(), check_choices(choices)
    compiler, folder = compiler or Compiler(), checks.check_resume(resume)
    check_type("compiler", compiler, Compiler, "an aq.Compiler")
    steps, seed = checks.check_count("steps", steps), checks.check_count("seed", seed)
    _check_call(budget, choices, steps, latencies)
    net, target, samples, layers = prepare_networks(
        apply, variables, calibration, choices, recipe, mask
    )
    base = base_recipe(recipe, choices, layers)
    if budget.counted == "latency" and latencies is None:
        latencies = layer_latencies(
            apply, variables, samples, choices, recipe=recipe, mask=mask, compiler=compiler
        )
    problem = make_problem(target, layers, latencies)
    check_free(layers)
    limits = budget.limits(any(c.act_bits for layer in layers for c in layer.choices))
    check_limits(problem, layers, limits, functools.partial(_without_overrides, target, choices))
    call = _Call(apply, variables, samples, recipe, choices, mask, steps, seed, compiler, folder)
    errors, pairs, measured = _measured(call, net, layers)
    problem = problem._replace(errors=errors, pairs=pairs)
    check_degradation(problem, budget)
    recipes = Recipes(recipe, base, tuple(rule_tensors(target)), ruled_inputs(target))
    return _Result(problem, layers, recipes).allocation(budget, limits, measured)


class _Call(NamedTuple):
    """The arguments of a call that its measurements depend on."""

    apply: Callable
    variables: Any
    samples: Any
    recipe: Recipe
    choices: tuple[Choice, ...]
    mask: str | None
    steps: int
    seed: int
    compiler: Compiler
    resume: Path | None

    @property
    def borders(self) -> bool:
        """Whether the choices differ in borders, so that these must be learned to be compared."""
        return any(choice.kind != (None, None) for choice in self.choices)

    def run(self, choice: Choice) -> Quantized:
        """A short reconstruction with one choice wherever the recipe fixes nothing.

        A block learns behind the float network, as its layers are measured, and weights at a rate
        that makes up for the fewer steps.
        """
        folder = self.resume and self.resume / "runs" / str(choice).replace(" ", "_")
        recipe, learning = uniform(self.recipe, choice), self.recipe.reconstruction
        rate = learning.weight_lr * max(1.0, learning.steps / self.steps)
        recipe = recipe.replace(
            steps=self.steps, weight_lr=rate, finetune_steps=0,
            input_mixing=FLOAT_INPUTS, final_full_quant_fraction=0.0,
        )  # fmt: skip
        if not self.borders:
            recipe = recipe.replace(border=None)
        return quantize(
            self.apply, self.variables, self.samples, recipe,
            mask=self.mask, seed=self.seed, compiler=self.compiler, resume=folder,
        )  # fmt: skip


def _measured(
    call: _Call, net: Network, layers: Sequence[LayerChoices]
) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray], int]:
    """`solve.Problem.errors` and ``pairs``, and how many errors were measured for them."""
    samples, borders = call.samples, call.borders
    rounded = functools.partial(round_nearest, net, samples, call.compiler)
    if call.steps:
        rounded = functools.partial(round_learned, net, call.run, borders)
    table = uniform_choices(call.choices, borders)
    identity = fingerprint(net, samples, call.seed, call.compiler, None) | {"steps": call.steps}
    if call.steps:
        identity["reconstructed"] = {"borders": borders, "recipe": call.recipe.to_dict()}
    runs = named_runs(table) if call.steps else {}
    with open_measurements(call.resume, identity, runs) as measurements:
        if call.steps:
            table = from_runs(table, measurements.runs)
        origins = functools.partial(origins_of, table)
        meter = Meter(net, samples, layers, origins, rounded, call.compiler)
        blocks = [block.layers for block in net.blocks]
        errors, pairs = measure(measurements, meter, layers, blocks)
        if learns_blocks(call.recipe):
            errors, pairs = repaired(errors, pairs, layers, blocks)
        return errors, pairs, measurements.measured


def _check_call(budget: Any, choices: Sequence[Choice], steps: int, latencies: Any) -> None:
    if not isinstance(budget, Budget):
        raise InputError(f"budget is {budget!r}; it must be an aq.Budget")
    if latencies is not None:
        check_latencies(latencies)
    bits = {(choice.weight_bits, choice.act_bits) for choice in choices}
    if not steps and len(bits) < len(choices):
        raise InputError(
            f"choices {', '.join(map(str, choices))}: some differ in their borders alone, which "
            "rounding to nearest does not tell apart; give steps"
        )


def _without_overrides(net: Network, choices: Sequence[Choice]) -> Problem:
    recipe = dataclasses.replace(net.recipe, overrides=())
    net = net._replace(recipe=recipe, plan=make_plan(net.graph, recipe))
    return make_problem(net, layer_choices(net.graph, recipe, choices))


class _Result(NamedTuple):
    """A problem with its measured errors, which is solved and told in paths and choices."""

    problem: Problem
    layers: Sequence[LayerChoices]
    recipes: Recipes

    def allocation(self, budget: Budget, limits: Mapping[str, float], measured: int) -> Allocation:
        """The allocation under a budget.

        Raises:
          InputError: each of several limits can be kept, but not all of them.
        """
        if budget.degradation is not None:
            chosen = cheapest(self.problem, weights_of(budget.counted), budget.degradation)
        else:
            chosen = self._within(limits)
        if chosen is None:
            both = " and ".join(itertools.starmap(limit_text, limits.items()))
            raise InputError(f"budget: no allocation keeps to {both} at once")
        point = self._point(chosen)
        front = self._front(tuple(limits or weights_of(budget.counted)))
        return Allocation(
            self.recipes.base, point.layers, budget, point.degradation, point.costs, front,
            self._table(chosen), measured,
        )  # fmt: skip

    def _within(self, limits: Mapping[str, float]) -> list[int] | None:
        try:
            return least_error(self.problem, limits)
        except InfeasibleError:
            return None

    def _front(self, names: Sequence[str]) -> tuple[FrontPoint, ...]:
        """The allocations of least error at limits evenly spaced from the least to the most."""
        ends = {name: extremes(self.problem, name) for name in names}
        found = []
        for share in np.linspace(0.0, 1.0, FRONT_POINTS):
            limits = {name: low + share * (high - low) for name, (low, high) in ends.items()}
            if (chosen := self._within(limits)) is not None:
                found.append(self._point(chosen))
        return tuple(found)

    def _point(self, chosen: Sequence[int]) -> FrontPoint:
        costs = {name: self.problem.costs.total(name, chosen) for name in self.problem.costs.layers}
        pairs = zip(self.layers, chosen, strict=True)
        choices = [layer.choices[index] for layer, index in pairs]
        overrides = chosen_overrides(self.recipes, self.layers, choices)
        return FrontPoint(self.problem.degradation(chosen), costs, overrides)

    def _table(self, chosen: Sequence[int]) -> tuple[Entry, ...]:
        costs = self.problem.costs.layers
        return tuple(
            Entry(
                layer.path, str(choice), float(self.problem.errors[i][c]),
                {name: float(costs[name][i][c]) for name in costs}, c == chosen[i],
            )
            for i, layer in enumerate(self.layers) for c, choice in enumerate(layer.choices)
        )  # fmt: skip
