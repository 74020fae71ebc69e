"""Archives: folders that are complete or absent, and whose every byte is checked before use.

An archive holds one orbax array ``payload`` (the bytes of all arrays), ``index.json`` (the layout
version, the position of each array, and metadata), further files by name, and ``manifest.json``
with the SHA-256 of every file, itself included. The arrays share one orbax array because orbax
takes about 340 bytes for each.

A manifest can be written anew by whoever alters a file. Hence `read` also checks what the files
state (see `parsing`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from logging import LogRecord
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from aquant_jax.arithmetic.packing import pack, packed_size, unpack
from aquant_jax.errors import InputError, reason
from aquant_jax.storage.folder_lock import lock
from aquant_jax.storage.manifest import (
    MANIFEST,
    check,
    sizes,
    sync,
    sync_folder,
    write_manifest,
)
from aquant_jax.storage.parsing import malformed, printable

INDEX = "index.json"
ARRAYS = "arrays"
PAYLOAD = "payload"
LAYOUT = 3  # version of archives written now; earlier ones have other names of fields
WRITTEN_BY = {"1": "aquant-jax 0.1.0", "2": "an earlier aquant-jax 0.2.0.dev0"}
INLINE = 1024  # bytes of a value that tensorstore compresses; longer ones take their own bytes


class Stored(NamedTuple):
    """The contents of an archive.

    Attributes:
      arrays: by name.
      metadata: about the arrays, as from JSON.
      files: further files, by name.
      bits: of the arrays that are packed, by name.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    files: dict[str, bytes]
    bits: dict[str, int]


class Entry(NamedTuple):
    """An array in the index; its bytes follow those of the entry before it.

    Attributes:
      name: of the array.
      dtype: of its elements.
      shape: of the array.
      bits: of each code (uint8) where they are packed, else None.
    """

    name: str
    dtype: str
    shape: list[int]
    bits: int | None

    @property
    def size(self) -> int:
        """Its bytes in the payload."""
        count = math.prod(self.shape)
        if self.bits:
            return packed_size(count, self.bits)
        return count * jnp.dtype(self.dtype).itemsize

    def decode(self, part: np.ndarray) -> np.ndarray:
        """The array from its bytes."""
        if self.bits:
            return unpack(part, math.prod(self.shape), self.bits).reshape(self.shape)
        return np.frombuffer(part.tobytes(), jnp.dtype(self.dtype)).reshape(self.shape)


