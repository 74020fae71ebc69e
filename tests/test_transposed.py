"""Transposed and cropped convolutions through the whole library; weighted ops without a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import aquant_jax as aq
import gpu_ops
from aquant_jax.deployment import stablehlo
from aquant_jax.errors import InputError
from tests.gpu_ops.test_backend import QuickCompiler
from tests.support.nets import conv, images, normal, relative_error, rng_of

X = images(0, 32, size=4)
WEIGHTS = {
    "stem": 0.4 * normal(rng_of(1), 1, 1, 3, 8),
    "cropped": 0.3 * normal(rng_of(3), 2, 2, 8, 8),
    "up": 0.3 * normal(rng_of(2), 4, 4, 3, 8),
}
COMPILER = QuickCompiler(gpu_ops.backend())


def decoder(v, x):
    h = jax.nn.relu(conv(x, v["stem"]))
    h = jax.nn.relu(conv(h, v["cropped"], padding=((-1, 1), (2, -1)), lhs_dilation=(1, 2)))
    return lax.conv_transpose(h, v["up"], (2, 2), "SAME", transpose_kernel=True)


@functools.cache
def learned(granularity, steps=20):
    preset = aq.recipes.nearest if granularity == "nearest" else aq.recipes.aquant
    options = {} if granularity == "nearest" else {"border_granularity": granularity}
    recipe = preset(4, 4, steps=steps, batch_size=16, **options)
    return aq.quantize(decoder, WEIGHTS, X, recipe, observer=aq.Observer(), compiler=COMPILER)


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_its_border_is_learned(granularity):
    quantized = learned(granularity)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(quantized))
    taps = {entry.path: entry.border["b0"].shape for entry in quantized.summary()[1:]}
    every = (1, 8) if granularity == "channel" else None
    assert taps == {"cropped": every or (4, 8), "up": every or (16, 8)}
    for report in quantized.reports[1:]:
        assert report.final_error < report.start_error
    nearest, found = (
        np.square(q(X) - decoder(WEIGHTS, X)).mean() for q in (learned("nearest", 0), quantized)
    )
    assert found < 0.97 * nearest


def moved(quantized):
    """With borders that round a zero up, unless it has the code of the zero point."""
    layers = {
        path: layer._replace(
            border={n: jnp.full_like(c, -0.4 if n == "b0" else 0) for n, c in layer.border.items()}
        )
        for path, layer in quantized.layers.items()
    }
    return dataclasses.replace(quantized, layers=layers)


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_inserted_zeros_have_the_same_code_in_every_program(granularity, tmp_path):
    quantized = moved(learned(granularity))
    expected = np.asarray(quantized(X))
    assert np.ptp(expected) > 0.1
    np.testing.assert_array_equal(quantized.with_backend(gpu_ops.backend())(X), expected)
    program = export.deserialize(stablehlo.self_contained(quantized).serialize())
    np.testing.assert_array_equal(program.call(X), expected)
    aq.save(quantized, tmp_path / "saved")
    np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(X), expected)


def test_one_left_float_stops_nothing():
    recipe = aq.recipes.nearest(
        8, 8, batch_size=8, overrides=({"pattern": "up|crop", "keep_float": True},)
    )
    quantized = aq.quantize(decoder, WEIGHTS, X, recipe, observer=aq.Observer())
    assert [entry.weight_bits for entry in quantized.summary()] == [8, None, None]
    assert 0 < relative_error(quantized(X), decoder(WEIGHTS, X)) < 0.02


def grouped_batches(x, kernel):
    """A depthwise convolution as one of batch groups: channels are its images."""
    (y,) = lax.conv_general_dilated(
        x[..., None], kernel[None], (1, 1, 1), "VALID", batch_group_count=x.shape[-1],
        dimension_numbers=("DHWNC", "DHWIO", "NDHWC"),
    )  # fmt: skip
    return y


def weight_first(x, kernel):
    """The weight as the images, the samples as kernels."""
    y = lax.conv_general_dilated(
        kernel[None], x, (1, 1), "VALID", dimension_numbers=("NHWC", "OHWI", "NHWC")
    )
    return y[0].transpose(2, 0, 1)


ODD = {
    "batch groups": (grouped_batches, (2, 2, 1, 8), "batch_group_count is 8, supported is 1"),
    "weight first": (weight_first, (6, 5, 8), "the weight is the left operand of a convolution"),
}


@pytest.mark.parametrize(("function", "shape", "reason"), ODD.values(), ids=ODD.keys())
def test_an_op_without_a_layer_stays_float_and_is_named(function, shape, reason):
    weights = {**WEIGHTS, "odd": normal(rng_of(4), *shape), "head": normal(rng_of(5), 4, 3)}

    def network(v, x):
        h = jax.nn.relu(conv(x, v["stem"]))
        h = function(h, v["odd"])
        return h.reshape(h.shape[0], -1)[:, :4] @ v["head"]

    recipe = aq.recipes.nearest(
        8, 8, batch_size=8, overrides=({"pattern": "odd", "keep_float": True},)
    )
    net = aq.prepare(network, weights, X, recipe)
    assert net.graph.unquantized == (("odd", "conv_general_dilated", reason),)
    quantized = aq.quantize(network, weights, X, recipe, observer=aq.Observer())
    assert [entry.path for entry in quantized.summary()] == ["stem", "head"]
    expected = network(weights, X)
    assert 0 < relative_error(quantized(X), expected) < 0.02
    np.testing.assert_array_equal(quantized.with_backend(gpu_ops.backend())(X), quantized(X))
    bits = recipe.replace(overrides=({"pattern": "odd", "weight_bits": 3},))
    with pytest.raises(InputError, match=rf"'odd' cannot quantize odd \(conv.*{reason}"):
        aq.prepare(network, weights, X, bits)
