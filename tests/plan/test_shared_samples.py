"""Samples that several processes read together, here by one."""

import jax.numpy as jnp
import numpy as np

from aquant_jax.plan.checks import check_mask
from aquant_jax.plan.shared_samples import SharedSamples, row_digests

ROWS = np.arange(24, dtype=np.int32).reshape(6, 4)


def test_all_rows_are_gathered_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("aquant_jax.plan.shared_samples.PART", 4 * ROWS[0].nbytes)
    shared = SharedSamples(jnp.asarray(ROWS), 5)
    np.testing.assert_array_equal(shared[:9], ROWS[:5])
    np.testing.assert_array_equal(shared.gather(6), ROWS)


def test_a_mask_is_whole():
    mask = {"mask": SharedSamples(jnp.asarray(ROWS % 4 > 1), 6)}
    np.testing.assert_array_equal(check_mask(mask, "mask"), ROWS % 4 > 1)


def test_digests_of_rows_are_those_of_one_process():
    digests = row_digests(ROWS)
    assert len({row.tobytes() for row in digests}) == len(ROWS)
    np.testing.assert_array_equal(row_digests(SharedSamples(jnp.asarray(ROWS), 0)), digests)
