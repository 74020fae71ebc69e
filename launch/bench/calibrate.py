"""Measures what reconstruction costs: one optimisation step, and the search of all ranges.

A step is one of the first residual block, at batch 32: in float (forward, backward and a step
against the gradient, of the block alone), by qdrop, and by aquant with a border an element and with
one a channel; on a GPU in a scanned loop. The search covers all weights and the activations of 256
images. Weights and images are random: the arithmetic does not depend on them. Every figure is the
median of the rounds, and every ratio is one of figures of the same run.

Example:

    python -m launch.bench.calibrate --model=resnet20_cifar --rounds=5 --out=calibrate.json
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax import models
from aquant_jax.arithmetic.range_search import search_activation_range
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.layers.backend import Backend, ReferenceBackend
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.plan.block_program import BlockProgram, forward, make_block_program
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction import optimize
from aquant_jax.reconstruction.activation_cache import Cache, store
from aquant_jax.reconstruction.observe_ranges import observe_ranges
from aquant_jax.reconstruction.training_step import CalibrationData, Quantizers
from aquant_jax.reconstruction.weights import float_weights, make_weight_quantizers
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line

BATCH = 32
CALLS = 3  # of the scanned loop; the first one is not timed
BLOCK = 1  # the first residual block; block 0 is the stem
SAMPLES = 256
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "qdrop": ("qdrop", {}),
    "aquant": ("aquant", {}),
    "aquant_channel": ("aquant", {"border_granularity": "channel"}),
}
Carry = tuple[list[Weights], jax.Array]  # of the float step: weights and input


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("model", "resnet20_cifar", "in the zoo", flag_values=values)
    timing.define_flags(values)


def measure(rounds: int, model: str) -> dict[str, Any]:
    """Times of the steps and of the search, in ms and s.

    Args:
        rounds: how often every figure is taken.
        model: of the zoo.
    """
    apply, variables = models.create(model)
    side = 32 if model.endswith("_cifar") else 224
    images = np.random.default_rng(0).normal(size=(SAMPLES, side, side, 3)).astype(np.float32)
    steps = CALLS * max(optimize.LOG_EVERY, optimize.steps_a_call())
    networks = {
        name: aq.prepare(
            apply, variables, images, _recipe(preset, 2, steps=steps, batch_size=BATCH, **fields)
        )
        for name, (preset, fields) in WAYS.items()
    }
    timers = {"float": _float_step(networks["qdrop"])}
    timers |= {name: _quantized_step(net, gpu_ops.backend()) for name, net in networks.items()}
    timers["aquant_without_gpu_ops"] = _quantized_step(networks["aquant"], ReferenceBackend())
    times = timing.in_turns(timers, rounds)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    searches = {f"w{b}a{b}": range_search(apply, variables, images, b) for b in (2, 4)}
    program = _program(networks["qdrop"])
    boundary = program.subgraph.boundary_inputs
    return {
        "benchmark": "calibrate",
        "model": model,
        "block": str(networks["qdrop"].blocks[BLOCK]),
        "block_input": [tuple(program.avals[value].shape) for value in boundary],
        "rounds": rounds,
        "step_ms": medians,
        "step_ms_all": {name: [v * 1e3 for v in values] for name, values in times.items()},
        "qdrop_over_float": medians["qdrop"] / medians["float"],
        "aquant_over_qdrop": medians["aquant"] / medians["qdrop"],
        "channel_over_qdrop": medians["aquant_channel"] / medians["qdrop"],
        "scale_search_s": searches,
        **environment(),
    }


def range_search(
    apply: models.Apply, variables: models.Variables, images: np.ndarray, bits: int
) -> float:
    """Seconds for all weights and all activations, compilation included."""
    net = aq.prepare(apply, variables, images, _recipe("nearest", bits, batch_size=SAMPLES))
    everything = make_block_program(net.graph, net.plan, (), net.graph.outputs)
    activations: list[tuple[np.ndarray, Sequence[Any]]] = []

    def run_float(probe: BlockProgram) -> Iterable[tuple[np.ndarray, Sequence[Any]]]:
        if not activations:  # of the first call, which is not timed
            run = jax.jit(lambda weights, inputs: forward(probe, weights, None, inputs))
            outputs = run(float_weights(probe, net.folded), BlockInputs(model=[images]))
            activations.append((np.arange(SAMPLES), [np.asarray(a) for a in outputs]))
        return activations

    observe_ranges(net, [everything], run_float)
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(make_weight_quantizers(everything, net.folded, {}))
    jax.block_until_ready(observe_ranges(net, [everything], run_float))
    return time.perf_counter() - start


def _recipe(preset: str, bits: int, **fields: Any) -> aq.Recipe:
    return aq.recipes.preset(preset, weight_bits=bits, act_bits=bits, **fields)


def _program(net: Network) -> BlockProgram:
    block = net.blocks[BLOCK]
    return make_block_program(net.graph, net.plan, block.start, block.targets)


def _caches(net: Network, values: Sequence[Any]) -> tuple[Cache, ...]:
    """Random activations of all samples."""
    rng = np.random.default_rng(1)
    shapes = [(SAMPLES, *net.graph.avals[value].shape[1:]) for value in values]
    arrays = [np.maximum(rng.normal(size=shape), 0.0).astype(np.float32) for shape in shapes]
    return store([arrays], SAMPLES)


def _float_step(net: Network) -> Callable[[], float]:
    program = _program(net)
    weights = float_weights(program, net.folded)
    (cache,) = _caches(net, program.subgraph.boundary_inputs)
    x = cache.values[:BATCH].astype(jnp.float32)

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        def loss(weights: list[Weights], x: jax.Array) -> jax.Array:
            (y,) = forward(program, weights, None, BlockInputs([x]))
            return jnp.mean(y**2)

        gradients = jax.grad(loss, argnums=(0, 1))(*carry)
        return jax.tree.map(lambda a, g: a - 1e-6 * g, carry, gradients), None

    scanned = optimize.steps_a_call()

    @jax.jit
    def advance(carry: Carry) -> Carry:
        return step(carry, None)[0] if scanned == 1 else jax.lax.scan(step, carry, None, scanned)[0]

    def timer() -> float:
        carry, marks = (weights, x), []
        for _ in range(net.recipe.reconstruction.steps // scanned + 1):
            carry = jax.block_until_ready(advance(carry))
            marks.append(time.perf_counter())
        return (marks[-1] - marks[0]) / (len(marks) - 1) / scanned

    return timer


def _quantized_step(net: Network, backend: Backend) -> Callable[[], float]:
    program, compiler = _program(net), aq.Compiler(backend)
    boundary = _caches(net, program.subgraph.boundary_inputs)
    targets = _caches(net, program.subgraph.outputs)
    values = np.abs(np.random.default_rng(2).normal(size=10_000))
    quantizers = Quantizers(
        make_weight_quantizers(program, net.folded, {}),
        tuple(search_activation_range(values, tensor.bits) for tensor in program.tensors),
        (True,) * len(program.tensors),
    )
    data = CalibrationData(boundary, boundary, targets, np.arange(net.samples))

    def timer() -> float:
        marks: list[tuple[int, float]] = []
        optimize.optimize(
            program, quantizers, data, net.recipe, 0, compiler,
            lambda step, loss: marks.append((step, time.perf_counter())),
        )  # fmt: skip
        (first, start), (last, end) = marks[0], marks[-1]
        return (end - start) / (last - first)

    return timer


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    timing.report(measure(values.rounds, values.model), values.out)


if __name__ == "__main__":
    sys.exit(main())
