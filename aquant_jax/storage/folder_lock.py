"""One process a folder: a lock that ends with its process.

The lock is ``flock`` on the file ``.lock`` in the folder. On a local file system it excludes every
other process of the machine. On NFS, Linux passes it to the server as a byte-range lock: it
excludes other machines too, unless the folder is mounted with ``nolock`` or ``local_lock``. Where
the file system has no locks at all, a warning says so, and nothing is excluded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from absl import logging

from aquant_jax.errors import InputError, reason

LOCK = ".lock"
Result = TypeVar("Result")
ATTEMPTS = 100
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUseError(InputError):
    """Another process holds the folder; the message names it."""


@contextlib.contextmanager
def hold(folder: Path, check: Callable[[], Result]) -> Iterator[Result]:
    """A context in which no other process, and no other thread, holds the folder.

    The folder and its parents are created if necessary. Those that are empty at the end, and were
    created here, are removed again.

    Args:
      folder: the folder.
      check: raises an InputError where the folder belongs to something else. It is called before
        the folder is touched, and again when it is held.

    Yields:
      The result of the second call of `check`.

    Raises:
      InputError: by `check`; the folder cannot be written.
      FolderInUseError: it is held already (the message names the process and its host).
    """
    check()
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        with lock(folder / LOCK, folder):
            yield check()
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def lock(file: Path, owner: Path) -> Iterator[None]:
    """A context in which no other process, and no other thread, holds the file.

    Args:
      file: created here, with the folders above it, and removed at the end.
      owner: what it stands for, named in messages.

    Raises:
      InputError: it cannot be written.
      FolderInUseError: it is held already (the message names by which process).
    """
    try:
        descriptor = _acquire(file, owner)
    except OSError as error:
        raise InputError(f"{owner} cannot be written: {reason(error)}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: see `_is_current`
        os.close(descriptor)


def _acquire(file: Path, owner: Path) -> int:
    """The descriptor of the locked file, which says who holds it."""
    while True:
        try:
            # Closed in child programs, so that the lock ends with this process.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # at first, or its last holder has removed the empty folder
            _make(file.parent)
            continue
        try:
            _flock(descriptor, owner)
            if _is_current(descriptor, file):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _make(folder: Path) -> None:
    """Creates a folder, which other holders may remove while it is made."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return folder.mkdir(parents=True, exist_ok=True)
    return folder.mkdir(parents=True, exist_ok=True)  # a broken link, for instance


def _flock(descriptor: int, owner: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise FolderInUseError(
            f"{owner} is in use by {holder}; wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logging.warning(
            "%s: its file system has no locks (%s); let no other process use this folder",
            owner, error.strerror,
        )  # fmt: skip


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the locked file still has that name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
