import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.adaround import init_alpha, soft_codes
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.trace import trace
from aquant_jax.layers.fake_quant import (
    LayerInput,
    LayerSpec,
    LayerState,
    Weights,
    border_shape,
    dequantize_weight,
    per_channel,
    run_layer,
    weight_rows,
)
from tests.support import numpy_reference as reference
from tests.support.layer_codes import input_codes
from tests.support.nets import conv, normal, rng_of

GRID = ActivationQuantizer(jnp.float32(0.3), jnp.float32(2.0))
BITS = 3
# What a convolution may be: padding, strides, dilations and groups.
CONVOLUTIONS = {
    "same": {"padding": ((1, 1), (1, 1))},
    "valid": {"padding": ((0, 0), (0, 0))},
    "strided": {"padding": ((1, 0), (0, 1)), "strides": (2, 3)},
    "dilated": {"padding": ((2, 2), (2, 2)), "dilation": (2, 2)},
    "grouped": {"padding": ((1, 1), (1, 1)), "groups": 2},
    "depthwise": {"padding": ((1, 1), (1, 1)), "groups": 4},
    "transposed": {"padding": ((2, -1), (0, 1)), "lhs_dilation": (2, 3), "dilation": (2, 1)},
    "transposed, grouped": {
        "padding": ((1, 2), (-1, 2)), "lhs_dilation": (3, 1), "strides": (2, 2), "groups": 2,
    },
}  # fmt: skip


def op_of(function, kernel, x):
    (op,) = [op for op in trace(function, {"w": kernel}, x).ops if op.layer]
    return op


def spec_of(op, border="quadratic", phi="clamp", granularity="mean"):
    return LayerSpec("w", op.layer.kind, 4, "w", BITS, border, phi, granularity)


def coefficients_of(op, spec, x_shape, seed=0, size=0.1):
    shape = border_shape(op, spec.border_granularity, x_shape)
    start = borders.get(spec.border).init(shape, borders.get_phi(spec.phi).half)
    rng = rng_of(seed)
    return {name: np.asarray(c) + size * normal(rng, *shape) for name, c in start.items()}


