"""Finished blocks of a quantization on disk, from which the same call goes on, to the same bits.

Each block is a folder that is whole or absent (see `store`); ``run.json`` beside them says which
call they belong to.
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

from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.errors import InputError
from aquant_jax.graph.subgraph import cut, signature
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerState, skeletons
from aquant_jax.plan.network import Network, describe
from aquant_jax.reconstruction.report import BlockReport
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import differences, jsonable, read_json, write_json
from launch.lib.run_directory import IDENTITY

# Fields of a recipe that change how a block is learned, and nothing about what is learned.
HOW = (
    "preset", "steps", "batch_size", "input_mixing", "drop", "settle", "weight_lr", "step_lr",
    "border_lr", "step_schedule", "border_schedule", "border_gain", "border_range",
    "border_warmup", "rounding_weight", "rounding_warmup", "beta_start", "beta_end", "loss_power",
    "init_samples",
)  # fmt: skip
CURVES = ("loss_curve", "propagated")  # fields of a report
NUMBERS = ("start_error", "final_error", "seconds")


class Finished(NamedTuple):
    """What a finished block leaves.

    Attributes:
      layers: deployed, by weight path.
      tensors: grids first read in this block, by key.
      report: how it went.
    """

    layers: dict[str, LayerState]
    tensors: dict[str, TensorState]
    report: BlockReport


def fingerprint(net: Network, calibration, seed: int, compiler: Compiler) -> dict[str, Any]:
    """What the bits of a quantization depend on, JSON-able; weights and samples by SHA-256.

    The network is its units and equations; ``constants`` are arrays that it closes over.
    """
    whole = signature(net.graph, cut(net.graph, (), net.graph.outputs))
    return jsonable(
        {
            "network": hashlib.sha256(f"{describe(net)}\n{whole}".encode()).hexdigest(),
            "constants": _digest(list(net.graph.constants.values())),
            "weights": _digest(net.variables),
            "calibration": _digest(calibration),
            "counted": _digest(net.counted),
            "recipe": net.recipe.to_dict(),
            "seed": seed,
            "convolution": compiler.name,
            **environment(),
        }
    )


class Blocks:
    """The finished blocks of one call, in a folder.

    Args:
      path: the folder, made if it is not there.
      call: its `fingerprint`.
      restart_from: forget this block and those after it; the recipe may then differ in `HOW`.

    Raises:
      InputError: the folder holds the blocks of another call (it lists the fields that differ),
        fewer blocks than `restart_from`, or cannot be written.
    """

    def __init__(self, path: Path, call: Mapping[str, Any], restart_from: int | None = None):
        self.path = path
        known = path / IDENTITY
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

    def read(self, index: int) -> Finished | None:
        """The block of that number, if it is finished.

        Raises:
          InputError: a file of it is damaged.
        """
        folder = self._folder(index)
        if not folder.exists():
            return None
        stored = archive.read(folder)
        facts, report = stored.facts, stored.facts["report"]
        layers = skeletons(facts["borders"])
        tensors = dict.fromkeys(facts["tensors"], TensorState(jnp.zeros(0), jnp.zeros(0)))
        curves = {name: stored.arrays[name] for name in CURVES}
        numbers = {name: float(stored.arrays[name]) for name in NUMBERS}
        layers, tensors = archive.fill((layers, tensors), stored.arrays)
        report = BlockReport(**report | curves | numbers)
        return Finished(layers, tensors, report._replace(layers=tuple(report.layers)))

    def write(self, index: int, block: Finished) -> None:
        """Keeps a block.

        Raises:
          InputError: the folder cannot be written; the blocks before stay as they are.
        """
        report = block.report._asdict()
        # As arrays: JSON has neither NaN nor infinity.
        arrays = {name: np.asarray(report.pop(name)) for name in CURVES + NUMBERS}
        facts = {
            "borders": {path: list(layer.border) for path, layer in block.layers.items()},
            "tensors": list(block.tensors),
            "report": report,
        }
        arrays |= archive.flatten((block.layers, block.tensors))
        archive.write(self._folder(index), arrays, jsonable(facts))

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


def open_blocks(
    folder: str | Path | None,
    restart_from: int | None,
    net: Network,
    calibration,
    seed: int,
    compiler: Compiler,
) -> Blocks | None:
    """The finished blocks of a call of `quantize` in its folder; None where it names none.

    Raises:
      InputError: see `Blocks`; a restart without a folder.
    """
    if folder is not None:
        return Blocks(Path(folder), fingerprint(net, calibration, seed, compiler), restart_from)
    if restart_from is not None:
        raise InputError(f"restart_from is {restart_from}, and resume names no folder of blocks")
    return None


def _check_owner(path: Path, owner, call, restart_from: int | None) -> None:
    changed = differences(owner, call)
    if restart_from is not None:
        fields = {f"recipe.{name}" for name in HOW}
        changed = [line for line in changed if line.split(" ")[0] not in fields]
    if changed:
        may = "" if restart_from is None else " (a restart may change how blocks are learned only)"
        raise InputError(
            f"{path} holds the blocks of another run, which differs in {', '.join(changed)}{may}"
        )


def _digest(tree) -> str:
    """SHA-256 of the paths, dtypes, shapes and bytes of the arrays of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
