"""Saved networks: packed state and the program that runs it, in one archive.

The program is StableHLO (`jax.export`) over the state and a batch of any size, so that a restored
network needs neither the code of the model nor a pickle.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import export

from aquant_jax.arithmetic import packing
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.deployment.stablehlo import (
    Exported,
    check_targets,
    export_program,
    serialize,
    state_of,
    with_state,
)
from aquant_jax.layers.fake_quant import LayerSpec, LayerState, skeletons
from aquant_jax.recipe import Recipe
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import jsonable

PROGRAM = "program.stablehlo.z"
PARTS = ("codes", "quantizers", "borders", "biases", "constants")


class Sizes(NamedTuple):
    """Bytes of a network.

    Attributes:
      floating: folded, in the dtypes of its variables, float32 where it is quantized.
      codes: packed weight codes, and the weights of float layers.
      quantizers: scales and zero points of weights and activations.
      borders: border coefficients.
      biases: float32.
      constants: other arrays that the network reads, such as embeddings.
    """

    floating: int
    codes: int
    quantizers: int
    borders: int
    biases: int
    constants: int

    @property
    def packed(self) -> int:
        """Bytes of the saved arrays, without container and program."""
        return self.codes + self.quantizers + self.borders + self.biases + self.constants

    def __str__(self) -> str:
        share = 100 * self.borders / (self.packed - self.borders)
        listed = ", ".join(f"{name} {getattr(self, name):,}" for name in PARTS)
        return (
            f"float {self.floating:,} bytes, packed {self.packed:,} "
            f"({self.floating / self.packed:.1f} times smaller): {listed}; "
            f"borders add {share:.2f}%"
        )


def sizes(quantized: Quantized) -> Sizes:
    """Bytes of a network, by the part that holds them."""
    arrays, _ = _encode(quantized)
    count: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, role in leaf_roles(quantized).items():
        array = arrays[name]
        packed = role.packed_bits and packing.packed_size(array.size, role.packed_bits)
        count[role.part] += packed or array.nbytes
    elements = sum(layer.codes.size for layer in quantized.layers.values())
    return Sizes(4 * elements + count["biases"] + count["constants"], **count)


def summary(quantized: Quantized) -> Sizes:
    """Prints and returns the sizes of a network."""
    found = sizes(quantized)
    print(found)
    return found


def save(quantized: Quantized, path: str | Path, inputs: Any = None) -> None:
    """Saves a network to a folder; `restore` gives the same codes and outputs, bit for bit.

    Args:
      quantized: from `quantize`.
      path: of the folder, which must not exist.
      inputs: pytree of arrays or ``jax.ShapeDtypeStruct`` with a leading sample axis, any size of
        which the saved program takes; those of the calibration set if it is None. A network that
        cannot be traced with a symbolic number of samples (one that asks for ``len(x)``, say) is
        traced with the number in `inputs`, and runs others in batches of that size.

    Raises:
      InputError: the folder exists or cannot be written, the network cannot be traced, calls
        anything but XLA (which `restore` would refuse), or returns a pytree of a user's class.
    """
    arrays, exponents = _encode(quantized)
    program = quantized.program
    if isinstance(program, Exported):
        exported = program.program
    else:
        exported = export_program(quantized, inputs)
    metadata = {
        "recipe": quantized.recipe.to_dict(),
        "layers": [spec._asdict() for spec in quantized.specs],
        "borders": {path: list(layer.border) for path, layer in quantized.layers.items()},
        "activations": list(quantized.activations),
        "constants": list(quantized.constants),
        "exponents": exponents,
        **environment(),
    }
    check_targets(path, exported)
    files = {PROGRAM: zlib.compress(serialize(exported), 9)}
    roles = leaf_roles(quantized)
    bits = {name: role.packed_bits for name, role in roles.items() if role.packed_bits}
    archive.write(Path(path), arrays, jsonable(metadata), files, bits)


def restore(path: str | Path) -> Quantized:
    """Restores a saved network. Nothing in it can run code, except as an XLA program.

    Raises:
      InputError: no such folder, a damaged file (named), another layout, or a program that calls
        anything but XLA.
    """
    stored = archive.read(Path(path))
    metadata = stored.metadata
    program = export.deserialize(bytearray(zlib.decompress(stored.files[PROGRAM])))
    check_targets(path, program)
    empty = jnp.zeros(0)
    activations = dict.fromkeys(metadata["activations"], ActivationQuantizer(empty, empty))
    unfilled = Quantized(
        skeletons(metadata["borders"]),
        activations,
        dict.fromkeys(metadata["constants"], empty),
        Exported(program),
        tuple(LayerSpec(**spec) for spec in metadata["layers"]),
        Recipe(**metadata["recipe"]),
    )
    roles, exponents = leaf_roles(unfilled), metadata["exponents"]
    arrays = {
        name: _decode(roles[name], array, exponents.get(name, 0))
        for name, array in stored.arrays.items()
    }
    return with_state(unfilled, arrays)


@dataclasses.dataclass(frozen=True)
class LeafRole:
    """The part of a network that an array belongs to, and how it is stored.

    Attributes:
      part: one of `PARTS`.
      whole: whether it holds whole numbers, which are stored as uint8.
      packed_bits: bits of each number where they are packed, else None.
    """

    part: str
    whole: bool = False
    packed_bits: int | None = None


def leaf_roles(quantized: Quantized) -> dict[str, LeafRole]:
    """The role of every array of `stablehlo.state_of`, under the same names."""
    bits = {spec.path: spec.weight_bits for spec in quantized.specs}
    layer_state: Any = LayerState  # here of roles, not of arrays
    layers = {
        path: layer_state(
            codes=LeafRole("codes", packed_bits=bits[path]),
            scale=LeafRole("quantizers"),
            zero_point=LeafRole("quantizers", whole=True, packed_bits=bits[path]),
            bias=LeafRole("biases"),
            border=dict.fromkeys(layer.border, LeafRole("borders")),
        )
        for path, layer in quantized.layers.items()
    }
    quantizer: Any = ActivationQuantizer
    roles = quantizer(LeafRole("quantizers"), LeafRole("quantizers", whole=True))
    activations = dict.fromkeys(quantized.activations, roles)
    constants = dict.fromkeys(quantized.constants, LeafRole("constants"))
    return archive.flatten((layers, activations, constants))


def _encode(quantized: Quantized) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Arrays in their stored form, and exponents of the borders."""
    arrays, exponents = {}, {}
    roles = leaf_roles(quantized)
    for name, array in state_of(quantized).items():
        host = np.asarray(array)
        if roles[name].part == "borders":
            host, exponents[name] = packing.encode(host, quantized.recipe.border_format)
        elif roles[name].whole:
            host = host.astype(np.uint8)
        arrays[name] = host
    return arrays, exponents


def _decode(role: LeafRole, array: np.ndarray, exponent: int) -> np.ndarray:
    if role.part == "borders":
        return packing.decode(array, exponent)
    return array.astype(np.float32) if role.whole else array
