"""The outputs of a float network with any part of it quantized to nearest, block by block."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import (
    NEAREST,
    ActivationQuantizer,
    dequantize,
    max_code,
    to_units,
)
from aquant_jax.graph.ir import Op
from aquant_jax.graph.subgraph import BlockInputs, bind_inputs, run
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerInput, LayerSpec, Weights, rounding_of, run_layer
from aquant_jax.plan.block_program import BlockProgram, forward, make_block_program
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.weights import float_weights, init_borders


class Rounding(NamedTuple):
    """How a tensor is rounded to nearest, with its bits as data (a pytree).

    Attributes:
      quantizer: its step size and zero point.
      top: the largest code, ``2^bits - 1``; 0 leaves the tensor in float.
      border: coefficients, where a layer that has a border reads it.
    """

    quantizer: ActivationQuantizer
    top: np.float32
    border: Mapping[str, jax.Array] = MappingProxyType({})


class Roundings(NamedTuple):
    """How the activations of a network are rounded; what is not named stays in float.

    Attributes:
      inputs: of layers, by weight path.
      reads: of tensors, by key, where other ops read them.
    """

    inputs: Mapping[str, Rounding] = MappingProxyType({})
    reads: Mapping[str, Rounding] = MappingProxyType({})


class Probe:
    """A float network, any part of which can be quantized, run block by block.

    Bits are data of the compiled blocks, and blocks that compute the same function share one. The
    float values that enter one block are kept: blocks before it are not run again.

    Args:
      net: the network; its plan names the tensors that may be rounded.
      calibration: its samples, which it runs at once.
      compiler: where compiled blocks are shared.
      specs: static parts of layers that have borders; the others round to nearest.

    Attributes:
      programs: of the blocks; the last gives the outputs with samples.
    """

    def __init__(
        self,
        net: Network,
        calibration: Any,
        compiler: Compiler,
        specs: Sequence[LayerSpec] | None = None,
    ) -> None:
        ends = (*(block.end for block in net.blocks[:-1]), net.graph.target_outputs)
        given = {spec.path: spec for spec in specs or ()}
        self.programs = []
        for block, end in zip(net.blocks, ends, strict=True):
            program = make_block_program(net.graph, net.plan, block.start, end)
            own = (given.get(s.path, s._replace(border=None)) for s in program.specs)
            self.programs.append(program._replace(specs=tuple(own)))
        self._weights = [float_weights(program, net.folded) for program in self.programs]
        self._borders = list(map(init_borders, self.programs))
        self._inputs = [program_inputs(net, program, calibration) for program in self.programs]
        self._compiler = compiler
        self._off = rounding_to(ActivationQuantizer(jnp.float32(1.0), jnp.float32(0.0)), 0)
        self._reached: tuple[int, Sequence[Any]] = (0, ())

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The static parts of the layers, in the order of the network."""
        return tuple(spec for program in self.programs for spec in program.specs)

    def outputs(
        self,
        weights: Mapping[str, Weights] = MappingProxyType({}),
        roundings: Roundings = Roundings(),  # noqa: B008 - immutable
    ) -> Sequence[jax.Array]:
        """The outputs with samples, with the weights of some layers replaced, by path."""
        first = next((i for i, p in enumerate(self.programs) if _reads(p, weights, roundings)), 0)
        start, values = self._reached if self._reached[0] <= first else (0, ())
        for index in range(start, len(self.programs)):
            if index == first:
                self._reached = index, values
            values = self._run(index, values, weights, roundings)
        return values

    def _run(
        self,
        index: int,
        boundary: Sequence[Any],
        weights: Mapping[str, Weights],
        roundings: Roundings,
    ) -> Sequence[jax.Array]:
        """The values behind a block."""
        # Arguments, not constants: XLA would spend minutes folding the float network otherwise.
        program, inputs = self.programs[index], self._inputs[index]._replace(boundary=boundary)
        paths = [spec.path for spec in program.specs]
        own = [weights.get(*pair) for pair in zip(paths, self._weights[index], strict=True)]
        if not _reads(program, {}, roundings):
            run = functools.partial(forward, program)
            return self._compiler.get(("probe", program.float_key), lambda: run)(own, None, inputs)
        of_inputs = [
            roundings.inputs.get(path, self._off._replace(border=border))
            for path, border in zip(paths, self._borders[index], strict=True)
        ]
        of_reads = [roundings.reads.get(tensor.key, self._off) for tensor in program.tensors]
        key = "probe", program.key, tuple(map(rounding_of, program.specs))
        run = functools.partial(_outputs, program)
        return self._compiler.get(key, lambda: run)(own, (of_inputs, of_reads), inputs)


def _reads(program: BlockProgram, weights: Mapping[str, Weights], roundings: Roundings) -> bool:
    """Whether a block has any of these weights or rounded activations."""
    layers = weights.keys() | roundings.inputs.keys()
    return any(spec.path in layers for spec in program.specs) or any(
        tensor.key in roundings.reads for tensor in program.tensors
    )


def rounding_to(
    quantizer: ActivationQuantizer,
    bits: int,
    border: Mapping[str, jax.Array] = MappingProxyType({}),
) -> Rounding:
    """Rounding to codes of a number of bits."""
    return Rounding(quantizer, np.float32(max_code(bits)), dict(border))


def _outputs(
    program: BlockProgram,
    weights: Sequence[Weights],
    roundings: tuple[Sequence[Rounding], Sequence[Rounding]],
    inputs: BlockInputs,
) -> tuple[jax.Array, ...]:
    """The outputs of a block, with its layers' inputs and its tensors rounded."""
    of_inputs, of_reads = roundings
    index_of = {op.layer.path: i for i, op in enumerate(program.subgraph.weighted)}

    def layer_fn(op: Op, x: jax.Array) -> jax.Array:
        i = index_of[op.layer.path]
        spec, rounding, aval = program.specs[i], of_inputs[i], program.avals[op.outputs[0]]
        if spec.tensor is None or not spec.border:
            value = x if spec.tensor is None else _rounded(x, rounding)
            return run_layer(op, spec, LayerInput(value), weights[i]).astype(aval.dtype)
        with_border = LayerInput(x, rounding.quantizer)
        bordered = weights[i]._replace(border=rounding.border)
        return jax.lax.cond(
            rounding.top > 0,
            lambda: run_layer(op, spec, with_border, bordered).astype(aval.dtype),
            lambda: run_layer(op, spec, LayerInput(x), weights[i]).astype(aval.dtype),
        )

    def read_fn(value_id: int, value: jax.Array) -> jax.Array:
        if value_id not in program.tensor_of:
            return value
        return _rounded(value, of_reads[program.tensor_of[value_id]]).astype(value.dtype)

    return run(program.subgraph, inputs, layer_fn, read_fn)


def _rounded(x: jax.Array, rounding: Rounding) -> jax.Array:
    """`uniform.fake_quantize`, whose bits are static, for bits that are data."""
    quantizer, top, _ = rounding
    codes = jnp.ceil(to_units(x, 1.0 / quantizer.step_size) - NEAREST) + quantizer.zero_point
    value = dequantize(jnp.clip(codes, 0.0, top), quantizer.step_size, quantizer.zero_point)
    return jnp.where(top > 0, value, x.astype(jnp.float32))


def program_inputs(net: Network, program: BlockProgram, calibration: Any) -> BlockInputs:
    """What a program reads of the model's input and of the variables, of all samples."""
    leaves = map(jnp.asarray, jax.tree.leaves(calibration))
    by_id = dict(zip(net.graph.inputs, leaves, strict=True))
    return bind_inputs(net.graph, program.subgraph, net.variables, by_id)
