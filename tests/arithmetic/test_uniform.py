import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from aquant_jax.arithmetic import uniform
from aquant_jax.arithmetic.uniform import ActivationQuantizer, fake_quantize, quantize, to_units
from tests.support.nets import normal, rng_of

BITS = range(uniform.MIN_BITS, uniform.MAX_BITS + 1)


def state(step, zero):
    return ActivationQuantizer(jnp.float32(step), jnp.float32(zero))


def dyadic(rng, shape, denominator, limit):
    """Multiples of 1 / denominator: every sum and product below is exact in float32."""
    steps = rng.integers(-limit * denominator, limit * denominator + 1, shape)
    return (steps / denominator).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_integers_in_range(bits):
    u = 300.0 * normal(rng_of(bits), 500)
    for zero in (0, 2 ** (bits - 1), 2**bits - 1):
        codes = np.asarray(quantize(u, float(zero), bits))
        assert codes.min() == 0
        assert codes.max() == 2**bits - 1
        np.testing.assert_array_equal(codes, np.round(codes))


def test_codes_do_not_increase_with_the_border():
    u = 4.0 * normal(rng_of(1), 400)
    bounds = np.linspace(-1.0, 2.0, 61, dtype=np.float32)
    codes = np.stack([quantize(u, 3.0, 3, b) for b in bounds])
    assert (np.diff(codes, axis=0) <= 0).all()
    assert (codes[0] > codes[-1]).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("step", [0.3, 1.7e-3, 41.0])
def test_quantize_dequantize_is_idempotent_at_half(bits, step):
    grid = state(step, 2 ** (bits - 1))
    once = fake_quantize(100.0 * step * normal(rng_of(bits), 1000), grid, bits)
    np.testing.assert_array_equal(once, fake_quantize(once, grid, bits))


def test_ties_round_down():
    u = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    np.testing.assert_array_equal(quantize(u, 2.0, 4), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(quantize(u + np.float32(2**-20), 2.0, 4), [1, 2, 3, 4, 5])
    # The zero point is added after the ceil: it would swallow the small difference.
    np.testing.assert_array_equal(quantize(u[2:3] + np.float32(2**-20), 200.0, 8), [201])


def test_jit_gives_numpys_codes_on_dyadic_inputs():
    rng = rng_of(2)
    x, border = dyadic(rng, 20000, 64, 16), dyadic(rng, 20000, 64, 1)
    grid = state(0.25, 5)
    codes = jax.jit(lambda x, b, g: quantize(to_units(x, 1.0 / g.step_size), g.zero_point, 4, b))
    expected = np.clip(np.ceil(x * np.float32(4.0) - border) + 5, 0, 15)
    np.testing.assert_array_equal(codes(x, border, grid), expected)


def test_jit_gives_numpys_codes_on_ties_of_any_step_size():
    """The clip of `to_units` keeps XLA from contracting the product with the subtraction."""
    rng = rng_of(3)
    codes = jax.jit(lambda x, g: quantize(to_units(x, 1.0 / g.step_size), g.zero_point, 8))
    for step in rng.uniform(1e-3, 10.0, 20).astype(np.float32):
        ties = (rng.integers(0, 255, 500) + 0.5).astype(np.float32) * step
        u = ties * (np.float32(1.0) / step)
        expected = np.clip(np.ceil(u - np.float32(0.5)), 0, 255)
        np.testing.assert_array_equal(codes(ties, state(step, 0)), expected)


def test_jit_rounds_what_is_dequantized_before_it_is_added():
    """A residual sum would otherwise depend on what XLA compiles into one loop."""
    rng = rng_of(4)
    q, other = rng.integers(0, 16, 4096).astype(np.float32), normal(rng, 4096)
    step, zero = np.float32(0.3), np.float32(7)
    found = jax.jit(lambda q, s, z, y: uniform.dequantize(q, s, z) + y)(q, step, zero, other)
    np.testing.assert_array_equal(found, step * (q - zero) + np.asarray(other))


def test_the_gradient_of_a_product_is_the_plain_one():
    a, b = normal(rng_of(5), 3, 1), normal(rng_of(6), 1, 4)
    weights = normal(rng_of(7), 3, 4)
    found = jax.grad(lambda a, b: jnp.sum(weights * uniform.product(a, b)), (0, 1))(a, b)
    plain = jax.grad(lambda a, b: jnp.sum(weights * (a * b)), (0, 1))(a, b)
    for one, other in zip(found, plain, strict=True):  # sums, which XLA may fuse with the products
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_units_of_huge_values_are_finite():
    huge = jnp.array([-3e38, 3e38, -jnp.inf, jnp.inf], jnp.float32)
    units = to_units(huge, 1e6)
    np.testing.assert_array_equal(units, uniform.MAX_UNITS * np.array([-1.0, 1.0, -1.0, 1.0]))
    np.testing.assert_array_equal(quantize(units, 1.0, 2), [0, 3, 0, 3])


def test_gradient_of_the_codes_passes_at_both_ends_of_the_range():
    raw = jnp.array([-1.0, 0.0, 1.0, 3.0, 4.0])
    gradient = jax.grad(lambda raw: uniform.clip_codes(raw, 2).sum())(raw)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])


def test_ceil_is_straight_through():
    x = jnp.array([-1.2, 0.0, 0.5])
    value, tangent = jax.jvp(uniform.ste_ceil, (x,), (jnp.array([1.0, 2.0, 3.0]),))
    np.testing.assert_array_equal(value, [-1, 0, 1])
    np.testing.assert_array_equal(tangent, [1, 2, 3])


def test_gradients_are_those_of_lsq():
    x = 2.0 * normal(rng_of(4), 300)
    x[:2] = -50.0, 50.0
    grid, bits = state(0.37, 3), 3
    u = x * np.float32(1 / 0.37)
    raw = np.ceil(u - 0.5) + 3
    q, inside = np.clip(raw, 0, 7), (raw >= 0) & (raw <= 7)

    def one(step, x):
        return fake_quantize(x, ActivationQuantizer(step, grid.zero_point), bits)

    dstep, dx = jax.vmap(jax.grad(one, argnums=(0, 1)), in_axes=(None, 0))(grid.step_size, x)
    np.testing.assert_allclose(dstep, np.where(inside, q - 3 - u, q - 3), atol=1e-5)
    np.testing.assert_allclose(dx, inside, atol=1e-6)
    assert 0 < inside.sum() < len(x)
    dy = normal(rng_of(5), 25, 4, 3)
    whole, passed = jax.vjp(one, grid.step_size, x.reshape(dy.shape))[1](dy)
    np.testing.assert_allclose(whole, dy.ravel() @ dstep, rtol=1e-5)
    np.testing.assert_allclose(passed, dy * inside.reshape(dy.shape), atol=1e-6)


def test_gradient_scale():
    assert uniform.lsq_gradient_scale(50, 2) == pytest.approx(1 / np.sqrt(150.0))
    value, gradient = jax.value_and_grad(lambda s: uniform.scale_gradient(s, 0.25) * 3.0)(0.7)
    assert value == pytest.approx(2.1)
    assert gradient == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_results_are_float32(dtype):
    x = jnp.asarray(normal(rng_of(5), 3, 4), dtype)
    assert to_units(x, jnp.float32(2.0)).dtype == jnp.float32
    assert fake_quantize(x, state(0.5, 1), 4).dtype == jnp.float32


def test_calls_are_checked_against_their_annotations_while_tests_run():
    grid = np.zeros(3, np.float32)
    with pytest.raises(jaxtyping.TypeCheckError):
        uniform.dequantize("codes", grid, grid)
