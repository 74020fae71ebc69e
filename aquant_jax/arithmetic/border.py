"""Border functions: the learned replacement of the constant rounding border (paper Eq. 4 to 9).

A border function is a polynomial of u, given by a pair ``(init, apply)`` in a table; the rest of
the library never looks inside the pair. A function phi then maps the polynomial to the border.
Checkpoints store the coefficients, the name of the border function and the name of phi.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import clip, product
from aquant_jax.errors import InputError, check_type

# The coefficients of one layer by name; the channels may span several axes.
Coefficients = Mapping[str, Float[AnyArray, "taps *channels"]]
CoefficientRows = Mapping[str, list[Float[Array, "..."]]]  # the same, one array per tap

# The largest float32 below one: a border of exactly one would round zero padding down to -1.
BELOW_ONE = 1.0 - 2.0**-24
# What has a border of its own: a column element; the taps of an input channel, whose element
# borders are averaged (Eq. 9); an input channel, whose elements are rounded before they are padded.
GRANULARITIES = ("element", "mean", "channel")
AUTO = "auto"  # in a recipe: a border is chosen for every layer
NEAREST = "nearest"  # in an override: no border


class Border(NamedTuple):
    """One border function.

    Attributes:
      init: ``init(shape, half) -> coefficients``: a dict of float32 arrays of `shape`
        ``(taps, channels)`` that gives the constant polynomial `half`.
      apply: ``apply(coefficients, u) -> P``, elementwise and broadcasting over `u`.
      powers: the power of u that each coefficient multiplies. The trainer scales the learning rate
        of a coefficient by it (``Reconstruction.border_range``); one that is not listed keeps its
        learning rate.
      needs_taps: whether the polynomial depends on the tap, so that a border needs one for every
        tap.
    """

    init: Callable[[tuple[int, ...], float], dict[str, jax.Array]]
    apply: Callable[[Mapping[str, Any], Any], jax.Array]
    powers: Mapping[str, int]
    needs_taps: bool = False


class Phi(NamedTuple):
    """A map from polynomial to border.

    Attributes:
      apply: the map, elementwise.
      half: the polynomial that gives the border 0.5.
      deployed: name of the function that inference uses.
    """

    apply: Callable[[jax.Array], jax.Array]
    half: float
    deployed: str


def _polynomial(degree: int) -> Border:
    """``P = b0 + b1 u + ... + b_degree u^degree``, by Horner's rule."""
    names = [f"b{power}" for power in range(degree + 1)]

    def init(shape: tuple[int, ...], half: float) -> dict[str, Float[Array, "..."]]:
        rest = {name: jnp.zeros(shape, jnp.float32) for name in names[1:]}
        return {"b0": jnp.full(shape, half, jnp.float32), **rest}

    def apply(
        coefficients: Mapping[str, Float[AnyArray, "..."]], u: Float[AnyArray, "..."]
    ) -> Float[Array, "..."]:
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
BUILT_IN = frozenset(BORDERS)


