"""One border an input channel: an activation has one code, and padding that of the zero point."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.backend import ReferenceBackend
from aquant_jax.layers.fake_quant import LayerInput, LayerState, Weights, run_layer
from aquant_jax.layers.integer import convolve_layer, run_deployed_layer
from tests.layers.test_fake_quant import (
    CONVOLUTIONS,
    GRID,
    coefficients_of,
    convolution,
    op_of,
    spec_of,
)
from tests.support.nets import conv, normal, rng_of


def no_columns(*_):
    raise AssertionError("the layer ran over columns")


def trained(op, spec, inputs, state):
    weight = np.float32(state.codes) - np.float32(state.zero_point)
    weights = Weights(weight * state.scale, state.bias, state.border)
    return run_layer(op, spec, inputs, weights, no_columns)


def with_codes(backend):
    def run(op, spec, inputs, state):
        x, quantizer, _ = inputs
        operands = (op, spec, jnp.asarray(x), quantizer, state)
        return convolve_layer(*operands, convolve=backend.convolve_codes).values

    return run


RUNS = {
    "trained": trained,
    "deployed": functools.partial(run_deployed_layer, convolve=no_columns),
    "codes": with_codes(ReferenceBackend()),
    "gpu_ops": with_codes(gpu_ops.backend()),
}


@pytest.mark.parametrize("border", [1.5, -1.25, 0.5])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_padding_has_the_code_of_the_zero_point(run, border):
    """Zeros inside have the code of their border, which is another one outside [0, 1)."""
    x, channels = np.zeros((1, 5, 4, 2), np.float32), 2
    codes = np.full((3, 3, channels, 1), 5, np.uint8)
    op = op_of(lambda v, x: conv(x, v["w"]), np.float32(codes), x)
    spec = spec_of(op, "constant", "identity", "channel")
    one = np.ones(1, np.float32)
    state = LayerState(codes, one, 4 * one, 0 * one, {"b0": np.full((1, channels), border, "f")})
    grid = ActivationQuantizer(jnp.float32(0.5), jnp.float32(3.0))
    y = jax.jit(lambda x: run(op, spec, LayerInput(x, grid), state))(x)
    inside = np.multiply.outer([2, 3, 3, 3, 2], [2, 3, 3, 2])
    np.testing.assert_array_equal(y[0, ..., 0], channels * 0.5 * np.ceil(-border) * inside)


def deployed(options, phi):
    op, x, kernel = convolution(options)
    spec, rng = spec_of(op, phi=phi, granularity="channel"), rng_of(3)
    state = LayerState(
        codes=rng.integers(0, 16, kernel.shape).astype(np.uint8),
        scale=rng.uniform(0.01, 0.1, 4).astype(np.float32),
        zero_point=rng.integers(0, 16, 4).astype(np.float32),
        bias=normal(rng, 4),
        border=coefficients_of(op, spec, x.shape, size=0.3),
    )
    return op, spec, LayerInput(x, GRID), state


@pytest.mark.parametrize(
    ("options", "phi"),
    [*zip(CONVOLUTIONS.values(), itertools.cycle(["clamp", "identity"]))],
    ids=CONVOLUTIONS.keys(),
)
def test_a_convolution_of_codes_gives_the_bits_of_the_reference(options, phi):
    """So its codes are those of the borders: each sum of the reference is of whole numbers."""
    op, spec, inputs, state = deployed(options, phi)
    scales = state.scale * np.asarray(GRID.step_size)
    expected, *others = (
        np.asarray(jax.jit(lambda x, r=r: r(op, spec, inputs._replace(x=x), state))(inputs.x))
        for r in (RUNS["deployed"], RUNS["codes"], RUNS["gpu_ops"])
    )
    for found in others:
        sums = [np.rint((y - state.bias) / scales) for y in (found, expected)]
        np.testing.assert_array_equal(*sums)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    nearest = RUNS["deployed"](op, spec._replace(border=None), inputs, state)
    assert np.abs(nearest - expected).max() > 0.1


def test_gpu_ops_serves_a_border_that_a_user_registered(monkeypatch):
    """Its custom calls know the built-in borders alone, but here they get quantized values."""
    monkeypatch.setattr(borders, "BORDERS", dict(borders.BORDERS))
    borders.register("mine", *borders.get("quadratic"))
    op, spec, inputs, state = deployed(CONVOLUTIONS["same"], "identity")
    mine = spec._replace(border="mine")
    run = jax.jit(lambda x: RUNS["gpu_ops"](op, mine, inputs._replace(x=x), state))
    assert "gpu_ops_conv_int8" in run.lower(inputs.x).as_text()
    expected = RUNS["gpu_ops"](op, spec, inputs, state)
    np.testing.assert_array_equal(run(inputs.x), expected)
