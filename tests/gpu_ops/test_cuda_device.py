"""The CUDA operations on a GPU, where one is at hand, against numpy and the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from gpu_ops import targets
from tests.gpu_ops import test_conv_border_int8 as int8
from tests.layers.test_im2col import (
    CASES,
    assert_close,
    convolve_by_autodiff,
    cotangent,
    drop_zero,
    pulled,
)
from tests.support.deployed_layers import LAYERS
from tests.support.img2col_reference import (
    Case,
    assert_same,
    by_group,
    contractible,
    gather,
    random_case,
    reference,
)
from tests.support.nets import images, residual_net
from tests.support.tuned_reference import (
    assert_convolves,
    assert_exact_codes,
    count_differing_codes,
    random_layer,
)

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
        found = gpu_ops.img2col(x, case.geometry(), case.align)
        assert_same(found, by_group(gather(np.asarray(x), case), case))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("case", BUILT_IN.values(), ids=BUILT_IN.keys())
def test_value_and_gradients_are_those_of_the_reference(case, masked):
    arguments, dy = case.arguments(1, masked), cotangent(case, 2)
    with jax.default_matmul_precision("highest"):
        value, found = pulled(gpu_ops.backend().convolve, case, arguments, dy)
        again = pulled(gpu_ops.backend().convolve, case, arguments, dy)[1]
        expected_value, expected = pulled(convolve_by_autodiff, case, arguments, dy)
    assert_close(value, expected_value, 1e-5)
    trees = (jax.tree.leaves(drop_zero(g)) for g in (found, expected, again))
    for gradient, autodiff, second in zip(*trees, strict=True):
        assert_close(gradient, autodiff, 1e-5)
        np.testing.assert_array_equal(np.asarray(gradient), np.asarray(second))


@pytest.mark.parametrize("bits", int8.WEIGHT_BITS)
def test_the_int8_convolution_sums_exactly(bits):
    for seed in range(30):
        case = random_case(seed)
        own, weights = case.operands(seed), int8.weights_of(case, bits, seed)
        expected = int8.exact(case, own, weights)
        np.testing.assert_allclose(int8.call(case, own, weights), expected, rtol=3e-7)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_one_call_gives_the_bits_of_the_cpu(layer):
    found = layer.run()
    with jax.default_device(jax.devices("cpu")[0]):
        expected = layer.run()
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("preset", ["nearest", "aquant"])
def test_a_deployed_network_gives_the_outputs_of_the_reference(preset):
    apply, variables = residual_net()
    x = images(0, 32)
    with jax.default_matmul_precision("highest"):
        recipe = aq.recipes.preset(preset, batch_size=8, steps=0 if preset == "nearest" else 4)
        quantized = aq.quantize(apply, variables, x, recipe, observer=aq.Observer())
        deployed, expected = quantized.with_backend(gpu_ops.backend()), quantized(x)
        np.testing.assert_allclose(deployed(x), expected, atol=1e-4 * np.abs(expected).max())


def test_mapped_exported_empty_and_spoilt_images():
    case = Case()
    x, step, zero, coefficients = case.operands(1)
    run = jax.jit(lambda x, step: case.run(x, step, zero, coefficients))
    expected = reference(x, step, zero, coefficients, case)
    mapped = jax.vmap(run, (0, None))(jnp.stack([x, x + 1]), step)
    assert_same(mapped[0], expected)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    exported = jax.export.export(run, disabled_checks=gpu_ops.export_checks())(shape, step)
    assert_same(jax.export.deserialize(exported.serialize()).call(x, step), expected)
    assert run(x[:0], step).shape == (0, *expected.shape[1:])
    assert (np.asarray(run(x * np.nan, step)) == 0).all()
    assert (np.asarray(run(x, jnp.float32(0))) == 0).all()


def call(function):
    return function()


def test_the_tuned_convolution_has_the_codes_of_the_reference():
    assert_exact_codes(call, range(50))
    differ, codes = count_differing_codes(call, range(50))
    assert codes > 900_000
    assert differ <= 1e-5 * codes


def test_the_tuned_convolution_multiplies_its_codes():
    for seed in range(50):
        case, outer = random_layer(seed, [(3, 3), (1, 1), (2, 3)])
        assert_convolves(case, outer, call, seed)
