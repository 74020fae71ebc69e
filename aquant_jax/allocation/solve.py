"""The mixed-integer program of an allocation, solved by HiGHS (`scipy.optimize.milp`).

With ``x[l, c]`` one where layer l has choice c, and ``y`` the products of two layers of a block,

    minimise    sum_l e[l, c] x[l, c] + sum_(l, m) p[l, c, m, d] y[l, c, m, d]
    subject to  sum_c x[l, c] = 1,   sum_d y[l, c, m, d] = x[l, c],   sum_c y[l, c, m, d] = x[m, d],
                fixed + sum_l cost[l, c] x[l, c] <= limit    for every limit,

some layer is quantized, and readers of one tensor choose the same bits for it. The two sums over y
make it the product of both x wherever these are whole, for p of either sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aquant_jax.allocation.costs import Costs, Latencies, count_costs
from aquant_jax.allocation.layer_choices import LayerChoices
from aquant_jax.errors import InputError
from aquant_jax.plan.network import Network

SLACK = 1e-9  # relative, of a limit: averages are sums of floats
SMALL, LEAST_UNIT = 0.01, 1e-9  # of a minimum, and of a unit beside the largest coefficient
FAR = 1000.0  # times a limit: as far out of reach as anything beyond it


class InfeasibleError(ValueError):
    """No allocation keeps to the limits."""


class Problem(NamedTuple):
    """An allocation to be solved.

    Attributes:
      errors: predicted output error of every layer's choices, alone.
      pairs: what two layers of a block add to the sum, ``[choices, choices]``, by their indices.
      costs: of the choices.
      shared: for each further reader of a tensor, the first reader, and the group (its bits) of
        every choice of both.
      quantized: whether the weights of every layer's choices are; some layer's must be.
    """

    errors: list[np.ndarray]
    pairs: dict[tuple[int, int], np.ndarray]
    costs: Costs
    shared: list[tuple[int, int, np.ndarray, np.ndarray]]
    quantized: Sequence[np.ndarray] = ()

    def degradation(self, chosen: Sequence[int]) -> float:
        """The predicted output error of an allocation."""
        alone = sum(float(errors[c]) for errors, c in zip(self.errors, chosen, strict=True))
        both = sum(float(p[chosen[i], chosen[j]]) for (i, j), p in self.pairs.items())
        return max(alone + both, 0.0)


class _Columns(NamedTuple):
    """Where the variables of a problem stand: of the layers, and of the pairs."""

    layers: list[int]
    pairs: dict[tuple[int, int], int]
    count: int


def make_problem(
    net: Network, layers: Sequence[LayerChoices], latencies: Latencies | None = None
) -> Problem:
    """The choices of a network and their costs, of errors not yet measured.

    Raises:
      InputError: no choice quantizes any layer; see `count_costs`.
    """
    costs = count_costs(net, layers, latencies)
    first: dict[str, int] = {}
    shared = []
    for j, layer in enumerate(layers):
        if layer.tensor is None:
            continue
        i = first.setdefault(layer.tensor, j)
        if i != j:
            bits = [np.array([c.act_bits or 0 for c in layers[k].choices]) for k in (i, j)]
            shared.append((i, j, *bits))
    errors = [np.zeros(len(layer.choices)) for layer in layers]
    quantized = [np.array([bool(c.weight_bits) for c in layer.choices]) for layer in layers]
    if not any(map(np.any, quantized)):
        raise InputError("choices leave every layer in float: there is nothing to quantize")
    return Problem(errors, {}, costs, shared, quantized)


def cheapest(problem: Problem, names: Mapping[str, float], most: float | None = None) -> list[int]:
    """The allocation of least weighted cost, the weights given by name.

    Args:
      problem: the choices.
      names: weight of each cost; negative ones look for the most expensive.
      most: upper bound of the degradation.
    """
    layers = [
        np.sum([weight * problem.costs.layers[name][i] for name, weight in names.items()], axis=0)
        for i in range(len(problem.errors))
    ]
    return _solve(problem, layers, {}, {}, most)


def least_error(problem: Problem, limits: Mapping[str, float]) -> list[int]:
    """The allocation of least predicted error within the limits, which some allocation keeps."""
    return _solve(problem, problem.errors, problem.pairs, limits, None)


def _solve(
    problem: Problem,
    objective: Sequence[np.ndarray],
    pairs: Mapping[tuple[int, int], np.ndarray],
    limits: Mapping[str, float],
    most: float | None,
) -> list[int]:
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint

    columns = _columns(problem, bool(pairs) or most is not None)
    rows = [*_choose_one(problem, columns), *_products(problem, columns)]
    rows += _quantize_one(problem, columns)
    rows += [*_same_bits(problem, columns), *_within(problem, columns, limits, most)]
    entries = [(i, *entry) for i, (row, _, _) in enumerate(rows) for entry in row]
    lines, places, values = zip(*entries, strict=True)
    matrix = sparse.csr_array((values, (lines, places)), shape=(len(rows), columns.count))
    cost = np.zeros(columns.count)
    for start, part in zip(columns.layers, objective, strict=True):
        cost[start : start + len(part)] = part
    for pair, part in pairs.items():
        cost[columns.pairs[pair] : columns.pairs[pair] + part.size] = part.ravel()
    whole = np.zeros(columns.count)
    whole[: sum(map(len, problem.errors))] = 1
    constraints = LinearConstraint(matrix, *np.array([row[1:] for row in rows]).T)
    found = _minimum(cost, integrality=whole, bounds=Bounds(0, 1), constraints=constraints)
    starts = zip(columns.layers, problem.errors, strict=True)
    return [int(np.argmax(found[start : start + len(part)])) for start, part in starts]


def _minimum(cost: np.ndarray, **program: Any) -> np.ndarray:
    """The variables at the minimum of a mixed-integer program.

    HiGHS stops within 1e-6 of the least, in the unit of the cost: a least that is small beside the
    coefficients becomes the unit of another run.
    """
    from scipy.optimize import milp

    largest = unit = max(float(np.abs(cost).max()), 1e-30)
    while True:
        result = milp(cost / unit, **program, options={"mip_rel_gap": 1e-6})
        if result.x is None:
            raise InfeasibleError(result.message)
        if abs(result.fun) > SMALL or unit == LEAST_UNIT * largest:
            return result.x
        unit = max(unit * abs(result.fun), LEAST_UNIT * largest)


Row = tuple[list[tuple[int, float]], float, float]  # entries (column, value), lower, upper bound


def _columns(problem: Problem, with_pairs: bool) -> _Columns:
    sizes = list(map(len, problem.errors))
    starts = np.cumsum([0, *sizes])
    pairs, count = {}, int(starts[-1])
    for pair, part in problem.pairs.items() if with_pairs else ():
        pairs[pair], count = count, count + part.size
    return _Columns([int(start) for start in starts[:-1]], pairs, count)


def _choose_one(problem: Problem, columns: _Columns) -> Iterator[Row]:
    for start, part in zip(columns.layers, problem.errors, strict=True):
        yield [(start + c, 1.0) for c in range(len(part))], 1.0, 1.0


def _quantize_one(problem: Problem, columns: _Columns) -> Iterator[Row]:
    starts = zip(columns.layers, problem.quantized, strict=False)
    if row := [(start + int(c), 1.0) for start, part in starts for c in np.flatnonzero(part)]:
        yield row, 1.0, np.inf


def _products(problem: Problem, columns: _Columns) -> Iterator[Row]:
    for (i, j), start in columns.pairs.items():
        index = start + np.arange(problem.pairs[i, j].size).reshape(problem.pairs[i, j].shape)
        for layer, lines in ((i, index), (j, index.T)):
            for c, line in enumerate(lines):
                marginal = [(int(column), 1.0) for column in line]
                yield [*marginal, (columns.layers[layer] + c, -1.0)], 0.0, 0.0


def _same_bits(problem: Problem, columns: _Columns) -> Iterator[Row]:
    for i, j, of_i, of_j in problem.shared:
        for group in np.union1d(of_i, of_j):
            row = [(columns.layers[i] + int(c), 1.0) for c in np.flatnonzero(of_i == group)]
            row += [(columns.layers[j] + int(c), -1.0) for c in np.flatnonzero(of_j == group)]
            yield row, 0.0, 0.0


def _within(
    problem: Problem, columns: _Columns, limits: Mapping[str, float], most: float | None
) -> Iterator[Row]:
    for name, limit in limits.items():
        rest = limit * (1 + SLACK) - problem.costs.fixed[name]
        row = [
            (start + c, min(float(cost), FAR * rest) if rest > 0 else float(cost > 0))
            for start, costs in zip(columns.layers, problem.costs.layers[name], strict=True)
            for c, cost in enumerate(costs)
        ]
        yield _at_most(row, rest)
    if most is None:
        return
    alone = [
        (start + c, float(error))
        for start, errors in zip(columns.layers, problem.errors, strict=True)
        for c, error in enumerate(errors)
    ]
    both = [
        (columns.pairs[pair] + c, float(value))
        for pair, part in problem.pairs.items()
        for c, value in enumerate(part.ravel())
    ]
    yield _at_most([*alone, *both], most * (1 + SLACK))


def _at_most(row: list[tuple[int, float]], bound: float) -> Row:
    """In thousandths of the bound, so that the tolerance of the solver is relative."""
    largest = max(abs(value) for _, value in row)
    unit = max(abs(bound), LEAST_UNIT * largest, 1e-30) / 1000
    return [(column, value / unit) for column, value in row], -np.inf, bound / unit
