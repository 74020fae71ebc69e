"""What a quantized layer's epilogue absorbs, and that the network still gives the same bits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
import gpu_ops
from aquant_jax.deployment.fusion import NEAREST, plan_fusions
from aquant_jax.graph.fold import fold
from aquant_jax.graph.trace import trace
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.block_program import make_block_program
from tests.gpu_ops.test_backend import QuickCompiler, with_random_borders
from tests.support.nets import conv, normal, rng_of

COMPILER = QuickCompiler()
WEIGHTS = {
    name: 0.3 * normal(rng_of(ord(name)), 3, 3, 4, 4) for name in "abcde"
} | {"d1": normal(rng_of(9), 4, 6), "d2": normal(rng_of(8), 6, 5)}  # fmt: skip
X = normal(rng_of(0), 6, 5, 4, 4)


def relu_chain(v, x):
    h = jax.nn.relu(conv(x, v["a"]))
    h = jax.nn.relu6(conv(h, v["b"]))
    return conv(jnp.clip(conv(h, v["c"]), -0.5, 0.75), v["d"])


def residual(v, x):
    h = jax.nn.relu(conv(x, v["a"]))
    y = jax.nn.relu(conv(h, v["b"]))
    h = jax.nn.relu(h + conv(y, v["c"]))
    return jnp.mean(conv(h, v["d"]) + h, (1, 2)) @ v["d1"]


def projected(v, x):
    """Two convolutions meet in one addition."""
    h = jax.nn.relu(conv(x, v["a"]))
    return conv(jax.nn.relu(conv(h, v["b"]) + conv(h, v["c"])), v["d"])


def twice(v, x):
    """The value before the clip is read again."""
    h = conv(jax.nn.relu(conv(x, v["a"])), v["b"])
    return conv(jax.nn.relu(h) + h, v["c"])


def doubled(v, x):
    h = conv(jax.nn.relu(conv(x, v["a"])), v["b"])
    return conv(h + h, v["c"])


def broadcast(v, x):
    h = conv(jax.nn.relu(conv(x, v["a"])), v["b"])
    return conv(h + jnp.mean(h, 0, keepdims=True), v["c"])


def pooled(v, x):
    h = jax.nn.relu(conv(conv(x, v["a"]), v["b"]))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.concatenate([conv(h, v["c"]), h], -1)


def channels_first(v, x):
    numbers = ("NCHW", "HWIO", "NCHW")
    run = functools.partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=numbers
    )
    h = jax.nn.relu(run(jnp.transpose(x, (0, 3, 1, 2)), v["a"]))
    return run(jax.nn.relu(run(h, v["b"]) + h), v["c"])


def an_output(v, x):
    h = conv(jax.nn.relu(conv(x, v["a"])), v["b"])
    return jax.nn.relu(h), h


def halved(v, x):
    h = jax.nn.relu(conv(x, v["a"]).astype(jnp.bfloat16))
    return conv(jax.nn.relu(conv(h.astype(jnp.float32), v["b"])), v["c"])


def dense(v, x):
    """Rows have no windows, but the axes before their last one may have."""
    h = jax.nn.relu(x @ v["d1"])
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jax.nn.relu(h @ v["d2"])


def pointwise(v, x):
    h = jax.nn.relu(conv(x, v["a"]))
    return conv(jax.nn.relu(conv(h, v["b"][:1, :1])), v["c"][:1, :1], padding=((1, 1), (0, 0)))


def transposed(v, x):
    """Codes pass into transposed and cropped convolutions, and out of them; not of relu alone."""
    h = conv(x, v["a"])
    h = jax.nn.relu(conv(h, v["b"], padding=((2, -1), (1, 1)), lhs_dilation=(2, 3)))
    skip = conv(h, v["c"], padding=((-1, 0), (0, 0)), strides=(2, 1))
    return conv(jax.nn.relu(skip), v["d"], padding=((1, 1), (1, 0)), lhs_dilation=(1, 2))


NETS = [
    relu_chain, residual, projected, twice, doubled, broadcast, pooled, channels_first, an_output,
    halved, dense, pointwise, transposed,
]  # fmt: skip
KINDS = {
    "nearest": ("nearest", {}),
    "element": ("aquant", {}),
    "channel": ("aquant", {"border_granularity": "channel"}),
}


def recipe_of(kind, bits):
    preset, fields = KINDS[kind]
    fields = fields if preset == "nearest" else {**fields, "steps": 0}
    common = {"weight_bits": bits, "act_bits": bits, "batch_size": 4, "quantize_input": True}
    return aq.recipes.preset(preset, **common, **fields)


def quantized_net(apply, kind, bits):
    options = {"observer": aq.Observer(), "compiler": COMPILER}
    network = aq.quantize(apply, WEIGHTS, X, recipe_of(kind, bits), **options)
    return network if kind == "nearest" else with_random_borders(network)


# Borders an element read values, so that no code passes: the networks differ in what is added.
# Rounding to nearest passes the codes that borders a channel pass, which every network has.
# tests/test_transposed.py has transposed convolutions with borders an element, in integers.
FEW = {
    "element": (residual,),
    "nearest": (residual, pooled, halved),
    "channel": NETS,
}
CASES = [
    pytest.param(
        apply, kind, id=f"{apply.__name__}-{kind}",
        marks=[pytest.mark.slow] * (apply not in FEW[kind]),
    )
    for apply in NETS for kind in KINDS
]  # fmt: skip


@pytest.mark.parametrize(("apply", "kind"), CASES)
def test_codes_between_layers_give_the_bits_of_the_reference(apply, kind):
    network = quantized_net(apply, kind, 8 if apply is relu_chain else 3)
    found = jax.jit(network.with_backend(gpu_ops.backend()))(X)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(network(X)), strict=True):
        assert np.ptp(other) > 0
        np.testing.assert_array_equal(one, other)


def plan_of(apply, kind="channel"):
    graph = fold(trace(apply, WEIGHTS, X))
    program = make_block_program(graph, make_plan(graph, recipe_of(kind, 3)), (), graph.outputs)
    plan = plan_fusions(program)
    return {f.op.layer.path: (f, plan.wanted[f.result]) for f in plan.fusions.values()}


def test_clips_are_absorbed_and_codes_handed_on():
    plan = plan_of(relu_chain)
    bounds = {path: (fusion.low, fusion.high) for path, (fusion, _) in plan.items()}
    infinity = math.inf
    assert bounds == {
        "a": (0, infinity), "b": (0, 6), "c": (-0.5, 0.75), "d": (-infinity, infinity)
    }  # fmt: skip
    assert {path: wanted for path, (_, wanted) in plan.items()} == {
        "a": (False, ("b",)), "b": (False, ("c",)), "c": (False, ("d",)), "d": (True, ())
    }  # fmt: skip


def test_codes_pass_into_a_transposed_convolution():
    plan = plan_of(transposed)
    wanted = [(wanted.values, wanted.readers) for _, wanted in plan.values()]
    assert wanted == [(False, ("b",)), (False, ("c",)), (False, ("d",)), (True, ())]


def test_element_borders_read_values():
    assert plan_of(relu_chain, "element")["a"][1] == (True, ())


def test_a_residual_is_added_from_codes():
    plan = plan_of(residual)
    assert plan["a"][1] == (False, ("b", NEAREST))
    assert plan["c"][0].residual == plan["a"][0].result
    assert plan["d"][0].residual == plan["c"][0].result
    assert [plan[path][0].low for path in "cd"] == [0, -math.inf]


def test_one_of_two_convolutions_absorbs_their_sum():
    plan = plan_of(projected)
    assert [plan[path][0].residual is not None for path in "bc"].count(True) == 1


def test_a_maximum_over_windows_is_absorbed():
    fusion, wanted = plan_of(pooled)["b"]
    assert (fusion.low, fusion.high) == (0, math.inf)
    assert fusion.pool == ConvGeometry((5, 4), (2, 2), (2, 2), (1, 1), ((0, 0), (0, 0)))
    assert wanted == (False, ("c", NEAREST))


NO_POOLS = {
    "of channels": {"window_dimensions": (1, 1, 1, 2)},
    "of samples": {"window_dimensions": (2, 2, 2, 1)},
    "some samples": {"window_strides": (2, 1, 1, 1)},
    "padded channels": {"padding": ((0, 0), (0, 0), (0, 0), (1, 0))},
    "inserted pixels": {"base_dilation": (1, 2, 1, 1)},
}


@pytest.mark.parametrize("changed", NO_POOLS.values(), ids=NO_POOLS.keys())
def test_no_other_maximum_is_absorbed(changed):
    options = {
        "window_dimensions": (1, 2, 2, 1),
        "window_strides": (1, 1, 1, 1),
        "padding": "VALID",
    }

    def network(v, x):
        h = conv(conv(x, v["a"]), v["b"])
        return lax.reduce_window(h, -jnp.inf, lax.max, **{**options, **changed})

    fusion, wanted = plan_of(network)["b"]
    assert (fusion.pool, wanted.values) == (None, True)


@pytest.mark.parametrize("apply", [twice, doubled, broadcast, an_output], ids=lambda f: f.__name__)
def test_what_is_read_elsewhere_stays(apply):
    fusion, wanted = plan_of(apply)["b"]
    assert (fusion.residual, fusion.low, wanted.values) == (None, -math.inf, True)


def test_other_layouts_stay():
    for fusion, wanted in plan_of(channels_first).values():
        assert (fusion.residual, fusion.low, wanted) == (None, -math.inf, (True, ()))


CLIPS = {
    "relu": (jax.nn.relu, (0, math.inf)),
    "relu6": (jax.nn.relu6, (0, 6)),
    "clip": (lambda x: jnp.clip(x, -1, 2), (-1, 2)),
    "clamp": (lambda x: lax.clamp(-2.0, x, 3.0), (-2, 3)),
    "minimum": (lambda x: jnp.minimum(4.0, x), (-math.inf, 4)),
    "jitted": (jax.jit(lambda x: jnp.minimum(jnp.maximum(x, 1.0), 0.0)), (0, 0)),
}


@pytest.mark.parametrize(("function", "expected"), CLIPS.values(), ids=CLIPS.keys())
def test_clips_are_found_by_what_they_do(function, expected):
    network = lambda v, x: conv(function(conv(conv(x, v["a"]), v["b"])), v["c"])  # noqa: E731
    fusion, wanted = plan_of(network)["b"]
    assert (fusion.low, fusion.high) == expected
    assert wanted == (False, ("c",))


OTHERS = {
    "gelu": jax.nn.gelu,
    "leaky": jax.nn.leaky_relu,
    "array": lambda x: jnp.maximum(x, jnp.linspace(0, 1, 4).reshape(1, 1, 1, 4)),
    "two values": lambda x: jnp.maximum(x, x[::-1]),
    "not a number": lambda x: jnp.maximum(x, jnp.nan),
    "absolute": jnp.abs,
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS.keys())
def test_no_other_function_is_a_clip(function):
    network = lambda v, x: conv(function(conv(conv(x, v["a"]), v["b"])), v["c"])  # noqa: E731
    fusion, wanted = plan_of(network)["b"]
    assert (fusion.low, fusion.high, wanted.values) == (-math.inf, math.inf, True)
