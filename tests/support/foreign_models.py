"""Networks that were not written for the library: what tests know of one, and their list."""

import dataclasses
import functools
from typing import Any

import pytest

import aquant_jax as aq

BATCH = 8


@dataclasses.dataclass(eq=False)
class Model:
    """A network, a batch for it, and the layers of its blocks."""

    apply: Any
    variables: Any
    x: Any
    blocks: list[tuple[str, ...]]
    tolerance: float = 1e-5  # of folding

    # Computed in the first test that asks, so under the promotion of the tests of this model.
    @functools.cached_property
    def net(self):
        recipe = aq.recipes.nearest(batch_size=BATCH)
        return aq.prepare(self.apply, self.variables, self.x, recipe)

    @functools.cached_property
    def expected(self):
        return self.apply(self.variables, self.x)


MODELS = []


def model(function, marks=()):
    MODELS.append(pytest.param(function, id=function.__name__, marks=marks))
    return function


def promoting_model(reason):
    """A model that strict promotion would refuse."""
    return functools.partial(model, marks=pytest.mark.user_model(reason=reason))
