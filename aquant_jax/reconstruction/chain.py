"""A whole network as a chain of its blocks, forward and backward, one block in memory at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.subgraph import BlockInputs, constant_inputs
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.layers.rematerialize import rematerialized
from aquant_jax.plan.block_program import (
    BlockProgram,
    differentiating,
    forward,
    make_block_program,
)
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.devices import everywhere, settled


class Parts(NamedTuple):
    """What the layers of a network compute with, or the gradient with respect to it (a pytree).

    Attributes:
      weights: of every layer, by weight path.
      activations: quantizer of every tensor, by key.
    """

    weights: dict[str, Weights]
    activations: dict[str, ActivationQuantizer]


class Chain:
    """The blocks of a network. Those that compute the same function share compiled functions.

    The forward pass keeps what passes between the blocks; the backward pass computes what is inside
    a block again.

    Args:
      net: the network.
      compiler: where compiled functions are shared, and the backend that they run on.
    """

    def __init__(self, net: Network, compiler: Compiler) -> None:
        self.net, self.compiler, self._layer = net, compiler, compiler.layer
        self._again = net.recipe.reconstruction.rematerialize
        if self._again:
            self._layer = rematerialized(compiler.layer)
        self.programs = tuple(
            make_block_program(net.graph, net.plan, block.start, block.end) for block in net.blocks
        )
        self._constants = [
            everywhere(tuple(constant_inputs(net.graph, p.subgraph, net.variables)))
            for p in self.programs
        ]

    def forward(
        self, parts: Parts, leaves: Mapping[int, jax.Array], quantized: bool = True
    ) -> list[Sequence[jax.Array]]:
        """The values between the blocks; the last are the outputs of the network.

        Args:
          parts: of the network.
          leaves: of a batch of the model's input, by value id.
          quantized: False runs the network in float.
        """
        boundaries: list[Sequence[jax.Array]] = [()]
        for index, program in enumerate(self.programs):
            function = self._compiled("chain forward", program, quantized, _forward)
            inputs = self._inputs(index, leaves, boundaries[-1])
            boundaries.append(settled(function(*_of(program, parts, quantized), inputs)))
        return boundaries

    def backward(
        self,
        parts: Parts,
        leaves: Mapping[int, jax.Array],
        boundaries: Sequence[Sequence[jax.Array]],
        cotangents: Sequence[jax.Array],
    ) -> Parts:
        """The gradient with respect to `parts`.

        Args:
          parts, leaves: see `forward`.
          boundaries: the result of `forward`.
          cotangents: of the inexact outputs of the network.
        """
        total = Parts({}, {})
        for index, program in reversed(list(enumerate(self.programs))):
            function = self._compiled("chain backward", program, True, _backward)
            inputs = self._inputs(index, leaves, boundaries[index])
            gradients = settled(function(*_of(program, parts, True), inputs, cotangents))
            weights, activations, cotangents = gradients
            for spec, gradient in zip(program.specs, weights, strict=True):
                _add(total.weights, spec.path, gradient)
            for tensor, gradient in zip(program.tensors, activations, strict=True):
                _add(total.activations, tensor.key, gradient)
        return total

    def backward_bytes(self, parts: Parts, leaves: Mapping[int, Any]) -> int:
        """Bytes that `forward` and `backward` hold at the peak, besides `parts` and its gradient.

        Those of the values between the blocks, and twice those that the backward pass of the
        largest block keeps of its forward pass: their gradients are as large.

        Args:
          parts, leaves: see `forward`; shapes and dtypes suffice.
        """
        between, largest = 0, 0
        avals = self.net.graph.avals
        seen: dict[str, int] = {}
        for index, program in enumerate(self.programs):
            ends = [value for value in program.subgraph.outputs if isinstance(value, int)]
            between += sum(_bytes(avals[value]) for value in ends)
            if program.key not in seen:
                boundary = [avals[v] for v in program.subgraph.boundary_inputs]
                boundary = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in boundary]
                inputs = self._inputs(index, leaves, boundary)
                pull = functools.partial(_pullback, program, self._layer)
                kept = jax.eval_shape(pull, *_of(program, parts, True), inputs)
                seen[program.key] = sum(map(_bytes, jax.tree.leaves(kept)))
            largest = max(largest, seen[program.key])
        return between + 2 * largest

    def _inputs(
        self, index: int, leaves: Mapping[int, Any], boundary: Sequence[Any]
    ) -> BlockInputs:
        model = tuple(leaves[i] for i in self.programs[index].subgraph.model_inputs)
        return BlockInputs(tuple(boundary), model, self._constants[index])

    def _compiled(
        self, name: str, program: BlockProgram, quantized: bool, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        run = functools.partial(function, program, self._layer)
        key = program.key if quantized else program.float_key
        return self.compiler.get((name, key, self._again), lambda: run)


def inexact(program: BlockProgram, ids: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Those of the `values` of these ids that have a gradient."""
    dtypes = program.dtypes(ids)
    return [v for v, d in zip(values, dtypes, strict=True) if jnp.issubdtype(d, jnp.inexact)]


def _of(program: BlockProgram, parts: Parts, quantized: bool) -> tuple[Any, Any]:
    """The parts of one block."""
    weights = [parts.weights[spec.path] for spec in program.specs]
    activations = [parts.activations[t.key] for t in program.tensors] if quantized else None
    return weights, activations


def _forward(
    program: BlockProgram,
    layer: Callable[..., jax.Array],
    weights: Sequence[Weights],
    activations: Sequence[ActivationQuantizer] | None,
    inputs: BlockInputs,
) -> tuple[jax.Array, ...]:
    return forward(program, weights, activations, inputs, layer=layer)


def _pullback(
    program: BlockProgram,
    layer: Callable[..., jax.Array],
    weights: Sequence[Weights],
    activations: Sequence[ActivationQuantizer],
    inputs: BlockInputs,
) -> Callable[..., Any]:
    """The backward pass of a block, from the gradient of its inexact outputs."""
    ids = program.subgraph.boundary_inputs

    def run(weights: Any, activations: Any, differentiable: Sequence[jax.Array]) -> list[jax.Array]:
        values = iter(differentiable)
        boundary = [
            next(values) if jnp.issubdtype(dtype, jnp.inexact) else value
            for value, dtype in zip(inputs.boundary, program.dtypes(ids), strict=True)
        ]
        batch = inputs._replace(boundary=boundary)
        outputs = _forward(program, layer, weights, activations, batch)
        return inexact(program, program.subgraph.outputs, outputs)

    differentiable = inexact(program, ids, inputs.boundary)
    with differentiating(program):
        return jax.vjp(run, weights, activations, differentiable)[1]


def _backward(
    program: BlockProgram,
    layer: Callable[..., jax.Array],
    weights: Sequence[Weights],
    activations: Sequence[ActivationQuantizer],
    inputs: BlockInputs,
    cotangents: Sequence[jax.Array],
) -> tuple[Any, Any, Any]:
    with differentiating(program):
        return _pullback(program, layer, weights, activations, inputs)(list(cotangents))


def _add(total: dict[str, Any], name: str, gradient: Any) -> None:
    known = name in total
    total[name] = jax.tree.map(jnp.add, total[name], gradient) if known else gradient


def _bytes(value: Any) -> int:
    return math.prod(value.shape) * jnp.dtype(value.dtype).itemsize
