"""Batch norm in training mode: a warning, and none for networks that keep samples apart."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

import aquant_jax as aq
from tests.support.nets import normal, rng_of

VARIABLES = {"a": normal(rng_of(0), 6, 8), "b": normal(rng_of(1), 8, 4)}
X = normal(rng_of(2), 16, 6)
RECIPE = aq.recipes.nearest(8, 8, batch_size=8)


def normed(h, axis):
    mean = jnp.mean(h, axis=axis, keepdims=True)
    return (h - mean) / jnp.sqrt(jnp.var(h, axis=axis, keepdims=True) + np.float32(1e-5))


def batch_norm(v, x):
    return jax.nn.relu(normed(x @ v["a"], 0)) @ v["b"]


def layer_norm(v, x):
    return jax.nn.relu(normed(x @ v["a"], 1)) @ v["b"]


def auxiliary_loss(v, x):
    """Of the whole batch, but the logits do not depend on it."""
    h = x @ v["a"]
    return layer_norm(v, x), jnp.mean(h * h)


def clamped(v, x):
    """Reads the largest value of the batch, which changes nothing of these samples."""
    h = x @ v["a"]
    return jnp.minimum(h, np.float32(100) + jnp.max(jnp.abs(h))) @ v["b"]


def reported(monkeypatch, apply):
    """The warnings of a call of `prepare`."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    aq.prepare(apply, VARIABLES, X, RECIPE)
    return lines


def test_batch_norm_in_training_mode_is_named_with_the_change(monkeypatch):
    (line,) = reported(monkeypatch, batch_norm)
    assert line.startswith("outputs of a sample depend on the others in its batch, by up to ")
    assert line.endswith("behind a): batch norm should normalize by its running statistics")
    other = np.concatenate([X[:4], np.repeat(X[:1], 4, axis=0)])
    expected = batch_norm(VARIABLES, X[:8])[:4]
    change = np.abs(batch_norm(VARIABLES, other)[:4] - expected).max()
    largest = np.abs(expected).max()
    assert f"up to {change:.3g}, where the largest output is {largest:.3g}" in line


@pytest.mark.parametrize("apply", [layer_norm, auxiliary_loss, clamped])
def test_networks_that_keep_samples_apart_are_no_warning(monkeypatch, apply):
    assert reported(monkeypatch, apply) == []


def test_networks_without_an_op_over_the_batch_are_not_run(monkeypatch):
    def runs(*args):
        raise AssertionError("the network runs")

    monkeypatch.setattr("aquant_jax.plan.independence._change", runs)
    for apply in (layer_norm, auxiliary_loss):
        aq.prepare(apply, VARIABLES, X, RECIPE)
    with pytest.raises(AssertionError, match="the network runs"):
        aq.prepare(batch_norm, VARIABLES, X, RECIPE)


def test_integers_and_outputs_that_are_not_finite_do_not_hide_it(monkeypatch):
    def apply(v, x):
        logits = batch_norm(v, x)
        bad = jnp.where(jnp.arange(4)[None] == 1, jnp.float32(jnp.nan), logits)
        return 1000 * jnp.argmax(logits, axis=1), bad

    (line,) = reported(monkeypatch, apply)
    assert re.search(r"by up to [\d.]{1,4}, where the largest output is [\d.]{1,4} ", line)
