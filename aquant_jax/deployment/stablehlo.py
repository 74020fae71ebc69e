"""Quantized networks as StableHLO (`jax.export`): programs that do not need the model's code."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import export
from jax.interpreters import mlir

from aquant_jax.deployment.quantized import Quantized, Traced, check_quantized
from aquant_jax.errors import InputError, reason
from aquant_jax.plan.network import batch_shapes, count_samples, in_batches
from aquant_jax.storage import archive
from aquant_jax.storage.parsing import malformed, printable

PLATFORMS = ("cpu", "cuda")
# The custom calls that a program may make; a callback would run an address of this process.
TARGETS = frozenset({"shape_assertion", "Sharding", "mhlo.topk", "cu_threefry2x32_ffi"})
CUSTOM_CALL = "stablehlo.custom_call"
# The dialects of the operations that `jax.export` writes; others reach the machine (llvm, gpu).
DIALECTS = frozenset({"builtin", "func", "stablehlo", "chlo", "sdy"})
# Operations that wait for the host or for other devices, in any dialect.
COMMUNICATION = frozenset(
    {
        "infeed", "outfeed", "send", "recv", "all_gather", "all_reduce", "all_to_all",
        "collective_broadcast", "collective_permute", "cross-replica-sum", "reduce_scatter",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """Runs a restored network."""

    program: export.Exported

    @property
    def arguments(self) -> tuple[Any, Any]:
        """Shapes and dtypes of the state, and of a batch."""
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.program.in_avals]
        (state, batch), _ = jax.tree.unflatten(self.program.in_tree, avals)
        return state, batch

    @property
    def inputs(self) -> Any:
        """Shapes and dtypes of a batch."""
        return self.arguments[1]

    @property
    def batch(self) -> int | None:
        """Samples that the program takes at a time; None: any number."""
        samples = count_samples(self.inputs)
        return samples if isinstance(samples, int) else None

    @functools.cached_property
    def _call(self) -> Callable:
        """The program, which `jax.vmap` runs once for every element."""
        call = jax.custom_jvp(jax.custom_batching.sequential_vmap(self.program.call))

        @call.defjvp
        def _(*_: Any) -> Any:
            raise InputError(
                "a restored network has no gradient: differentiate the one that aq.quantize returns"
            )

        return call

    def check_signature(self) -> None:
        """Raises an error of JAX unless the code of the program has the arguments it declares."""
        if self.program.nr_devices == 1:  # the context of several devices is only known in a call
            state, batch = self.arguments
            traced = jax.jit(self.program.call).trace(state, batch_shapes(batch, self.batch or 1))
            traced.lower(lowering_platforms=tuple(self.program.platforms))

    def __call__(self, quantized: Quantized, x: Any) -> Any:
        if quantized.backend is not None:
            raise InputError(
                f"a restored network runs the program that it was saved with, "
                f"not {quantized.backend}: give the backend to what aq.quantize returns"
            )
        run = functools.partial(self._call, state_of(quantized))
        try:
            return in_batches(run, x, count_samples(self.inputs))
        except ValueError as error:
            said = " ".join(str(error).split())[:300]
            raise InputError(f"the saved program does not take this input: {said}") from error


def export_program(quantized: Quantized, inputs: Any = None, **options: Any) -> export.Exported:
    """``(state, batch) -> outputs`` as StableHLO for CPU and CUDA, with any number of samples.

    Args:
      quantized: from `quantize`.
      inputs: shapes of a batch, as a pytree of arrays or ``jax.ShapeDtypeStruct`` with a leading
        sample axis; those of the calibration set if it is None.
      **options: of `jax.export.export`.

    Raises:
      InputError: a restored network; or the network cannot be traced, neither with a symbolic
        number of samples nor with the number in `inputs`.
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
    if any(out.shape[:1] != (count_samples(fixed),) for out in exported.out_avals):
        raise InputError(
            f"the network cannot be traced with a symbolic number of samples ({reason(first)}), "
            f"nor run in batches: not all of its outputs have a leading sample axis"
        ) from first
    return exported


def batches_of(shapes: Any, size: int) -> tuple[Any, Any]:
    """Inputs of these shapes for a symbolic number of samples, and for at most `size`."""
    symbol = export.symbolic_shape("samples")[0]
    return batch_shapes(shapes, symbol), batch_shapes(shapes, min(count_samples(shapes), size))


def self_contained(quantized: Quantized, inputs: Any = None, **options: Any) -> export.Exported:
    """``batch -> outputs`` as StableHLO that holds the network, weight codes as uint8.

    Args:
      quantized: from `quantize` or `restore`.
      inputs: shapes of a batch, as a pytree of arrays or ``jax.ShapeDtypeStruct`` with a leading
        sample axis; those of the calibration set, or of a restored program, if it is None.
      **options: of `jax.export.export`.

    Raises:
      InputError: the network cannot be traced, neither with a symbolic number of samples nor with
        the number in `inputs`; a saved program does not take `inputs`.
    """
    check_quantized(quantized)
    program = quantized.program
    if not isinstance(program, Exported):
        program = Exported(export_program(quantized, inputs, **options))
    run = jax.jit(functools.partial(program.program.call, state_of(quantized)))
    return export.export(run, platforms=PLATFORMS, **options)(program.inputs)


def check_program(path: Path, program: export.Exported) -> None:
    """Check that a program computes, and does nothing else.

    Args:
      path: of the program, for messages.
      program: it is parsed, not run.

    Raises:
      InputError: it is malformed, calls anything but `TARGETS`, or has an operation of
        `COMMUNICATION` or of a dialect other than `DIALECTS`.
    """
    with malformed(path), mlir.make_ir_context():
        found = _operations(program.mlir_module(serialized=False))
    called = sorted(target for name, target in found if name == CUSTOM_CALL)
    foreign = [target for target in called if target not in TARGETS]
    if foreign:
        raise InputError(
            f"{path}: the program calls {printable(', '.join(foreign))}, which is not part of XLA; "
            f"nothing of it was run"
        )
    names = sorted({name for name, _ in found})
    outside = [name for name in names if not _computes(*name.split(".", 1))]
    if outside:
        raise InputError(
            f"{path}: the program has {printable(', '.join(outside))}, which reaches the host or "
            f"other devices; nothing of it was run"
        )


def _computes(dialect: str, operation: str = "") -> bool:
    return dialect in DIALECTS and operation not in COMMUNICATION


def _operations(module: mlir.ir.Module) -> set[tuple[str, str]]:
    """Names of all operations of a module, at any depth, with the targets of custom calls."""
    found = set()

    def visit(op: mlir.ir.Operation) -> mlir.ir.WalkResult:
        target: Any = op.attributes["call_target_name"] if op.name == CUSTOM_CALL else None
        found.add((op.name, target.value if target else ""))
        return mlir.ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


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
    return archive.flatten(quantized.states)


def with_state(quantized: Quantized, state: Mapping[str, Any]) -> Quantized:
    """The network with the arrays of `state`, named as `state_of` names them."""
    return quantized.with_states(archive.fill(quantized.states, state))


def _run(quantized: Quantized, state: dict[str, jax.Array], batch: Any) -> Any:
    return with_state(quantized, state)(batch)
