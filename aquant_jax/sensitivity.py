"""Which layers suffer: the network's output error with one layer quantized at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.graph.ir import Op
from aquant_jax.graph.subgraph import BlockInputs, bind_inputs, run
from aquant_jax.layers.fake_quant import LayerInput, run_layer
from aquant_jax.plan import checks
from aquant_jax.plan.block_program import BlockProgram, forward, make_block_program
from aquant_jax.plan.network import Network, count_samples, take_samples
from aquant_jax.plan.prepare import prepare
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.observe_ranges import observe_ranges
from aquant_jax.reconstruction.weights import (
    deployed_weights,
    float_weights,
    make_weight_quantizers,
    nearest_layers,
)


class Sensitivity(NamedTuple):
    """Squared error of the network's output over the output's own square, for one layer alone."""

    path: str
    error: float


@jax.transfer_guard("allow")
def sensitivity(
    apply: Callable, variables: Any, calibration: Any, recipe: Recipe
) -> list[Sensitivity]:
    """Output error of every layer quantized alone (weights and input, to nearest).

    Args:
      apply, variables, calibration: see `quantize`; the first
        ``recipe.reconstruction.init_samples`` samples are used.
      recipe: gives bits and exceptions; nothing is learned.

    Returns:
      One entry per layer, the most sensitive first.

    Raises:
      InputError: see `quantize`.
    """
    checks.check_recipe(recipe)
    calibration = checks.host_arrays(calibration)
    checks.check_calibration(calibration, recipe.replace(steps=0))
    samples = min(count_samples(calibration), recipe.reconstruction.init_samples)
    calibration = jax.tree.map(lambda leaf: take_samples(leaf, slice(samples)), calibration)
    net = prepare(apply, variables, calibration, recipe.replace(batch_size=samples, steps=0))
    program = make_block_program(net.graph, net.plan, (), net.graph.target_outputs)
    inputs = _inputs(net, program, calibration)
    exact = float_weights(program, net.folded)
    layers = nearest_layers(program, make_weight_quantizers(program, net.folded))
    # Arguments, not constants: XLA would spend minutes folding the float network otherwise.
    arguments = (deployed_weights(program, layers), exact, _observe(net, program, calibration))
    outputs = _outputs_with_one_layer(program)
    reference = outputs(-1, *arguments, inputs)
    entries = [
        Sensitivity(spec.path, _error(outputs(i, *arguments, inputs), reference))
        for i, spec in enumerate(program.specs)
    ]
    return sorted(entries, key=lambda entry: -entry.error)


def _outputs_with_one_layer(program: BlockProgram) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of the index of the layer to quantize (-1 for none) and the weights."""
    index_of = {op.layer.path: i for i, op in enumerate(program.subgraph.weighted)}

    @jax.jit
    def outputs(chosen, rounded, exact, activations, inputs):
        def layer_fn(op: Op, x: jax.Array) -> jax.Array:
            i = index_of[op.layer.path]
            spec = program.specs[i]
            quantizer = activations[program.tensor_of[op.x]] if spec.tensor else None
            alone = run_layer(op, spec, LayerInput(x, quantizer), rounded[i])
            plain = run_layer(op, spec, LayerInput(x), exact[i])
            y = jnp.where(chosen == i, alone, plain)
            return y.astype(program.avals[op.outputs[0]].dtype)

        return run(program.subgraph, inputs, layer_fn)

    return outputs


def _inputs(net: Network, program: BlockProgram, calibration: Any) -> BlockInputs:
    leaves = map(jnp.asarray, jax.tree.leaves(calibration))
    by_id = dict(zip(net.graph.inputs, leaves, strict=True))
    return bind_inputs(net.graph, program.subgraph, net.variables, by_id)


def _observe(net: Network, program: BlockProgram, calibration: Any) -> list:
    """Initial quantizers of the tensors of the network, in the program's order."""

    def run_float(probe: BlockProgram) -> list[tuple[np.ndarray, Sequence[jax.Array]]]:
        weights, inputs = float_weights(probe, net.folded), _inputs(net, probe, calibration)
        outputs = jax.jit(lambda weights, inputs: forward(probe, weights, None, inputs))
        return [(np.arange(net.samples), outputs(weights, inputs))]

    quantizers = observe_ranges(net, [program], run_float)
    return [quantizers[tensor.key] for tensor in program.tensors]


def _error(outputs: Sequence[jax.Array], reference: Sequence[jax.Array]) -> float:
    pairs = [
        (np.asarray(a, np.complex128), np.asarray(b, np.complex128))
        for a, b in zip(outputs, reference, strict=True) if jnp.issubdtype(b.dtype, jnp.inexact)
    ]  # fmt: skip
    errors = sum((np.abs(a - b) ** 2).sum() for a, b in pairs)
    return float(errors / sum((np.abs(b) ** 2).sum() for _, b in pairs))
