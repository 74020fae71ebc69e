import numpy as np

from aquant_jax.reconstruction import report
from aquant_jax.reconstruction.activation_cache import store
from aquant_jax.reconstruction.report import History, propagated_error
from tests.support.nets import normal, rng_of


def test_propagated_error_by_magnitude():
    """Noise proportional to the value: its deviation grows with the cluster's magnitude."""
    exact = np.abs(normal(rng_of(0), 20, 500))
    noised = exact + np.float32(0.01) + np.float32(0.05) * exact * normal(rng_of(1), 20, 500)
    table = propagated_error(store([[noised]], 20), store([[exact]], 20), 20)
    assert table.shape == (16, 4)
    magnitude, mean, deviation, count = table.T
    assert count.sum() == exact.size
    filled = count > 50
    assert (np.diff(magnitude[filled]) > 0).all()
    np.testing.assert_allclose(deviation[filled], 0.05 * magnitude[filled], rtol=0.4, atol=2e-3)
    weighted = np.nansum(mean * count) / count.sum()
    np.testing.assert_allclose(weighted, (noised - exact).mean(), atol=1e-3)


def test_clusters_split_the_range_evenly():
    values = np.arange(16, dtype=np.float32)[None] + np.float32(0.5)
    table = propagated_error(store([[values]], 1), store([[values]], 1), 1)
    np.testing.assert_array_equal(table[:, 3], 1)
    np.testing.assert_allclose(table[:, 1:3], 0)
    np.testing.assert_allclose(table[:, 0], values[0], rtol=1e-3)


def test_empty_clusters_and_the_first_unit():
    values = np.array([[0.01, 1.0]], np.float32)
    table = propagated_error(store([[values]], 1), store([[values]], 1), 1)
    assert list(table[:, 3]) == [1] + [0] * 14 + [1]
    assert np.isnan(table[1:15, 0]).all()
    assert propagated_error((), (), 0).shape == (0, 4)


def test_histories_are_equal_but_keep_their_reports():
    one, two = History(("a",)), History(("b", "c"))
    assert one == two
    assert hash(one) == hash(two)
    assert [*two] == ["b", "c"]


def test_no_more_values_than_a_plot_needs(monkeypatch):
    monkeypatch.setattr(report, "MOST_VALUES", 1200)
    values = np.abs(normal(rng_of(0), 20, 500))
    table = propagated_error(store([[values]], 20), store([[values]], 20), 20)
    assert table[:, 3].sum() == 2 * 500
    monkeypatch.setattr(report, "MOST_VALUES", 3)
    assert propagated_error(store([[values]], 20), store([[values]], 20), 20)[:, 3].sum() == 500
