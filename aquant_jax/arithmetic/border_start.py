"""The check that a registered border starts as the constant that rounds to nearest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.border import AUTO, BUILT_IN, get, get_phi, of_tap
from aquant_jax.errors import InputError, reason

CLOSE = 1e-5  # of a polynomial to `half`

_Value = TypeVar("_Value")


def check_start(name: str | None, phi: str) -> None:
    """Check that a registered border starts as the constant that rounds to nearest.

    Raises:
      InputError: a function that fails, or returns no arrays; a coefficient of another shape than
        `init` was given, or that `powers` names and `init` does not; a polynomial that is not
        `half` everywhere with the coefficients of `init`.
    """
    if name is None or name == AUTO or name in BUILT_IN:
        return
    border, half, shape = get(name), get_phi(phi).half, (4, 2)
    coefficients = _returned(name, "init", lambda: dict(border.init(shape, half)))
    for key, values in coefficients.items():
        if np.shape(values) != shape:
            raise InputError(
                f"border {name!r}: init({shape}, {half}) gives {key!r} the shape "
                f"{np.shape(values)}; it must be {shape}"
            )
    if unknown := sorted(border.powers.keys() - coefficients.keys()):
        raise InputError(
            f"border {name!r}: powers names {unknown[0]!r}; init gives {', '.join(coefficients)}"
        )
    us = jnp.arange(-8.0, 17.0, dtype=jnp.float32)[:, None]
    for tap in range(shape[0]):
        rows, wide = of_tap(coefficients, tap, us.ndim), jnp.tile(us, (1, shape[1]))
        start = _returned(name, "apply", lambda r=rows, u=wide: jnp.asarray(border.apply(r, u)))
        off = ~(abs(start - half) <= CLOSE).all(axis=-1)
        if off.any():
            index = int(jnp.argmax(off))
            raise InputError(
                f"border {name!r}: with the coefficients of init, apply returns "
                f"{start[index].ravel()[0]:.4g} at u = {us[index, 0]:g}; it must return half, "
                f"{half:g}, for every u"
            )


def _returned(name: str, function: str, call: Callable[[], _Value]) -> _Value:
    """What a function of a registered border returns."""
    try:
        return call()
    except Exception as error:  # it is the user's
        raise InputError(f"border {name!r}: {function} fails: {reason(error)}") from error
