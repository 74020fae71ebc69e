"""Rematerialisation: a gradient that computes a layer again instead of keeping values inside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Layer = Callable[..., jax.Array]


def rematerialized(layer: Layer) -> Layer:
    """A layer function with the contract of `fake_quant.run_layer`, whose gradient keeps its
    arguments and computes the values inside the layer again.

    On a CPU, XLA merges the second forward pass of `jax.checkpoint` with the first. There the
    second pass reads its arguments through a condition that XLA cannot decide.
    """
    wrap = _computed_again if jax.default_backend() == "cpu" else jax.checkpoint
    return lambda op, spec, *arrays: wrap(functools.partial(layer, op, spec))(*arrays)


def _computed_again(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    run = jax.custom_vjp(function)
    run.defvjp(lambda *args: (function(*args), args), functools.partial(_pull, function))
    return run


def _pull(function: Callable[..., jax.Array], args: Any, cotangent: jax.Array) -> Any:
    """The gradient of `function`: None for arguments that have none, such as masks."""
    (x, *others), tree = jax.tree.flatten(args)
    first = jnp.ravel(cotangent)[0]
    defined = first == first
    # The activation itself would have to be copied; what is computed from the others suffices.
    again = [jnp.where(defined, v, jnp.nan) if _is_inexact(v) else v for v in others]
    gradients = jax.vjp(function, *tree.unflatten([x, *again]))[1](cotangent)
    found = zip(jax.tree.leaves(gradients), (x, *others), strict=True)
    return tree.unflatten([g if _is_inexact(leaf) else None for g, leaf in found])


def _is_inexact(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
