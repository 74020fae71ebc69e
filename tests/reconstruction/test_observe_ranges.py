"""Initial step sizes come from a sample of the elements, and from the ends of all of them."""

import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.arithmetic.range_search import POWER, RANGES, search_activation_range
from aquant_jax.arithmetic.uniform import fake_quantize
from aquant_jax.reconstruction import observe_ranges
from tests.support.nets import mlp, normal, rng_of

X = normal(rng_of(0), 512, 6)
BITS = 4


def quantizers():
    apply, variables = mlp(sizes=(6, 64, 64, 4))
    network = aq.quantize(
        apply, variables, X, aq.recipes.nearest(BITS, BITS, init_samples=512, last_act_bits=None),
        observer=aq.Observer(),
    )  # fmt: skip
    return network.activations


def test_a_sample_of_the_elements_gives_nearly_the_same_step_sizes(monkeypatch):
    exact = quantizers()
    monkeypatch.setattr(observe_ranges, "MOST_ELEMENTS", 2**13)
    sampled, again = quantizers(), quantizers()
    assert sampled.keys() == exact.keys() == {"1/w", "2/w"}
    for key, quantizer in exact.items():
        np.testing.assert_allclose(sampled[key].step_size, quantizer.step_size, rtol=0.2)
        assert float(sampled[key].step_size) == float(again[key].step_size)
    assert any(float(sampled[key].step_size) != float(exact[key].step_size) for key in exact)


def test_a_sample_has_the_error_of_the_whole():
    values = np.maximum(normal(rng_of(1), 2**18), 0.0)
    ends = float(values.min()), float(values.max())
    sample = values[rng_of(2).integers(0, values.size, 2**13)]

    def error(quantizer):
        rounded = np.asarray(fake_quantize(values, quantizer, BITS))
        return np.mean(np.abs(rounded - values) ** POWER)

    found = search_activation_range(sample, BITS, ends)
    assert error(found) == pytest.approx(error(search_activation_range(values, BITS)), rel=0.05)


def test_the_ends_are_those_of_all_values():
    """A grid of a hundred ranges starts at the highest value, sampled or not."""
    values = np.linspace(0.0, 1.0, 100, dtype=np.float32)
    without = search_activation_range(values, 8)
    highest = search_activation_range(values, 8, (0.0, 50.0))
    steps = float(highest.step_size) * 255 * RANGES / 50.0
    assert steps == pytest.approx(round(steps), abs=1e-3)
    assert float(without.step_size) * 255 == pytest.approx(1.0, abs=0.02)


def test_a_single_value_that_is_not_a_number_is_told(monkeypatch):
    monkeypatch.setattr(observe_ranges, "MOST_ELEMENTS", 16)
    apply, variables = mlp()

    def broken(variables, x):
        return apply(variables, jnp.where(x > 4.0, jnp.nan, x))

    x = np.clip(X, -2.0, 2.0)
    x[300, 2] = 5.0
    with pytest.raises(aq.ReconstructionError, match=r"^0: the float network .* sample 300,"):
        aq.quantize(
            broken, variables, x, aq.recipes.nearest(4, 4, init_samples=512), observer=aq.Observer()
        )
