"""Border functions: the learned replacement of the constant rounding border (paper Eq. 4 to 9).

A border function is a pair ``(init, apply)`` in a table; nothing else in the library knows its
form. `phi` maps the polynomial to the border that is used. What is stored and deployed is always
the coefficients and the name of phi.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.uniform import clip, product
from aquant_jax.errors import InputError

Coefficients = Mapping[str, jax.Array]

# The largest float32 below one: a border of exactly one would round zero padding down to -1.
BELOW_ONE = 1.0 - 2.0**-24


class Border(NamedTuple):
    """One border function.

    Attributes:
      init: ``init(shape, half) -> coefficients``: a dict of float32 arrays of `shape`
        ``(taps, channels)`` that gives the constant polynomial `half`.
      apply: ``apply(coefficients, u) -> P``, elementwise and broadcasting over `u`.
      powers: for every coefficient, the power of u that it multiplies; the trainer scales its
        learning rate accordingly (``Recipe.border_range``), and leaves that of one not listed.
    """

    init: Callable[[tuple[int, ...], float], dict[str, jax.Array]]
    apply: Callable[[Coefficients, jax.Array], jax.Array]
    powers: Mapping[str, int]


class Phi(NamedTuple):
    """Map from polynomial to border: `apply`, the preimage of 0.5, and the name it deploys as."""

    apply: Callable[[jax.Array], jax.Array]
    half: float
    deployed: str


def _polynomial(degree: int) -> Border:
    names = [f"b{power}" for power in range(degree + 1)]

    def init(shape, half):
        rest = {name: jnp.zeros(shape, jnp.float32) for name in names[1:]}
        return {"b0": jnp.full(shape, half, jnp.float32), **rest}

    def apply(coefficients, u):
        value = coefficients[names[-1]]
        for name in reversed(names[:-1]):
            value = product(value, u) + coefficients[name]
        return jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, u.shape))

    return Border(init, apply, {name: power for power, name in enumerate(names)})


BORDERS: dict[str, Border] = {
    "constant": _polynomial(0),
    "linear": _polynomial(1),  # Eq. 5
    "quadratic": _polynomial(2),  # Eq. 8
}


@jax.custom_jvp
def _ste_clamp(p: jax.Array) -> jax.Array:
    return jnp.clip(p, 0.0, BELOW_ONE)


@_ste_clamp.defjvp
def _ste_clamp_jvp(primals, tangents):
    return _ste_clamp(*primals), tangents[0]


PHIS: dict[str, Phi] = {
    "identity": Phi(lambda p: p, 0.5, "identity"),
    "clamp": Phi(lambda p: clip(p, 0.0, BELOW_ONE), 0.5, "clamp"),
    # The same function as clamp, trained with a straight-through gradient.
    "clamp_ste": Phi(_ste_clamp, 0.5, "clamp"),
    # For comparison only: exp is not the same function in numpy, XLA and CUDA.
    "sigmoid": Phi(jax.nn.sigmoid, 0.0, "sigmoid"),
}


def register(name: str, init, apply, powers: Mapping[str, int] | None = None) -> None:
    """Add a border function to the table, to be named in ``Recipe(border=name)``.

    Args:
      name: a new name.
      init: ``init(shape, half) -> dict of float32 arrays of that shape``.
      apply: ``apply(coefficients, u) -> P``; elementwise, differentiable, broadcasting.
      powers: see `Border`.

    Raises:
      InputError: the name is taken.
    """
    if name in BORDERS:
        raise InputError(f"border {name!r} is already registered; registered: {sorted(BORDERS)}")
    BORDERS[name] = Border(init, apply, powers or {})


def get(name: str) -> Border:
    """The border function called `name`; InputError lists what exists."""
    return _lookup("border", BORDERS, name)


def get_phi(name: str) -> Phi:
    """The phi called `name`; InputError lists what exists."""
    return _lookup("phi", PHIS, name)


def _lookup(kind, table, name):
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]


def polynomials(
    name: str, fused: bool, coefficients: Coefficients, us: Sequence[jax.Array]
) -> list[jax.Array]:
    """The polynomial of every tap of an im2col row, before phi.

    Args:
      name: border function.
      fused: average over the taps of one input channel (Eq. 9).
      coefficients: arrays of shape (taps, channels).
      us: one array ``[..., channels]`` per tap, in row-major tap order, in units of the step size.

    Returns:
      A list with one array per tap, or with a single one, shared by all taps, when fused.
    """
    apply = get(name).apply
    values = [apply(_of_tap(coefficients, tap, u.ndim), u) for tap, u in enumerate(us)]
    if not fused:
        return values
    total = values[0]
    for value in values[1:]:
        total = total + value
    return [product(total, jnp.float32(1.0 / len(us)))]


def _of_tap(coefficients: Coefficients, tap: int, rank: int) -> dict[str, jax.Array]:
    """One tap's coefficients, broadcast to the rank of u."""
    rows = {key: c[tap] for key, c in coefficients.items()}
    return {k: jnp.expand_dims(row, range(rank - row.ndim)) for k, row in rows.items()}


def borders(
    name: str, phi: str, fused: bool, coefficients: Coefficients, us: Sequence[jax.Array]
) -> list[jax.Array]:
    """The border of every tap: phi of `polynomials` (after the mean)."""
    return [get_phi(phi).apply(p) for p in polynomials(name, fused, coefficients, us)]


def analytic_border(x, weight, weight_error, propagated_error=0.0):
    """The border that minimises the element-wise error of one product (Eq. 4; Eq. 7 with an error).

    ``B = dw / (w + dw) * x' + w / (w + dw) * e(x') + 1/2``, everything in units of the step sizes.

    Args:
      x: the (noised) activation x'.
      weight: w.
      weight_error: dw, the quantized weight minus `weight`; ``weight + weight_error`` non-zero.
      propagated_error: ``e(x') = x' - x``.

    Returns:
      The border, to be used as ``ceil(x' - B)``. It may leave [0, 1]: the best neighbour of the
      exact product is then further than one step away.
    """
    quantized = weight + weight_error
    return weight_error / quantized * x + weight / quantized * propagated_error + 0.5
