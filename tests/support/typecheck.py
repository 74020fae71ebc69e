"""Checks the annotations of the core packages, array shapes included, while the tests run."""

import sys
import types
from typing import TypeVar

from beartype import beartype
from jaxtyping import install_import_hook

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
    install_import_hook(CHECKED, f"{__name__}.check")


def check(found: Checked) -> Checked:
    """A function or class that checks its annotations.

    A function inside of another one is left as it is: it would be compiled anew at every call of
    that one, which took a twentieth of the tests' time.
    """
    return found if "<locals>" in found.__qualname__ else beartype(found)
