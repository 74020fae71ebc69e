"""Finished blocks of a quantization on disk, from which the same call resumes bit for bit.

Each block is an archive, whole or absent (see `storage.archive`). ``fingerprint.json`` beside them
identifies the call that they belong to.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import InputError
from aquant_jax.graph.subgraph import extract_subgraph, signature
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerState, skeletons
from aquant_jax.plan.network import Network, describe
from aquant_jax.reconstruction.report import BlockReport
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import differences, jsonable, read_json, write_json

FINGERPRINT = "fingerprint.json"
OLD_FINGERPRINT = "run.json"  # its name in layout 1
# Fields that a restart may change: how blocks are learned, and the name of the preset.
LEARNING = ("recipe.reconstruction.", "recipe.preset ")
CURVES = ("loss_curve", "propagated")  # fields of a report
NUMBERS = ("start_error", "final_error", "seconds")


class BlockResult(NamedTuple):
    """The result of one block.

    Attributes:
      layers: deployed, by weight path.
      activations: quantizers of the tensors first read in this block, by key.
      report: how its reconstruction went.
    """

    layers: dict[str, LayerState]
    activations: dict[str, ActivationQuantizer]
    report: BlockReport


def fingerprint(net: Network, calibration: Any, seed: int, compiler: Compiler) -> dict[str, Any]:
    """Everything that the bits of a quantization depend on, JSON-able; arrays by SHA-256.

    ``network`` covers blocks and equations; ``constants`` are the arrays that it closes over.
    """
    everything = signature(net.graph, extract_subgraph(net.graph, (), net.graph.outputs))
    return jsonable(
        {
            "layout": archive.LAYOUT,
            "network": hashlib.sha256(f"{describe(net)}\n{everything}".encode()).hexdigest(),
            "constants": _digest(list(net.graph.constants.values())),
            "weights": _digest(net.variables),
            "calibration": _digest(calibration),
            "valid_mask": _digest(net.valid_mask),
            "recipe": net.recipe.to_dict(),
            "seed": seed,
            "backend": compiler.backend.name,
            **environment(),
        }
    )


class BlockStore:
    """The finished blocks of one call, in a folder.

    Args:
      path: the folder, created if necessary.
      call: its `fingerprint`.
      restart_from: remove this block and all later ones; the call may then differ in `LEARNING`.

    Raises:
      InputError: the folder holds the blocks of another call (it lists the fields that differ),
        fewer blocks than `restart_from`, or cannot be written.
    """

    def __init__(
        self, path: Path, call: Mapping[str, Any], restart_from: int | None = None
    ) -> None:
        self.path = path
        known = path / FINGERPRINT
        old = path / OLD_FINGERPRINT
        if old.exists() and "convolution" in read_json(old):
            raise InputError(f"{path} holds blocks of {archive.written_by(1)}")
        owner = read_json(known) if known.exists() else None
        if owner is not None:
            _check_owner(path, owner, call, restart_from)
        try:
            if restart_from is not None:
                self._forget(restart_from)
            path.mkdir(parents=True, exist_ok=True)
            if owner != call:
                write_json(known, call)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error

    def read(self, index: int) -> BlockResult | None:
        """The block of that number, if it is finished.

        Raises:
          InputError: a file of it is damaged.
        """
        folder = self._folder(index)
        if not folder.exists():
            return None
        stored = archive.read(folder)
        metadata, report = stored.metadata, stored.metadata["report"]
        layers = skeletons(metadata["borders"])
        empty = ActivationQuantizer(jnp.zeros(0), jnp.zeros(0))
        activations = dict.fromkeys(metadata["activations"], empty)
        curves = {name: stored.arrays[name] for name in CURVES}
        numbers = {name: float(stored.arrays[name]) for name in NUMBERS}
        layers, activations = archive.fill((layers, activations), stored.arrays)
        report = BlockReport(**report | curves | numbers)
        return BlockResult(layers, activations, report._replace(layers=tuple(report.layers)))

    def write(self, index: int, block: BlockResult) -> None:
        """Keeps a block.

        Raises:
          InputError: the folder cannot be written; earlier blocks stay unchanged.
        """
        report = block.report._asdict()
        # As arrays: JSON has neither NaN nor infinity.
        arrays = {name: np.asarray(report.pop(name)) for name in CURVES + NUMBERS}
        metadata = {
            "borders": {path: list(layer.border) for path, layer in block.layers.items()},
            "activations": list(block.activations),
            "report": report,
        }
        arrays |= archive.flatten((block.layers, block.activations))
        archive.write(self._folder(index), arrays, jsonable(metadata))

    def _folder(self, index: int) -> Path:
        return self.path / f"{index:03d}"

    def _forget(self, first: int) -> None:
        count = 0
        while self._folder(count).exists():
            count += 1
        if not 0 <= first <= count:
            raise InputError(f"restart from block {first}: {self.path} has {count} finished blocks")
        rest = [p for p in self.path.glob("[0-9]*") if p.name.isdecimal() and int(p.name) >= first]
        for folder in sorted(rest, key=lambda p: -int(p.name)):  # a gap would hide those behind it
            shutil.rmtree(folder)


def open_block_store(
    folder: str | Path | None,
    restart_from: int | None,
    net: Network,
    calibration: Any,
    seed: int,
    compiler: Compiler,
) -> BlockStore | None:
    """The finished blocks of a call of `quantize`; None where it names no folder.

    Raises:
      InputError: see `BlockStore`; a restart without a folder.
    """
    if folder is not None:
        return BlockStore(Path(folder), fingerprint(net, calibration, seed, compiler), restart_from)
    if restart_from is not None:
        raise InputError(f"restart_from is {restart_from}, but resume is None")
    return None


def _check_owner(
    path: Path, owner: Mapping[str, Any], call: Mapping[str, Any], restart_from: int | None
) -> None:
    changed = differences(owner, call, () if restart_from is None else LEARNING)
    if changed:
        may = "" if restart_from is None else " (a restart may change recipe.reconstruction only)"
        raise InputError(
            f"{path} holds the blocks of another run, which differs in {', '.join(changed)}{may}"
        )


def _digest(tree: Any) -> str:
    """SHA-256 of the paths, dtypes, shapes and bytes of the arrays of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
