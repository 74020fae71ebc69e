import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from aquant_jax.graph.fold import fold, folded_weights
from aquant_jax.graph.trace import trace
from tests.support.nets import (
    conv,
    conv_bn,
    images,
    normal,
    relative_error,
    residual_net,
    rng_of,
    run_folded,
)

X = images(0, 8)
VECTOR = normal(rng_of(7), 1, 1, 1, 4)


def prepare(apply, variables, x=X):
    return aq.prepare(apply, variables, x, aq.recipes.nearest(batch_size=8))


def kernel():
    return {"w": normal(rng_of(1), 3, 3, 3, 4), "c": VECTOR}


def after_conv(chain):
    return lambda v, x: chain(conv(x, v["w"]), v["c"])


def remaining(apply, variables):
    """Ops that are left after folding, other than the weighted ones and static arithmetic."""
    graph = fold(trace(apply, variables, X))
    return [op.name for op in graph.ops if op.layer is None and set(op.outputs) & graph.dynamic]


def test_folded_residual_network_equals_float():
    apply, variables = residual_net(blocks=2)
    net = prepare(apply, variables)
    assert relative_error(run_folded(net, X), apply(variables, X)) < 1e-5
    # Batch norms are gone: what is left are the activation functions, the skips and the head.
    names = [op.name for op in net.graph.ops if set(op.outputs) & net.graph.dynamic]
    assert names.count("conv_general_dilated") == 5
    assert not {"sub", "rsqrt"} & set(names)
    assert names.count("add") == names.count("add_any") + 2


def test_batch_norm_goes_into_weight_and_bias():
    _, variables = residual_net()
    stem = variables["stem"]
    folded = folded_weights(trace(lambda v, x: conv_bn(x, v), stem, X), stem)["kernel"]
    slope = stem["scale"] / np.sqrt(stem["var"] + 1e-5)
    np.testing.assert_allclose(folded.weight, stem["kernel"] * slope, rtol=1e-5)
    np.testing.assert_allclose(
        folded.bias, stem["bias"] - stem["mean"] * slope, rtol=1e-5, atol=1e-6
    )


CHAINS = {
    "bias": lambda y, c: y + c,
    "bias on the left": lambda y, c: c + y,
    "minus": lambda y, c: y - c,
    "from": lambda y, c: c - y,
    "scale": lambda y, c: y * c,
    "divide": lambda y, c: y / (2.0 + c * c),
    "negate": lambda y, c: -y,
    "scalars": lambda y, c: (3.0 - 2.0 * y) / 4.0 + 1.0,
    "long": lambda y, c: 0.5 * ((c - (y * c + 1.0)) / (1.0 + jnp.exp(c)) - c),
    "broadcast": lambda y, c: y + jnp.broadcast_to(c, y.shape),
    "squeezed": lambda y, c: y * lax.broadcast_in_dim(c[0, 0, 0], y.shape, (3,)),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_affine_chains_fold_away(chain):
    apply, variables = after_conv(chain), kernel()
    assert remaining(apply, variables) == []
    net = prepare(apply, variables)
    assert relative_error(run_folded(net, X), apply(variables, X)) < 1e-5


NOT_AFFINE = {
    "relu": lambda y, c: jax.nn.relu(y) * c,
    "per position": lambda y, c: y + jnp.arange(6, dtype=jnp.float32)[None, :, None, None],
    "reciprocal": lambda y, c: c / y,
    "square": lambda y, c: y * y,
    "residual": lambda y, c: y + lax.slice_in_dim(jnp.tile(y, (1, 1, 1, 2)), 1, 5, axis=3),
    "integer": lambda y, c: y.astype(jnp.int32) + 1,
}


@pytest.mark.parametrize("chain", NOT_AFFINE.values(), ids=NOT_AFFINE.keys())
def test_what_is_not_affine_per_channel_stays(chain):
    apply, variables = after_conv(chain), kernel()
    assert remaining(apply, variables)
    net = prepare(apply, variables)
    # XLA may round the integer case differently at a boundary, but not here.
    assert relative_error(run_folded(net, X), apply(variables, X)) < 1e-5


def test_an_output_that_is_read_twice_is_not_folded_past():
    def apply(v, x):
        y = conv(x, v["w"])
        return (y + v["c"]) * jax.nn.sigmoid(y)

    net = prepare(apply, kernel())
    assert "add" in remaining(apply, kernel())
    assert relative_error(run_folded(net, X), apply(kernel(), X)) < 1e-5


def test_a_finished_output_is_not_folded_past():
    def apply(v, x):
        y = conv(x, v["w"])
        return y, y + v["c"]

    found = run_folded(prepare(apply, kernel()), X)
    for value, expected in zip(found, apply(kernel(), X), strict=True):
        assert relative_error(value, expected) < 1e-5


def test_an_offset_that_depends_on_the_input_is_not_folded():
    apply = lambda v, x: conv(x, v["w"]) + jnp.mean(x, axis=(1, 2, 3), keepdims=True)  # noqa: E731
    assert "add" in remaining(apply, kernel())
    assert relative_error(run_folded(prepare(apply, kernel()), X), apply(kernel(), X)) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_other_layouts_and_groups(groups):
    x = normal(rng_of(2), 8, 4, 6, 6)
    variables = {"w": normal(rng_of(3), 8, 4 // groups, 3, 3), "c": normal(rng_of(4), 1, 8, 1, 1)}

    def apply(v, x):
        y = lax.conv_general_dilated(
            x, v["w"], (1, 1), "SAME", feature_group_count=groups,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )  # fmt: skip
        return (y - v["c"]) * (1.0 + v["c"])

    net = prepare(apply, variables, x)
    assert relative_error(run_folded(net, x), apply(variables, x)) < 1e-5


def test_projection_to_heads_has_two_channel_axes():
    """einsum btd,dhk->bthk with a bias [heads, depth], and one weight on the left."""
    x = normal(rng_of(2), 8, 5, 6)
    variables = {"w": normal(rng_of(3), 6, 2, 4), "b": normal(rng_of(4), 1, 1, 2, 4)}
    straight = lambda v, x: jnp.einsum("btd,dhk->bthk", x, v["w"]) * v["b"] + v["b"]  # noqa: E731

    def turned(v, x):
        y = jnp.einsum("dhk,btd->hkbt", v["w"], x) * v["b"].reshape(2, 4, 1, 1)
        return jnp.moveaxis(y, 2, 0)

    for apply in (straight, turned):
        net = prepare(apply, variables, x)
        assert relative_error(run_folded(net, x), apply(variables, x)) < 1e-5
    assert "mul" not in {op.name for op in prepare(straight, variables, x).graph.ops}


def test_half_precision_weights_fold_in_single_precision():
    variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), kernel())

    def apply(v, x):
        return (conv(x.astype(jnp.bfloat16), v["w"]) * v["c"] + v["c"]).astype(jnp.float32)

    net = prepare(apply, variables)
    assert net.folded["w"].weight.dtype == np.float32
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    reference = conv(X, exact["w"]) * exact["c"] + exact["c"]
    assert relative_error(run_folded(net, X), reference) < 2e-2


def test_batch_of_one_folds_like_any_other():
    apply, variables = residual_net()
    names = [[op.name for op in fold(trace(apply, variables, X[:batch])).ops] for batch in (1, 8)]
    assert names[0] == names[1]
