"""Checks the annotations of the core packages, array shapes included, while the tests run."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from jaxtyping import install_import_hook

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
    install_import_hook(CHECKED, "beartype.beartype")
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(
    found: Any = None, *, decorate: Callable[..., Any] = jaxtyping.jaxtyped, **options: Any
):
    """`jaxtyping.jaxtyped`, which leaves a function inside of another one as it is: it would be
    compiled anew at every call of that one, which took a tenth of the tests' time."""
    if found is None:
        return functools.partial(jaxtyped, **options)
    inner = isinstance(found, types.FunctionType) and "<locals>" in found.__qualname__
    return found if inner else decorate(found, **options)
