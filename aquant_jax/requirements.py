"""The versions of Python and JAX that the package runs on, checked when it is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

OLDEST_PYTHON = (3, 11)
OLDEST_JAX = (0, 10)


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def check() -> None:
    """Raises ImportError, in one line with both versions, where Python or JAX is too old.

    The package's own metadata says the same to pip; this is for an environment that changed since,
    and for a checkout on the path.
    """
    if sys.version_info < OLDEST_PYTHON:
        here, needed = _text(sys.version_info[:3]), _text(OLDEST_PYTHON)
        raise ImportError(f"aquant_jax needs Python {needed} or newer; this is Python {here}")
    try:
        jax = metadata.version("jax")
    except metadata.PackageNotFoundError:
        jax = ""
    if not jax or _number(jax) < OLDEST_JAX:
        here = f"JAX {jax} is installed" if jax else "it is not installed"
        raise ImportError(
            f"aquant_jax needs JAX {_text(OLDEST_JAX)} or newer; {here}: pip install --upgrade jax"
        )


check()
