import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.arithmetic import adaround
from tests.support.nets import normal, rng_of

ZERO = jnp.float32(3.0)


@pytest.fixture
def units():
    return 3.0 * normal(rng_of(0), 6, 50)


def test_soft_rounding_starts_at_the_weight(units):
    alpha = adaround.init_alpha(units)
    codes = adaround.soft_codes(units, alpha, ZERO, 8)
    np.testing.assert_allclose(codes, np.clip(units + 3, 0, 255), atol=2e-5)


def test_hard_rounding_starts_at_nearest_ties_included():
    units = np.arange(-200, 200, dtype=np.float32) / 8
    alpha = adaround.init_alpha(units)
    hard = adaround.hard_codes(units, alpha, ZERO, 4)
    np.testing.assert_array_equal(hard, adaround.nearest_codes(units, ZERO, 4))
    assert adaround.nearest_codes(jnp.float32(1.5), ZERO, 4) == 4.0


def test_soft_rounding_reaches_hard(units):
    """Once the rounding loss has driven every h to an end, nothing changes on deployment."""
    alpha = jnp.where(normal(rng_of(1), *units.shape) > 0, 3.0, -3.0)
    soft = adaround.soft_codes(units, alpha, ZERO, 4)
    np.testing.assert_array_equal(soft, adaround.hard_codes(units, alpha, ZERO, 4))
    assert adaround.regularizer(alpha, 2.0) == 0.0
    assert set(np.unique(adaround.soft_rounding(alpha))) == {0.0, 1.0}


def test_gradient_descent_on_the_regularizer_makes_every_weight_hard(units):
    alpha = adaround.init_alpha(units)
    step = jax.jit(lambda a: a - 0.1 * jnp.sign(jax.grad(adaround.regularizer)(a, 2.0)))
    for _ in range(60):
        alpha = step(alpha)
    soft = adaround.soft_codes(units, alpha, ZERO, 4)
    hard = adaround.hard_codes(units, alpha, ZERO, 4)
    assert (np.asarray(soft) == np.asarray(hard)).mean() > 0.97


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_in_range(bits):
    units = 300.0 * normal(rng_of(bits), 1000)
    alpha = normal(rng_of(bits + 1), 1000)
    for codes in (
        adaround.nearest_codes(units, ZERO, bits),
        adaround.soft_codes(units, alpha, ZERO, bits),
        adaround.hard_codes(units, alpha, ZERO, bits),
    ):
        assert codes.min() == 0
        assert codes.max() == 2**bits - 1


def test_codes_differ_from_the_floor_by_at_most_one(units):
    alpha = normal(rng_of(2), *units.shape)
    up = adaround.hard_codes(units, alpha, jnp.float32(100.0), 8) - (np.floor(units) + 100)
    np.testing.assert_array_equal(up, (alpha > 0).astype(np.float32))


def test_regularizer_of_known_values():
    # h = 0.5 at alpha = 0; h = 0.75 where 1.2 sigmoid(alpha) - 0.1 = 0.75.
    alpha = jnp.array([0.0, np.log((0.85 / 1.2) / (1 - 0.85 / 1.2))], jnp.float32)
    assert adaround.regularizer(alpha, 2.0) == pytest.approx(1.0 + 0.75, rel=1e-5)
    assert adaround.regularizer(alpha, 4.0) == pytest.approx(1.0 + 0.9375, rel=1e-5)


def test_beta_is_constant_then_linear():
    progress = jnp.array([0.0, 0.1, 0.2, 0.6, 1.0])
    beta = adaround.beta_schedule(progress, 0.2, 20.0, 2.0)
    np.testing.assert_allclose(beta, [20, 20, 20, 11, 2], rtol=1e-6)
