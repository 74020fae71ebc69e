"""Parsing files that anyone may have written: each failure is one line that names the file."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from aquant_jax.errors import InputError, reason

LONGEST = 200  # characters of a file that a message quotes

Record = TypeVar("Record")


@contextlib.contextmanager
def malformed(path: Path) -> Iterator[None]:
    """A context in which a file is parsed: what that raises becomes an InputError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # zlib, flatbuffers, MLIR and JAX have exceptions of their own
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path} is malformed: {kind}{printable(reason(error))}") from error


def printable(text: str) -> str:
    """A text of a file for a message: one line of limited length, without control characters.

    >>> printable("tail"), printable("one\\ntwo")
    ('tail', "'one\\\\ntwo'")
    """
    start = text[:LONGEST]
    return start if start.isprintable() else ascii(start)


def record(kind: type[Record], fields: Mapping[str, Any]) -> Record:
    """A NamedTuple from the fields of a JSON object, which must have exactly the annotated types.

    Raises:
      TypeError: a field that is missing, unknown or of another type.
    """
    made = kind(**fields)
    for name, hint in typing.get_type_hints(kind).items():
        union = isinstance(hint, types.UnionType)
        accepted = typing.get_args(hint) if union else (typing.get_origin(hint) or hint,)
        value = getattr(made, name)
        if type(value) not in accepted:  # no isinstance: True is an int
            raise TypeError(f"{name} is {value!r}; it must be of type {hint}")
    return made
