"""Rematerialisation: a gradient that computes a layer again instead of keeping values inside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Layer = Callable[..., jax.Array]


def rematerialized(layer: Layer) -> Layer:
    """A layer function with the contract of `fake_quant.run_layer`, whose gradient keeps nothing
    but its input, its mask and its weights.

    On a CPU, XLA merges the second forward pass of `jax.checkpoint` with the first. There the
    second pass is in a branch, whose condition XLA cannot decide.
    """
    wrap = _computed_again if jax.default_backend() == "cpu" else jax.checkpoint
    return lambda op, spec, *arrays: wrap(functools.partial(layer, op, spec))(*arrays)


def _computed_again(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    run = jax.custom_vjp(function)
    run.defvjp(lambda *args: (function(*args), args), functools.partial(_pull, function))
    return run


def _pull(function: Callable[..., jax.Array], args: Any, cotangent: jax.Array) -> Any:
    """The gradient of `function`: None for arguments that have none, such as masks."""
    leaves, tree = jax.tree.flatten(args)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def gradients(args: Any, cotangent: jax.Array) -> list[jax.Array]:
        every = jax.tree.leaves(jax.vjp(function, *args)[1](cotangent))
        return [g for g, real in zip(every, inexact, strict=True) if real]

    def undefined(args: Any, _: jax.Array) -> list[jax.Array]:
        pairs = zip(jax.tree.leaves(args), inexact, strict=True)
        return [jnp.full_like(leaf, jnp.nan) for leaf, real in pairs if real]

    first = jnp.ravel(cotangent)[0]
    found = iter(jax.lax.cond(first == first, gradients, undefined, args, cotangent))
    return tree.unflatten([next(found) if real else None for real in inexact])
