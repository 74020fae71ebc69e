"""Folders that are whole or absent, and in which a flipped byte is told before anything is read.

A folder holds one orbax array ``payload`` (the bytes of every array, one after the other),
``index.json`` (which array lies where, and what the caller wants to say about them), further files
by name, and ``manifest.json`` with the SHA-256 of them all, itself included. One array and not one
each, because orbax spends some 340 bytes on every array.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from aquant_jax.arithmetic.packing import pack, packed_size, unpack
from aquant_jax.errors import InputError, reason

MANIFEST = "manifest.json"
INDEX = "index.json"
ARRAYS = "arrays"
PAYLOAD = "payload"


class Stored(NamedTuple):
    """What a folder holds.

    Attributes:
      arrays: by name.
      facts: what is said about them, as from JSON.
      files: further ones, by name.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    files: dict[str, bytes]


def write(
    path: Path,
    arrays: Mapping[str, Any],
    facts: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    bits: Mapping[str, int] | None = None,
) -> None:
    """Writes a folder through a temporary one beside it, which is renamed when all is on the disk.

    Args:
      path: of the folder, which must not be there.
      arrays: by name.
      facts: JSON-able, about the arrays.
      files: further ones, by name.
      bits: of the arrays (uint8) that are packed: 2 means four values a byte.

    Raises:
      InputError: the folder is there, or cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} is there already; nothing was written")
    temporary = path.with_name(f".{path.name}.partial")
    bits = bits or {}
    host = {name: np.asarray(array) for name, array in arrays.items()}
    index = [[n, str(a.dtype), list(a.shape), bits.get(n)] for n, a in host.items()]
    parts = [pack(a, bits[n]) if n in bits else _bytes(a) for n, a in host.items()]
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        payload = {PAYLOAD: np.concatenate([np.zeros(0, np.uint8), *parts])}
        _checkpointer().save((temporary / ARRAYS).absolute(), args=ocp.args.PyTreeSave(payload))
        text = json.dumps({"arrays": index, "facts": facts}, allow_nan=False)
        for name, content in {INDEX: text.encode(), **(files or {})}.items():
            (temporary / name).write_bytes(content)
        (temporary / MANIFEST).write_text(_manifest(_digests(temporary)))
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{path} cannot be written: {reason(error)}") from error


def read(path: Path) -> Stored:
    """Reads a folder, after a look at every byte of it.

    Raises:
      InputError: it is no such folder, or a file of it is missing, altered or not ours.
    """
    check(path)
    content = json.loads((path / INDEX).read_text())
    payload, position, arrays = read_payload(path), 0, {}
    for name, dtype, shape, bits in content["arrays"]:
        count, kind = int(np.prod(shape)), jnp.dtype(dtype)
        size = packed_size(count, bits) if bits else count * kind.itemsize
        part = payload[position : position + size]
        values = unpack(part, count, bits) if bits else np.frombuffer(part.tobytes(), kind)
        arrays[name] = values.reshape(shape)
        position += size
    own = {MANIFEST, INDEX}
    others = [p for p in path.iterdir() if p.is_file() and p.name not in own]
    return Stored(arrays, content["facts"], {p.name: p.read_bytes() for p in others})


def read_payload(path: Path) -> np.ndarray:
    """The bytes of all arrays: uint8, with orbax alone."""
    return np.asarray(_checkpointer().restore((path / ARRAYS).absolute())[PAYLOAD])


def check(path: Path) -> None:
    """Compares every file of a folder with its checksum.

    Raises:
      InputError: as `read`.
    """
    manifest = path / MANIFEST
    try:
        text = manifest.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no checkpoint: {MANIFEST}: {reason(error)}") from error
    try:
        expected = json.loads(text)["sha256"]
        whole = text == _manifest(expected)
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{manifest} is damaged: it does not have the checksum it states")
    try:
        found = _digests(path)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {reason(error)}") from error
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{path / name} is missing")
        if name not in expected:
            raise InputError(f"{path / name} does not belong to this checkpoint")
        if found[name] != expected[name]:
            raise InputError(
                f"{path / name} is damaged: its SHA-256 is {found[name][:16]}, "
                f"not {expected[name][:16]}"
            )


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path."""
    return {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A pytree of `tree`'s structure with the `arrays` that `flatten` named."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    found = [jnp.asarray(arrays[jax.tree_util.keystr(path)]) for path, _ in leaves]
    return jax.tree.unflatten(treedef, found)


def sizes(path: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by relative name."""
    return {str(p.relative_to(path)): p.stat().st_size for p in _files(path)}


def _checkpointer() -> ocp.Checkpointer:
    # Packed codes do not compress, and a size on disk that can be reckoned is worth more.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if not p.is_dir())


def _digests(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in _files(path)
        if p != path / MANIFEST
    }


def _manifest(digests: Mapping[str, str]) -> str:
    own = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digests, "own": own}, indent=1, sort_keys=True) + "\n"


def _sync(path: Path) -> None:
    """Waits until a folder is on the disk, so that a power cut leaves it whole or absent too."""
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
        _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
