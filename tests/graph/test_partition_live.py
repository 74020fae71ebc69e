"""Blocks of networks in which values stay live over many layers: decoders, UNets."""

import functools

import jax
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from tests.support.nets import normal, relative_error, rng_of

X = normal(rng_of(0), 16, 8)
WIDTH = 8


def weights(*names):
    scale = np.float32(WIDTH**-0.5)
    return {name: scale * normal(rng_of(i), WIDTH, WIDTH) for i, name in enumerate(names, 1)}


def decoder(layers):
    """Every layer adds a function of its input and one of the encoder's output."""
    names = [f"{name}_{i}" for i in range(layers) for name in ("own", "cross", "out")]
    variables = weights("encoder", "embed", *names)

    def apply(v, x):
        encoded = jax.nn.relu(x @ v["encoder"])
        h = jax.nn.relu(x[:, ::-1] @ v["embed"])
        for i in range(layers):
            mixed = jax.nn.relu(h @ v[f"own_{i}"] + encoded @ v[f"cross_{i}"])
            h = h + mixed @ v[f"out_{i}"]
        return h

    return apply, variables


def unet(depth):
    """Down and up again, with a skip connection between every two layers of the same level."""
    names = [f"{name}_{i}" for i in range(depth) for name in ("down", "up")]
    variables = weights("stem", *names)

    def apply(v, x):
        h, skips = jax.nn.relu(x @ v["stem"]), []
        for i in range(depth):
            skips.append(h)
            h = jax.nn.relu(h @ v[f"down_{i}"])
        for i in reversed(range(depth)):
            h = jax.nn.relu(h @ v[f"up_{i}"]) + skips[i]
        return h

    return apply, variables


def blocks(apply, variables):
    net = aq.prepare(apply, variables, X, aq.recipes.nearest(8, 8, batch_size=8))
    return net, [block.layers for block in net.blocks]


def test_every_layer_of_a_decoder_is_a_block():
    net, found = blocks(*decoder(4))
    # A layer's `own` and `cross` products have no order of their own.
    assert [sorted(block) for block in found[2:4]] == [
        ["cross_0", "out_0", "own_0"],
        ["cross_1", "out_1", "own_1"],
    ]
    assert found[0] == ("encoder",)
    assert all(len(block) == 3 for block in found[2:4])
    (encoded,) = net.blocks[0].end
    assert all(encoded in block.start for block in net.blocks[1:4])
    assert "(takes 2 activations, 0.0 MiB)" in aq.describe(net).splitlines()[4]


def test_the_levels_of_a_unet_are_blocks():
    _, found = blocks(*unet(8))
    levels = [("stem",), *((f"down_{i}",) for i in range(4))]
    assert found[:5] == levels
    assert found[-1] == ("up_0",)
    # The innermost skips span as few layers as those of a residual branch: they stay whole.
    assert {"down_7", "up_7"} <= set(found[5])
    assert max(map(len, found)) <= 8


def test_a_skip_of_few_layers_is_not_cut():
    _, found = blocks(*unet(3))
    assert found == [("stem",), ("down_0", "down_1", "down_2", "up_2", "up_1", "up_0")]


def test_such_blocks_are_learned_resumed_and_run_in_integers(tmp_path):
    apply, variables = decoder(4)
    recipe = aq.recipes.qdrop(4, 4, steps=20, batch_size=8)
    compiler = aq.Compiler()
    learned = aq.quantize(apply, variables, X, recipe, compiler=compiler)
    assert relative_error(learned(X), apply(variables, X)) < 0.3
    assert not all(report.fell_back_to_nearest for report in learned.reports)
    in_integers = learned.with_backend(gpu_ops.backend())(X)
    np.testing.assert_allclose(in_integers, learned(X), rtol=1e-5, atol=1e-5)

    class Stop(aq.Observer):
        def on_block_end(self, report):
            if report.index == 2:
                raise KeyboardInterrupt

    again = functools.partial(
        aq.quantize, apply, variables, X, recipe, compiler=compiler, resume=tmp_path / "blocks"
    )
    with pytest.raises(KeyboardInterrupt):
        again(observer=Stop())
    resumed = again()
    for path, layer in learned.layers.items():
        np.testing.assert_array_equal(layer.codes, resumed.layers[path].codes)
    np.testing.assert_array_equal(resumed(X), learned(X))
