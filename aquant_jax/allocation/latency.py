"""Milliseconds of every layer at every choice, on this device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.allocation.choices import Choice
from aquant_jax.allocation.layer_choices import LayerChoices, uniform
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment.integer_program import run_integers
from aquant_jax.graph.ir import Op
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.layers.backend import Backend
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.block_program import BlockProgram, make_block_program
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.weights import make_weight_quantizers, nearest_layers

ROUNDS, SECONDS = 5, 0.02  # the fastest of some rounds, each of some time


def time_layers(
    net: Network, layers: Sequence[LayerChoices], backend: Backend
) -> dict[str, dict[str, float]]:
    """Milliseconds of one sample, by weight path and ``str(choice)``.

    Each layer runs alone, deployed, from a float input; layers that compute the same are timed
    once.
    """
    ops = {op.layer.path: op for op in net.graph.ops if op.layer is not None}
    timed: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    for layer in layers:
        for choice in layer.choices:
            program = _alone(net, ops[layer.path], choice)
            if program.key not in timed:
                timed[program.key] = _milliseconds(net, program, backend)
            found.setdefault(layer.path, {})[str(choice)] = timed[program.key]
    return found


def _alone(net: Network, op: Op, choice: Choice) -> BlockProgram:
    """The program of one layer at a choice."""
    plan = make_plan(net.graph, uniform(net.recipe, choice))
    if choice.weight_bits is None:
        floats = plan.layers[op.layer.path]._replace(weight_bits=None, tensor=None, border=None)
        plan = plan._replace(layers=plan.layers | {op.layer.path: floats}, tensors={})
    return make_block_program(net.graph, plan, op.reads, op.outputs)


def _milliseconds(net: Network, program: BlockProgram, backend: Backend) -> float:
    layers = nearest_layers(program, make_weight_quantizers(program, net.folded))
    quantizer = ActivationQuantizer(jnp.float32(0.1), jnp.float32(0.0))
    activations = [quantizer for _ in program.tensors]
    rng = np.random.default_rng(0)
    boundary = [_sample(rng, program.avals[i]) for i in program.subgraph.boundary_inputs]
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


def _sample(rng: np.random.Generator, aval: Any) -> jax.Array:
    """A batch of one sample."""
    values = np.abs(rng.normal(size=(1, *aval.shape[1:])))
    return jnp.asarray(values, aval.dtype)
