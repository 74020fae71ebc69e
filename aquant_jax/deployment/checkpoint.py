"""What is deployed, as a folder: packed state and the program that runs it.

The program is StableHLO (`jax.export`) over the state and a batch of any size, so that a restored
network needs neither the code of the model nor a pickle.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import export

from aquant_jax.arithmetic import packing
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.deployment.stablehlo import (
    Exported,
    check_targets,
    export_program,
    serialize,
    state_of,
)
from aquant_jax.errors import InputError
from aquant_jax.layers.fake_quant import LayerSpec, skeletons
from aquant_jax.recipe import Recipe
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import jsonable

VERSION = 1  # of the layout
PROGRAM = "program.stablehlo.z"
PARTS = ("codes", "grids", "borders", "biases", "static")


class Sizes(NamedTuple):
    """Bytes of a network.

    Attributes:
      floating: folded, in the dtypes of its variables, float32 where it is quantized.
      codes: packed weight codes, and the weights of float layers.
      grids: scales and zero points of weights, grids of activations.
      borders: border coefficients.
      biases: float32.
      static: other arrays that the network reads, such as embeddings.
    """

    floating: int
    codes: int
    grids: int
    borders: int
    biases: int
    static: int

    @property
    def packed(self) -> int:
        """Bytes of what is saved, without container and program."""
        return self.codes + self.grids + self.borders + self.biases + self.static

    def __str__(self) -> str:
        share = 100 * self.borders / (self.packed - self.borders)
        listed = ", ".join(f"{name} {getattr(self, name):,}" for name in PARTS)
        return (
            f"float {self.floating:,} bytes, packed {self.packed:,} "
            f"({self.floating / self.packed:.1f} times smaller): {listed}; "
            f"borders add {share:.2f}%"
        )


def sizes(quantized: Quantized) -> Sizes:
    """Bytes of a network by what they hold."""
    arrays, bits, _ = _encode(quantized)
    count: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, array in arrays.items():
        size = packing.packed_size(array.size, bits[name]) if name in bits else array.nbytes
        count[_kind(name)] += size
    elements = sum(layer.codes.size for layer in quantized.layers.values())
    return Sizes(4 * elements + count["biases"] + count["static"], **count)


def summary(quantized: Quantized) -> Sizes:
    """Prints and returns the sizes of a network."""
    found = sizes(quantized)
    print(found)
    return found


def save(quantized: Quantized, path: str | Path, inputs: Any = None) -> None:
    """Saves a network into a folder, from which `restore` gives the same codes and outputs.

    Args:
      quantized: what `quantize` made.
      path: of the folder, which must not be there.
      inputs: pytree of arrays or ``jax.ShapeDtypeStruct`` with a leading sample axis, any size of
        which the saved program takes; those of the calibration set if it is None. A network that
        cannot be traced with a symbolic number of samples (one that asks for ``len(x)``, say) is
        traced with theirs, and runs other numbers in batches of so many.

    Raises:
      InputError: the folder is there or cannot be written, the network cannot be traced, calls
        what is no part of XLA (which `restore` would refuse), or returns a pytree without bytes.
    """
    arrays, bits, exponents = _encode(quantized)
    program = quantized.program
    if isinstance(program, Exported):
        exported = program.program
    else:
        exported = export_program(quantized, inputs)
    facts = {
        "layout": VERSION,
        "recipe": quantized.recipe.to_dict(),
        "layers": [spec._asdict() for spec in quantized.specs],
        "borders": {path: list(own.border) for path, own in quantized.layers.items()},
        "tensors": list(quantized.tensors),
        "static": list(quantized.static),
        "exponents": exponents,
        **environment(),
    }
    check_targets(path, exported)
    files = {PROGRAM: zlib.compress(serialize(exported), 9)}
    archive.write(Path(path), arrays, jsonable(facts), files, bits)


def restore(path: str | Path) -> Quantized:
    """Restores what `save` saved; nothing of it can run code but as an XLA program.

    Raises:
      InputError: no such folder, a damaged file (named), another layout, or a program that calls
        anything but XLA.
    """
    stored = archive.read(Path(path))
    facts = stored.facts
    if facts.get("layout") != VERSION:
        raise InputError(f"{path} has layout {facts.get('layout')}; this version reads {VERSION}")
    program = export.deserialize(bytearray(zlib.decompress(stored.files[PROGRAM])))
    check_targets(path, program)
    none = jnp.zeros(0)
    skeleton = (
        skeletons(facts["borders"]),
        dict.fromkeys(facts["tensors"], TensorState(none, none)),
        dict.fromkeys(facts["static"], none),
    )
    arrays = {n: _decode(n, a, facts["exponents"].get(n, 0)) for n, a in stored.arrays.items()}
    layers, tensors, static = archive.fill(skeleton, arrays)
    specs = tuple(LayerSpec(**spec) for spec in facts["layers"])
    return Quantized(layers, tensors, static, Exported(program), specs, Recipe(**facts["recipe"]))


def _encode(quantized: Quantized):
    """Arrays as they are stored, bits of the packed ones, exponents of the borders."""
    specs = {spec.path: spec for spec in quantized.specs}
    bits = {}
    for path, layer in quantized.layers.items():
        if (own := specs[path].weight_bits) is not None:
            names = archive.flatten(({path: layer},))
            bits |= {n: own for n in names if n.endswith((".codes", ".zero_point"))}
    arrays, exponents = {}, {}
    for name, array in state_of(quantized).items():
        host = np.asarray(array)
        if _kind(name) == "borders":
            host, exponents[name] = packing.encode(host, quantized.recipe.border_format)
        elif name.endswith(".zero_point"):
            host = host.astype(np.uint8)
        arrays[name] = host
    return arrays, bits, exponents


def _decode(name: str, array: np.ndarray, exponent: int) -> np.ndarray:
    if _kind(name) == "borders":
        return packing.decode(array, exponent)
    return array.astype(np.float32) if name.endswith(".zero_point") else array


def _kind(name: str) -> str:
    """What an array of `state_of` holds."""
    if name.startswith("[2]"):
        return "static"
    if name.startswith("[1]"):
        return "grids"
    for kind, end in (("codes", ".codes"), ("biases", ".bias")):
        if name.endswith(end):
            return kind
    return "borders" if ".border[" in name else "grids"
