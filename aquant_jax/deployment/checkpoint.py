"""Saved networks: packed state and the program that runs it, in one archive.

The program is StableHLO (`jax.export`) over the state and a batch of any size, so that a restored
network needs neither the code of the model nor a pickle.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from aquant_jax.arithmetic import packing
from aquant_jax.arithmetic.border import GRANULARITIES, get_phi
from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS, ActivationQuantizer
from aquant_jax.deployment.quantized import Quantized, check_quantized
from aquant_jax.deployment.sizes import PARTS, Sizes
from aquant_jax.deployment.stablehlo import (
    Exported,
    check_program,
    export_program,
    serialize,
    state_of,
    with_state,
)
from aquant_jax.deployment.states import stacks_of
from aquant_jax.errors import InputError, to_path
from aquant_jax.graph.ir import Unquantized
from aquant_jax.layers.fake_quant import LayerSpec, LayerState, skeletons
from aquant_jax.plan.coverage import coverage
from aquant_jax.recipe import Recipe
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import differences, jsonable
from aquant_jax.storage.parsing import malformed, record
from aquant_jax.terminal import show

PROGRAM = "program.stablehlo.z"
MOST_PROGRAM_BYTES = 2**31  # a flatbuffer is no longer


def sizes(quantized: Quantized) -> Sizes:
    """Bytes of a network, by the part that holds them."""
    quantized = quantized.on_host()
    arrays, _ = _encode(quantized)
    count: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, role in leaf_roles(quantized).items():
        array = arrays[name]
        packed = role.packed_bits and packing.packed_size(array.size, role.packed_bits)
        count[role.part] += packed or array.nbytes
    elements = sum(layer.codes.size for layer in quantized.layers.values())
    return Sizes(4 * elements + count["biases"] + count["constants"], **count)


def summary(quantized: Quantized) -> Sizes:
    """Prints the sizes of a network and the weighted ops that stay float, and returns the sizes.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> variables = {"kernel": np.ones((4, 3), np.float32)}
    >>> network = aq.quantize(apply, variables, np.eye(4, dtype=np.float32), aq.recipes.nearest())
    >>> aq.summary(network).floating  # doctest: +ELLIPSIS
    float 60 bytes, packed 39 (1.5 times smaller): codes 12, ...
    1 of 1 weighted ops quantized
    60
    """
    check_quantized(quantized)
    found = sizes(quantized)
    show(found)
    print(coverage(quantized.specs, quantized.unquantized))
    return found


@jax.transfer_guard("allow")
def save(quantized: Quantized, path: str | Path, inputs: Any = None) -> None:
    """Saves a network to a folder; `restore` gives the same codes and outputs, bit for bit.

    >>> import tempfile
    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> samples = np.eye(4, dtype=np.float32)
    >>> network = aq.quantize(apply, {"kernel": samples}, samples, aq.recipes.nearest(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     aq.save(network, f"{folder}/network")
    ...     restored = aq.restore(f"{folder}/network")
    >>> np.array_equal(restored(samples), network(samples))
    True

    Args:
      quantized: from `quantize`. The saved program is XLA's alone, whatever the backend.
      path: of the folder, which must not exist.
      inputs: pytree of arrays or ``jax.ShapeDtypeStruct`` with a leading sample axis, any size of
        which the saved program takes; those of the calibration set if it is None. A network that
        cannot be traced with a symbolic number of samples (one that asks for ``len(x)``, say) is
        traced with the number in `inputs`, and runs others in batches of that size.

    Raises:
      InputError: the folder exists or cannot be written, the network cannot be traced, calls
        anything but XLA (which `restore` would refuse), or returns a pytree of a user's class.
    """
    check_quantized(quantized)
    path = to_path("path", path)
    program, stacks = quantized.program, list(map(stacks_of, quantized.states))
    if isinstance(program, Exported):
        exported = program.program
    else:
        exported = export_program(quantized.with_backend(None), inputs)
    check_program(path, exported)
    program_bytes = serialize(exported)
    quantized = quantized.on_host()
    arrays, exponents = _encode(quantized)
    metadata = {
        "recipe": quantized.recipe.to_dict(),
        "layers": [spec._asdict() for spec in quantized.specs],
        "borders": {path: list(layer.border) for path, layer in quantized.layers.items()},
        "activations": list(quantized.activations),
        "constants": list(quantized.constants),
        "stacks": stacks,
        "unquantized": [list(op) for op in quantized.unquantized],
        "exponents": exponents,
        "program_bytes": len(program_bytes),
        **environment(),
    }
    files = {PROGRAM: zlib.compress(program_bytes, 9)}
    archive.write(path, arrays, jsonable(metadata), files, _packed_bits(quantized))


@jax.transfer_guard("allow")
def restore(path: str | Path) -> Quantized:
    """Restores a saved network. Nothing in it can run code, except as an XLA program.

    The function needs no code of the model, and the example of `save` restores one.

    >>> import aquant_jax as aq
    >>> try:
    ...     aq.restore("missing")
    ... except aq.InputError as error:
    ...     print(error)
    missing is not a checkpoint: manifest.json: No such file or directory

    Raises:
      InputError: no such folder, a damaged or malformed file (named), another layout, or a program
        that calls anything but XLA, or the host or other devices.
    """
    path = to_path("path", path)
    stored = archive.read(path)
    if PROGRAM not in stored.files:
        raise InputError(f"{path} is not a saved network: it has no {PROGRAM}")
    with malformed(path / PROGRAM):
        program = _program(stored.files[PROGRAM], stored.metadata.get("program_bytes"))
    check_program(path / PROGRAM, program.program)
    with malformed(path / archive.INDEX):
        network = _network(stored, program)
    with malformed(path / PROGRAM):
        program.check_signature()
    return network


def _program(compressed: bytes, size: Any) -> Exported:
    """A program from its file, which decompresses to `size` bytes if it is intact."""
    if type(size) is not int or not 0 < size <= MOST_PROGRAM_BYTES:
        raise ValueError(f"{archive.INDEX} declares program_bytes {size!r}")
    stream = zlib.decompressobj()
    content = stream.decompress(compressed, size + 1)
    if len(content) != size or not stream.eof or stream.unused_data:
        found = "more" if len(content) > size else len(content)
        raise ValueError(f"it holds {found} bytes, {archive.INDEX} declares program_bytes {size}")
    program = Exported(export.deserialize(bytearray(content)))
    state, _ = program.arguments
    if not isinstance(state, dict) or program.program.has_vjp():
        raise ValueError("it takes no state by name, or has a derivative, a program of its own")
    return program


def _network(stored: archive.Stored, program: Exported) -> Quantized:
    """The network of an archive, whose parts must match each other."""
    metadata, empty = stored.metadata, jnp.zeros(0)
    activations = dict.fromkeys(metadata["activations"], ActivationQuantizer(empty, empty))
    specs = tuple(_spec(fields, activations) for fields in metadata["layers"])
    if sorted(spec.path for spec in specs) != sorted(metadata["borders"]):
        raise ValueError(f"layers {[s.path for s in specs]}, borders {list(metadata['borders'])}")
    unfilled = Quantized(
        skeletons(metadata["borders"]),
        activations,
        dict.fromkeys(metadata["constants"], empty),
        program,
        specs,
        Recipe(**metadata["recipe"]),
        unquantized=tuple(Unquantized(*map(str, op)) for op in metadata.get("unquantized", ())),
    )
    roles, exponents = leaf_roles(unfilled), metadata["exponents"]
    borders = {name: int for name, role in roles.items() if role.part == "borders"}
    if {name: type(exponent) for name, exponent in exponents.items()} != borders:
        raise TypeError(f"exponents is {exponents!r}; it must have an int for each of {[*borders]}")
    arrays = {
        name: _decode(roles[name], array, exponents.get(name, 0))
        for name, array in stored.arrays.items()
    }
    network = with_state(unfilled, arrays).with_stacks(metadata.get("stacks", ((), (), ())))
    state, _ = program.arguments
    differ = [
        *differences(_avals(state), _avals(state_of(network))),
        *differences(_packed_bits(unfilled), stored.bits),
    ]
    if differ:
        raise ValueError(f"arrays do not match layers and {PROGRAM}: {differ[0]}")
    return network


def _spec(fields: Mapping[str, Any], activations: Container[str]) -> LayerSpec:
    """A layer from its metadata, checked."""
    spec = record(LayerSpec, fields)
    get_phi(spec.phi)
    bits = range(MIN_BITS, MAX_BITS + 1)
    quantizes = spec.act_bits in bits and spec.weight_bits in (None, *bits)
    reads = spec.tensor is None or spec.tensor in activations
    known = spec.kind in ("conv", "dense", "experts") and spec.border_granularity in GRANULARITIES
    if not known or not quantizes or not reads:
        raise ValueError(f"layer {spec}")
    return spec


def _avals(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in state.items()}


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


def _packed_bits(quantized: Quantized) -> dict[str, int]:
    """Bits of the arrays that are packed, by name."""
    roles = leaf_roles(quantized)
    return {name: role.packed_bits for name, role in roles.items() if role.packed_bits}


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
