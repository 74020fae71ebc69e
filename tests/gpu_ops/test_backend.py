"""The compiled backend against the reference implementation, in training and deployed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from aquant_jax.arithmetic import border as borders
from aquant_jax.layers.backend import Backend
from gpu_ops import targets
from tests.layers.test_im2col import (
    CASES,
    Case,
    assert_close,
    by_autodiff,
    cotangent,
    drop_zero,
    pulled,
)
from tests.support.nets import images, mlp, normal, rng_of, small_net, two_convolutions

BACKEND = gpu_ops.backend()
BUILT_IN = {name: case for name, case in CASES.items() if case.phi != "sigmoid"}


@pytest.fixture(params=BUILT_IN.values(), ids=BUILT_IN.keys())
def case(request):
    return request.param


def test_it_is_a_backend():
    assert isinstance(BACKEND, Backend)
    assert hash(BACKEND) == hash(gpu_ops.backend())
    assert BACKEND.name == "gpu_ops"


@pytest.mark.parametrize("weights", [2**17, 0], ids=["one pass", "columns"])
def test_value_and_gradients_are_those_of_the_reference(case, weights):
    masked = case not in (CASES["2x3"], CASES["depthwise"])  # whether values are dropped
    backend = gpu_ops.CustomCallBackend(one_pass_weights=weights)
    value, found = pulled(backend.convolve, case, case.arguments(1, masked), cotangent(case, 2))
    expected_value, expected = by_autodiff(case, masked)
    assert_close(value, expected_value, 1e-6)
    found, expected = (jax.tree.leaves(drop_zero(g)) for g in (found, expected))
    for gradient, autodiff in zip(found, expected, strict=True):
        assert_close(gradient, autodiff, 1e-5)
        assert np.abs(gradient).max() > 0


# More channels than a task takes at a time.
WIDE = {
    "quadratic": Case((3, 3), (2, 1), (1, 1), 460, 460, 460, (7, 6), "quadratic", "clamp", True, 1),
    "linear": Case((3, 3), (1, 1), (1, 2), 460, 460, 460, (5, 7), "linear", "clamp", False, 2),
    "constant": Case((3, 3), (1, 1), (1, 1), 460, 460, 460, (5, 5), "constant", "clamp", True, 0),
}  # fmt: skip


@pytest.mark.parametrize("wide", WIDE.values(), ids=WIDE)
def test_depthwise_convolutions_of_many_channels(wide):
    test_value_and_gradients_are_those_of_the_reference(wide, 2**17)


def lowered(backend, case):
    """The program of a convolution, as text."""
    run = jax.jit(lambda *a: backend.convolve(*a, case.geometry(), case.rounding()))
    return run.lower(*case.arguments(1, True)).as_text()


def test_a_custom_call_is_what_runs(case):
    assert "gpu_ops_border_" in lowered(BACKEND, case)
    assert "gpu_ops_border_columns" in lowered(BACKEND._replace(one_pass_weights=0), case)


def test_depthwise_convolutions_write_no_columns():
    assert "gpu_ops_border_conv" in lowered(BACKEND, CASES["depthwise each tap"])


def test_a_registered_border_is_served_by_the_reference(monkeypatch):
    monkeypatch.setattr(borders, "BORDERS", dict(borders.BORDERS))
    linear = borders.get("linear")
    borders.register("mine", linear.init, linear.apply)
    case = BUILT_IN["grouped, dilated"]
    arguments, dy = case.arguments(1, True), cotangent(case, 2)
    expected = pulled(BACKEND.convolve, case, arguments, dy)
    mine = case._replace(border="mine")
    found = pulled(BACKEND.convolve, mine, arguments, dy)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, 1e-5)
    assert "gpu_ops" not in lowered(BACKEND, mine)


def test_on_a_device_without_handlers_the_reference_runs(monkeypatch):
    monkeypatch.setattr(targets, "PLATFORMS", ())
    assert "gpu_ops" not in lowered(BACKEND, CASES["2x3"])


class QuickCompiler(aq.Compiler):
    """Compiles in half the time; the programs are slower."""

    def get(self, key, build, **options):
        fast = {"xla_backend_optimization_level": 0}
        return super().get(key, build, compiler_options=fast, **options)


def test_quantizing_with_it_learns_the_same_as_without():
    recipe = aq.recipes.aquant(weight_bits=2, act_bits=2, steps=10, batch_size=8)
    calibration = images(0, 16, size=6)
    net, variables = two_convolutions()
    plain, compiled = (
        aq.quantize(
            net, variables, calibration, recipe, observer=aq.Observer(), compiler=compiler
        )
        for compiler in (QuickCompiler(), QuickCompiler(BACKEND))
    )  # fmt: skip
    assert [r.name for r in plain.reports] == [r.name for r in compiled.reports]
    for one, other in zip(plain.reports, compiled.reports, strict=True):
        np.testing.assert_allclose(other.loss_curve, one.loss_curve, rtol=1e-5)
    for one, other in zip(plain.summary(), compiled.summary(), strict=True):
        assert (one.border is None) == (other.border is None)
        for name in one.border or {}:
            np.testing.assert_allclose(other.border[name], one.border[name], atol=1e-4)


COMPILER = QuickCompiler()


def with_random_borders(quantized):
    """As if its borders were learned: every coefficient moved, each by another amount."""
    rng = rng_of(5)
    layers = {
        path: state._replace(
            border={n: c + 0.2 * normal(rng, *c.shape) for n, c in state.border.items()}
        )
        for path, state in quantized.layers.items()
    }
    return dataclasses.replace(quantized, layers=layers)


def quantize(apply, variables, x, recipe):
    return aq.quantize(apply, variables, x, recipe, observer=aq.Observer(), compiler=COMPILER)


@functools.cache
def quantized_net(net, bits, preset, granularity="element"):
    """A small network, without learning, and inputs."""
    apply, variables = net()
    x = images(0, 32) if net is small_net else normal(rng_of(0), 32, 6)
    recipe = aq.recipes.preset(
        preset, weight_bits=bits, act_bits=bits, batch_size=8, steps=0,
        border_granularity=granularity,
    )  # fmt: skip
    quantized = quantize(apply, variables, x, recipe)
    return quantized if preset == "nearest" else with_random_borders(quantized), x


class TestDeployedNetworks:
    """``quantized.with_backend``: the same predictions, and outputs up to float rounding."""

    @pytest.mark.parametrize(
        ("net", "bits", "preset", "granularity"),
        [
            (small_net, 2, "nearest", "element"), (mlp, 8, "nearest", "element"),
            (small_net, 2, "aquant", "element"), (mlp, 8, "aquant", "element"),
            (small_net, 8, "aquant", "channel"), (mlp, 2, "aquant", "channel"),
        ],
    )  # fmt: skip
    def test_give_the_same_outputs(self, net, bits, preset, granularity):
        quantized, x = quantized_net(net, bits, preset, granularity)
        deployed = quantized.with_backend(BACKEND)
        np.testing.assert_array_equal(jax.jit(deployed)(x), quantized(x))
        text = jax.jit(deployed).lower(x).as_text()
        assert text.count("@gpu_ops_conv_int8") > 0
        assert "gpu_ops" not in jax.jit(deployed.with_backend(None)).lower(x).as_text()

    def test_of_random_borders_are_not_those_of_nearest(self):
        (nearest, x), (rounded, _) = (quantized_net(small_net, 2, p) for p in ("nearest", "aquant"))
        assert np.abs(rounded(x) - nearest(x)).max() > 0.1

    def test_give_the_same_bits_where_the_reference_sums_exactly(self):
        apply, variables = mlp(sizes=(6, 128, 128, 8))
        x = normal(rng_of(0), 32, 6)
        recipe = aq.recipes.nearest(4, 4, batch_size=8)
        quantized = quantize(apply, variables, x, recipe)
        deployed = jax.jit(quantized.with_backend(BACKEND))
        np.testing.assert_array_equal(deployed(x), jax.jit(quantized)(x))

    @pytest.mark.parametrize("preset", ["nearest", "aquant"])
    def test_of_three_spatial_axes_run_by_the_reference(self, preset):
        def apply(v, x):
            h = jax.nn.relu(jax.lax.conv(x, v["a"], (1, 1, 1), "SAME"))
            return jax.lax.conv(h, v["b"], (1, 1, 1), "SAME")

        rng = rng_of(0)
        x = normal(rng, 4, 2, 3, 3, 3)
        variables = {"a": normal(rng, 3, 2, 2, 2, 2), "b": normal(rng, 2, 3, 2, 2, 2)}
        recipe = aq.recipes.preset(preset, batch_size=4, steps=0)
        quantized = quantize(apply, variables, x, recipe)
        if preset == "aquant":
            quantized = with_random_borders(quantized)
        deployed = quantized.with_backend(BACKEND)
        np.testing.assert_allclose(deployed(x), quantized(x), rtol=1e-4, atol=1e-4)
        assert "gpu_ops" not in jax.jit(deployed).lower(x).as_text()

    @pytest.mark.parametrize(("net", "bits"), [(small_net, 2), (mlp, 8)], ids=["residual", "mlp"])
    def test_of_an_empty_batch(self, net, bits):
        quantized, x = quantized_net(net, bits, "nearest")
        y = quantized.with_backend(BACKEND)(x[:0])
        assert y.shape == quantized(x)[:0].shape


@pytest.mark.parametrize("backend", [None, BACKEND], ids=["reference", "gpu_ops"])
def test_sums_are_scaled_before_the_bias_is_added(backend):
    """Rounded in between, whatever is compiled together: both ways give numpy's outputs."""
    rng = rng_of(0)
    weights = {"w": normal(rng, 64, 128), "b": normal(rng, 1, 128)}
    x = normal(rng, 200, 64)
    recipe = aq.recipes.nearest(4, 4, batch_size=8, quantize_input=True)
    quantized = quantize(lambda v, x: x @ v["w"] + v["b"], weights, x, recipe)
    (layer,), (quantizer,) = quantized.layers.values(), quantized.activations.values()
    step, zero = (np.asarray(a) for a in quantizer)
    codes = np.clip(np.ceil(x * (np.float32(1) / step) - np.float32(0.5)) + zero, 0, 255)
    total = (codes - zero) @ (np.float32(layer.codes) - np.asarray(layer.zero_point))
    expected = total * (step * np.asarray(layer.scale)) + np.asarray(layer.bias)
    np.testing.assert_array_equal(quantized.with_backend(backend)(x), expected)
