"""``gpu_ops.border_columns`` and ``border_conv``: bits, errors, maps and empty batches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from tests.layers.test_im2col import CASES, flat_case
from tests.support import numpy_reference as reference
from tests.support.nets import normal, rng_of

BUILT_IN = {name: case for name, case in CASES.items() if case.phi != "sigmoid"}
GEOMETRY = ConvGeometry((6, 6), (3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
QUADRATIC = Rounding(3, "quadratic", "clamp", True)


@pytest.mark.parametrize("case", BUILT_IN.values(), ids=BUILT_IN.keys())
def test_columns_are_those_of_numpy_bit_for_bit(case):
    x, _, quantizer, coefficients, _ = case.arguments(3, False)
    found = gpu_ops.border_columns(
        x, None, quantizer, coefficients, case.geometry(), case.rounding()
    )
    flat, size, options = flat_case(case, x)
    u = reference.im2col(flat, size, padding=((0, 0), (0, 0)), **options)
    u = u * (np.float32(1.0) / np.float32(quantizer.step_size))
    coefficients = {name: np.asarray(c) for name, c in coefficients.items()}
    phi = borders.get_phi(case.phi).deployed
    border = reference.column_borders(u, coefficients, phi, case.shared_across_taps)
    zero = np.float32(quantizer.zero_point)
    codes = np.clip(np.ceil(u - border) + zero, 0, 7)
    expected = np.float32(quantizer.step_size) * (codes - zero)
    np.testing.assert_array_equal(np.asarray(found).reshape(expected.shape), expected)


def test_the_kernel_of_a_convolution_in_one_pass_must_fit():
    case = CASES[next(iter(BUILT_IN))]
    x, keep, quantizer, coefficients, _ = case.arguments(1, False)
    arguments = (x, keep, quantizer, coefficients)
    elements = int(np.prod(case.geometry().kernel)) * x.shape[-1]
    for kernel in (jnp.ones((elements + 1, 4)), jnp.ones((elements, 2, 2))):
        message = rf"kernel is float32 {re.escape(str(kernel.shape))}, not float32 \({elements}, O"
        with pytest.raises(ValueError, match=message):
            gpu_ops.border_conv(*arguments, kernel, case.geometry(), case.rounding())


def operands(channels=4, taps=9):
    quantizer = ActivationQuantizer(jnp.float32(0.3), jnp.float32(0.0))
    x = jnp.asarray(normal(rng_of(0), 2, 6, 6, channels))
    return x, quantizer, borders.get("quadratic").init((taps, channels), 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t, c: (x[:, 1:], t, c), "(2, 5, 6, 4), the geometry one or two spatial axes "
                                           "of sizes (6, 6)"),
        (lambda x, t, c: (x[0], t, c), "(6, 6, 4), the geometry one or two spatial axes of sizes "
                                       "(6, 6)"),
        (lambda x, t, c: (x.astype(jnp.bfloat16), t, c), "bfloat16, not float32"),
        (lambda x, t, c: (x, t, operands(taps=4)[2]), "'b0' has shape (4, 4), not (9, 4)"),
        (lambda x, t, c: (x, t, {"b0": c["b0"]}), "'b1' has shape None, not (9, 4)"),
        (lambda x, t, c: (x, t, c | {"b0": c["b0"].astype(jnp.bfloat16)}), "'b0' is bfloat16"),
    ],
    ids=["spatial", "rank", "dtype", "coefficients", "missing", "coefficient dtype"],
)  # fmt: skip
def test_operands_that_do_not_fit_are_named(change, words):
    x, quantizer, coefficients = change(*operands())
    with pytest.raises(ValueError, match=re.escape(words)):
        gpu_ops.border_columns(x, None, quantizer, coefficients, GEOMETRY, QUADRATIC)


@pytest.mark.parametrize(
    ("geometry", "rounding", "words"),
    [
        (GEOMETRY, QUADRATIC._replace(phi="sigmoid"), "phi 'sigmoid' has no custom call"),
        (GEOMETRY, QUADRATIC._replace(border="mine"), "border 'mine' has no custom call"),
        (GEOMETRY._replace(dilation=(3, 3)), QUADRATIC,
         "a window of (7, 7) is larger than the padded input, (6, 6)"),
        (GEOMETRY._replace(padding=((0, 1), (0, 0))), QUADRATIC,
         "padding is ((0, 1), (0, 0)), not zero; x must be padded already"),
        (GEOMETRY, QUADRATIC._replace(bits=9), "bits is 9, not an integer of 2 to 8"),
    ],
    ids=["phi", "border", "window", "padding", "bits"],
)  # fmt: skip
def test_what_it_does_not_serve_is_named(geometry, rounding, words):
    x, quantizer, coefficients = operands()
    with pytest.raises(ValueError, match=re.escape(words)):
        gpu_ops.border_columns(x, None, quantizer, coefficients, geometry, rounding)


def test_images_too_large_for_the_index_are_named():
    geometry = GEOMETRY._replace(spatial=(70_000, 10_000))
    quantizer = ActivationQuantizer(jnp.float32(0.3), jnp.float32(0.0))
    x = jax.ShapeDtypeStruct((1, *geometry.spatial, 4), jnp.float32)
    coefficients = operands()[2]

    def call(x):
        return gpu_ops.border_columns(x, None, quantizer, coefficients, geometry, QUADRATIC)

    with pytest.raises(ValueError, match="padded image has 2800000000 elements; at most 21474"):
        jax.eval_shape(call, x)


def with_grid(step, zero=0.0):
    x, _, coefficients = operands()
    quantizer = ActivationQuantizer(step, jnp.float32(zero))
    return gpu_ops.border_columns(x, None, quantizer, coefficients, GEOMETRY, QUADRATIC)


@pytest.mark.parametrize("size", [0.0, -1.0])
def test_a_step_size_that_is_not_positive_is_an_error_not_a_crash(size):
    with pytest.raises(jax.errors.JaxRuntimeError, match="the step size is"):
        jax.jit(with_grid)(jnp.float32(size))


def test_a_step_size_that_is_no_number_gives_none():
    assert np.isnan(jax.jit(with_grid)(jnp.float32(np.nan))).all()


@pytest.mark.parametrize(
    ("step", "zero", "words"),
    [
        (0.0, 0.0, "step_size is 0.0, not positive"),
        (1e-40, 0.0, "step_size is 1e-40, not positive"),
        (1e39, 0.0, "step_size is 1e+39, not positive"),
        (np.nan, 0.0, "step_size is nan, not positive"),
        (np.ones(2), 0.0, "step_size has shape (2,), not ()"),
        (0.3, 8.0, "zero_point is 8.0, not an integer of 0 to 7"),
        (0.3, 1.5, "zero_point is 1.5, not an integer of 0 to 7"),
    ],
)
def test_a_grid_that_is_known_is_checked_at_once(step, zero, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        with_grid(step, zero)


def test_no_images_give_no_results_and_no_gradient():
    x, quantizer, coefficients = operands()
    kernel = jnp.ones((36, 5))
    found = gpu_ops.border_columns(x[:0], None, quantizer, coefficients, GEOMETRY, QUADRATIC)
    assert found.shape == (0, 4, 4, 9, 4)

    def loss(kernel):
        y = gpu_ops.border_conv(x[:0], None, quantizer, coefficients, kernel, GEOMETRY, QUADRATIC)
        return jnp.sum(y), y

    gradient, y = jax.grad(loss, has_aux=True)(kernel)
    assert y.shape == (0, 4, 4, 5)
    np.testing.assert_array_equal(gradient, np.zeros_like(kernel))


def test_mapped_over_anything_it_gives_each_its_own():
    x, quantizer, coefficients = operands()
    kernel = jnp.asarray(normal(rng_of(1), 36, 5))
    xs, steps = jnp.stack([x, 2 * x]), jnp.float32([0.3, 0.2])

    def loss(x, step):
        grid = quantizer._replace(step_size=step)
        y = gpu_ops.border_conv(x, None, grid, coefficients, kernel, GEOMETRY, QUADRATIC)
        return jnp.sum(y**2)

    run = jax.value_and_grad(loss, argnums=(0, 1))
    found = jax.vmap(run)(xs, steps)
    expected = [run(x, step) for x, step in zip(xs, steps, strict=True)]
    for i, one in enumerate(expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("masked", [False, True])
def test_mapped_over_x_it_is_one_call(masked):
    x, quantizer, coefficients = operands()
    xs = jnp.stack([x, 2 * x, x - 1])
    keep = jnp.asarray(rng_of(2).random(x.shape) < 0.5) if masked else None

    def run(x):
        return gpu_ops.border_columns(x, keep, quantizer, coefficients, GEOMETRY, QUADRATIC)

    np.testing.assert_array_equal(jax.vmap(run)(xs), jnp.stack([run(x) for x in xs]))
    text = jax.jit(jax.vmap(run)).lower(xs).as_text()
    assert text.count("@gpu_ops_border_columns") == 1
    assert "while" not in text


def test_groups_that_no_pass_serves_are_named():
    x, quantizer, coefficients = operands()
    for groups, kernel, words in (
        (2, jnp.ones((36, 2)), "groups is 2, neither 1 nor the 4 channels of x"),
        (4, jnp.ones((36, 2)), "kernel is float32 (36, 2), not float32 (36, 1)"),
    ):
        geometry = GEOMETRY._replace(groups=groups)
        with pytest.raises(ValueError, match=re.escape(words)):
            gpu_ops.border_conv(x, None, quantizer, coefficients, kernel, geometry, QUADRATIC)
