"""The processes of a quantization on a mesh of several: all take the same decisions.

Each of them makes the same call. What one of them reads from a disk, or finds wrong, the others
cannot see, so they exchange it before they go on. The first process writes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from aquant_jax.errors import InputError, SharedError
from aquant_jax.reconstruction.block_store import (
    SHARED,
    BlockResult,
    BlockStore,
    open_block_store,
    read_block_store,
)
from aquant_jax.reconstruction.devices import read, several_processes
from aquant_jax.storage.json_file import differences, jsonable

PACKAGE = Path(__file__).parents[1]
Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def name_of(process: int, host: str) -> str:
    """A process in messages."""
    return f"process {process} on {host}"


def exchange(value: Any) -> list[Any]:
    """The JSON values of all processes, by process; all call this together."""
    data = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.array([len(data)]))[:, 0]
    width = 1 << int(sizes.max() - 1).bit_length()  # few shapes, each of which is compiled
    rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(width), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def together(step: Callable[[], Result], several: bool | None = None) -> Result:
    """The result of a step that every process takes, in which none waits for another.

    Args:
      step: to take.
      several: whether there are several processes; None means those of the mesh in force.

    Raises:
      InputError: the step raises one on some process, which the message names, or on all.
    """
    if not (several_processes() if several is None else several):
        return step()
    result, message = None, None
    try:
        result = step()
    except InputError as error:
        message = str(error)
    hosts, messages = zip(*exchange([socket.gethostname(), message]), strict=True)
    for process, text in enumerate(messages):
        if text is not None:
            alike = len(set(messages)) == 1
            raise SharedError(text if alike else f"{name_of(process, hosts[process])}: {text}")
    return result  # type: ignore[return-value]


def check_same(call: dict[str, Any]) -> None:
    """InputError unless all processes make the same call, such as a `fingerprint`, of one code."""
    mine = {"call": jsonable(call), "code": code(), "host": socket.gethostname()}
    (first, *others) = exchange(mine)
    for process, other in enumerate(others, 1):
        host = other.pop("host")
        changed = differences({**first, "host": None}, {**other, "host": None})
        if changed:
            fields = ", ".join(line.removeprefix("call.") for line in changed)
            raise SharedError(
                f"{name_of(process, host)} makes another call than process 0 on "
                f"{first['host']}: it differs in {fields}"
            )


def code() -> str:
    """SHA-256 of the Python files of the library."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class SharedBlockStore:
    """The block store of several processes: the first writes, and all read, or none.

    Args:
      store: of this process; that of the first process holds the folder.

    Raises:
      InputError: see `BlockStore`, on any process; one does not see what the first has written.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def read(self, index: int) -> BlockResult | None:
        """See `BlockStore.read`."""
        return self._read(functools.partial(self._store.read, index))

    def read_progress(self, index: int, like: Any) -> Any:
        """See `BlockStore.read_progress`."""
        return self._read(functools.partial(self._store.read_progress, index, like))

    def write(self, index: int, block: BlockResult) -> None:
        """See `BlockStore.write`."""
        block = jax.tree.map(read, block)
        together(lambda: self._store.write(index, block) if is_first() else None)

    def write_progress(self, index: int, step: int, progress: Any) -> None:
        """See `BlockStore.write_progress`."""
        progress = jax.tree.map(read, progress)
        together(lambda: self._store.write_progress(index, step, progress) if is_first() else None)

    def _read(self, reading: Callable[[], Result | None]) -> Result | None:
        """What every process reads, if the first finds anything."""
        found = together(reading)
        first_has = exchange(found is not None)[0]
        return together(lambda: self._checked(found)) if first_has else None

    def _checked(self, found: Result | None) -> Result:
        if found is None:
            raise InputError(f"{self._store.path} lacks what process 0 sees there; {SHARED}")
        return found


@contextlib.contextmanager
def open_blocks(
    folder: str | Path | None, restart_from: int | None, call: Callable[[], dict[str, Any]]
) -> Iterator[BlockStore | SharedBlockStore | None]:
    """`open_block_store` for the processes of the mesh in force."""
    own = functools.partial(open_block_store, folder, restart_from, call)
    if folder is None or not several_processes():
        with own() as store:
            yield store
        return
    with contextlib.ExitStack() as stack:
        held = together(lambda: stack.enter_context(own()) if is_first() else None)
        # The others look when the first has written: a network file system keeps what they saw.
        yield SharedBlockStore(together(lambda: held or read_block_store(folder, call())))
