"""Small networks that several test files quantize, with weights that are not all alike."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aquant_jax.graph.subgraph import bind_inputs
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.plan.block_program import forward, make_block_program


def rng_of(seed):
    return np.random.default_rng(seed)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def conv(x, kernel, strides=(1, 1), padding="SAME", groups=1, dilation=(1, 1), lhs_dilation=(1, 1)):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation, dilation, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def conv_bn_params(rng, height, width, inputs, outputs):
    fan_in = height * width * inputs
    return {
        "kernel": normal(rng, height, width, inputs, outputs) * np.float32(fan_in**-0.5),
        "mean": 0.3 * normal(rng, outputs),
        "var": np.exp(normal(rng, outputs)),
        "scale": np.float32(1.0) + np.float32(0.2) * normal(rng, outputs),
        "bias": np.float32(0.2) * normal(rng, outputs),
    }


def conv_bn(x, params, **options):
    y = conv(x, params["kernel"], **options)
    wide = {name: jnp.reshape(value, (1, 1, 1, -1)) for name, value in params.items()}
    normed = (y - wide["mean"]) * lax.rsqrt(wide["var"] + 1e-5)
    return normed * wide["scale"] + wide["bias"]


def residual_net(seed=0, width=4, blocks=1, size=3):
    """Stem, residual blocks and head in plain JAX; no implicit promotion anywhere."""
    rng = rng_of(seed)
    variables = {"stem": conv_bn_params(rng, size, size, 3, width)}
    for i in range(1, blocks + 1):
        variables[f"block_{i}"] = {
            name: conv_bn_params(rng, size, size, width, width) for name in ("conv1", "conv2")
        }
    variables["head"] = {"kernel": normal(rng, width, 5), "bias": normal(rng, 5)}

    def apply(variables, x):
        h = jax.nn.relu(conv_bn(x, variables["stem"]))
        for i in range(1, blocks + 1):
            block = variables[f"block_{i}"]
            y = jax.nn.relu(conv_bn(h, block["conv1"]))
            h = jax.nn.relu(conv_bn(y, block["conv2"]) + h)
        pooled = jnp.mean(h, axis=(1, 2))
        return pooled @ variables["head"]["kernel"] + variables["head"]["bias"][None]

    return apply, variables


def small_net(**options):
    """With 2x2 kernels, whose learned borders compile in half the time."""
    return residual_net(**{"size": 2, **options})


def two_convolutions(seed=0):
    """The least whose second layer has a learned border."""
    rng = rng_of(seed)
    variables = [conv_bn_params(rng, 2, 2, 3, 3) for _ in range(2)]
    return lambda params, x: functools.reduce(conv_bn, params, x), variables


def images(seed, samples=32, size=6, channels=3):
    return normal(rng_of(seed), samples, size, size, channels)


def mlp(seed=0, sizes=(6, 8, 8, 4)):
    """A plain-JAX perceptron; its weights are leaves of a list."""
    rng = rng_of(seed)
    variables = [
        {"w": normal(rng, a, b) * np.float32(a**-0.5), "b": normal(rng, b)}
        for a, b in itertools.pairwise(sizes)
    ]

    def apply(variables, x):
        for layer in variables[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
        return x @ variables[-1]["w"] + variables[-1]["b"][None]

    return apply, variables


def run_folded(net, x):
    """The prepared network's folded graph in float, on a batch of ``net.batch`` samples."""
    program = make_block_program(net.graph, net.plan, (), net.graph.outputs)
    weights = [Weights(*map(jnp.asarray, net.folded[s.path]), {}) for s in program.specs]
    by_id = dict(zip(net.graph.inputs, jax.tree.leaves(x), strict=True))
    inputs = bind_inputs(net.graph, program.subgraph, net.variables, by_id)
    outputs = forward(program, weights, None, inputs)
    return jax.tree.unflatten(net.graph.tree, outputs)


def relative_error(value, reference):
    """Largest difference over largest reference value."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.abs(value - reference).max() / np.abs(reference).max()


def assert_same_network(one, two):
    """Two quantized networks have the same arrays, bit for bit."""
    for name in ("layers", "activations", "constants"):
        a, b = getattr(one, name), getattr(two, name)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
