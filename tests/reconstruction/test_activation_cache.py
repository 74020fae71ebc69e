import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.plan.checks import cache_bytes
from aquant_jax.reconstruction.activation_cache import one_ahead, store
from aquant_jax.reconstruction.devices import empty
from aquant_jax.storage.mapped_array import MappedArray
from tests.support.nets import images, normal, residual_net, rng_of


def batches(values, size=4):
    for start in range(0, len(values), size):
        part = values[start : start + size]
        missing = size - len(part)
        yield [np.concatenate([part, part[:1].repeat(missing, 0)])] if missing else [part]


def test_two_bytes_a_value_and_close_to_it():
    values = 37.0 * normal(rng_of(0), 10, 5, 3)
    (cache,) = store(batches(values), 10)
    assert cache.values.nbytes == 2 * values.size
    taken = np.asarray(cache.take(jnp.arange(10), jnp.float32))
    np.testing.assert_allclose(taken, values, rtol=2.0**-11, atol=1e-6)


@pytest.mark.parametrize("top", [3, 15, 255])
@pytest.mark.parametrize("step", [1.0, 0.25, 2.0**-20, 2.0**16])
def test_codes_are_exact(top, step):
    codes = (rng_of(top).integers(0, top + 1, (16, 50)) * step).astype(np.float32)
    (cache,) = store(batches(codes), 16)
    assert cache.values.dtype == jnp.float16
    np.testing.assert_array_equal(cache.take(np.arange(16), jnp.float32), codes)


@pytest.mark.parametrize("factor", [10.0, 1e6, 1e-6])
@pytest.mark.parametrize("first", [1.0, 0.0])
@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_a_later_batch_may_be_far_larger_than_the_first(factor, first, place, tmp_path):
    values = np.full((8, 3), first, np.float32)
    values[4:] = factor
    allocate = {
        "device": empty,
        "host": lambda samples, shape, dtype: np.empty((samples, *shape), dtype),
        "file": lambda samples, shape, dtype: MappedArray(tmp_path, (samples, *shape), dtype),
    }[place]
    (cache,) = store(batches(values), 8, allocate)
    found = cache.take(np.arange(8), jnp.float32)
    np.testing.assert_allclose(found, values, rtol=1e-3)


def test_infinity_is_kept_and_scales_nothing():
    values = 3e5 * np.ones((8, 3), np.float32)
    values[4:, 0] = -np.inf  # a mask
    (cache,) = store(batches(values), 8)
    np.testing.assert_allclose(cache.take(np.arange(8), jnp.float32), values, rtol=1e-3)


def test_a_mask_of_huge_numbers_takes_no_bits_from_what_is_beside_it():
    values = normal(rng_of(0), 8, 3)
    values[:, 0] = np.finfo(np.float32).min
    (cache,) = store(batches(values), 8)
    np.testing.assert_array_equal(cache.take(np.arange(8), jnp.float32), values)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
def test_other_dtypes_are_kept_as_they_come(dtype):
    values = np.asarray(jnp.asarray(4.0 * normal(rng_of(1), 6, 3)).astype(dtype))
    (cache,) = store(batches(values, 6), 6)
    assert cache.values.dtype == dtype
    np.testing.assert_array_equal(cache.take(np.arange(6), dtype), values)


def test_take_picks_samples_in_the_asked_dtype():
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    (cache,) = store(batches(values, 3), 6)
    taken = cache.take(np.array([5, 0, 0]), jnp.bfloat16)
    assert taken.dtype == jnp.bfloat16
    np.testing.assert_array_equal(taken.astype(np.float32), values[[5, 0, 0]])


def test_what_runs_over_is_dropped_and_zeros_are_kept():
    values = np.zeros((5, 2), np.float32)
    (cache,) = store(batches(values), 5)
    assert cache.values.shape == (5, 2)
    np.testing.assert_array_equal(cache.take(np.arange(5), jnp.float32), values)


def test_predicted_memory_is_that_of_the_largest_block():
    apply, variables = residual_net()
    net = aq.prepare(apply, variables, images(0, 16), aq.recipes.nearest(batch_size=8))
    activation = 16 * 6 * 6 * 4 * 2  # samples, size, channels, bytes
    # Both inputs of the residual block, its output by both networks, and its target.
    assert cache_bytes(net.graph, net.blocks, 16) == 5 * activation
    assert cache_bytes(net.graph, net.blocks, 32) == 10 * activation


def test_stored_values_are_rounded_as_numpy_rounds_them():
    values = normal(rng_of(3), 10, 40) * np.float32(10.0) ** rng_of(4).integers(-9, 4, (10, 40))
    values = values.astype(np.float32)
    (cache,) = store(batches(values), 10)
    scaled = values / np.float32(cache.scale)
    np.testing.assert_array_equal(cache.values, scaled.astype(np.float16))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_item_waits_until_the_next_one_is_made(count):
    made = []

    def items():
        for item in range(count):
            made.append(item)
            yield item

    found = [(item, len(made)) for item in one_ahead(items())]
    assert found == [(item, min(item + 2, count)) for item in range(count)]
