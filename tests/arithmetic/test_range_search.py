import numpy as np
import pytest

from aquant_jax.arithmetic.range_search import POWER, search_activation_range, search_weight_range
from tests.support.nets import normal, rng_of


def error(values, scale, zero, bits):
    codes = np.clip(np.ceil(values / scale - 0.5) + zero, 0, 2**bits - 1)
    return np.mean(np.abs(values - scale * (codes - zero)) ** 2.4)


def brute_force(values, bits):
    """Smallest mean |x - x_q|^2.4 over 100 shrunken ranges and the allowed zero points."""
    low, high, top = min(values.min(), 0.0), max(values.max(), 0.0), 2**bits - 1
    zeros = [0] if low >= 0 else [top] if high <= 0 else range(top + 1)
    scales = (high - low) * np.arange(1, 101) / 100 / top
    return min(error(values, scale, zero, bits) for scale in scales for zero in zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_grid_is_the_brute_force_optimum_of_every_channel(bits):
    factors = np.array([0.01, 1e-20, 30.0, 1.0, 1.0, 1e20], np.float32)
    weight = normal(rng_of(bits), 6, 40) * factors[:, None]
    weight[3], weight[4] = np.abs(weight[3]), -np.abs(weight[4])
    scale, zero = map(np.asarray, search_weight_range(weight, bits))
    for row, s, z in zip(weight.astype(np.float64), scale, zero, strict=True):
        # With 8 bits not every zero point is tried.
        tolerance = 1e-4 if bits < 8 else 0.02
        assert error(row, s, z, bits) == pytest.approx(brute_force(row, bits), rel=tolerance)


def test_power_is_that_of_the_reference():
    assert POWER == 2.4


def test_weight_grid_is_positive_integer_and_in_range():
    weight = normal(rng_of(1), 6, 30)
    weight[0] = 0.0
    scale, zero = map(np.asarray, search_weight_range(weight, 3))
    assert (scale > 0).all()
    assert np.isin(zero, np.arange(8)).all()
    assert scale.dtype == zero.dtype == np.float32


def test_one_sided_channels_get_the_zero_point_of_their_side():
    positive = np.abs(normal(rng_of(2), 3, 30))
    assert (np.asarray(search_weight_range(positive, 4).zero_point) == 0).all()
    assert (np.asarray(search_weight_range(-positive, 4).zero_point) == 15).all()


def test_weights_on_a_grid_are_kept_exactly():
    rng = rng_of(3)
    codes = np.concatenate([rng.integers(0, 16, (4, 60)), [[0, 15]] * 4], 1)
    weight = (0.5 * (codes - np.array([[0], [4], [8], [15]]))).astype(np.float32)
    scale, zero = map(np.asarray, search_weight_range(weight, 4))
    np.testing.assert_allclose(scale, 0.5, rtol=1e-6)
    np.testing.assert_array_equal(zero, [0, 4, 8, 15])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sign", ["relu", "both", "negative"])
def test_tensor_state_is_as_good_as_brute_force_on_the_values(bits, sign):
    values = 3.0 * normal(rng_of(bits), 2000)
    values = {"relu": np.maximum(values, 0), "both": values, "negative": -np.abs(values)}[sign]
    state = search_activation_range(values.reshape(20, 10, 10), bits)
    found = error(values, float(state.step_size), float(state.zero_point), bits)
    assert found == pytest.approx(brute_force(values, bits), rel=5e-3)
    expected = {"relu": 0, "negative": 2**bits - 1}
    assert float(state.zero_point) == expected.get(sign, round(float(state.zero_point)))


@pytest.mark.parametrize("factor", [4.0, 1e-20, 1e20])
def test_tensor_state_ignores_the_shape_and_follows_the_scale(factor):
    values = np.maximum(normal(rng_of(4), 4000), 0)
    one, two = (
        search_activation_range(values, 4),
        search_activation_range(factor * values.reshape(40, 100), 4),
    )
    assert float(two.step_size) == pytest.approx(factor * float(one.step_size), rel=1e-5, abs=0)


def test_a_constant_zero_tensor_has_a_positive_step_size():
    state = search_activation_range(np.zeros((3, 4), np.float32), 2)
    assert (state.step_size, state.zero_point) == (1.0, 0.0)
    positive = search_activation_range(np.full((3, 4), 2.5, np.float32), 2)
    assert float(positive.step_size) > 0


@pytest.mark.parametrize("factor", [1e-36, 1e-37])
def test_numbers_near_the_smallest_of_float32_are_rounded_to_a_step_that_xla_can_read(factor):
    smallest = np.finfo(np.float32).tiny
    values = np.float32(factor) * normal(rng_of(0), 3, 64)
    scale, zero = map(np.asarray, search_weight_range(values, 8))
    assert (scale >= smallest).all()
    codes = np.clip(np.ceil(values / scale[:, None] - 0.5) + zero[:, None], 0, 255)
    rounded = scale[:, None] * (codes - zero[:, None])
    assert abs(rounded - values).max() <= max(smallest, np.ptp(values) / 255)
    step, _ = search_activation_range(values, 8)
    assert smallest <= step <= max(smallest, np.ptp(values) / 255)
