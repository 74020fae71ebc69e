"""The CUDA operations on a GPU, where one is at hand, against numpy and the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from img2col_reference import assert_same, by_group, contractible, gather, random_case, reference
from test_columns import CASES, assert_close, cotangent, drop_zero, pulled
from tuned_reference import (
    assert_convolves,
    assert_exact_codes,
    count_differing_codes,
    random_layer,
)

import gpu_ops
from aquant_jax import columns
from gpu_ops import targets

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu" or "gpu" not in targets.PLATFORMS,
    reason="needs a GPU, and gpu_ops built with CUDA",
)
BUILT_IN = {name: case for name, case in CASES.items() if case.phi != "sigmoid"}
SWEEP = 200


@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "random"])
def test_two_hundred_random_calls_are_numpys_bit_for_bit(dyadic):
    for seed in range(SWEEP):
        case = random_case(seed)
        operands = case.operands(seed, dyadic)
        assert_same(case.run(*operands), reference(*operands, case))


def test_products_are_rounded_before_they_are_added():
    case, operands = contractible()
    assert_same(case.run(*operands), reference(*operands, case))


def test_plain_columns_are_numpys_bit_for_bit():
    for seed in range(SWEEP):
        case = random_case(seed)
        x = jnp.asarray(case.operands(seed)[0]).astype(case.dtype)
        found = gpu_ops.img2col(x, **case.geometry())
        assert_same(found, by_group(gather(np.asarray(x), case), case))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("case", BUILT_IN.values(), ids=BUILT_IN.keys())
def test_value_and_gradients_are_those_of_the_definition(case, masked):
    arguments, dy = case.arguments(1, masked), cotangent(case, 2)
    with jax.default_matmul_precision("highest"):
        value, found = pulled(gpu_ops.backend().convolve, case, arguments, dy)
        again = pulled(gpu_ops.backend().convolve, case, arguments, dy)[1]
        expected_value, expected = pulled(columns.convolve_reference, case, arguments, dy)
    assert_close(value, expected_value, 1e-5)
    trees = (jax.tree.leaves(drop_zero(g)) for g in (found, expected, again))
    for gradient, definition, second in zip(*trees, strict=True):
        assert_close(gradient, definition, 1e-5)
        np.testing.assert_array_equal(np.asarray(gradient), np.asarray(second))


def call(function):
    return function()


def test_the_tuned_convolution_has_the_codes_of_the_definition():
    assert_exact_codes(call, range(50))
    differ, codes = count_differing_codes(call, range(50))
    assert codes > 900_000
    assert differ <= 1e-5 * codes


def test_the_tuned_convolution_multiplies_its_codes():
    for seed in range(50):
        case, outer = random_layer(seed, [(3, 3), (1, 1), (2, 3)])
        assert_convolves(case, outer, call, seed)
