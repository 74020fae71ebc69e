"""JSON files that are complete or absent, and JSON values compared field by field."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from aquant_jax.errors import InputError


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file, so that no reader ever sees half of it."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, likewise; links stay, and so do devices, which take the text as it comes."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    temporary = path.parent / f".{path.name}.{os.getpid()}"  # "." and "/" have no name
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
      InputError: the file is not JSON.
      OSError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def holds_numbers(found: Any) -> bool:
    """Whether what was read is finite numbers by name."""
    return isinstance(found, dict) and all(
        isinstance(number, int | float) and math.isfinite(number) for number in found.values()
    )


def jsonable(value: Any) -> Any:
    """The value with NumPy values as plain ones, and NaN and infinity, which JSON lacks, as None.

    >>> jsonable({"loss": np.array([0.5, np.nan])})
    {'loss': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def differences(old: Any, new: Any, allowed: tuple[str, ...] = ()) -> list[str]:
    """A line ``name (old there, new here)`` for every leaf in which two JSON values differ.

    Lines that start with a text of `allowed` are left out.

    >>> differences({"steps": 20, "bits": {"act": 4}}, {"steps": 20, "bits": {"act": 2}})
    ['bits.act (4 there, 2 here)']
    """
    return [line for line in _differences(old, new, "") if not line.startswith(allowed)]


def _differences(old: Any, new: Any, prefix: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    there, here = ("{...}" if isinstance(value, dict) else repr(value) for value in (old, new))
    return [] if old == new else [f"{prefix} ({there} there, {here} here)"]
