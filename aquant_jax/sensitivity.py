"""Which layers suffer: the network's output error with one layer quantized at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
from aquant_jax.layers.fake_quant import LayerInput, LayerSpec, Weights, run_layer
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
    """Squared error of the network's output over the output's own square, for one layer alone.

    >>> import aquant_jax as aq
    >>> aq.Sensitivity("head/kernel", 0.25).error
    0.25
    """

    path: str
    error: float


@jax.transfer_guard("allow")
def sensitivity(
    apply: Callable, variables: Any, calibration: Any, recipe: Recipe
) -> list[Sensitivity]:
    """Output error of every layer quantized alone (weights and input, to nearest).

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: (x @ variables["first"]) @ variables["last"]
    >>> kernel = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    >>> variables = {"first": kernel, "last": kernel.T}
    >>> recipe = aq.recipes.nearest(2, 2, first_weight_bits=None)  # the last layer stays at 8 bits
    >>> [entry.path for entry in aq.sensitivity(apply, variables, kernel, recipe)]
    ['first', 'last']

    Args:
      apply, variables, calibration: see `quantize`; the first
        ``recipe.reconstruction.init_samples`` samples are used.
      recipe: gives bits and exceptions; nothing is learned. The first and the last layer have the
        bits that it fixes for them, 8 in the presets, and so an error close to 0.

    Returns:
      One entry per layer, the most sensitive first.

    Raises:
      InputError: see `quantize`.
    """
    checks.check_recipe(recipe)
    net, calibration = probed(apply, variables, calibration, recipe)
    probe = Probe(net, calibration)
    weights, quantizers = nearest(net, calibration)
    reference = probe.outputs(probe.weights, probe.unrounded())
    entries = []
    for i, spec in enumerate(probe.program.specs):
        alone = [*probe.weights]
        alone[i] = weights[spec.path]
        rounding = probe.unrounded()
        if spec.tensor is not None:
            rounding.inputs[i] = rounding_to(quantizers[spec.tensor], spec.act_bits)
        entries.append(Sensitivity(spec.path, _error(probe.outputs(alone, rounding), reference)))
    return sorted(entries, key=lambda entry: -entry.error)


def probed(
    apply: Callable,
    variables: Any,
    calibration: Any,
    recipe: Recipe,
    mask: str | None = None,
    batch: int | None = None,
) -> tuple[Network, Any]:
    """The network whose output errors are measured, and its first ``init_samples`` samples.

    It runs `batch` of them at once, or all.

    Raises:
      InputError: see `quantize`.
    """
    calibration = checks.host_arrays(calibration)
    checks.check_calibration(calibration, recipe.replace(steps=0))
    samples = min(count_samples(calibration), recipe.reconstruction.init_samples)
    calibration = jax.tree.map(lambda leaf: take_samples(leaf, slice(samples)), calibration)
    recipe = recipe.replace(batch_size=batch or samples, accumulate=1, steps=0)
    return prepare(apply, variables, calibration, recipe, mask), calibration


class Rounding(NamedTuple):
    """How a tensor is rounded to nearest, with its bits as data (a pytree).

    Attributes:
      quantizer: its step size and zero point.
      top: the largest code, ``2^bits - 1``; 0 leaves the tensor in float.
    """

    quantizer: ActivationQuantizer
    top: jax.Array


class Roundings(NamedTuple):
    """How the activations of a network are rounded (a pytree).

    Attributes:
      inputs: one for each layer's input; None where it always stays float.
      reads: one for each tensor, where other ops read it.
    """

    inputs: list[Rounding | None]
    reads: list[Rounding]


class Probe:
    """A float network, any part of which can be quantized, in one compiled program.

    Args:
      net: the network; its plan names the tensors that may be rounded.
      calibration: its samples, which it runs at once.
      specs: static parts of layers that have borders; the others round to nearest.

    Attributes:
      program: the whole network.
      weights: of the float network, one of each layer.
    """

    def __init__(
        self, net: Network, calibration: Any, specs: Sequence[LayerSpec] | None = None
    ) -> None:
        program = make_block_program(net.graph, net.plan, (), net.graph.target_outputs)
        given = {spec.path: spec for spec in specs or ()}
        own = (given.get(spec.path, spec._replace(border=None)) for spec in program.specs)
        self.program = program._replace(specs=tuple(own))
        self.weights = float_weights(program, net.folded)
        self._inputs = _inputs(net, program, calibration)
        self._run = jax.jit(functools.partial(_outputs, self.program))

    def unrounded(self) -> Roundings:
        """The roundings of the float network."""
        off = rounding_to(ActivationQuantizer(jnp.float32(1.0), jnp.float32(0.0)), 0)
        inputs = [off if spec.tensor else None for spec in self.program.specs]
        return Roundings(inputs, [off for _ in self.program.tensors])

    def outputs(self, weights: Sequence[Weights], roundings: Roundings) -> tuple[jax.Array, ...]:
        """The outputs with samples, of the network with these weights and roundings."""
        # Arguments, not constants: XLA would spend minutes folding the float network otherwise.
        return self._run(weights, roundings, self._inputs)


def rounding_to(quantizer: ActivationQuantizer, bits: int) -> Rounding:
    """Rounding to codes of a number of bits."""
    return Rounding(quantizer, jnp.float32(max_code(bits)))


def _outputs(
    program: BlockProgram, weights: Sequence[Weights], roundings: Roundings, inputs: BlockInputs
) -> tuple[jax.Array, ...]:
    index_of = {op.layer.path: i for i, op in enumerate(program.subgraph.weighted)}

    def layer_fn(op: Op, x: jax.Array) -> jax.Array:
        i = index_of[op.layer.path]
        spec, rounding, aval = program.specs[i], roundings.inputs[i], program.avals[op.outputs[0]]
        if rounding is None or not spec.border:
            value = x if rounding is None else _rounded(x, rounding)
            return run_layer(op, spec, LayerInput(value), weights[i]).astype(aval.dtype)
        with_border = LayerInput(x, rounding.quantizer)
        return jax.lax.cond(
            rounding.top > 0,
            lambda: run_layer(op, spec, with_border, weights[i]).astype(aval.dtype),
            lambda: run_layer(op, spec, LayerInput(x), weights[i]).astype(aval.dtype),
        )

    def read_fn(value_id: int, value: jax.Array) -> jax.Array:
        if value_id not in program.tensor_of:
            return value
        return _rounded(value, roundings.reads[program.tensor_of[value_id]]).astype(value.dtype)

    return run(program.subgraph, inputs, layer_fn, read_fn)


def _rounded(x: jax.Array, rounding: Rounding) -> jax.Array:
    """`uniform.fake_quantize`, whose bits are static, for bits that are data."""
    quantizer, top = rounding
    codes = jnp.ceil(to_units(x, 1.0 / quantizer.step_size) - NEAREST) + quantizer.zero_point
    value = dequantize(jnp.clip(codes, 0.0, top), quantizer.step_size, quantizer.zero_point)
    return jnp.where(top > 0, value, x.astype(jnp.float32))


class Rounded(NamedTuple):
    """A network rounded to nearest: weights by path, activation quantizers by tensor key."""

    weights: dict[str, Weights]
    quantizers: dict[str, ActivationQuantizer]


def nearest(net: Network, calibration: Any) -> Rounded:
    """The network rounded to nearest, with ranges by MSE search, as its plan has the bits."""
    program = make_block_program(net.graph, net.plan, (), net.graph.target_outputs)
    layers = nearest_layers(program, make_weight_quantizers(program, net.folded, {}))
    weights = deployed_weights(program, layers)
    paths = [spec.path for spec in program.specs]
    return Rounded(dict(zip(paths, weights, strict=True)), _observe(net, program, calibration))


def _inputs(net: Network, program: BlockProgram, calibration: Any) -> BlockInputs:
    leaves = map(jnp.asarray, jax.tree.leaves(calibration))
    by_id = dict(zip(net.graph.inputs, leaves, strict=True))
    return bind_inputs(net.graph, program.subgraph, net.variables, by_id)


def _observe(
    net: Network, program: BlockProgram, calibration: Any
) -> dict[str, ActivationQuantizer]:
    """Initial quantizers of the tensors of the network, by key."""

    def run_float(probe: BlockProgram) -> list[tuple[np.ndarray, Sequence[jax.Array]]]:
        weights, inputs = float_weights(probe, net.folded), _inputs(net, probe, calibration)
        outputs = jax.jit(lambda weights, inputs: forward(probe, weights, None, inputs))
        return [(np.arange(net.samples), outputs(weights, inputs))]

    return observe_ranges(net, [program], run_float)


def _error(outputs: Sequence[jax.Array], reference: Sequence[jax.Array]) -> float:
    pairs = [
        (np.asarray(a, np.complex128), np.asarray(b, np.complex128))
        for a, b in zip(outputs, reference, strict=True) if jnp.issubdtype(b.dtype, jnp.inexact)
    ]  # fmt: skip
    errors = sum((np.abs(a - b) ** 2).sum() for a, b in pairs)
    return float(errors / sum((np.abs(b) ** 2).sum() for _, b in pairs))
