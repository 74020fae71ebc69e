"""Rematerialised layers: the same gradients with less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.layers.rematerialize import rematerialized

OP = SPEC = None
X = jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32)
KEEP = X > 0
WEIGHTS = [jnp.float32(0.5 + i) for i in range(4)]


def layer(op, spec, activation, weight):
    """Several elementwise operations, of which each keeps a value for its gradient."""
    x, keep = activation
    y = x
    for _ in range(4):
        y = jnp.sin(y * weight)
    return jnp.where(keep, y, x)


def loss(run, x, weights):
    for weight in weights:
        x = run(OP, SPEC, (x, KEEP), weight)
    return jnp.sum(x**2)


def gradient_of(run):
    return jax.jit(jax.grad(lambda *args: loss(run, *args), argnums=(0, 1)))


def temporary_bytes(run):
    analysis = gradient_of(run).lower(X, WEIGHTS).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_the_gradient_is_the_same():
    wanted, found = (gradient_of(run)(X, WEIGHTS) for run in (layer, rematerialized(layer)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_holds_less():
    assert temporary_bytes(rematerialized(layer)) < 0.7 * temporary_bytes(layer)


@pytest.mark.parametrize("scale", [0.0, jnp.nan])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(scale):
    gradient = jax.grad(lambda x: scale * loss(rematerialized(layer), x, WEIGHTS))(X)
    assert bool(jnp.isnan(gradient).all()) == bool(jnp.isnan(scale))
