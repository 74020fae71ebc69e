"""The mixed-integer program against the best of all allocations."""

import itertools

import numpy as np
import pytest

from aquant_jax.allocation.costs import Costs
from aquant_jax.allocation.solve import InfeasibleError, Problem, cheapest, least_error

SIZES = (3, 4, 2, 3)


def make_problem(seed):
    """Four layers, of which the first two and the last two interact, and two share a tensor."""
    rng = np.random.default_rng(seed)
    errors = [rng.uniform(0.1, 1, n) for n in SIZES]
    pairs = {
        (i, j): sign * rng.uniform(0, 0.9) * np.sqrt(np.outer(errors[i], errors[j]))
        for i, j, sign in ((0, 1, -1), (2, 3, 1))
    }
    costs = Costs({name: [rng.integers(1, 9, n).astype(float) for n in SIZES] for name in "ab"},
                  {"a": 3.0, "b": 0.0})  # fmt: skip
    shared = [(0, 3, np.array([2, 3, 3]), np.array([3, 2, 4]))]
    return Problem(errors, pairs, costs, shared)


def allowed(problem):
    (_, _, of_first, of_last), = problem.shared  # fmt: skip
    every = itertools.product(*map(range, SIZES))
    return [list(c) for c in every if of_first[c[0]] == of_last[c[3]]]


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_finds_the_best_of_all_allocations(seed):
    problem = make_problem(seed)
    limits = {
        name: float(np.median([problem.costs.total(name, c) for c in allowed(problem)]))
        for name in "ab"
    }
    within = [
        c for c in allowed(problem)
        if all(problem.costs.total(name, c) <= limit for name, limit in limits.items())
    ]  # fmt: skip
    best = min(problem.degradation(c) for c in within)
    found = least_error(problem, limits)
    assert found in within
    assert problem.degradation(found) == pytest.approx(best, abs=1e-6)
    most = np.median([problem.degradation(c) for c in allowed(problem)])
    least = min(
        problem.costs.total("b", c) for c in allowed(problem) if problem.degradation(c) <= most
    )
    cheap = cheapest(problem, {"b": 1.0}, most)
    assert problem.costs.total("b", cheap) == least
    assert problem.degradation(cheap) <= most * (1 + 1e-6)


def test_limits_that_nothing_keeps_are_told():
    with pytest.raises(InfeasibleError):
        least_error(make_problem(0), {"a": 4.0})


@pytest.mark.parametrize("seed", range(3))
def test_a_least_error_far_below_the_largest_is_the_best(seed):
    """Errors of eight decades, of which a generous limit allows small ones everywhere."""
    rng = np.random.default_rng(seed)
    errors = [10.0 ** rng.uniform(-4, 1) * 100.0 ** -np.arange(4.0) for _ in range(6)]
    sizes = rng.integers(10, 99, 6)
    costs = Costs({"a": [n * np.arange(2.0, 6.0) for n in sizes]}, {"a": 0.0})
    problem, limit = Problem(errors, {}, costs, []), 4.8 * float(sizes.sum())
    every = itertools.product(range(4), repeat=6)
    best = min(problem.degradation(c) for c in every if costs.total("a", c) <= limit)
    assert problem.degradation(least_error(problem, {"a": limit})) == pytest.approx(best, rel=1e-4)


def test_limits_of_nothing_and_costs_out_of_reach():
    errors, far = [np.array([0.0, 0.5]), np.array([1.0, 0.5])], 1e30
    costs = Costs({"a": [np.array([4.0, 0.0]), np.array([0.0, far])]}, {"a": 0.0})
    problem = Problem(errors, {}, costs, [])
    assert least_error(problem, {"a": 0.0}) == [1, 0]
    assert least_error(problem, {"a": 3.0}) == [1, 0]
    assert least_error(problem, {"a": 4.0}) == [0, 0]
    assert least_error(problem, {"a": 2 * far}) == [0, 1]
    free = problem._replace(errors=[np.array([0.0, 0.5]), np.array([0.0, 0.5])])
    assert cheapest(free, {"a": 1.0}, 0.0) == [0, 0]
