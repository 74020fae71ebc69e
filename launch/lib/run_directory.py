"""The directory of one run: who owns it, and files that are either whole or absent.

``run.json`` says which run a directory belongs to from the start, ``blocks/`` holds the finished
blocks (see `block_store`) or ``epochs/`` the last epoch of a fine-tuning, ``log.jsonl`` grows by a
line per block or epoch, ``quantized/`` is the network (see `checkpoint`) and ``results.json`` comes
last. A directory without it holds an unfinished run, which the same command resumes after the last
finished block or epoch. One process at a time holds the directory (see `folder_lock`).

Nothing is removed before the run is accepted (`RunDirectory.begin`), and then only what a file of
the run lists: its manifest, the reports of its exports, and the plots in its results.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.reconstruction.block_store import MAY_CHANGE
from aquant_jax.storage import archive
from aquant_jax.storage.folder_lock import hold
from aquant_jax.storage.json_file import differences, jsonable, read_json, write_json
from aquant_jax.storage.ownership import archive_files, check_files, check_unclaimed, remove_files

IDENTITY = "run.json"
RESULTS = "results.json"
LOG = "log.jsonl"
LAYERS = "layers.json"  # what a report shows of the layers
PAGE = "report.html"
PLOTS = "plots"
BLOCKS = "blocks"
EPOCHS = "epochs"
PROGRESS = (BLOCKS, EPOCHS)  # from which an unfinished run resumes
NETWORK = "quantized"
EXPORTS = "export"
REPORT = "report.json"  # of an export: the bytes of its files, and how it compares
CHECKPOINT = "checkpoint"  # of a fine-tuning
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# What `block_store.MAY_CHANGE` says, in a config.
RESTARTS = ("config.preset ", "config.recipe.reconstruction.", "config.augment ")


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
        """Called when a run is accepted: the outputs of an unfinished or replaced one go.

        Raises:
            InputError: files of unknown origin stand among them.
        """
        with _writable(self.path):
            _remove_outputs(self.path)
            if self._restarts is not None:
                write_json(self.path / IDENTITY, self._restarts)

    def log(self, record: dict[str, Any]) -> None:
        """Appends one line to the log."""
        with _writable(self.path), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")

    @property
    def network(self) -> Path:
        """The folder for the network."""
        return self.path / NETWORK

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, which marks the run as finished, with the names of its plots."""
        folder = self.path / PLOTS
        plots = sorted(archive.sizes(folder)) if folder.is_dir() else []
        with _writable(self.path):
            write_json(self.path / RESULTS, {**results, PLOTS: plots})


@contextlib.contextmanager
def claim(
    path: str | Path, identity: dict[str, Any], restart: bool = False
) -> Iterator[RunDirectory]:
    """Takes a directory for the run described by ``identity``, and holds it.

    Args:
        path: the directory, created if necessary.
        identity: JSON-able; two runs are the same if these are equal.
        restart: from blocks of a run, finished or not, whose config may differ in `RESTARTS`; what
            is there stays until `RunDirectory.begin`.

    Yields:
        A ``RunDirectory``. On an error inside the context without results or any finished block,
        epoch or cell, everything written is removed again. On an interruption, or if a
        reconstruction failed, it stays.

    Raises:
        InputError: the directory cannot be written, is held by another process, holds another run,
            one of another version, or files of unknown origin.
    """
    path = Path(path)
    identity = json.loads(json.dumps(jsonable({"layout": archive.LAYOUT, **identity})))
    check = functools.partial(_read_owned, path, identity, restart)
    with hold(path, check) as results:
        new, stored = not (path / IDENTITY).exists(), None if restart else results
        try:
            with _writable(path, FULL):
                if new:
                    write_json(path / IDENTITY, identity)
                yield RunDirectory(path, stored, identity if restart else None)
        except ReconstructionError:
            raise
        except Exception:
            if new and not _has_progress(path):
                _withdraw(path)
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
        if not os.path.lexists(path):
            if restart:
                raise InputError(f"workdir {path} does not exist: there is no run to restart")
            return None
        if not os.access(path, os.W_OK) or not path.is_dir():
            raise InputError(f"workdir {path} is not a folder that can be written")
        check_unclaimed(path, IDENTITY)
        if not (path / IDENTITY).exists():
            if restart:
                raise InputError(f"workdir {path} is empty: there is no run to restart")
            return None
        changed = differences(_read_identity(path), identity, RESTARTS if restart else ())
        if changed:
            may = f" ({MAY_CHANGE})" if restart else ""
            raise InputError(
                f"workdir {path} holds another run, which differs in "
                f"{', '.join(changed)}{may}; choose another --workdir"
            )
        return _read_results(path)


def _read_identity(path: Path) -> dict[str, Any]:
    identity = read_json(path / IDENTITY)
    if not isinstance(identity, dict):
        raise InputError(f"{path / IDENTITY} is damaged: it holds {identity!r}, not an object")
    layout = identity.get("layout", 1)
    if layout != archive.LAYOUT:
        raise InputError(f"{path} has {archive.written_by(layout)}; choose another --workdir")
    return identity


def _read_results(path: Path) -> dict[str, Any] | None:
    if not (path / RESULTS).exists():
        return None
    results = read_json(path / RESULTS)
    if not isinstance(results, dict):
        raise InputError(f"{path / RESULTS} is damaged: it holds {results!r}, not an object")
    return results


def _has_progress(path: Path) -> bool:
    """Whether results, a block, an epoch, or anything of a cell is there."""
    kept = [path.glob(f"{name}/[0-9]*") for name in PROGRESS]
    cells = [path.glob(f"{depth}/{IDENTITY}") for depth in ("*", "*/*")]
    return (path / RESULTS).exists() or any(itertools.chain(*kept, *cells))


def _withdraw(path: Path) -> None:
    """Removes everything that a run wrote into a directory that was empty before."""
    for name in (PLOTS, NETWORK, EXPORTS, CHECKPOINT, *PROGRESS):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (LOG, LAYERS, PAGE, RESULTS, IDENTITY):
        (path / name).unlink(missing_ok=True)


def _remove_outputs(path: Path) -> None:
    """Removes the outputs of a run, but neither its blocks nor its identity.

    Nothing is removed where files of unknown origin stand among what is replaced.
    """
    files = {path / NETWORK: archive_files(path / NETWORK)}
    files |= {report.parent: exported_files(report.parent) for report in _reports(path)}
    files[path / PLOTS] = (_read_results(path) or {}).get(PLOTS, [])  # others may stand there
    shutil.rmtree(path / f".{NETWORK}.partial", ignore_errors=True)  # of a process that was killed
    for folder, names in files.items():
        remove_files(folder, names)
    with contextlib.suppress(OSError):
        (path / EXPORTS).rmdir()
    for name in (LOG, LAYERS, PAGE, RESULTS):
        (path / name).unlink(missing_ok=True)


def _reports(path: Path) -> list[Path]:
    return list((path / EXPORTS).glob(f"*/{REPORT}"))


def exported_files(folder: Path) -> list[str]:
    """The names of the files of an export, to be removed; none where it is absent.

    Raises:
        InputError: there is no report in it, or files that the report does not list.
    """
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    listed = report.get("bytes", {}) if isinstance(report, dict) else {}
    names = [*listed, REPORT] if isinstance(listed, dict) else []
    if folder.is_dir():
        check_files(folder, names)
    return names


@contextlib.contextmanager
def _writable(path: Path, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Turns errors of the system, or `only` those of these numbers, into an InputError."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        raise InputError(f"workdir {path} cannot be written: {error.strerror}") from error
