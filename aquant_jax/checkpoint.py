"""What is deployed, as a folder: packed state and the program that runs it.

The program is StableHLO (`jax.export`) over the state and a batch of any size, so that a restored
network needs neither the code of the model nor a pickle.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from aquant_jax import packing, store
from aquant_jax.environment import environment
from aquant_jax.errors import InputError
from aquant_jax.layer import LayerSpec, LayerState
from aquant_jax.numerics import TensorState
from aquant_jax.quantized import Quantized, Traced
from aquant_jax.recipe import Recipe
from aquant_jax.workdir import jsonable

VERSION = 1  # of the layout
PROGRAM = "program.stablehlo.z"
PLATFORMS = ("cpu", "cuda")
# What a program may call outside itself; a callback, say, would run an address of this process.
TARGETS = frozenset({"shape_assertion", "Sharding", "mhlo.topk", "cu_threefry2x32_ffi"})
PARTS = ("codes", "grids", "borders", "biases", "static")


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """Runs a restored network."""

    program: export.Exported

    @property
    def batch(self) -> int | None:
        """Samples that the program takes at a time; None: any number."""
        (_, batch), _ = jax.tree.unflatten(self.program.in_tree, self.program.in_avals)
        samples = jax.tree.leaves(batch)[0].shape[0]
        return samples if isinstance(samples, int) else None

    def __call__(self, quantized: Quantized, x):
        if quantized.backend is not None:
            raise InputError(
                f"a restored network runs the program that it was saved with, "
                f"not {quantized.backend}: choose the backend where it is exported"
            )
        run = functools.partial(self.program.call, _state(quantized))
        try:
            return run(x) if self.batch is None else _in_batches(run, x, self.batch)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"the saved program does not take this input: {reason}") from error


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
      InputError: the folder is there or cannot be written, or the network cannot be traced.
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
    files = {PROGRAM: zlib.compress(bytes(exported.serialize()), 9)}
    store.write(Path(path), arrays, jsonable(facts), files, bits)


def restore(path: str | Path) -> Quantized:
    """Restores what `save` saved; nothing of it can run code but as an XLA program.

    Raises:
      InputError: no such folder, a damaged file (named), another layout, or a program that calls
        anything but XLA.
    """
    stored = store.read(Path(path))
    facts = stored.facts
    if facts.get("layout") != VERSION:
        raise InputError(f"{path} has layout {facts.get('layout')}; this version reads {VERSION}")
    program = export.deserialize(bytearray(zlib.decompress(stored.files[PROGRAM])))
    check_targets(path, program)
    none = jnp.zeros(0)
    skeleton = (
        {
            key: LayerState(none, none, none, none, dict.fromkeys(names, none))
            for key, names in facts["borders"].items()
        },
        {key: TensorState(none, none) for key in facts["tensors"]},
        dict.fromkeys(facts["static"], none),
    )
    arrays = {n: _decode(n, a, facts["exponents"].get(n, 0)) for n, a in stored.arrays.items()}
    layers, tensors, static = store.fill(skeleton, arrays)
    specs = tuple(LayerSpec(**spec) for spec in facts["layers"])
    return Quantized(layers, tensors, static, Exported(program), specs, Recipe(**facts["recipe"]))


def export_program(quantized: Quantized, inputs: Any = None, **options) -> export.Exported:
    """``(state, batch) -> outputs`` as StableHLO for CPU and CUDA, with any number of samples.

    Args:
      quantized: what `quantize` made.
      inputs: see `save`.
      **options: of `jax.export.export`.

    Raises:
      InputError: see `save`.
    """
    program = quantized.program
    if not isinstance(program, Traced):
        raise InputError("a restored network has its program already")
    shapes = program.inputs if inputs is None else inputs
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), _state(quantized))
    run = jax.jit(functools.partial(_run, quantized))
    (samples,) = export.symbolic_shape("samples")
    try:
        return export.export(run, platforms=PLATFORMS, **options)(state, _batch(shapes, samples))
    except Exception as error:  # a network may do anything with a size
        size = min(jax.tree.leaves(shapes)[0].shape[0], quantized.recipe.batch_size)
        exported = export.export(run, platforms=PLATFORMS, **options)(state, _batch(shapes, size))
        if any(out.shape[:1] != (size,) for out in exported.out_avals):
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the network cannot be traced with a symbolic number of samples ({reason}), nor "
                f"run in batches: not all of its outputs have a leading sample axis"
            ) from error
        return exported


def _batch(shapes, samples):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((samples, *a.shape[1:]), a.dtype), shapes)


def _in_batches(run, x, size: int):
    """Outputs for any number of samples of what takes `size`; the last batch is filled up."""
    count = jax.tree.leaves(x)[0].shape[0]
    if not count:
        raise ValueError(f"an empty batch; the program takes {size} samples at a time")
    rows = [np.arange(start, start + size) % count for start in range(0, count, size)]
    outputs = [run(jax.tree.map(lambda a, index=index: a[index], x)) for index in rows]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *outputs)


def check_targets(path: str | Path, program: export.Exported) -> None:
    """Looks at what a program calls outside itself.

    Raises:
      InputError: anything but `TARGETS`.
    """
    called = set(re.findall(r"custom_call @([\w.$]+)", program.mlir_module()))
    if called - TARGETS:
        raise InputError(
            f"{path}: the program calls {', '.join(sorted(called - TARGETS))}, which is no "
            f"part of XLA; nothing of it was run"
        )


def _run(quantized: Quantized, state, batch):
    layers, tensors, static = store.fill(_parts(quantized), state)
    return dataclasses.replace(quantized, layers=layers, tensors=tensors, static=static)(batch)


def _parts(quantized: Quantized):
    return quantized.layers, quantized.tensors, quantized.static


def _state(quantized: Quantized) -> dict[str, jax.Array]:
    return store.flatten(_parts(quantized))


def _encode(quantized: Quantized):
    """Arrays as they are stored, bits of the packed ones, exponents of the borders."""
    specs = {spec.path: spec for spec in quantized.specs}
    bits = {}
    for path, layer in quantized.layers.items():
        if (own := specs[path].weight_bits) is not None:
            names = store.flatten(({path: layer},))
            bits |= {n: own for n in names if n.endswith((".codes", ".zero_point"))}
    arrays, exponents = {}, {}
    for name, array in _state(quantized).items():
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
    """What an array of `_state` holds."""
    if name.startswith("[2]"):
        return "static"
    if name.startswith("[1]"):
        return "grids"
    for kind, end in (("codes", ".codes"), ("biases", ".bias")):
        if name.endswith(end):
            return kind
    return "borders" if ".border[" in name else "grids"
