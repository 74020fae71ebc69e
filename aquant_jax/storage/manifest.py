"""The manifest of a folder: the SHA-256 of each of its files, and of itself.

It proves that the files are those that were written, not who wrote them: whoever alters a file can
write the manifest anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from aquant_jax.errors import InputError, reason
from aquant_jax.storage.parsing import printable

MANIFEST = "manifest.json"


def write_manifest(path: Path) -> None:
    """Write the manifest of a folder that has none yet."""
    (path / MANIFEST).write_text(manifest_of(_digests(path)), encoding="utf-8")


def check(path: Path) -> None:
    """Compare every file of an archive with its checksum.

    Raises:
      InputError: the folder is not an archive, or has a file that is missing, altered or unknown.
    """
    expected = listed(path)
    try:
        digests = _digests(path)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {reason(error)}") from error
    for name in sorted(expected.keys() | digests.keys()):
        file = path / printable(name)
        if name not in digests:
            raise InputError(f"{file} is missing")
        if name not in expected:
            raise InputError(f"{file} does not belong to this checkpoint")
        if digests[name] != expected[name]:
            raise InputError(
                f"{file} is damaged: its SHA-256 is {digests[name][:16]}, not {expected[name][:16]}"
            )


def listed(path: Path) -> dict[str, str]:
    """The SHA-256 of every file that the manifest of a folder names.

    Raises:
      InputError: the folder has no manifest, a damaged one, or anything but files and folders.
    """
    manifest = path / MANIFEST
    try:
        manifest.lstat()  # first, since a wrong folder may hold anything
        _files(path)  # refuses links, devices and FIFOs before any of them is opened
        text = manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a checkpoint: {MANIFEST}: {reason(error)}") from error
    try:
        expected = json.loads(text)["sha256"]
        intact = text == manifest_of(expected) and all(map(str.isprintable, expected.values()))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        intact = False
    if not intact:
        raise InputError(f"{manifest} is damaged: it does not have the checksum it states")
    return expected


def sizes(path: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by relative name."""
    return {str(p.relative_to(path)): p.stat().st_size for p in _files(path)}


def sync(path: Path) -> None:
    """Wait until a folder is on the disk: after a power cut it is complete or absent."""
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
        sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(path: Path) -> list[Path]:
    """The files of a folder, at any depth.

    Raises:
      InputError: it holds a link, which leads elsewhere, or a FIFO or a device, which may block.
    """
    files = []
    for entry in sorted(path.rglob("*")):
        mode = entry.lstat().st_mode
        if stat.S_ISREG(mode):
            files.append(entry)
        elif not stat.S_ISDIR(mode):
            name = path / printable(str(entry.relative_to(path)))
            raise InputError(f"{name} is neither a file nor a folder: {stat.filemode(mode)}")
    return files


def _digests(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): _digest(p) for p in _files(path) if p != path / MANIFEST}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(digests: Any) -> str:
    """The text of a manifest, with a digest of the digests as its own checksum."""
    checksum = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digests, "own": checksum}, indent=1, sort_keys=True) + "\n"
