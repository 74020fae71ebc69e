"""The choice of a border for every block: the cheapest that is good enough (``border="auto"``).

A block is learned with the reference, a quadratic border an element, and then with cheaper ones,
the cheapest first: none, and then constant, linear and quadratic borders, a channel and an element.
The first whose error on held-out samples is within ``border_tolerance`` of the reference's is kept.
A border costs its coefficients: one to three a channel, or a column element, and as many products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from aquant_jax.arithmetic.border import AUTO, NEAREST
from aquant_jax.graph.partition import Block
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.block_program import BlockProgram, make_block_program
from aquant_jax.plan.network import Network
from aquant_jax.recipe import REFERENCE, Override, Recipe, exactly
from aquant_jax.reconstruction.weights import init_borders

POLYNOMIALS = ("constant", "linear", "quadratic")
KINDS = (
    (NEAREST, "element"),
    *((name, "channel") for name in POLYNOMIALS),
    *((name, "element") for name in POLYNOMIALS),
)
Borders = Mapping[str, tuple[str, str]]  # by weight path: name, or NEAREST, and granularity


class Candidate(NamedTuple):
    """One way to round the inputs of a block.

    Attributes:
      name: of the border and its granularity.
      borders: of the layers.
      coefficients: number of its coefficients.
      program: the block with it.
    """

    name: str
    borders: dict[str, tuple[str, str]]
    coefficients: int
    program: BlockProgram


def candidates(net: Network, block: Block) -> list[Candidate]:
    """What to try for a block: the reference first, then what costs less, the cheapest first.

    Of those that cost the same, as in a dense layer, where an element is a channel, the first is
    tried.
    """
    found: dict[int, Candidate] = {}
    for kind in (REFERENCE, *KINDS):
        borders = dict.fromkeys(block.layers, kind)
        program = block_program(net, borders, block.start, block.targets)
        count = sum(math.prod(a.shape) for a in jax.tree.leaves(init_borders(program)))
        found.setdefault(count, Candidate(" ".join(kind), borders, count, program))
    reference, *others = found.values()
    cheaper = [other for other in others if other.coefficients < reference.coefficients]
    return [reference, *sorted(cheaper, key=lambda candidate: candidate.coefficients)]


def with_borders(recipe: Recipe, borders: Borders) -> Recipe:
    """A recipe with the borders that were chosen, as overrides before the user's, which decide."""
    chosen = (
        Override(exactly(path), border=name, border_granularity=granularity)
        for path, (name, granularity) in borders.items()
    )
    name, granularity = REFERENCE
    overrides = (*chosen, *recipe.overrides)
    return dataclasses.replace(
        recipe, border=name, border_granularity=granularity, overrides=overrides
    )


def resolved(net: Network, borders: Borders) -> Network:
    """A network with the borders that were chosen."""
    if net.recipe.border != AUTO:
        return net
    recipe = with_borders(net.recipe, borders)
    return net._replace(recipe=recipe, plan=make_plan(net.graph, recipe))


def block_program(
    net: Network, borders: Borders, start: tuple[int, ...], end: tuple[int, ...]
) -> BlockProgram:
    """The program of a block whose layers have these borders."""
    net = resolved(net, borders)
    return make_block_program(net.graph, net.plan, start, end)
