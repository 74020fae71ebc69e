"""Which layers suffer: the network's output error with one layer quantized at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import ReconstructionError
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.plan import checks
from aquant_jax.plan.block_program import BlockProgram, forward, make_block_program
from aquant_jax.plan.network import Network, count_samples, take_samples
from aquant_jax.plan.prepare import prepare
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.observe_ranges import observe_ranges
from aquant_jax.reconstruction.probe import Probe, Roundings, program_inputs, rounding_to
from aquant_jax.reconstruction.weights import (
    deployed_weights,
    float_weights,
    make_weight_quantizers,
    nearest_layers,
)

# Above, the search of weight ranges skips zero points, unlike that of `quantize`: half the time of
# 5 bits, a quarter of that of 6.
MEASURED_FULL_BITS = 4


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
      ReconstructionError: the float network computes NaN, or an error is not finite.
    """
    checks.check_recipe(recipe)
    net, calibration = probed(apply, variables, calibration, recipe)
    probe = Probe(net, calibration, compiler := Compiler())
    weights, quantizers = nearest(net, calibration, compiler)
    reference = float_outputs(probe)
    entries = []
    for spec in probe.specs:
        path, rounding = spec.path, {}
        if spec.tensor:
            rounding[path] = rounding_to(quantizers[spec.tensor], spec.act_bits)
        outputs = probe.outputs({path: weights[path]}, Roundings(rounding))
        error = _error(outputs, reference)
        if not math.isfinite(error):
            raise ReconstructionError(f"{path}: the error of the network's output is {error}")
        entries.append(Sensitivity(path, error))
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


def float_outputs(probe: Probe) -> Sequence[jax.Array]:
    """The outputs of the float network.

    Raises:
      ReconstructionError: NaN is among them.
    """
    outputs = probe.outputs()
    for output in outputs:
        if jnp.issubdtype(output.dtype, jnp.inexact) and jnp.isnan(output).any():
            raise ReconstructionError(
                f"the float network itself computes NaN for calibration samples, in its output "
                f"{output.dtype}{list(output.shape)}"
            )
    return outputs


class Rounded(NamedTuple):
    """A network rounded to nearest: weights by path, activation quantizers by tensor key."""

    weights: dict[str, Weights]
    quantizers: dict[str, ActivationQuantizer]


def nearest(net: Network, calibration: Any, compiler: Compiler) -> Rounded:
    """The network rounded to nearest, with ranges by MSE search, as its plan has the bits.

    Calls that share `compiler` share the ranges of weights, and the compiled float network.
    """
    program = make_block_program(net.graph, net.plan, (), net.graph.target_outputs)
    found = make_weight_quantizers(program, net.folded, compiler.weight_ranges, MEASURED_FULL_BITS)
    weights = deployed_weights(program, nearest_layers(program, found))
    paths = [spec.path for spec in program.specs]
    quantizers = _observe(net, program, calibration, compiler)
    return Rounded(dict(zip(paths, weights, strict=True)), quantizers)


def _observe(
    net: Network, program: BlockProgram, calibration: Any, compiler: Compiler
) -> dict[str, ActivationQuantizer]:
    """Initial quantizers of the tensors that layers read, by key."""

    def run_float(probe: BlockProgram) -> list[tuple[np.ndarray, Sequence[jax.Array]]]:
        weights, inputs = float_weights(probe, net.folded), program_inputs(net, probe, calibration)
        run = functools.partial(forward, probe)
        outputs = compiler.get(("observe", probe.float_key), lambda: run)
        return [(np.arange(net.samples), outputs(weights, None, inputs))]

    read = {spec.tensor for spec in program.specs}
    others = {tensor.key for tensor in program.tensors} - read
    return observe_ranges(net, [program], run_float, others)


def _error(outputs: Sequence[jax.Array], reference: Sequence[jax.Array]) -> float:
    pairs = [
        (np.asarray(a, np.complex128), np.asarray(b, np.complex128))
        for a, b in zip(outputs, reference, strict=True) if jnp.issubdtype(b.dtype, jnp.inexact)
    ]  # fmt: skip
    errors = sum((np.abs(a - b) ** 2).sum() for a, b in pairs)
    size = sum((np.abs(b) ** 2).sum() for _, b in pairs)
    return float(errors / max(size, np.finfo(np.float64).tiny))  # of outputs that are all zero
