"""Folders of users are left alone: what is removed is what a list says is ours."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from aquant_jax.errors import InputError
from aquant_jax.storage import manifest
from aquant_jax.storage.folder_lock import LOCK
from aquant_jax.storage.parsing import printable


def check_unclaimed(folder: Path, owner: str) -> None:
    """Refuse a folder that holds anything although it lacks the file that says whose it is.

    Args:
      folder: may be absent.
      owner: the name of that file.

    Raises:
      InputError: it holds files of unknown origin; the message names the first of them.
    """
    if not folder.is_dir() or (folder / owner).exists():
        return
    # A lock, and half of an owner, are left by a process that was killed.
    found = {entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{owner}.")}
    if unknown := sorted(found - {LOCK}):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"{folder} holds {printable(unknown[0])}{more} of unknown origin: there is no {owner} "
            "in it; choose an empty or a new folder"
        )


def archive_files(folder: Path) -> list[str]:
    """The names of the files of an archive, to be removed; none where it is absent.

    Raises:
      InputError: it lacks its manifest, or holds files that this does not list.
    """
    if not folder.exists():
        return []
    names = [*manifest.listed(folder), manifest.MANIFEST]
    check_files(folder, names)
    return names


def check_files(folder: Path, names: Collection[str]) -> None:
    """Refuse a folder that holds other files than those of these names.

    Raises:
      InputError: it does; the message names the first of them.
    """
    if unknown := sorted(manifest.sizes(folder).keys() - set(names)):
        raise InputError(
            f"{folder / printable(unknown[0])} is of unknown origin; move it elsewhere: "
            f"{folder} is to be replaced"
        )


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Remove the files of a folder that have these names, and then what is empty of it."""
    if not folder.is_dir():
        return
    for name in manifest.sizes(folder).keys() & set(names):
        (folder / name).unlink()
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (*sorted(folders, reverse=True), folder):
        with contextlib.suppress(OSError):
            path.rmdir()
