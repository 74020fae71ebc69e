"""Weights that the input selects, as a router does: quantized, run in integers and saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
import gpu_ops
from aquant_jax.graph.trace import trace
from tests.support.nets import normal, relative_error, rng_of

BATCH, EXPERTS, WIDTH, HIDDEN = 8, 4, 16, 24
COMPILER = aq.Compiler()
X = normal(rng_of(0), 8 * BATCH, WIDTH)


def weights():
    shapes = {
        "in": (WIDTH, WIDTH), "router": (WIDTH, EXPERTS), "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH), "same": (EXPERTS, WIDTH, WIDTH), "head": (WIDTH, 5),
    }  # fmt: skip
    scaled = {name: normal(rng_of(i), *shape) for i, (name, shape) in enumerate(shapes.items(), 1)}
    return {name: jnp.asarray(w / np.sqrt(w.shape[-2])) for name, w in scaled.items()}


def gathered(v, h, x):
    chosen = jnp.argmax(x @ v["router"], -1)
    up = jax.nn.relu(jnp.einsum("ni,nio->no", h, v["up"][chosen]))
    down = jnp.einsum("ni,nio->no", up, v["down"][chosen])
    return h + (0.5 * down + 0.25)  # no fold: the output has no channels of one expert


def two_experts(v, h, x):
    shares, chosen = lax.top_k(jax.nn.softmax(x @ v["router"]), 2)
    up = jax.nn.relu(jnp.einsum("ni,nkio->nko", h, v["up"][chosen]))
    return h + jnp.einsum("nki,nkio,nk->no", up, v["down"][chosen], shares)


def taken_one_by_one(v, h, x):
    def one(row, routed_by):
        chosen = jnp.argmax(routed_by @ v["router"])
        return jax.nn.relu(row @ jnp.take(v["up"], chosen, axis=0)) @ v["down"][chosen]

    return h + jax.vmap(one)(h, x)


def weight_on_the_left(v, h, x):
    chosen = jnp.argmax(x @ v["router"], -1)
    turned = jnp.swapaxes(v["same"], 1, 2)  # a static view, which is the layer's weight
    return h + jnp.einsum("nio,ni->no", turned[chosen], h) @ v["in"].T


def ragged(v, h, x):
    shares, chosen = lax.top_k(jax.nn.softmax(x @ v["router"]), 2)
    order = jnp.argsort(chosen.reshape(-1))
    rows = jnp.repeat(h, 2, axis=0)[order]
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    made = lax.ragged_dot(jax.nn.relu(lax.ragged_dot(rows, v["up"], sizes)), v["down"], sizes)
    back = jnp.zeros_like(made).at[order].set(made).reshape(-1, 2, WIDTH)
    return h + (back * shares[..., None]).sum(1)


def in_a_loop(v, h, x):
    chosen = jnp.argmax(x @ v["router"], -1)
    step = lambda h, _: (jnp.tanh(jnp.einsum("ni,nio->no", h, v["same"][chosen])), None)  # noqa: E731
    return lax.scan(step, h, None, 3)[0]


PATTERNS = [gathered, two_experts, taken_one_by_one, weight_on_the_left, ragged, in_a_loop]


def network(pattern):
    """Routed by its input, so that rounding changes no choice."""
    return lambda v, x: pattern(v, jax.nn.relu(x @ v["in"]), x) @ v["head"]


def quantize(pattern, recipe, **options):
    recipe = recipe.replace(batch_size=BATCH, overrides=(aq.Override("router", keep_float=True),))
    return aq.quantize(
        network(pattern), weights(), X, recipe, observer=aq.Observer(), compiler=COMPILER, **options
    )


# two_experts selects as gathered does.
@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=[pytest.mark.slow] * (p is gathered)) for p in PATTERNS]
)
def test_selected_weights_are_quantized(pattern, tmp_path):
    quantized = quantize(pattern, aq.recipes.nearest(8, 8))
    assert not quantized.unquantized
    wanted = network(pattern)(weights(), X)
    assert relative_error(quantized(X), wanted) < 0.02
    stacks = [layer for layer in quantized.summary() if layer.kind == "experts"]
    assert stacks
    for layer in stacks:  # a grid for every output channel of every expert
        assert layer.weight_scale.shape == (EXPERTS * layer.shape[-1],)
    aq.save(quantized, tmp_path / "saved")
    np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(X), quantized(X))
    np.testing.assert_array_equal(quantized.with_backend(gpu_ops.backend())(X), quantized(X))


@pytest.mark.parametrize("pattern", [two_experts, ragged])
def test_learned_experts_beat_nearest(pattern):
    wanted = network(pattern)(weights(), X)
    learned = quantize(pattern, aq.recipes.aquant(4, 4, steps=20))
    nearest = quantize(pattern, aq.recipes.nearest(4, 4))
    assert relative_error(learned(X), wanted) < relative_error(nearest(X), wanted)
    assert learned.layers["up"].border["b0"].shape == (1, WIDTH)  # all experts share borders


def test_groups_of_inputs_have_grids_in_every_expert():
    coarse = quantize(in_a_loop, aq.recipes.nearest(3, None))
    fine = quantize(in_a_loop, aq.recipes.nearest(3, None).replace(weight_group=4))
    assert fine.layers["same"].scale.shape == (EXPERTS * WIDTH * WIDTH // 4,)
    wanted = network(in_a_loop)(weights(), X)
    assert relative_error(fine(X), wanted) < relative_error(coarse(X), wanted)


def test_an_embedding_is_no_expert():
    """A table whose rows are activations of a layer is read as it is."""

    def apply(v, tokens):
        return jax.nn.relu(v["table"][tokens] @ v["hidden"]) @ v["head"]

    shapes = {"table": (9, 4), "hidden": (4, 4), "head": (4, 2)}
    v = {name: normal(rng_of(1), *shape) for name, shape in shapes.items()}
    graph = trace(apply, v, jnp.zeros((2, 3), jnp.int32))
    assert {layer.path: layer.kind for layer in graph.layers} == {
        "hidden": "dense",
        "head": "dense",
    }
    assert not graph.unquantized
