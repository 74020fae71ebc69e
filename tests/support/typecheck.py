"""Checks the annotations of the core packages, array shapes included, while the tests run."""

import sys
import types
from collections.abc import Callable
from typing import TypeVar

import jaxtyping
from beartype import beartype

Checked = TypeVar("Checked", type, types.FunctionType)

# Packages whose functions check their arguments and results against their annotations: those that
# annotate shapes of arrays. What has none is left to pyright: a check costs more than most calls.
CHECKED = ("aquant_jax.arithmetic", "aquant_jax.layers", "aquant_jax.plan")


def install() -> None:
    """Checks every call of the packages that are imported from now on.

    A call with a wrong type, dtype kind, rank or size raises ``jaxtyping.TypeCheckError``. Under
    `jax.jit` the check runs once, while the function is traced.

    Raises:
      RuntimeError: a package is imported already; its functions would not be checked.
    """
    early = [name for name in CHECKED if name in sys.modules]
    if early:
        raise RuntimeError(f"imported before tests/conftest.py: {', '.join(early)}")
    jaxtyping.install_import_hook(CHECKED, f"{__name__}.check")
    jaxtyping.jaxtyped = unless_inside(jaxtyping.jaxtyped)  # the hook calls it by this name


def check(found: Checked) -> Checked:
    """A function or class that checks its annotations."""
    return beartype(found)


def unless_inside(jaxtyped: Callable) -> Callable:
    """`jaxtyped` that leaves a function inside of another one as it is.

    Its check would be compiled anew at every call of that one, and so would the wrapper around it.
    """

    def decorator(*found, **options):
        wrap = jaxtyped(*found, **options)
        return wrap if found else lambda inner: inner if is_inside(inner) else wrap(inner)

    return decorator


def is_inside(found: Checked) -> bool:
    """Whether a function or class of the packages is made by a function."""
    return "<locals>" in found.__qualname__ and found.__module__.startswith(CHECKED)
