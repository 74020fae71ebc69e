import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import (
    ActivationQuantizer,
    dequantize,
    quantize,
    to_units,
)
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import ConvGeometry
from tests.support import numpy_reference as reference
from tests.support.nets import normal, rng_of


class Case(NamedTuple):
    """One convolution over columns, and what rounds them."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels: int
    outputs: int
    spatial: tuple[int, ...]
    border: str
    phi: str
    shared_across_taps: bool
    zero: float

    def geometry(self):
        padding = ((0, 0),) * len(self.kernel)
        return ConvGeometry(
            self.spatial, self.kernel, self.strides, self.dilation, padding, self.groups
        )

    def rounding(self):
        return im2col.Rounding(3, self.border, self.phi, self.shared_across_taps)

    def arguments(self, seed, masked):
        rng, taps = rng_of(seed), int(np.prod(self.kernel))
        x = normal(rng, 2, *self.spatial, self.channels)
        start = borders.get(self.border).init((taps, self.channels), borders.get_phi(self.phi).half)
        coefficients = {k: c + 0.1 * normal(rng, *c.shape) for k, c in start.items()}
        inner, outer = self.channels // self.groups, self.outputs // self.groups
        kernel = normal(rng, taps, self.groups, inner, outer)
        tensor = ActivationQuantizer(jnp.float32(0.3), jnp.float32(self.zero))
        keep = jnp.asarray(rng.random(x.shape) < 0.6) if masked else None
        return jnp.asarray(x), keep, tensor, coefficients, jnp.asarray(kernel)


CASES = {
    "2x3": Case((2, 3), (1, 1), (1, 1), 1, 4, 6, (6, 7), "quadratic", "clamp", True, 0),
    "2x3 each tap": Case((2, 3), (1, 1), (1, 1), 1, 4, 6, (6, 7), "quadratic", "clamp", False, 2),
    "strided": Case((3, 2), (2, 2), (1, 1), 1, 4, 6, (9, 8), "quadratic", "clamp", False, 1),
    "grouped, dilated": Case(
        (3, 2), (2, 3), (2, 1), 2, 4, 6, (11, 9), "linear", "identity", True, 2
    ),
    "depthwise": Case((2, 2), (1, 1), (1, 1), 4, 4, 8, (6, 6), "quadratic", "clamp_ste", True, 3),
    "depthwise each tap": Case(
        (2, 3), (2, 1), (1, 1), 3, 3, 3, (7, 6), "linear", "clamp", False, 1
    ),
    "1-D": Case((5,), (1,), (2,), 4, 4, 4, (20,), "constant", "sigmoid", True, 0),
    "1-D strided": Case((3,), (2,), (1,), 1, 4, 5, (11,), "quadratic", "identity", False, 4),
    "1x1": Case((1, 1), (2, 2), (1, 1), 1, 3, 4, (5, 6), "quadratic", "clamp", True, 1),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def pulled(function, case, arguments, dy):
    """Value and gradients for x, tensor, coefficients and kernel."""
    x, keep, *rest = arguments

    def run(x, tensor, coefficients, kernel):
        return function(x, keep, tensor, coefficients, kernel, case.geometry(), case.rounding())

    def both(*operands):
        value, pull = jax.vjp(run, *operands)
        return value, pull(dy)

    options = {"xla_backend_optimization_level": 0}  # compiles twice as fast
    return jax.jit(both, compiler_options=options)(x, *rest)


def flat_case(case, x):
    """Input, kernel size and geometry for the numpy reference, which knows two dimensions."""
    images = np.asarray(x)
    one = () if images.ndim == 4 else (1,)
    images = images.reshape(images.shape[0], *one, *images.shape[1:])
    options = {"strides": (*one, *case.strides), "dilation": (*one, *case.dilation)}
    return images, (*one, *case.kernel), options


def cotangent(case, seed):
    return normal(rng_of(seed), 2, *case.geometry().out, case.outputs)


def assert_close(value, expected, tolerance):
    top = np.abs(expected).max()
    assert np.abs(np.asarray(value) - np.asarray(expected)).max() <= tolerance * top + 1e-6


def convolve_by_autodiff(x, keep, tensor, coefficients, kernel, geometry, rounding):
    """`im2col.convolve` without its hand-written derivative."""
    inv_step = 1.0 / tensor.step_size
    us = geometry.tap_rows([to_units(rows, inv_step) for rows in geometry.flatten(x)])
    bounds = rounding.borders(rounding.polynomials(coefficients, us), len(us))
    kept = [True] * len(us) if keep is None else geometry.tap_rows(geometry.flatten(keep))
    values = geometry.tap_rows(geometry.flatten(x))
    total = jnp.float32(0.0)
    for u, bound, k, value, weight in zip(us, bounds, kept, values, kernel, strict=True):
        codes = quantize(u, tensor.zero_point, rounding.bits, bound)
        column = dequantize(codes, tensor.step_size, tensor.zero_point)
        total = total + im2col.contract(jnp.where(k, column, value), weight)
    return geometry.crop(total, x.shape[0])


@functools.cache
def by_autodiff(case, masked):
    """Value and gradients of the reference implementation, compiled once for all backends."""
    return pulled(convolve_by_autodiff, case, case.arguments(1, masked), cotangent(case, 2))


def assert_gradients(case, masked):
    value, found = pulled(im2col.convolve, case, case.arguments(1, masked), cotangent(case, 2))
    expected_value, expected = by_autodiff(case, masked)
    assert_close(value, expected_value, 1e-6)
    pairs = zip(
        jax.tree.leaves(drop_zero(found)), jax.tree.leaves(drop_zero(expected)), strict=True
    )
    for gradient, autodiff in pairs:
        assert_close(gradient, autodiff, 2e-5)
        assert np.abs(gradient).max() > 0


def drop_zero(gradients):
    """Without the gradient of the zero point, which is not trained."""
    x, tensor, coefficients, kernel = gradients
    return x, tensor.step_size, coefficients, kernel


@pytest.mark.parametrize(
    "case",
    [
        # The strided case, too, has borders for each tap.
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name == "2x3 each tap"))
        for name, case in CASES.items()
    ],
)
def test_gradients_are_the_autodiff_of_the_forward_pass(case):
    assert_gradients(case, masked=True)


def test_gradients_without_a_mask():
    assert_gradients(CASES["1-D strided"], masked=False)


def test_taps_are_those_of_im2col(case):
    x = case.arguments(3, False)[0]
    geometry = case.geometry()
    rows = geometry.tap_rows(geometry.flatten(x))
    cropped = np.stack([geometry.crop(tap, len(x)) for tap in rows], -2)
    expected = reference.im2col(*flat_case(case, x)[:2], **flat_case(case, x)[2])
    np.testing.assert_array_equal(cropped, expected.reshape(cropped.shape))


def test_values_and_codes_are_those_of_the_numpy_reference(case):
    phi = borders.get_phi(case.phi).deployed
    x, keep, tensor, coefficients, kernel = case.arguments(4, True)
    images, size, options = flat_case(case, x)
    hwio = np.asarray(kernel).transpose(0, 2, 1, 3)
    hwio = hwio.reshape(*size, case.channels // case.groups, case.outputs)
    expected, codes = reference.quantized_conv(
        images, hwio, np.float32(0), np.float32(0.3), case.zero, 3,
        jax.tree.map(np.asarray, coefficients), phi,
        "mean" if case.shared_across_taps else "element", groups=case.groups,
        keep=np.asarray(keep).reshape(images.shape), **options,
    )  # fmt: skip
    geometry, rounding = case.geometry(), case.rounding()
    value = im2col.convolve(x, keep, tensor, coefficients, kernel, geometry, rounding)
    assert_close(value, expected.reshape(value.shape), 1e-5)
    found = np.stack(im2col.column_codes(x, tensor, coefficients, geometry, rounding), -2)
    np.testing.assert_array_equal(found, codes.reshape(found.shape))


def test_a_dropped_element_goes_through_unquantized():
    case = CASES["2x3"]
    x, _, tensor, coefficients, kernel = case.arguments(5, False)
    nothing = jnp.zeros(x.shape, bool)
    value = im2col.convolve(
        x, nothing, tensor, coefficients, kernel, case.geometry(), case.rounding()
    )
    hwio = kernel[:, 0].reshape(2, 3, case.channels, case.outputs)
    exact = jax.lax.conv_general_dilated(
        x, hwio, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert_close(value, exact, 1e-5)


def test_contract_agrees_with_a_dense_kernel():
    column = normal(rng_of(6), 5, 6)
    for groups, outer in ((1, 4), (2, 3), (6, 1), (6, 2)):
        kernel = normal(rng_of(7), groups, 6 // groups, outer)
        dense = np.zeros((6, groups * outer), np.float32)
        for g in range(groups):
            rows = slice(g * 6 // groups, (g + 1) * 6 // groups)
            dense[rows, g * outer : (g + 1) * outer] = kernel[g]
        result = im2col.contract(jnp.asarray(column), jnp.asarray(kernel))
        assert_close(result, column @ dense, 1e-5)