def write(
    path: Path,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    bits: Mapping[str, int] | None = None,
) -> None:
    """Write an archive.

    All files are written to a temporary folder beside `path`, which is then renamed. A lock beside
    it keeps two processes from writing the same one.

    Args:
      path: a folder that does not exist.
      arrays: by name.
      metadata: JSON-able, about the arrays.
      files: contents of further files, by name.
      bits: of the arrays (uint8) that are packed: 2 means four values a byte.

    Raises:
      InputError: the folder exists, or cannot be written.
    """
    check_path(path)
    if path.exists():
        raise InputError(f"{path} already exists; nothing was written")
    payload, index = _payload(arrays, bits or {})
    content = {"layout": LAYOUT, "arrays": index, "metadata": metadata}
    text = json.dumps(content, allow_nan=False)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with lock(path.with_name(f".{path.name}.lock"), path):
            _remove(temporary)  # of a process that was killed
            temporary.mkdir()
            _write_payload(temporary, payload)
            for name, content in {INDEX: text.encode(), **(files or {})}.items():
                (temporary / name).write_bytes(content)
            write_manifest(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{path} cannot be written: {reason(error)}") from error


def check_path(path: Path) -> None:
    """InputError where orbax or tensorstore would write an archive elsewhere than into `path`.

    Orbax takes a path for a pattern, and tensorstore a backslash for a slash.
    """
    if found := re.search(r"[*?[\\]", str(path.resolve())):
        raise InputError(f"{path} cannot be written: orbax takes no {found[0]!r} in a path")


def _write_payload(path: Path, payload: np.ndarray) -> None:
    tree = ocp.args.PyTreeSave({PAYLOAD: payload})
    logger = logging.get_absl_logger()
    logger.addFilter(_is_not_raised)
    try:
        _checkpointer().save(path.resolve() / ARRAYS, args=tree)
    finally:
        logger.removeFilter(_is_not_raised)


def _is_not_raised(record: LogRecord) -> bool:
    """Whether a record is not one of an exception of orbax's threads, which `save` raises too."""
    return not (record.exc_info and "orbax" in record.pathname)


def _payload(arrays: Mapping[str, Any], bits: Mapping[str, int]) -> tuple[np.ndarray, list[Entry]]:
    """The bytes of all arrays, and the index."""
    host = {name: np.asarray(array) for name, array in arrays.items()}
    index = [Entry(n, str(a.dtype), list(a.shape), bits.get(n)) for n, a in host.items()]
    parts = [pack(a, bits[n]) if n in bits else _bytes(a) for n, a in host.items()]
    return np.concatenate([np.zeros(0, np.uint8), *parts]), index


def read(path: Path) -> Stored:
    """Read an archive, after checking every byte of it.

    Raises:
      InputError: the folder is not an archive, has another layout, or has a file that is missing,
        altered, unknown or malformed.
    """
    check(path)
    index = path / INDEX
    with malformed(index):
        content = json.loads(index.read_text(encoding="utf-8"))
        layout = content.get("layout", 1)
        if type(layout) is not int:
            raise TypeError(f"layout is {layout!r}")
    if layout != LAYOUT:
        raise InputError(f"{path} has {written_by(layout)}")
    with malformed(index):
        entries = [_entry(*fields) for fields in content["arrays"]]
        bits = {entry.name: entry.bits for entry in entries if entry.bits}
        ends = list(itertools.accumulate(entry.size for entry in entries))
        if not isinstance(metadata := content["metadata"], dict):
            raise TypeError(f"metadata is {metadata!r}")
    with malformed(path / ARRAYS):
        payload = read_payload(path, ends[-1] if ends else 0)
    with malformed(index):
        parts = zip(entries, ends, strict=True)
        arrays = {entry.name: entry.decode(payload[end - entry.size : end]) for entry, end in parts}
        if len(arrays) != len(entries):
            raise ValueError(f"{len(entries)} arrays have {len(arrays)} names")
    others = [p for p in path.iterdir() if p.is_file() and p.name not in (MANIFEST, INDEX)]
    return Stored(arrays, metadata, {p.name: p.read_bytes() for p in others}, bits)


def _entry(name: Any, dtype: Any, shape: Any, bits: Any) -> Entry:
    """An entry of an index, checked: JSON has any number, and numpy has dtypes of objects."""
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    number = isinstance(dtype, str) and (
        jnp.issubdtype(jnp.dtype(dtype), np.number) or dtype == "bool"
    )
    packed = type(bits) is int and 1 <= bits <= 8 and dtype == "uint8"
    if not (isinstance(name, str) and whole and number and (packed or bits is None)):
        raise ValueError(f"array {name!r}: dtype {dtype!r}, shape {shape!r}, bits {bits!r}")
    return Entry(name, dtype, shape, bits)


def written_by(layout: Any) -> str:
    """A layout, the version that wrote it, and the layout that is read, for messages.

    >>> written_by(1)
    'layout 1, written by aquant-jax 0.1.0; this version reads layout 3'
    """
    writer = WRITTEN_BY.get(str(layout), "another version of aquant-jax")
    return (
        f"layout {printable(str(layout))}, written by {writer}; this version reads layout {LAYOUT}"
    )


def read_payload(path: Path, size: int | None = None) -> np.ndarray:
    """The bytes of all arrays, uint8, not checked.

    Read with tensorstore, not with orbax, which would take shape, chunks and compression from the
    files, and allocate whatever they state.

    Args:
      path: of the archive.
      size: in bytes; None takes any.

    Raises:
      ValueError: the files hold another number of bytes, or in another form.
    """
    folder = path.resolve() / ARRAYS  # tensorstore takes no ".." in a path
    metadata: dict[str, Any] = {"dtype": "|u1", "compressor": None, "filters": None}
    if size is not None:
        stored = sum(sizes(folder).values())
        if size > stored + INLINE:
            raise ValueError(f"{INDEX} declares {size} bytes, but the files have {stored}")
        metadata |= {"shape": [size], "chunks": [size]}
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    spec = {"driver": "zarr", "kvstore": store, "path": f"{PAYLOAD}/", "metadata": metadata}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path."""
    return {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """A pytree with the structure of `tree` and the `arrays` that `flatten` named.

    Raises:
      ValueError: the names of the arrays are not those of the leaves.
    """
    names = flatten(tree).keys()
    if names != arrays.keys():
        raise ValueError(f"no place or no array for {sorted(names ^ arrays.keys())}")
    return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(arrays[n]) for n in names])


def _checkpointer() -> ocp.Checkpointer:
    # Packed codes do not compress, and without compression the size on disk is predictable.
    # `read_payload` reads no other form.
    process = jax.process_index()  # of several, none waits for another
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, use_ocdbt=True, use_zarr3=False, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
