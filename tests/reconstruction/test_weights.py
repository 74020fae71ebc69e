import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.arithmetic.range_search import search_weight_range
from aquant_jax.layers.fake_quant import per_channel
from aquant_jax.plan.block_program import make_block_program
from aquant_jax.reconstruction.weights import (
    alpha_of,
    deploy,
    deployed_weights,
    float_weights,
    init_borders,
    make_weight_quantizers,
    nearest_layers,
)
from tests.support import numpy_reference as reference
from tests.support.nets import images, mlp, normal, residual_net, rng_of


@pytest.fixture(scope="module")
def problem():
    apply, variables = residual_net()
    overrides = ({"pattern": "conv2", "keep_float": True},)
    recipe = aq.recipes.aquant(3, 3, batch_size=8, overrides=overrides)
    net = aq.prepare(apply, variables, images(0, 8), recipe)
    program = make_block_program(net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets)
    return net, program, make_weight_quantizers(program, net.folded, {})


def test_a_float_layer_has_no_grid(problem):
    net, program, (quantized, floating) = problem
    assert quantized.scale.shape == quantized.zero_point.shape == (4,)
    assert floating.scale is None
    assert alpha_of(program.subgraph.weighted[1], floating) is None
    np.testing.assert_array_equal(floating.weight, net.folded["block_1/conv2/kernel"].weight)


def test_scales_are_searched_once_for_presets_that_share_a_compiler(monkeypatch):
    searched = []

    def counted(rows, bits, place, full_bits):
        searched.append(bits)
        return search_weight_range(rows, bits, place, full_bits)

    monkeypatch.setattr("aquant_jax.reconstruction.weights.search_weight_range", counted)
    (apply, variables), x, compiler = mlp(), normal(rng_of(1), 8, 6), aq.Compiler()

    def scales(variables, bits=3, compiler=compiler):
        recipe = aq.recipes.nearest(bits, 3, batch_size=8)
        network = aq.quantize(apply, variables, x, recipe, compiler=compiler)
        return [np.asarray(layer.scale) for layer in network.layers.values()]

    first = scales(variables)
    assert len(searched) == 3
    np.testing.assert_equal(scales(variables), first)
    assert len(searched) == 3
    # Other weights, and other bits of the layer in the middle, are searched for.
    doubled = scales(jax.tree.map(lambda leaf: 2 * leaf, variables))
    np.testing.assert_allclose(np.concatenate(doubled), 2 * np.concatenate(first), rtol=1e-6)
    scales(variables, bits=2)
    assert searched[3:] == [8, 3, 8, 2]
    np.testing.assert_equal(scales(variables, compiler=aq.Compiler()), first)


def test_nearest_layers_hold_nearest_codes(problem):
    _, program, quantizers = problem
    first, second = nearest_layers(program, quantizers)
    weight, scale, zero = map(
        np.asarray, (quantizers[0].weight, quantizers[0].scale, quantizers[0].zero_point)
    )
    assert first.codes.dtype == jnp.uint8
    exact = reference.nearest_weight(weight, scale, zero, 3)
    np.testing.assert_allclose(
        deployed_weights(program, (first, second))[0].weight, exact, rtol=1e-6
    )
    assert np.abs(exact - weight).max() <= 1.01 * np.abs(weight).max()
    # The float layer is deployed as it is.
    np.testing.assert_array_equal(second.codes, quantizers[1].weight)
    np.testing.assert_array_equal(
        deployed_weights(program, (first, second))[1].weight, second.codes
    )


def test_learned_layers_hold_hard_codes(problem):
    _, program, quantizers = problem
    op = program.subgraph.weighted[0]
    alpha = -np.asarray(alpha_of(op, quantizers[0]))  # everything to the farther neighbour
    layers = deploy(program, quantizers, [alpha, None], init_borders(program))
    up = np.asarray(layers[0].codes, int) - np.asarray(
        nearest_layers(program, quantizers)[0].codes, int
    )
    assert set(np.unique(up)) == {-1, 0, 1}
    scale, zero = per_channel(op, quantizers[0].scale), per_channel(op, quantizers[0].zero_point)
    expected = reference.hard_weight(
        *map(np.asarray, (quantizers[0].weight, scale, zero)), 3, alpha
    )
    np.testing.assert_allclose(deployed_weights(program, layers)[0].weight, expected, rtol=1e-6)


def test_float_weights_are_the_folded_ones(problem):
    net, program, _ = problem
    for spec, weights in zip(program.specs, float_weights(program, net.folded), strict=True):
        np.testing.assert_array_equal(weights.weight, net.folded[spec.path].weight)
        np.testing.assert_array_equal(weights.bias, net.folded[spec.path].bias)
        assert weights.border == {}


def test_borders_start_at_one_half(problem):
    _, program, _ = problem
    first, second = init_borders(program)
    assert first["b0"].shape == (9, 4)
    assert second == {}  # a float layer quantizes nothing