@jax.custom_jvp
def _ste_clamp(p: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(p, 0.0, BELOW_ONE)


@_ste_clamp.defjvp
def _ste_clamp_jvp(
    primals: tuple[Float[AnyArray, "*shape"]], tangents: tuple[Float[Array, "*shape"]]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    return _ste_clamp(*primals), tangents[0]


PHIS: dict[str, Phi] = {
    "identity": Phi(lambda p: p, 0.5, "identity"),
    "clamp": Phi(lambda p: clip(p, 0.0, BELOW_ONE), 0.5, "clamp"),
    # The same function as clamp, trained with a straight-through gradient.
    "clamp_ste": Phi(_ste_clamp, 0.5, "clamp"),
    # For comparison only: exp is not the same function in numpy, XLA and CUDA.
    "sigmoid": Phi(jax.nn.sigmoid, 0.0, "sigmoid"),
}


def register(
    name: str,
    init: Callable[[tuple[int, ...], float], dict[str, jax.Array]],
    apply: Callable[[Mapping[str, Any], Any], jax.Array],
    powers: Mapping[str, int] | None = None,
    needs_taps: bool = False,
) -> None:
    """Add a border function to the table; ``Recipe(border=name)`` then selects it.

    >>> import jax.numpy as jnp
    >>> import aquant_jax as aq
    >>> from aquant_jax.arithmetic.border import BORDERS
    >>> def init(shape, half):  # at the start, P is `half` everywhere
    ...     return {"b": jnp.full(shape, half), "wave": jnp.zeros(shape)}
    >>> def apply(coefficients, u):
    ...     return coefficients["b"] + coefficients["wave"] * jnp.sin(u)
    >>> aq.register_border("wave", init, apply)
    >>> aq.recipes.aquant(border="wave").border
    'wave'
    >>> del BORDERS["wave"]  # here, so that the name is free again

    Args:
      name: a new name.
      init: ``init(shape, half) -> dict of float32 arrays of that shape``.
      apply: ``apply(coefficients, u) -> P``; elementwise, differentiable, broadcasting.
      powers: the power of u that each coefficient multiplies, by name; see `Border`.
      needs_taps: whether the polynomial depends on the tap. Such a border is refused with
        ``border_granularity="channel"``.

    Raises:
      InputError: an argument of another type, or a name that is empty or taken.
    """
    _check_arguments(name, init, apply, powers or {}, needs_taps)
    if name in (AUTO, NEAREST):
        raise InputError(f"border {name!r} has a meaning in recipes; take another name")
    if name in BORDERS:
        raise InputError(f"border {name!r} is already registered; registered: {sorted(BORDERS)}")
    BORDERS[name] = Border(init, apply, powers or {}, needs_taps)


def _check_arguments(name: Any, init: Any, apply: Any, powers: Any, needs_taps: Any) -> None:
    check_type("name", name, str, "the name of a border")
    if not name:
        raise InputError("name is empty; it must be the name of a border")
    for argument, value in (("init", init), ("apply", apply)):
        if not callable(value):
            raise InputError(f"{argument} is of type {type(value).__name__}; it must be a function")
    check_type("powers", powers, Mapping, "a dict of the power of u by coefficient")
    for key, power in powers.items():
        if not isinstance(key, str) or type(power) is not int or power < 0:
            raise InputError(
                f"powers has {key!r}: {power!r}; it must have a whole number of 0 or more for the "
                "name of a coefficient"
            )
    check_type("needs_taps", needs_taps, bool, "True or False")


def get(name: str) -> Border:
    """The border function called `name`.

    Raises:
      InputError: an unknown name; the message lists the known ones.
    """
    hint = f"; also {AUTO!r} in a recipe and {NEAREST!r} in an override"
    return _lookup("border", BORDERS, name, hint)


def count_coefficients(name: str, shape: tuple[int, ...]) -> int:
    """Number of coefficients of the border function called `name`.

    Args:
      name: of a border function.
      shape: of each of its coefficients, see `Border.init`.

    Raises:
      InputError: an unknown name.
    """
    coefficients = jax.eval_shape(lambda: get(name).init(shape, 0.5))
    return sum(part.size for part in jax.tree.leaves(coefficients))


def get_phi(name: str) -> Phi:
    """The phi called `name`.

    Raises:
      InputError: an unknown name; the message lists the known ones.
    """
    return _lookup("phi", PHIS, name)


_Entry = TypeVar("_Entry")


def _lookup(kind: str, table: Mapping[str, _Entry], name: str, hint: str = "") -> _Entry:
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}; known: {', '.join(sorted(table))}{hint}")
    return table[name]


def polynomials(
    name: str,
    shared_across_taps: bool,
    coefficients: Coefficients | CoefficientRows,
    us: Sequence[Float[AnyArray, "..."]],
) -> list[Float[Array, "..."]]:
    """The polynomial of every tap of an im2col row, before phi (Eq. 5, 8).

    Args:
      name: border function.
      shared_across_taps: average over the taps of one input channel (Eq. 9).
      coefficients: arrays of shape ``(taps, channels)``, or the rows of such arrays.
      us: one array ``[..., channels]`` per tap, in row-major tap order, in units of the step size.

    Returns:
      One array per tap, or a single array when the taps share it.

    Raises:
      InputError: an unknown name.
    """
    apply = get(name).apply
    values = [apply(of_tap(coefficients, tap, u.ndim), u) for tap, u in enumerate(us)]
    if not shared_across_taps:
        return values
    total = values[0]
    for value in values[1:]:
        total = total + value
    return [product(total, jnp.float32(1.0 / len(us)))]


def of_tap(
    coefficients: Coefficients | CoefficientRows, tap: int, rank: int
) -> dict[str, Float[Array, "..."]]:
    """One tap's coefficients, broadcast to the rank of u."""
    rows = {key: c[tap] for key, c in coefficients.items()}
    return {k: jnp.expand_dims(row, range(rank - row.ndim)) for k, row in rows.items()}


def borders(
    name: str,
    phi: str,
    shared_across_taps: bool,
    coefficients: Coefficients | CoefficientRows,
    us: Sequence[Float[AnyArray, "..."]],
) -> list[Float[Array, "..."]]:
    """The border of every tap: phi of `polynomials`, applied after their mean.

    Args:
      name: border function.
      phi: name in `PHIS`.
      shared_across_taps: see `polynomials`.
      coefficients: see `polynomials`.
      us: see `polynomials`.

    Raises:
      InputError: an unknown name.
    """
    return [get_phi(phi).apply(p) for p in polynomials(name, shared_across_taps, coefficients, us)]
