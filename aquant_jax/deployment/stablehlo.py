"""Quantized networks as StableHLO (`jax.export`): programs that do not need the model's code."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from aquant_jax.deployment.quantized import Quantized, Traced
from aquant_jax.errors import InputError, reason
from aquant_jax.storage import archive

PLATFORMS = ("cpu", "cuda")
# The custom calls that a program may make; a callback would run an address of this process.
TARGETS = frozenset({"shape_assertion", "Sharding", "mhlo.topk", "cu_threefry2x32_ffi"})


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """Runs a restored network."""

    program: export.Exported

    @property
    def inputs(self) -> Any:
        """Shapes and dtypes of a batch."""
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.program.in_avals]
        (_, batch), _ = jax.tree.unflatten(self.program.in_tree, avals)
        return batch

    @property
    def batch(self) -> int | None:
        """Samples that the program takes at a time; None: any number."""
        samples = samples_of(self.inputs)
        return samples if isinstance(samples, int) else None

    def __call__(self, quantized: Quantized, x: Any) -> Any:
        if quantized.backend is not None:
            raise InputError(
                f"a restored network runs the program that it was saved with, "
                f"not {quantized.backend}: choose the backend where it is exported"
            )
        run = functools.partial(self.program.call, state_of(quantized))
        try:
            return in_batches(run, x, samples_of(self.inputs))
        except ValueError as error:
            said = " ".join(str(error).split())[:300]
            raise InputError(f"the saved program does not take this input: {said}") from error


def export_program(quantized: Quantized, inputs: Any = None, **options: Any) -> export.Exported:
    """``(state, batch) -> outputs`` as StableHLO for CPU and CUDA, with any number of samples.

    Args:
      quantized: from `quantize`.
      inputs: see `checkpoint.save`.
      **options: of `jax.export.export`.

    Raises:
      InputError: see `checkpoint.save`.
    """
    program = quantized.program
    if not isinstance(program, Traced):
        raise InputError("a restored network has its program already")
    shapes = program.inputs if inputs is None else inputs
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state_of(quantized))
    run = jax.jit(functools.partial(_run, quantized))
    symbolic, fixed = batches_of(shapes, quantized.recipe.reconstruction.batch_size)
    try:
        return export.export(run, platforms=PLATFORMS, **options)(state, symbolic)
    except Exception as error:  # a network may do anything with a size
        first = error
    try:
        exported = export.export(run, platforms=PLATFORMS, **options)(state, fixed)
    except Exception as error:
        raise InputError(f"the network cannot be exported: {reason(error)}") from error
    if any(out.shape[:1] != (samples_of(fixed),) for out in exported.out_avals):
        raise InputError(
            f"the network cannot be traced with a symbolic number of samples ({reason(first)}), "
            f"nor run in batches: not all of its outputs have a leading sample axis"
        ) from first
    return exported


def batches_of(shapes: Any, size: int) -> tuple[Any, Any]:
    """Inputs of these shapes for a symbolic number of samples, and for at most `size`."""
    numbers = export.symbolic_shape("samples")[0], min(samples_of(shapes), size)

    def batch(samples: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((samples, *a.shape[1:]), a.dtype), shapes
        )

    return batch(numbers[0]), batch(numbers[1])


def samples_of(inputs: Any) -> Any:
    """The number of samples of a batch; an integer if it is known."""
    return jax.tree.leaves(inputs)[0].shape[0]


def in_batches(run: Callable, x: Any, size: Any) -> Any:
    """Outputs for any number of samples of a function that takes `size` at a time.

    The last batch is filled up with the first samples. A `size` that is not an integer (symbolic)
    takes any number.
    """
    if not isinstance(size, int):
        return run(x)
    count = samples_of(x)
    if not count:
        raise ValueError(f"an empty batch; the program takes {size} samples at a time")
    rows = [np.arange(start, start + size) % count for start in range(0, count, size)]
    outputs = [run(jax.tree.map(lambda a, index=index: a[index], x)) for index in rows]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *outputs)


def self_contained(quantized: Quantized, inputs: Any = None, **options: Any) -> export.Exported:
    """``batch -> outputs`` as StableHLO that holds the network, weight codes as uint8.

    Args:
      quantized: from `quantize` or `restore`.
      inputs: see `checkpoint.save`; those of its program for a restored network.
      **options: of `jax.export.export`.

    Raises:
      InputError: see `checkpoint.save`.
    """
    program = quantized.program
    if not isinstance(program, Exported):
        program = Exported(export_program(quantized, inputs, **options))
    run = jax.jit(functools.partial(program.program.call, state_of(quantized)))
    return export.export(run, platforms=PLATFORMS, **options)(program.inputs)


def check_targets(path: str | Path, program: export.Exported) -> None:
    """Check the custom calls of a program.

    Raises:
      InputError: it calls anything but `TARGETS`.
    """
    named = re.findall(r'custom_call @(?:"([^"]*)"|([\w.$]+))', program.mlir_module())
    called = {quoted or bare for quoted, bare in named}
    if called - TARGETS:
        raise InputError(
            f"{path}: the program calls {', '.join(sorted(called - TARGETS))}, which is not "
            f"part of XLA; nothing of it was run"
        )


def serialize(program: export.Exported) -> bytes:
    """The bytes of a program.

    Raises:
      InputError: its outputs are a pytree of a class of the user's, which has no bytes.
    """
    try:
        return bytes(program.serialize())
    except ValueError as error:
        raise InputError(f"the network cannot be saved: {reason(error)}") from error


def state_of(quantized: Quantized) -> dict[str, jax.Array]:
    """The arrays of a network by their paths in ``(layers, activations, constants)``."""
    return archive.flatten(_parts(quantized))


def with_state(quantized: Quantized, state: Mapping[str, Any]) -> Quantized:
    """The network with the arrays of `state`, named as `state_of` names them."""
    layers, activations, constants = archive.fill(_parts(quantized), state)
    return dataclasses.replace(
        quantized, layers=layers, activations=activations, constants=constants
    )


def _run(quantized: Quantized, state: dict[str, jax.Array], batch: Any) -> Any:
    return with_state(quantized, state)(batch)


def _parts(quantized: Quantized) -> tuple[Any, Any, Any]:
    return quantized.layers, quantized.activations, quantized.constants
