"""Archives: folders that are complete or absent, and whose every byte is checked before use.

An archive holds one orbax array ``payload`` (the bytes of all arrays), ``index.json`` (the layout
version, the position of each array, and metadata), further files by name, and ``manifest.json``
with the SHA-256 of every file, itself included. The arrays share one orbax array because orbax
takes about 340 bytes for each.
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
LAYOUT = 2  # version of archives written now; layout 1 used other names
WRITTEN_BY = {1: "aquant-jax 0.1.0"}


class Stored(NamedTuple):
    """The contents of an archive.

    Attributes:
      arrays: by name.
      metadata: about the arrays, as from JSON.
      files: further files, by name.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    files: dict[str, bytes]


def write(
    path: Path,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    bits: Mapping[str, int] | None = None,
) -> None:
    """Write an archive.

    All files are written to a temporary folder beside `path`, which is then renamed.

    Args:
      path: a folder that does not exist.
      arrays: by name.
      metadata: JSON-able, about the arrays.
      files: contents of further files, by name.
      bits: of the arrays (uint8) that are packed: 2 means four values a byte.

    Raises:
      InputError: the folder exists, or cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} is there already; nothing was written")
    temporary = path.with_name(f".{path.name}.partial")
    payload, index = _payload(arrays, bits or {})
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        _write_payload(temporary, payload)
        content = {"layout": LAYOUT, "arrays": index, "metadata": metadata}
        text = json.dumps(content, allow_nan=False)
        for name, content in {INDEX: text.encode(), **(files or {})}.items():
            (temporary / name).write_bytes(content)
        (temporary / MANIFEST).write_text(_manifest(_digests(temporary)))
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{path} cannot be written: {reason(error)}") from error


def _write_payload(path: Path, payload: np.ndarray) -> None:
    tree = ocp.args.PyTreeSave({PAYLOAD: payload})
    _checkpointer().save((path / ARRAYS).absolute(), args=tree)


def _payload(
    arrays: Mapping[str, Any], bits: Mapping[str, int]
) -> tuple[np.ndarray, list[list[Any]]]:
    """The bytes of all arrays, and for each its name, dtype, shape and bits (None if unpacked)."""
    host = {name: np.asarray(array) for name, array in arrays.items()}
    index = [[n, str(a.dtype), list(a.shape), bits.get(n)] for n, a in host.items()]
    parts = [pack(a, bits[n]) if n in bits else _bytes(a) for n, a in host.items()]
    return np.concatenate([np.zeros(0, np.uint8), *parts]), index


def read(path: Path) -> Stored:
    """Read an archive, after checking every byte of it.

    Raises:
      InputError: the folder is not an archive, has another layout, or has a file that is missing,
        altered or unknown.
    """
    check(path)
    content = json.loads((path / INDEX).read_text())
    layout = content.get("layout", 1)
    if layout != LAYOUT:
        raise InputError(f"{path} has {written_by(layout)}")
    payload, position, arrays = read_payload(path), 0, {}
    for name, dtype, shape, bits in content["arrays"]:
        count, kind = int(np.prod(shape)), jnp.dtype(dtype)
        size = packed_size(count, bits) if bits else count * kind.itemsize
        part = payload[position : position + size]
        values = unpack(part, count, bits) if bits else np.frombuffer(part.tobytes(), kind)
        arrays[name] = values.reshape(shape)
        position += size
    others = [p for p in path.iterdir() if p.is_file() and p.name not in (MANIFEST, INDEX)]
    return Stored(arrays, content["metadata"], {p.name: p.read_bytes() for p in others})


def written_by(layout: Any) -> str:
    """A layout, the version that wrote it, and the layout that is read, for messages.

    >>> written_by(1)
    'layout 1, written by aquant-jax 0.1.0; this version reads layout 2'
    """
    writer = WRITTEN_BY.get(layout, "another version of aquant-jax")
    return f"layout {layout}, written by {writer}; this version reads layout {LAYOUT}"


def read_payload(path: Path) -> np.ndarray:
    """The bytes of all arrays, uint8, read with orbax and not checked."""
    return np.asarray(_checkpointer().restore((path / ARRAYS).absolute())[PAYLOAD])


def check(path: Path) -> None:
    """Compare every file of an archive with its checksum.

    Raises:
      InputError: the folder is not an archive, or has a file that is missing, altered or unknown.
    """
    manifest = path / MANIFEST
    try:
        text = manifest.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no checkpoint: {MANIFEST}: {reason(error)}") from error
    try:
        expected = json.loads(text)["sha256"]
        intact = text == _manifest(expected)
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise InputError(f"{manifest} is damaged: it does not have the checksum it states")
    try:
        digests = _digests(path)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {reason(error)}") from error
    for name in sorted(expected.keys() | digests.keys()):
        if name not in digests:
            raise InputError(f"{path / name} is missing")
        if name not in expected:
            raise InputError(f"{path / name} does not belong to this checkpoint")
        if digests[name] != expected[name]:
            raise InputError(
                f"{path / name} is damaged: its SHA-256 is {digests[name][:16]}, "
                f"not {expected[name][:16]}"
            )


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path."""
    return {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """A pytree with the structure of `tree` and the `arrays` that `flatten` named."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    filled = [jnp.asarray(arrays[jax.tree_util.keystr(path)]) for path, _ in leaves]
    return jax.tree.unflatten(treedef, filled)


def sizes(path: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by relative name."""
    return {str(p.relative_to(path)): p.stat().st_size for p in _files(path)}


def _checkpointer() -> ocp.Checkpointer:
    # Packed codes do not compress, and without compression the size on disk is predictable.
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
    """The text of a manifest, with a digest of the digests as its own checksum."""
    checksum = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digests, "own": checksum}, indent=1, sort_keys=True) + "\n"


def _sync(path: Path) -> None:
    """Wait until a folder is on the disk: after a power cut it is complete or absent."""
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
