"""The compiled operations against their definition, `layers.im2col`, and against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import Window
from tests.layers.test_im2col import CASES, assert_close, cotangent, drop_zero, flat_case, pulled
from tests.support import numpy_reference as reference
from tests.support.nets import images, normal, rng_of, small_net
from tests.support.process import run_python

BACKEND = gpu_ops.backend()
BUILT_IN = {name: case for name, case in CASES.items() if case.phi != "sigmoid"}


@pytest.fixture(params=BUILT_IN.values(), ids=BUILT_IN.keys())
def case(request):
    return request.param


@pytest.mark.parametrize("fused", [True, False], ids=["one pass", "columns"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropped"])
def test_value_and_gradients_are_those_of_the_definition(case, masked, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(gpu_ops.ops, "FUSED_WEIGHTS", 0)
    arguments, dy = case.arguments(1, masked), cotangent(case, 2)
    value, found = pulled(BACKEND.convolve, case, arguments, dy)
    expected_value, expected = pulled(im2col.convolve_reference, case, arguments, dy)
    assert_close(value, expected_value, 1e-6)
    found, expected = (jax.tree.leaves(drop_zero(g)) for g in (found, expected))
    for gradient, definition in zip(found, expected, strict=True):
        assert_close(gradient, definition, 1e-5)
        assert np.abs(gradient).max() > 0


def test_columns_are_those_of_numpy_bit_for_bit(case):
    x, _, tensor, coefficients, _ = case.arguments(3, False)
    found = gpu_ops.border_columns(x, None, tensor, coefficients, case.window(), case.rounding())
    flat, size, geometry = flat_case(case, x)
    u = reference.im2col(flat, size, padding=((0, 0), (0, 0)), **geometry)
    u = u * (np.float32(1.0) / np.float32(tensor.step_size))
    coefficients = {name: np.asarray(c) for name, c in coefficients.items()}
    phi = borders.get_phi(case.phi).deployed
    border = reference.column_borders(u, coefficients, phi, case.fused)
    zero = np.float32(tensor.zero_point)
    codes = np.clip(np.ceil(u - border) + zero, 0, 7)
    expected = np.float32(tensor.step_size) * (codes - zero)
    np.testing.assert_array_equal(np.asarray(found).reshape(expected.shape), expected)


def test_a_custom_call_is_what_runs(case):
    arguments = case.arguments(1, True)
    run = jax.jit(lambda *a: BACKEND.convolve(*a, case.window(), case.rounding()))
    assert "gpu_ops_border_" in run.lower(*arguments).as_text()


@pytest.mark.user_model
def test_quantizing_with_it_learns_what_quantizing_without_it_learns():
    recipe = aq.recipes.aquant(weight_bits=2, act_bits=2, steps=30, batch_size=8)
    calibration = images(0, 16, size=6)
    plain, compiled = (
        aq.quantize(*small_net(), calibration, recipe, progress=False, compiler=compiler)
        for compiler in (aq.Compiler(), aq.Compiler(BACKEND))
    )
    assert [r.name for r in plain.reports] == [r.name for r in compiled.reports]
    for one, other in zip(plain.reports, compiled.reports, strict=True):
        np.testing.assert_allclose(other.loss_curve, one.loss_curve, rtol=2e-3)
    for one, other in zip(plain.summary(), compiled.summary(), strict=True):
        assert (one.border is None) == (other.border is None)
        for name in one.border or {}:
            np.testing.assert_allclose(other.border[name], one.border[name], atol=2e-3)


def test_the_kernel_of_a_fused_convolution_must_fit():
    case = CASES[next(iter(BUILT_IN))]
    x, keep, tensor, coefficients, _ = case.arguments(1, False)
    arguments = (x, keep, tensor, coefficients)
    elements = int(np.prod(case.window().kernel)) * x.shape[-1]
    for kernel in (jnp.ones((elements + 1, 4)), jnp.ones((elements, 2, 2))):
        message = rf"kernel is float32 {re.escape(str(kernel.shape))}, not float32 \({elements}, O"
        with pytest.raises(ValueError, match=message):
            gpu_ops.border_conv(*arguments, kernel, case.window(), case.rounding())


def test_a_registered_border_is_served_by_the_definition(monkeypatch):
    monkeypatch.setattr(borders, "BORDERS", dict(borders.BORDERS))
    own = borders.get("linear")
    borders.register("mine", own.init, own.apply)
    case = BUILT_IN["grouped, dilated"]
    arguments, dy = case.arguments(1, True), cotangent(case, 2)
    expected = pulled(BACKEND.convolve, case, arguments, dy)
    found = pulled(BACKEND.convolve, case._replace(border="mine"), arguments, dy)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, 1e-5)


WINDOW = Window(2, (6, 6), (3, 3), (1, 1), (1, 1))
QUADRATIC = im2col.Rounding(3, "quadratic", "clamp", True)


def operands(channels=4, taps=9):
    tensor = TensorState(jnp.float32(0.3), jnp.float32(0.0))
    x = jnp.asarray(normal(rng_of(0), 2, 6, 6, channels))
    return x, tensor, borders.get("quadratic").init((taps, channels), 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t, c: (x[:1], t, c), "(1, 6, 6, 4), the window (2, 6, 6)"),
        (lambda x, t, c: (x[0], t, c), "(6, 6, 4) does not fit a window of 2 spatial axes"),
        (lambda x, t, c: (x.astype(jnp.bfloat16), t, c), "bfloat16, not float32"),
        (lambda x, t, c: (x, t, operands(taps=4)[2]), "'b0' has shape (4, 4), not (9, 4)"),
        (lambda x, t, c: (x, t, {"b0": c["b0"]}), "'b1' has shape None, not (9, 4)"),
        (lambda x, t, c: (x, t, c | {"b0": c["b0"].astype(jnp.bfloat16)}), "'b0' is bfloat16"),
    ],
    ids=["images", "rank", "dtype", "coefficients", "missing", "coefficient dtype"],
)
def test_operands_that_do_not_fit_are_named(change, words):
    x, tensor, coefficients = change(*operands())
    with pytest.raises(ValueError, match=re.escape(words)):
        gpu_ops.border_columns(x, None, tensor, coefficients, WINDOW, QUADRATIC)


@pytest.mark.parametrize(
    ("window", "rounding", "words"),
    [
        (WINDOW, QUADRATIC._replace(phi="sigmoid"), "phi 'sigmoid' has no custom call"),
        (WINDOW, QUADRATIC._replace(border="mine"), "border 'mine' has no custom call"),
        (WINDOW._replace(dilation=(3, 3)), QUADRATIC, "(3, 3) is larger than the input (6, 6)"),
        (WINDOW, QUADRATIC._replace(bits=9), "bits is 9, not an integer of 2 to 8"),
    ],
    ids=["phi", "border", "window", "bits"],
)
def test_what_it_does_not_serve_is_named(window, rounding, words):
    x, tensor, coefficients = operands()
    with pytest.raises(ValueError, match=re.escape(words)):
        gpu_ops.border_columns(x, None, tensor, coefficients, window, rounding)


def test_images_too_large_for_the_index_are_named():
    window = Window(1, (70_000, 10_000), (3, 3), (1, 1), (1, 1))
    tensor = TensorState(jnp.float32(0.3), jnp.float32(0.0))
    x = jax.ShapeDtypeStruct((1, *window.spatial, 4), jnp.float32)
    coefficients = operands()[2]

    def call(x):
        return gpu_ops.border_columns(x, None, tensor, coefficients, window, QUADRATIC)

    with pytest.raises(ValueError, match="padded image has 2800000000 elements; at most 21474"):
        jax.eval_shape(call, x)


def with_grid(step, zero=0.0):
    x, _, coefficients = operands()
    tensor = TensorState(step, jnp.float32(zero))
    return gpu_ops.border_columns(x, None, tensor, coefficients, WINDOW, QUADRATIC)


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
    x, tensor, coefficients = operands()
    window, kernel = WINDOW._replace(images=0), jnp.ones((36, 5))
    found = gpu_ops.border_columns(x[:0], None, tensor, coefficients, window, QUADRATIC)
    assert found.shape == (0, 4, 4, 9, 4)

    def loss(kernel):
        y = gpu_ops.border_conv(x[:0], None, tensor, coefficients, kernel, window, QUADRATIC)
        return jnp.sum(y), y

    gradient, y = jax.grad(loss, has_aux=True)(kernel)
    assert y.shape == (0, 4, 4, 5)
    np.testing.assert_array_equal(gradient, np.zeros_like(kernel))


def test_mapped_over_anything_it_gives_each_its_own():
    x, tensor, coefficients = operands()
    kernel = jnp.asarray(normal(rng_of(1), 36, 5))
    xs, steps = jnp.stack([x, 2 * x]), jnp.float32([0.3, 0.2])

    def loss(x, step):
        grid = tensor._replace(step_size=step)
        y = gpu_ops.border_conv(x, None, grid, coefficients, kernel, WINDOW, QUADRATIC)
        return jnp.sum(y**2)

    run = jax.value_and_grad(loss, argnums=(0, 1))
    found = jax.vmap(run)(xs, steps)
    expected = [run(x, step) for x, step in zip(xs, steps, strict=True)]
    for i, one in enumerate(expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("masked", [False, True])
def test_mapped_over_x_it_is_one_call(masked):
    x, tensor, coefficients = operands()
    xs = jnp.stack([x, 2 * x, x - 1])
    keep = jnp.asarray(rng_of(2).random(x.shape) < 0.5) if masked else None

    def run(x):
        return gpu_ops.border_columns(x, keep, tensor, coefficients, WINDOW, QUADRATIC)

    np.testing.assert_array_equal(jax.vmap(run)(xs), jnp.stack([run(x) for x in xs]))
    text = jax.jit(jax.vmap(run)).lower(xs).as_text()
    assert text.count("@gpu_ops_border_columns") == 1
    assert "while" not in text


PARTITIONED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import gpu_ops
from aquant_jax.layers.im2col import Rounding
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.layers.conv_geometry import Window
key = jax.random.key(0)
x, dy = jax.random.normal(key, (N, 6, 6, 8)), jax.random.normal(key, (N, 4, 4, 72))
keep = jax.random.bernoulli(key, 0.5, x.shape)
operands = {"step": jnp.float32(0.3), "kernel": jax.random.normal(key, (72, 8)),
            "c": {"b0": jnp.full((9, 8), -0.4), "b1": jnp.full((9, 8), 0.1)}}
def run(multiplied, masked, place):
    def loss(x, keep, o):
        x = place(1.0 * x)
        tensor = TensorState(o["step"], jnp.float32(1.0))
        how = Window(N, (6, 6), (3, 3), (1, 1), (1, 1)), Rounding(3, "linear", "identity", True)
        own = (x, keep if masked else None, tensor, o["c"])
        if multiplied:
            y = gpu_ops.border_conv(*own, o["kernel"], *how)
            return jnp.sum(y * dy[..., :8] + y**2), y
        y = gpu_ops.border_columns(*own, *how)
        return jnp.sum(y.reshape(dy.shape) * dy + y.reshape(dy.shape)**2), y
    return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("batch",))
images, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
even = N % 2 == 0
given = jax.device_put((x, keep), images if even else everywhere)
whole = jax.device_put(operands, everywhere)
for multiplied in (False, True):
    for masked in (False, True):
        expected = run(multiplied, masked, lambda x: x)(x, keep, operands)
        f = run(multiplied, masked, lambda x: jax.lax.with_sharding_constraint(x, images))
        found = f(*given, whole)
        if even:
            assert found[1].sharding.spec[0] == found[0][0].sharding.spec[0] == "batch"
            text = f.lower(*given, whole).compile().as_text()
            assert "all-gather" not in text and "all-reduce" in text
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
print("partitioned")
"""


@pytest.mark.parametrize("images", [4, 3], ids=["even", "uneven"])
def test_images_on_two_devices_train_where_they_are(images):
    done = run_python(
        f"N = {images}{PARTITIONED}", XLA_FLAGS="--xla_force_host_platform_device_count=2"
    )
    assert done.stdout == "partitioned\n", done.stderr[-3000:]


def test_groups_that_no_pass_serves_are_named():
    x, tensor, coefficients = operands()
    for groups, kernel, words in (
        (2, jnp.ones((36, 2)), "groups is 2, neither 1 nor the 4 channels of x"),
        (4, jnp.ones((36, 2)), "kernel is float32 (36, 2), not float32 (36, 1)"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            gpu_ops.border_conv(
                x, None, tensor, coefficients, kernel, WINDOW, QUADRATIC, groups=groups
            )


def test_depthwise_convolutions_write_no_columns():
    case = CASES["depthwise each tap"]
    run = jax.jit(lambda *a: BACKEND.convolve(*a, case.window(), case.rounding()))
    assert "gpu_ops_border_conv" in run.lower(*case.arguments(1, True)).as_text()
