"""Finished blocks of a quantization on disk, from which the same call resumes bit for bit.

Each block is an archive, whole or absent (see `storage.archive`), and states the fingerprint of the
call that learned it. ``fingerprint.json`` beside the blocks identifies the call that they belong to
now, and the calls of those that a restart kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import InputError, reason
from aquant_jax.layers.fake_quant import LayerState, skeletons
from aquant_jax.reconstruction.report import BlockReport, FinetuneReport, Report
from aquant_jax.storage import archive
from aquant_jax.storage.folder_lock import hold
from aquant_jax.storage.json_file import differences, jsonable, read_json, write_json
from aquant_jax.storage.ownership import archive_files, check_unclaimed, remove_files
from aquant_jax.storage.parsing import malformed, record

FINGERPRINT = "fingerprint.json"
OLD_FINGERPRINT = "run.json"  # its name in layout 1
# Fields that a restart may change: how blocks are learned, and the name of the preset.
LEARNING = ("recipe.reconstruction.", "recipe.preset ", "augment ")
SHARED = "the folder must be on a file system that all processes share"
MAY_CHANGE = "a restart may change recipe.reconstruction and augment only"
CURVES = ("loss_curve", "propagated", "held_out_curve")  # fields of a report
NUMBERS = ("start_error", "final_error", "seconds")


class BlockResult(NamedTuple):
    """The result of one block.

    Attributes:
      layers: deployed, by weight path.
      activations: quantizers of the tensors first read in this block, by key.
      report: how its reconstruction went.
      borders: name and granularity of those that were chosen, by weight path.

    That of the whole-network stage, which follows the last block, has all layers and tensors.
    """

    layers: dict[str, LayerState]
    activations: dict[str, ActivationQuantizer]
    report: Report
    borders: Mapping[str, tuple[str, str]] = MappingProxyType({})


class Owner(NamedTuple):
    """The calls that the blocks of a folder belong to, as ``fingerprint.json`` has them.

    Attributes:
      call: the `fingerprint` of the call that goes on.
      kept: for each block that its restart kept, the fingerprint of the call that learned it.
    """

    call: dict[str, Any]
    kept: list[dict[str, Any]]

    def of(self, index: int) -> dict[str, Any]:
        """The fingerprint of the call that learned the block of that number."""
        return self.kept[index] if index < len(self.kept) else self.call


class BlockStore:
    """The finished blocks of one call, in a folder that this process holds.

    Args:
      path: the folder.
      owner: of the folder, as `_read_owner` gives it; None where it is empty.
      call: the `fingerprint` of this call.
      restart_from: remove this block and all later ones; the call may then differ in `LEARNING`.

    Raises:
      InputError: the folder cannot be written, or holds files of unknown origin that a restart
        would remove.
    """

    def __init__(
        self, path: Path, owner: Owner | None, call: dict[str, Any], restart_from: int | None
    ) -> None:
        self.path = path
        self._owner = owner or Owner(call, [])
        if owner is not None and restart_from is not None:
            self._owner = Owner(call, [owner.of(index) for index in range(restart_from)])
        try:
            if restart_from is not None:
                self._forget(restart_from)
            if owner != self._owner:
                write_json(path / FINGERPRINT, self._owner._asdict())
        except OSError as error:
            raise InputError(f"{path} cannot be written: {reason(error)}") from error

    def read(self, index: int) -> BlockResult | None:
        """The block of that number, if it is finished.

        Raises:
          InputError: a file of it is damaged or malformed, or it is a block of another call.
        """
        folder = _folder(self.path, index)
        if not folder.exists():
            return None
        stored = archive.read(folder)
        metadata, arrays = stored.metadata, stored.arrays
        self._check_call(folder, metadata, index)
        with malformed(folder / archive.INDEX):
            layers = skeletons(metadata["borders"])
            empty = ActivationQuantizer(jnp.zeros(0), jnp.zeros(0))
            activations = dict.fromkeys(metadata["activations"], empty)
            kind = FinetuneReport if "held_out_curve" in arrays else BlockReport
            curves = [name for name in CURVES if name in arrays]
            fields = dict(metadata["report"]) | {name: arrays.pop(name) for name in curves}
            fields |= {name: arrays.pop(name).item() for name in NUMBERS}
            fields["layers"] = tuple(fields["layers"])
            if kind is BlockReport:
                fields["candidates"] = tuple(map(tuple, fields.get("candidates", ())))
            report = record(kind, fields)
            layers, activations = archive.fill((layers, activations), arrays)
            chosen = metadata.get("chosen_borders", {})
            borders = {path: (str(name), str(kind)) for path, (name, kind) in chosen.items()}
            return BlockResult(layers, activations, report, borders)

    def write(self, index: int, block: BlockResult) -> None:
        """Keeps a block.

        Raises:
          InputError: the folder cannot be written; earlier blocks stay unchanged.
        """
        report = block.report._asdict()
        # As arrays: JSON has neither NaN nor infinity.
        names = [name for name in CURVES + NUMBERS if name in report]
        arrays = {name: np.asarray(report.pop(name)) for name in names}
        metadata = {
            "borders": {path: list(layer.border) for path, layer in block.layers.items()},
            "activations": list(block.activations),
            "chosen_borders": dict(block.borders),
            "report": report,
            "call": self._owner.of(index),
        }
        arrays |= archive.flatten((block.layers, block.activations))
        archive.write(_folder(self.path, index), arrays, jsonable(metadata))
        self._forget_progress(index)

    def read_progress(self, index: int, like: Any) -> Any:
        """The last progress of the whole-network stage, which follows block ``index - 1``.

        Args:
          index: number of blocks.
          like: a pytree of its structure.

        Returns:
          The pytree, its leaves as arrays, or None where there is none.

        Raises:
          InputError: a file of it is damaged or malformed, or it is that of another call.
        """
        folders = self._progress(index)
        if not folders:
            return None
        folder = folders[-1]
        stored = archive.read(folder)
        self._check_call(folder, stored.metadata, index)
        with malformed(folder / archive.INDEX):
            return archive.fill(like, stored.arrays)

    def write_progress(self, index: int, step: int, progress: Any) -> None:
        """Keeps the progress of the whole-network stage after a step, in place of the last.

        Raises:
          InputError: the folder cannot be written; the last progress stays unchanged.
        """
        folder = self.path / f"{index:03d}-{step:09d}"
        arrays = archive.flatten(progress)
        archive.write(folder, arrays, jsonable({"call": self._owner.of(index)}))
        self._forget_progress(index, keep=folder)

    def _progress(self, first: int) -> list[Path]:
        """Folders of the progress behind the block of that number or a later one."""
        found = self.path.glob("[0-9][0-9][0-9]-[0-9]*")
        return sorted(path for path in found if int(path.name[:3]) >= first)

    def _forget_progress(self, first: int, keep: Path | None = None) -> None:
        for folder in self._progress(first):
            if folder != keep:
                remove_files(folder, archive_files(folder))

    def _check_call(self, folder: Path, metadata: Any, index: int) -> None:
        """InputError unless the call of an archive is that of its block."""
        with malformed(folder / archive.INDEX):
            changed = differences(metadata["call"], self._owner.of(index))
        if changed:
            raise InputError(
                f"{folder} is a block of another run, which differs in {', '.join(changed)}"
            )

    def _forget(self, first: int) -> None:
        rest = [p for p in self.path.glob("[0-9]*") if p.name.isdecimal() and int(p.name) >= first]
        rest.sort(key=lambda p: -int(p.name))  # a gap would hide those behind it
        files = {folder: archive_files(folder) for folder in (*self._progress(0), *rest)}
        for folder, names in files.items():
            remove_files(folder, names)


@contextlib.contextmanager
def open_block_store(
    folder: str | Path | None,
    restart_from: int | None,
    call: Callable[[], dict[str, Any]],
) -> Iterator[BlockStore | None]:
    """The finished blocks of a call of `quantize`, held while it runs; None where it has no folder.

    Args:
      folder: of the blocks.
      restart_from: see `BlockStore`.
      call: gives the `fingerprint` of the call.

    Raises:
      InputError: see `BlockStore`, `_read_owner` and `archive.check_path`; another process holds
        the folder; a restart without a folder.
    """
    if folder is None:
        if restart_from is not None:
            raise InputError(f"restart_from is {restart_from}, but resume is None")
        yield None
        return
    path, identity = Path(folder), call()
    archive.check_path(path)
    with hold(path, functools.partial(_read_owner, path, identity, restart_from)) as owner:
        yield BlockStore(path, owner, identity, restart_from)


def read_block_store(folder: str | Path, call: dict[str, Any]) -> BlockStore:
    """The finished blocks of a call of several processes, another of which holds the folder.

    Raises:
      InputError: see `_read_owner`; the folder is empty here.
    """
    path = Path(folder)
    owner = _read_owner(path, call, None)
    if owner is None:
        raise InputError(f"{path} is empty here, but not for process 0; {SHARED}")
    return BlockStore(path, owner, call, None)


def _read_owner(path: Path, call: dict[str, Any], restart_from: int | None) -> Owner | None:
    """The owner of a folder; None where it is empty.

    Raises:
      InputError: it holds the blocks of another call (the fields that differ are listed), of an
        unknown one or of another layout, or fewer blocks than `restart_from`.
    """
    old, known = path / OLD_FINGERPRINT, path / FINGERPRINT
    if old.exists() and "convolution" in read_json(old):
        raise InputError(f"{path} holds blocks of {archive.written_by(1)}")
    owner = None
    if known.exists():
        with malformed(known):
            owner = record(Owner, read_json(known))
            layout = owner.call["layout"]
            changed = differences(owner.call, call, () if restart_from is None else LEARNING)
        if layout != archive.LAYOUT:
            raise InputError(f"{path} holds blocks of {archive.written_by(layout)}")
        if changed:
            may = "" if restart_from is None else f" ({MAY_CHANGE})"
            raise InputError(
                f"{path} holds the blocks of another run, which differs in "
                f"{', '.join(changed)}{may}"
            )
    else:
        check_unclaimed(path, FINGERPRINT)
    count = 0
    while _folder(path, count).exists():
        count += 1
    if restart_from is not None and not 0 <= restart_from <= count:
        raise InputError(f"restart from block {restart_from}: {path} has {count} finished blocks")
    return owner


def _folder(path: Path, index: int) -> Path:
    return path / f"{index:03d}"
