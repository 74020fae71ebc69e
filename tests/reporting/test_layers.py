"""What is measured of the layers of a network, against numpy."""

import jax
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.reporting.layers import BINS, bounds, layer_records
from tests.support.html_page import Page
from tests.support.nets import normal, rng_of

FLOAT = {"one": normal(rng_of(1), 6, 8), "two": normal(rng_of(2), 8, 3)}
X = normal(rng_of(3), 16, 6)


def apply(variables, x):
    return jax.nn.relu(x @ variables["one"]) @ variables["two"]


@pytest.fixture(scope="module")
def network():
    recipe = aq.recipes.nearest(weight_bits=3, act_bits=4, first_weight_bits=3, last_weight_bits=3,
                                last_act_bits=4)  # fmt: skip
    return aq.quantize(apply, FLOAT, X, recipe, observer=aq.Observer())


def test_histograms_and_errors_are_those_of_the_float_network(network):
    one, two = layer_records(network, X, FLOAT)
    assert (one["path"], one["act_bits"], two["act_bits"]) == ("one", None, 4)
    assert "activations" not in one
    for record, weight in ((one, FLOAT["one"]), (two, FLOAT["two"])):
        summary = next(s for s in network.summary() if s.path == record["path"])
        assert record["codes"] == np.bincount(summary.codes.ravel(), minlength=8).tolist()
        low, high = bounds(3)
        codes = np.clip(weight / summary.weight_scale + summary.weight_zero_point, low, high - 1e-4)
        counts, _ = np.histogram(codes, BINS, (low, high))
        assert np.abs(counts - record["weights"]["counts"]).sum() <= 2  # at the edges of bins
    hidden = np.asarray(jax.nn.relu(X @ dequantized(network, "one")))
    assert sum(two["activations"]["counts"]) == hidden.size
    assert two["activations"]["counts"][bin_of(two["zero_point"], 4)] >= np.sum(hidden == 0)
    exact = X @ FLOAT["one"]
    difference = X @ dequantized(network, "one") - exact
    assert one["error"] == pytest.approx(np.sum(difference**2) / np.sum(exact**2), rel=1e-3)
    exact = hidden @ FLOAT["two"]
    difference = np.asarray(network(X)) - exact
    assert two["error"] == pytest.approx(np.sum(difference**2) / np.sum(exact**2), rel=1e-3)


def dequantized(network, path):
    layer = next(s for s in network.summary() if s.path == path)
    return (layer.codes.astype(np.float32) - layer.weight_zero_point) * layer.weight_scale


def bin_of(code, bits):
    low, high = bounds(bits)
    return int((code - low) * BINS / (high - low))


def test_a_report_of_a_network_and_of_a_restored_one(network, tmp_path):
    file = tmp_path / "report.html"
    aq.report(network, file, X, FLOAT)
    labels = Page(file.read_text()).named("aria-label")
    assert "Activations of two and their grid" in labels
    aq.save(network, tmp_path / "network")
    restored = aq.restore(tmp_path / "network")
    aq.report(restored, file)
    found = Page(file.read_text())
    assert "Weights of two and their grid" in found.named("aria-label")
    assert "Activations of two and their grid" not in found.named("aria-label")
    assert len(found.tables["layers-table"]) == 3
    before = file.read_bytes()
    with pytest.raises(aq.InputError, match="a restored network has no histograms of activations"):
        aq.report(restored, file, X)
    with pytest.raises(aq.InputError, match="need inputs besides the variables"):
        aq.report(network, file, variables=FLOAT)
    assert file.read_bytes() == before
    with pytest.raises(aq.InputError, match=r"nowhere/r\.html cannot be written: No such file"):
        aq.report(network, tmp_path / "nowhere" / "r.html")
