"""The folder of one run: who owns it, and files that are either whole or absent.

``run.json`` says which run a folder belongs to from the start, ``log.jsonl`` grows by a line
a block, and ``results.json`` comes last: a folder without it holds an unfinished run, which
the same command starts afresh.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aquant_jax.errors import InputError, ReconstructionError

IDENTITY = "run.json"
RESULTS = "results.json"
LOG = "log.jsonl"
PLOTS = "plots"


class Run:
    """Writes into a claimed folder; ``stored`` is the result of a finished run, or None."""

    def __init__(self, path: Path, stored: dict[str, Any] | None):
        self.path = path
        self.stored = stored

    @property
    def plots(self) -> Path:
        """The folder for plots, made when first asked for."""
        folder = self.path / PLOTS
        folder.mkdir(exist_ok=True)
        return folder

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, which marks the run as finished."""
        write_json(self.path / RESULTS, results)


@contextlib.contextmanager
def claim(path: str | Path, identity: dict[str, Any]) -> Iterator[Run]:
    """Takes a folder for the run described by ``identity``.

    Args:
        path: the folder, made if it is not there.
        identity: JSON-able; two runs are the same if these are equal.

    Yields:
        A ``Run``. On an error inside the context everything written is removed again; on an
        interruption it stays, for the same command to start afresh, and so does the log of a
        reconstruction that failed.

    Raises:
        InputError: the folder cannot be written, or holds another run.
    """
    path = Path(path)
    identity = json.loads(json.dumps(jsonable(identity)))
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    stored = _read_owned(path, identity) if path.exists() else None
    if stored is None:
        with _writable(path):
            path.mkdir(parents=True, exist_ok=True)
            _remove_outputs(path)
            write_json(path / IDENTITY, identity)
    try:
        yield Run(path, stored)
    except ReconstructionError:
        raise
    except Exception:
        if stored is None:
            _remove_outputs(path)
            for folder in made:
                with contextlib.suppress(OSError):  # a finished cell of a comparison stays
                    folder.rmdir()
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, so that no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def jsonable(value: Any) -> Any:
    """Turns numpy values into plain ones, and NaN and infinity, which JSON lacks, into None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_owned(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    with _writable(path):
        if not os.access(path, os.W_OK) or not path.is_dir():
            raise InputError(f"workdir {path} is not a folder that can be written")
        names = {entry.name for entry in path.iterdir()}
        if IDENTITY not in names:
            taken = sorted(names & {RESULTS, LOG, PLOTS})
            if taken:
                raise InputError(f"workdir {path} holds {', '.join(taken)} of unknown origin")
            return None
        owner = read_json(path / IDENTITY)
        if owner != identity:
            raise InputError(
                f"workdir {path} holds another run, which differs in "
                f"{', '.join(differences(owner, identity)[:5])}; choose another --workdir"
            )
        return read_json(path / RESULTS) if RESULTS in names else None


def read_json(path: Path) -> Any:
    """Reads JSON; an ``InputError`` names a file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """A line ``name (old there, new here)`` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{prefix} ({old!r} there, {new!r} here)"]


def _remove_outputs(path: Path) -> None:
    shutil.rmtree(path / PLOTS, ignore_errors=True)
    for name in (LOG, RESULTS, IDENTITY):
        (path / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"workdir {path} cannot be written: {error.strerror}") from error
