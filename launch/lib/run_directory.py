"""The directory of one run: who owns it, and files that are either whole or absent.

``run.json`` says which run a directory belongs to from the start, ``blocks/`` holds the finished
blocks (see `block_store`) or ``epochs/`` the last epoch of a fine-tuning, ``log.jsonl`` grows by a
line per block or epoch, ``quantized/`` is the network (see `checkpoint`) and ``results.json`` comes
last. A directory without it holds an unfinished run, which the same command resumes after the last
finished block or epoch.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.storage import archive
from aquant_jax.storage.json_file import differences, jsonable, read_json, write_json

IDENTITY = "run.json"
RESULTS = "results.json"
LOG = "log.jsonl"
PLOTS = "plots"
BLOCKS = "blocks"
EPOCHS = "epochs"
PROGRESS = (BLOCKS, EPOCHS)  # from which an unfinished run resumes
NETWORK = "quantized"
EXPORTS = "export"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
RESTARTS = ("config.preset ", "config.recipe.reconstruction.")  # what a restart may change


class RunDirectory:
    """Writes into a claimed directory.

    Attributes:
        path: of the directory.
        stored: the results of a finished run, or None.
    """

    def __init__(
        self,
        path: Path,
        stored: dict[str, Any] | None,
        restarts: dict[str, Any] | None = None,
    ):
        self.path = path
        self.stored = stored
        self._restarts = restarts

    @property
    def plots(self) -> Path:
        """The folder for plots, made when first asked for."""
        folder = self.path / PLOTS
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def blocks(self) -> Path:
        """The folder for finished blocks."""
        return self.path / BLOCKS

    @property
    def epochs(self) -> Path:
        """The folder for finished epochs."""
        return self.path / EPOCHS

    def begin(self) -> None:
        """To be called when a restart is accepted: the directory is then that of the new run."""
        if self._restarts is not None:
            with _writable(self.path):
                _remove_outputs(self.path)
                write_json(self.path / IDENTITY, self._restarts)

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to the log."""
        with _writable(self.path), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")

    def network(self) -> Path:
        """Where the network goes; one that an interrupted run left there is removed."""
        path = self.path / NETWORK
        shutil.rmtree(path, ignore_errors=True)
        return path

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, which marks the run as finished."""
        with _writable(self.path):
            write_json(self.path / RESULTS, results)


@contextlib.contextmanager
def claim(
    path: str | Path, identity: dict[str, Any], restart: bool = False
) -> Iterator[RunDirectory]:
    """Takes a directory for the run described by ``identity``.

    Args:
        path: the directory, created if necessary.
        identity: JSON-able; two runs are the same if these are equal.
        restart: from blocks of a run, finished or not, whose config may differ in `RESTARTS`; what
            is there stays until `RunDirectory.begin`.

    Yields:
        A ``RunDirectory``. On an error inside the context without any finished block or epoch,
        everything written is removed again. On an interruption, or if a reconstruction failed, it
        stays.

    Raises:
        InputError: the directory cannot be written, holds another run, or one of another version.
    """
    path = Path(path)
    identity = json.loads(json.dumps(jsonable({"layout": archive.LAYOUT, **identity})))
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    stored = _read_owned(path, identity, restart) if path.exists() else None
    if restart:
        with _writable(path, FULL):
            yield RunDirectory(path, None, identity)
        return
    if stored is None:
        with _writable(path):
            path.mkdir(parents=True, exist_ok=True)
            _remove_outputs(path)
            write_json(path / IDENTITY, identity)
    try:
        with _writable(path, FULL):
            yield RunDirectory(path, stored)
    except ReconstructionError:
        raise
    except Exception:
        if stored is None and not _has_progress(path):
            _withdraw(path, created)
        raise


def finished(path: str | Path) -> dict[str, Any]:
    """The identity of the finished run in a directory.

    Raises:
        InputError: there is none, or one of another version.
    """
    path = Path(path)
    for name in (IDENTITY, RESULTS):
        if not (path / name).is_file():
            raise InputError(f"{path} holds no finished run: there is no {name} in it")
    return _read_identity(path)


def _read_owned(path: Path, identity: dict[str, Any], restart: bool) -> dict[str, Any] | None:
    """The results in a directory, if there are any and they are those of this run."""
    with _writable(path):
        if not os.access(path, os.W_OK) or not path.is_dir():
            raise InputError(f"workdir {path} is not a folder that can be written")
        names = {entry.name for entry in path.iterdir()}
        if IDENTITY not in names:
            taken = sorted(names & {RESULTS, LOG, PLOTS, NETWORK, *PROGRESS})
            if taken:
                raise InputError(f"workdir {path} holds {', '.join(taken)} of unknown origin")
            return None
        changed = differences(_read_identity(path), identity, RESTARTS if restart else ())
        if changed:
            may = " (a restart may change recipe.reconstruction only)" if restart else ""
            raise InputError(
                f"workdir {path} holds another run, which differs in "
                f"{', '.join(changed)}{may}; choose another --workdir"
            )
        return read_json(path / RESULTS) if RESULTS in names else None


def _read_identity(path: Path) -> dict[str, Any]:
    identity = read_json(path / IDENTITY)
    layout = identity.get("layout", 1) if isinstance(identity, dict) else None
    if layout != archive.LAYOUT:
        raise InputError(f"{path} has {archive.written_by(layout)}; choose another --workdir")
    return identity


def _has_progress(path: Path) -> bool:
    return any(match for name in PROGRESS for match in (path / name).glob("[0-9]*"))


def _withdraw(path: Path, created: list[Path]) -> None:
    """Removes everything that a run wrote, and the folders that were created for it."""
    _remove_outputs(path)
    (path / IDENTITY).unlink(missing_ok=True)
    for name in PROGRESS:
        shutil.rmtree(path / name, ignore_errors=True)
    for folder in created:
        with contextlib.suppress(OSError):  # a finished cell of a sweep stays
            folder.rmdir()


def _remove_outputs(path: Path) -> None:
    """Removes the outputs of a run, but neither its blocks nor its identity."""
    for name in (PLOTS, NETWORK, EXPORTS):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (LOG, RESULTS):
        (path / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _writable(path: Path, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Turns errors of the system, or `only` those of these numbers, into an InputError."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        raise InputError(f"workdir {path} cannot be written: {error.strerror}") from error
