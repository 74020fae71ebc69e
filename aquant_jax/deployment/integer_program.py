"""Runs a deployed network in integers: codes pass from layer to layer where `fusion` allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import ActivationQuantizer, fake_quantize
from aquant_jax.deployment.fusion import NEAREST, Fusion, FusionPlan, plan_fusions, reads_codes
from aquant_jax.graph.ir import ALIASES, Atom, Op
from aquant_jax.graph.loops import run_ops
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.layers.backend import Backend
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.epilogue import Codes, Epilogue, Requantization
from aquant_jax.layers.fake_quant import LayerInput, LayerSpec, LayerState, rounding_of
from aquant_jax.layers.integer import convolve_layer, run_deployed_layer
from aquant_jax.plan.block_program import BlockProgram


def run_integers(
    program: BlockProgram,
    layers: Sequence[LayerState],
    activations: Sequence[ActivationQuantizer],
    inputs: BlockInputs,
    backend: Backend,
) -> tuple[Any, ...]:
    """The outputs of a network; the bits of `block_program.forward` with `run_deployed_layer`.

    Args:
      program: the network, or a part of it.
      layers: deployed state of every layer.
      activations: one quantizer per quantized tensor.
      inputs: the values that it reads.
      backend: runs the layers that multiply codes.
    """
    subgraph = program.subgraph
    env = _Values(program, activations)
    env.values.update(zip(subgraph.boundary_inputs, inputs.boundary, strict=True))
    env.values.update(zip(subgraph.model_inputs, inputs.model, strict=True))
    env.values.update(zip(subgraph.constants, inputs.constants, strict=True))
    by_path = {spec.path: layer for spec, layer in zip(program.specs, layers, strict=True)}
    run_op = _Run(program, plan_fusions(program), by_path, backend)
    run_ops(subgraph.ops, env, run_op, subgraph.outputs)
    return tuple(map(env.through, subgraph.outputs))


class _Values:
    """The values of a run, as floats, as codes, or as both."""

    def __init__(self, program: BlockProgram, activations: Sequence[ActivationQuantizer]) -> None:
        self.program = program
        self.activations = activations
        self.values: dict[int, AnyArray] = {}
        self.codes: dict[tuple[int, str], Codes] = {}

    def copy(self) -> _Values:
        """The same values, to which those of a loop's step are added."""
        copied = _Values(self.program, self.activations)
        copied.values, copied.codes = dict(self.values), dict(self.codes)
        return copied

    def quantizer(self, value: int) -> ActivationQuantizer:
        """Of the tensor that `value` is."""
        return self.activations[self.program.tensor_of[value]]

    def bits(self, value: int) -> int:
        """Of that tensor's codes."""
        return self.program.tensors[self.program.tensor_of[value]].bits

    def through(self, atom: Atom) -> Any:
        """The operand of an op that passes a tensor on."""
        return self.values[atom] if isinstance(atom, int) else atom.val

    def read(self, atom: Atom) -> Any:
        """The operand of any other op, which reads quantized tensors rounded to nearest."""
        if not isinstance(atom, int) or atom not in self.program.tensor_of:
            return self.through(atom)
        if (codes := self.codes.get((atom, NEAREST))) is not None:
            return codes.dequantized()
        value = self.values[atom]
        return fake_quantize(value, self.quantizer(atom), self.bits(atom)).astype(value.dtype)

    def residual(self, value: int) -> AnyArray | Codes:
        """`read`, as codes where these are known."""
        return self.codes.get((value, NEAREST)) or self.read(value)


class _Run(NamedTuple):
    """Runs one op."""

    program: BlockProgram
    plan: FusionPlan
    layers: Mapping[str, LayerState]
    backend: Backend

    @property
    def specs(self) -> dict[str, LayerSpec]:
        return {spec.path: spec for spec in self.program.specs}

    def __call__(self, op: Op, env: _Values) -> None:
        fusions = self.plan.fusions
        for out in op.outputs:
            if out in fusions:
                return self._fused(fusions[out], env)
            if out in self.plan.absorbed:
                return None
        if op.layer is not None:
            results = [self._float(op, env)]
        else:
            read = env.through if op.name in ALIASES else env.read
            results = op.call(*map(read, op.inputs))
        env.values.update(zip(op.outputs, results, strict=True))
        return None

    def _float(self, op: Op, env: _Values) -> jax.Array:
        """The output of a layer that does not multiply codes."""
        spec, (out,) = self.specs[op.layer.path], op.outputs
        quantizer = None if spec.tensor is None else env.quantizer(op.x)
        inputs = LayerInput(env.values[op.x], quantizer)
        op = op.bind(env.through)
        y = run_deployed_layer(op, spec, inputs, self.layers[spec.path])
        return y.astype(self.program.avals[out].dtype)

    def _fused(self, fusion: Fusion, env: _Values) -> None:
        op, result = fusion.op, fusion.result
        spec, wanted = self.specs[op.layer.path], self.plan.wanted[result]
        epilogue = Epilogue(
            residual=None if fusion.residual is None else env.residual(fusion.residual),
            low=fusion.low,
            high=fusion.high,
            pool=fusion.pool,
            values=wanted.values,
            requantizations=tuple(self._requantization(result, r, env) for r in wanted.readers),
        )
        results = convolve_layer(
            op, spec, self._activation(op, env), env.quantizer(op.x), self.layers[spec.path],
            epilogue, convolve=self.backend.convolve_codes,
        )  # fmt: skip
        if results.values is not None:
            env.values[result] = results.values.astype(self.program.avals[result].dtype)
        for reader, codes in zip(wanted.readers, results.codes, strict=True):
            env.codes[result, reader] = Codes(codes, env.quantizer(result))

    def _activation(self, op: Op, env: _Values) -> AnyArray | Codes:
        """The activation of a layer, as codes where these are known."""
        spec = self.specs[op.layer.path]
        reader = op.layer.path if spec.border else NEAREST
        codes = env.codes.get((op.x, reader))
        if codes is not None and reads_codes(self.program, op, spec, op.x):
            return codes
        return env.values[op.x].astype(jnp.float32)

    def _requantization(self, value: int, reader: str, env: _Values) -> Requantization:
        """How `value` is quantized for a reader."""
        quantizer = env.quantizer(value)
        if reader == NEAREST:
            return Requantization(quantizer, Rounding(env.bits(value)), {})
        return Requantization(
            quantizer, rounding_of(self.specs[reader]), self.layers[reader].border
        )