def convolution(options, size=3):
    groups = options.get("groups", 1)
    x = normal(rng_of(1), 2, 7, 6, 4)
    kernel = normal(rng_of(2), size, size, 4 // groups, 4)
    return op_of(lambda v, x: conv(x, v["w"], **options), kernel, x), x, kernel


def as_columns(codes, granularity, kernel, options):
    """The result of `input_codes` as [N, OH, OW, taps, C]; padding has the code of zero."""
    if granularity != "channel":
        return np.moveaxis(codes, 0, 3)
    geometry = {name: value for name, value in options.items() if name != "groups"}
    return reference.im2col(np.asarray(codes, int) - 2, kernel.shape[:2], **geometry) + 2


@pytest.mark.parametrize("granularity", borders.GRANULARITIES)
@pytest.mark.parametrize(
    ("options", "phi"),
    [*zip(CONVOLUTIONS.values(), itertools.cycle(["clamp", "identity"]))],
    ids=CONVOLUTIONS.keys(),
)
def test_convolution_is_that_of_the_numpy_reference(options, phi, granularity):
    op, x, kernel = convolution(options)
    spec, bias = spec_of(op, phi=phi, granularity=granularity), normal(rng_of(3), 4)
    coefficients = coefficients_of(op, spec, x.shape)
    keep = rng_of(4).random(x.shape) < 0.5
    expected, codes = reference.quantized_conv(
        x,
        kernel,
        bias,
        np.float32(0.3),
        2,
        BITS,
        coefficients,
        phi,
        granularity,
        keep=keep,
        **options,
    )
    y = run_layer(
        op, spec, LayerInput(x, GRID, jnp.asarray(keep)), Weights(kernel, bias, coefficients)
    )
    np.testing.assert_allclose(y, expected, atol=2e-5)
    found = input_codes(op, spec, x, GRID, coefficients)
    np.testing.assert_array_equal(as_columns(found, granularity, kernel, options), codes)


def test_zeros_between_the_elements_have_the_border_of_a_single_tap():
    options = {"padding": ((0, 0), (0, 0)), "lhs_dilation": (2, 3)}
    op, x, kernel = convolution(options, size=1)
    spec = spec_of(op, "constant", "identity", "element")
    coefficients = {"b0": np.full((1, 4), -0.5, np.float32)}  # rounds zero up
    expected, _ = reference.quantized_conv(
        x, kernel, np.float32(0), np.float32(0.3), 2, BITS, coefficients, "identity", "element",
        **options,
    )  # fmt: skip
    weights = Weights(kernel, np.zeros(4, "f"), coefficients)
    y = run_layer(op, spec, LayerInput(x, GRID), weights)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    assert np.abs(y[:, 1]).min() > 0.01


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_nearest_convolution_is_that_of_the_numpy_reference(options):
    op, x, kernel = convolution(options)
    spec, bias = spec_of(op, border=None), normal(rng_of(3), 4)
    expected, _ = reference.quantized_conv(
        x, kernel, bias, np.float32(0.3), 2, BITS, None, **options
    )
    np.testing.assert_allclose(
        run_layer(op, spec, LayerInput(x, GRID), Weights(kernel, bias, {})), expected, atol=2e-5
    )
    u = x * (np.float32(1) / np.float32(0.3))
    codes = np.clip(np.ceil(u - np.float32(0.5)) + 2, 0, 7)
    np.testing.assert_array_equal(input_codes(op, spec, x, GRID, {}), codes)


SIZES = itertools.cycle([1, 3, 5, 7])


@pytest.mark.parametrize(
    ("name", "granularity", "size"),
    [
        (name, granularity, next(SIZES))
        for name in ("constant", "linear", "quadratic") for granularity in borders.GRANULARITIES
    ],
)  # fmt: skip
def test_border_of_one_half_gives_the_codes_of_nearest(name, granularity, size):
    """Ties included: the input is made of multiples of half a step."""
    options = {"padding": ((size // 2, size // 2),) * 2}
    op, x, kernel = convolution(options, size)
    x = np.round(4 * x).astype(np.float32) / 4
    half = ActivationQuantizer(jnp.float32(0.5), jnp.float32(2.0))
    spec = spec_of(op, border=name, granularity=granularity)
    start = coefficients_of(op, spec, x.shape, size=0.0)
    nearest = np.asarray(input_codes(op, spec._replace(border=None), x, half, {}))
    found = np.asarray(input_codes(op, spec, x, half, start))
    if size == 1:
        np.testing.assert_array_equal(found, nearest)
    else:
        columns = as_columns(nearest, "channel", kernel, options)
        np.testing.assert_array_equal(as_columns(found, granularity, kernel, options), columns)


def test_one_dimensional_convolution_equals_the_two_dimensional_one():
    x, kernel = normal(rng_of(5), 2, 9, 4), normal(rng_of(6), 3, 4, 5)

    def line(v, x):
        return jax.lax.conv_general_dilated(
            x, v["w"], (2,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC")
        )

    op = op_of(line, kernel, x)
    coefficients = coefficients_of(op, spec_of(op, "linear"), x.shape)
    y = run_layer(
        op,
        spec_of(op, "linear"),
        LayerInput(x, GRID),
        Weights(kernel, np.zeros(5, "f"), coefficients),
    )
    expected, _ = reference.quantized_conv(
        x[:, None], kernel[None], np.float32(0), np.float32(0.3), 2, BITS, coefficients,
        strides=(1, 2), padding=((0, 0), (1, 1)),
    )  # fmt: skip
    np.testing.assert_allclose(y, expected[:, 0], atol=2e-5)


@pytest.mark.parametrize("layout", ["NCHW", "CHWN"])
def test_layouts_give_the_same_convolution(layout):
    options = CONVOLUTIONS["strided"]
    op, x, kernel = convolution(options)
    coefficients, bias = coefficients_of(op, spec_of(op), x.shape), normal(rng_of(3), 4)
    expected = run_layer(op, spec_of(op), LayerInput(x, GRID), Weights(kernel, bias, coefficients))
    order = ["NHWC".index(axis) for axis in layout]
    weights = {"NCHW": "OIHW", "CHWN": "IHWO"}[layout]
    moved = np.transpose(kernel, ["HWIO".index(axis) for axis in weights])

    def other(v, x):
        return jax.lax.conv_general_dilated(
            x, v["w"], options["strides"], options["padding"],
            dimension_numbers=(layout, weights, layout),
        )  # fmt: skip

    turned = np.transpose(x, order)
    again = op_of(other, moved, turned)
    y = run_layer(
        again, spec_of(again), LayerInput(turned, GRID), Weights(moved, bias, coefficients)
    )
    np.testing.assert_allclose(y, np.transpose(expected, order), atol=2e-5)


def test_dense_layer_has_one_border_an_input_channel():
    x, kernel, bias = normal(rng_of(7), 5, 6), normal(rng_of(8), 6, 4), normal(rng_of(9), 4)
    op = op_of(lambda v, x: x @ v["w"], kernel, x)
    coefficients = coefficients_of(op, spec_of(op), x.shape)
    y = run_layer(op, spec_of(op), LayerInput(x, GRID), Weights(kernel, bias, coefficients))
    expected, codes = reference.quantized_conv(
        x[:, None, None], kernel[None, None], bias, np.float32(0.3), 2, BITS, coefficients
    )
    np.testing.assert_allclose(y, expected[:, 0, 0], atol=2e-5)
    found = input_codes(op, spec_of(op), x, GRID, coefficients)
    np.testing.assert_array_equal(found, codes[:, 0, 0, 0])


def test_dense_layer_whose_weight_is_on_the_left():
    x, kernel, bias = normal(rng_of(7), 5, 6), normal(rng_of(8), 6, 4), normal(rng_of(9), 4)
    op = op_of(lambda v, x: x @ v["w"], kernel, x)
    left = op_of(lambda v, x: jnp.einsum("io,ni->on", v["w"], x), kernel, x)
    coefficients = coefficients_of(op, spec_of(op, "linear"), x.shape)
    y = run_layer(
        op, spec_of(op, "linear"), LayerInput(x, GRID), Weights(kernel, bias, coefficients)
    )
    other = run_layer(
        left, spec_of(left, "linear"), LayerInput(x, GRID), Weights(kernel, bias, coefficients)
    )
    np.testing.assert_allclose(other if other.shape == y.shape else other.T, y, atol=2e-5)


def test_two_contracted_axes_are_two_axes_of_column_elements():
    """The output projection of multi-head attention: [n, t, heads, depth] x [heads, depth, o]."""
    x, kernel = normal(rng_of(10), 3, 5, 2, 4), normal(rng_of(11), 2, 4, 6)
    op = op_of(lambda v, x: jnp.einsum("nthd,hdo->nto", x, v["w"]), kernel, x)
    assert {border_shape(op, g, x.shape) for g in borders.GRANULARITIES} == {(1, 8)}
    coefficients, bias = coefficients_of(op, spec_of(op), x.shape), normal(rng_of(12), 6)
    y = run_layer(op, spec_of(op), LayerInput(x, GRID), Weights(kernel, bias, coefficients))
    # The elements are numbered in the order of the op's contracted axes.
    first, second = op.params["dimension_numbers"][0][0]
    flat = x.transpose(0, 1, first, second).reshape(3, 1, 5, 8)
    kernel = kernel.transpose(first - 2, second - 2, 2)
    expected, _ = reference.quantized_conv(
        flat, kernel.reshape(1, 1, 8, 6), bias, np.float32(0.3), 2, BITS, coefficients
    )
    np.testing.assert_allclose(y, expected[:, 0], atol=2e-5)


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_weight_rows_and_per_channel_number_the_output_channels(options):
    op, _, kernel = convolution(options)
    rows = weight_rows(op, kernel)
    assert rows.shape == (4, kernel.size // 4)
    for channel in range(4):
        np.testing.assert_array_equal(rows[channel], kernel[..., channel].ravel())
    scaled = kernel * per_channel(op, jnp.arange(4.0))
    np.testing.assert_array_equal(scaled, kernel * np.arange(4.0, dtype=np.float32))


def test_dequantized_weights():
    op, _, kernel = convolution(CONVOLUTIONS["same"])
    codes = rng_of(13).integers(0, 16, kernel.shape).astype(np.uint8)
    scale, zero = np.float32([0.5, 1, 2, 0.25]), np.float32([0, 3, 8, 15])
    state = LayerState(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(zero), jnp.zeros(4), {})
    np.testing.assert_array_equal(dequantize_weight(op, state), scale * (codes - zero))
    floats = LayerState(jnp.asarray(kernel), jnp.zeros(0), jnp.zeros(0), jnp.zeros(4), {})
    np.testing.assert_array_equal(dequantize_weight(op, floats), kernel)


def test_half_precision_operands_give_a_float32_result():
    x, kernel = normal(rng_of(7), 5, 6), normal(rng_of(8), 6, 4)
    op = op_of(lambda v, x: x @ v["w"], kernel.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    coefficients = coefficients_of(op, spec_of(op), x.shape)
    weights = Weights(kernel, np.zeros(4, "f"), coefficients)
    y = run_layer(op, spec_of(op), LayerInput(jnp.asarray(x, jnp.bfloat16), GRID), weights)
    assert y.dtype == jnp.float32


class TestGradients:
    """Against finite differences of the surrogate whose rounding residual and clips are frozen."""

    @pytest.mark.parametrize("granularity", borders.GRANULARITIES)
    @pytest.mark.parametrize(
        ("name", "phi"),
        [
            ("strided", "clamp"), ("grouped", "identity"),
            pytest.param("strided", "identity", marks=pytest.mark.slow),
            pytest.param("grouped", "clamp", marks=pytest.mark.slow),
        ],
    )  # fmt: skip
    def test_of_step_size_and_border(self, name, phi, granularity):
        options = CONVOLUTIONS[name]
        op, x, kernel = convolution(options)
        spec = spec_of(op, phi=phi, granularity=granularity)
        coefficients = coefficients_of(op, spec, x.shape)
        exact = jax.tree.map(np.float64, coefficients)
        frozen = reference.Frozen()

        def surrogate(step, coefficients):
            y, _ = reference.quantized_conv(
                np.float64(x), np.float64(kernel), 0.0, np.float64(step), 2, BITS, coefficients,
                phi, granularity, quantizer=frozen, **options,
            )  # fmt: skip
            return y

        dy = normal(rng_of(14), *surrogate(np.float32(0.3), exact).shape)

        def loss(step, coefficients):
            grid = GRID._replace(step_size=step)
            weights = Weights(kernel, np.zeros(4, "f"), coefficients)
            y = run_layer(op, spec, LayerInput(x, grid), weights)
            return jnp.sum(dy * y)

        dstep, found = jax.jit(jax.grad(loss, argnums=(0, 1)))(GRID.step_size, coefficients)
        expected = reference.numerical_gradient(
            lambda s: np.sum(dy * surrogate(s, exact)), np.float32(0.3)
        )
        np.testing.assert_allclose(dstep, expected, rtol=2e-4)
        for key in coefficients:
            numeric = reference.numerical_gradient(
                lambda c, key=key: np.sum(dy * surrogate(np.float32(0.3), {**exact, key: c})),
                exact[key],
            )
            np.testing.assert_allclose(found[key], numeric, atol=2e-4 * np.abs(numeric).max())

    def test_of_alpha(self):
        weight, scale, zero = normal(rng_of(15), 6, 8), np.float32(0.4), np.float32(3.0)
        alpha = np.asarray(init_alpha(weight / scale)) + 0.3 * normal(rng_of(16), 6, 8)
        dy = normal(rng_of(17), 6, 8)
        top = 2**BITS - 1
        codes = np.floor(weight / scale) + zero
        # The straight-through clip: nothing flows where the soft code leaves the range.
        h = reference.soft_weight(np.float64(weight), scale, 100.0, 8, np.float64(alpha)) / scale
        inside = (h + zero >= 0) & (h + zero <= top)

        def surrogate(alpha):
            h = np.clip(1.2 / (1.0 + np.exp(-alpha)) - 0.1, 0.0, 1.0)
            return np.sum(dy * scale * np.where(inside, codes + h - zero, 0.0))

        def loss(alpha):
            values = scale * (soft_codes(weight / scale, alpha, zero, BITS) - zero)
            return jnp.sum(dy * values)

        numeric = reference.numerical_gradient(surrogate, np.float64(alpha))
        np.testing.assert_allclose(jax.grad(loss)(alpha), numeric, atol=1e-5)
        assert 0 < inside.sum() < inside.size
