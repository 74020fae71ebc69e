"""Broadcasts whose gradients are sums that a CPU runs on all its cores.

XLA on CPU fuses element-wise work into the sum that reads it, and runs the whole serially. It fuses
nothing into a matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquant_jax.arithmetic.array_types import AnyArray


def channel_sums(values: Float[AnyArray, "... C"]) -> Float[Array, "C"]:
    """Sum over all axes but the last; on a CPU as a matmul."""
    flat = values.reshape(-1, values.shape[-1])
    if jax.default_backend() != "cpu":
        return jnp.sum(flat, 0)
    return (jnp.ones((1, flat.shape[0]), flat.dtype) @ flat)[0]


def differentiated(function: Callable[..., jax.Array], *operands: Any) -> jax.Array:
    """``function(*operands, plain)``, and for its gradient ``function(*operands, spread)``.

    The results are equal. Where nothing is differentiated, in what is deployed and exported, there
    is no broadcast.

    Args:
      function: of the operands and of a function like `spread`.
      operands: pytrees of arrays, the only ones that `function` differentiates.
    """

    @jax.custom_vjp
    def plain(*operands: Any) -> jax.Array:
        return function(*operands, lambda values, shape: values)

    def forward(*operands: Any) -> tuple[jax.Array, Callable[..., Any]]:
        return jax.vjp(lambda *given: function(*given, spread), *operands)

    plain.defvjp(forward, lambda pull, dy: pull(dy))
    return plain(*operands)


def spread(values: Float[AnyArray, "..."], shape: tuple[Any, ...]) -> Float[Array, "..."]:
    """Broadcast a scalar, or one value a channel, to a shape whose last axis has the channels.

    The gradient is that of `jnp.broadcast_to`, summed by `channel_sums`.

    >>> jax.grad(lambda c: spread(c, (4, 3, 2)).sum())(jnp.ones(2))
    Array([12., 12.], dtype=float32)
    """
    return _spread(jnp.broadcast_to(values, shape[-1:]), shape) if shape else jnp.asarray(values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(values: Float[AnyArray, "C"], shape: tuple[Any, ...]) -> Float[Array, "... C"]:
    return jnp.broadcast_to(values, shape)


def _spread_forward(
    values: Float[AnyArray, "C"], shape: tuple[Any, ...]
) -> tuple[Float[Array, "... C"], None]:
    return _spread(values, shape), None


def _spread_backward(
    shape: tuple[Any, ...], saved: None, dy: Float[AnyArray, "... C"]
) -> tuple[Float[Array, "C"]]:
    return (channel_sums(dy),)


_spread.defvjp(_spread_forward, _spread_backward)
