"""What the tests of channel transforms share."""

import pytest

from aquant_jax.plan import transform_search


@pytest.fixture
def few_candidates(monkeypatch):
    """The search takes a second a tensor where XLA does not optimize."""
    monkeypatch.setattr(transform_search, "THRESHOLDS", 4)
    monkeypatch.setattr(transform_search, "ROWS", 256)
