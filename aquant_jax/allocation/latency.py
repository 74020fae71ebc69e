"""Milliseconds of every layer at every choice, on this device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.allocation.choices import Choice, check_choices
from aquant_jax.allocation.layer_choices import LayerChoices, uniform
from aquant_jax.allocation.networks import prepare_networks
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment.integer_program import run_integers
from aquant_jax.errors import check_type
from aquant_jax.graph.ir import Op
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.layers.backend import Backend
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.block_program import BlockProgram, make_block_program
from aquant_jax.plan.network import Network
from aquant_jax.recipe import Recipe, aquant
from aquant_jax.reconstruction.weights import Ranges, make_weight_quantizers, nearest_layers

ROUNDS, SECONDS = 5, 0.02  # the fastest of some rounds, each of some time


@jax.transfer_guard("allow")
def layer_latencies(
    apply: Callable,
    variables: Any,
    calibration: Any,
    choices: Sequence[Choice],
    *,
    recipe: Recipe | None = None,
    mask: str | None = None,
    compiler: Compiler | None = None,
) -> dict[str, dict[str, float]]:
    """Milliseconds of every layer on this device, for `allocate` on any other.

    >>> import numpy as np
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: (x @ variables["a"]) @ variables["b"]
    >>> variables = {name: np.eye(4, dtype=np.float32) for name in "ab"}
    >>> found = aq.layer_latencies(apply, variables, np.eye(4, dtype=np.float32), [aq.Choice(4, 4)])
    >>> {path: list(times) for path, times in found.items()}
    {'a': ['w8a16'], 'b': ['w8a8']}

    Args:
      apply, variables, calibration, mask: see `quantize`; of the calibration set, the shapes count.
      choices, recipe: see `allocate`.
      compiler: whose backend runs the layers.

    Returns:
      Of one sample, by weight path and ``str(choice)``. Each layer runs alone, deployed, from a
      float input; layers that compute the same are timed once.

    Raises:
      InputError: see `quantize`; no choice.
    """
    choices, compiler = check_choices(choices), compiler or Compiler()
    check_type("compiler", compiler, Compiler, "an aq.Compiler")
    net = prepare_networks(apply, variables, calibration, choices, recipe or aquant(), mask, 1)
    return _time_layers(net.target, net.layers, compiler.backend)


def _time_layers(
    net: Network, layers: Sequence[LayerChoices], backend: Backend
) -> dict[str, dict[str, float]]:
    ops = {op.layer.path: op for op in net.graph.ops if op.layer is not None}
    timed: dict[str, float] = {}
    ranges: Ranges = {}
    found: dict[str, dict[str, float]] = {}
    for layer in layers:
        for choice in layer.choices:
            op = ops[layer.path]
            program = _alone(net, op, choice)
            if program.key not in timed:
                timed[program.key] = _milliseconds(net, program, backend, ranges)
            found.setdefault(layer.path, {})[str(choice)] = op.steps * timed[program.key]
    return found


def _alone(net: Network, op: Op, choice: Choice) -> BlockProgram:
    """The program of one layer at a choice: in a rolled loop, of one step."""
    plan = make_plan(net.graph, uniform(net.recipe, choice))
    if choice.weight_bits is None:
        floats = plan.layers[op.layer.path]._replace(weight_bits=None, tensor=None, border=None)
        plan = plan._replace(layers=plan.layers | {op.layer.path: floats}, tensors={})
    ops = tuple(one._replace(loop=None) if one is op else one for one in net.graph.ops)
    return make_block_program(net.graph._replace(ops=ops), plan, op.reads, op.outputs)


def _milliseconds(net: Network, program: BlockProgram, backend: Backend, ranges: Ranges) -> float:
    layers = nearest_layers(program, make_weight_quantizers(program, net.folded, ranges))
    quantizer = ActivationQuantizer(jnp.float32(0.1), jnp.float32(0.0))
    activations = [quantizer for _ in program.tensors]
    rng = np.random.default_rng(0)
    boundary = [_values(rng, program.avals[i]) for i in program.subgraph.boundary_inputs]
    run = jax.jit(
        lambda layers, boundary: run_integers(
            program, layers, activations, BlockInputs(boundary), backend
        )
    )
    jax.block_until_ready(run(layers, boundary))
    best = np.inf
    for _ in range(ROUNDS):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            jax.block_until_ready(run(layers, boundary))
            count += 1
        best = min(best, (time.perf_counter() - start) / count)
    return 1000 * float(best)


def _values(rng: np.random.Generator, aval: Any) -> jax.Array:
    return jnp.asarray(np.abs(rng.normal(size=aval.shape)), aval.dtype)
