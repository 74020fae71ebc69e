"""Measures: ``python -m launch.bench calibrate|throughput|deploy|latency|size [--out=FILE.json]``.

calibrate: one optimisation step of the first residual block of ResNet-20, or of another ``model``
of the zoo, at batch 32, in float (forward, backward and a step against the gradient, of the block
alone), by qdrop and by aquant, on a GPU in a scanned loop, and the scale search of the whole
network. Weights and images are random: the arithmetic does not
depend on them. Every figure is the median of the rounds, every ratio that of figures of the same
run.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import aquant_jax as aq
import gpu_ops
from aquant_jax import models
from aquant_jax.arithmetic.range_search import tensor_state
from aquant_jax.errors import InputError
from aquant_jax.graph.subgraph import root
from aquant_jax.layers import im2col
from aquant_jax.layers.compiler import Backend, Compiler
from aquant_jax.plan.block_program import forward, make_unit
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.activation_cache import store
from aquant_jax.reconstruction.optimize import LOG_EVERY, Data, optimize, steps_a_call
from aquant_jax.reconstruction.weights import float_weights, make_grids
from aquant_jax.storage.environment import environment
from launch.bench import deploy, latency, size, throughput, timing
from launch.lib import command_line

BATCH = 32
CALLS = 3  # of the scanned loop; the first one is not timed
BLOCK = 1  # the first residual block; block 0 is the stem
SAMPLES = 256


def calibrate(rounds: int, model: str) -> dict:
    """Times of the steps and of the scale search, in ms and s.

    Args:
        rounds: how often every figure is taken.
        model: of the zoo.
    """
    apply, variables = models.create(model)
    side = 32 if model.endswith("_cifar") else 224
    images = np.random.default_rng(0).normal(size=(SAMPLES, side, side, 3)).astype(np.float32)
    steps = CALLS * max(LOG_EVERY, steps_a_call())
    fields = {**_bits(2), "steps": steps, "batch_size": BATCH}
    networks = {
        name: aq.prepare(apply, variables, images, aq.recipes.preset(name, **fields))
        for name in ("qdrop", "aquant")
    }
    timers = {"float": _float_step(networks["qdrop"])}
    timers |= {name: _quantized_step(net, gpu_ops.backend()) for name, net in networks.items()}
    timers["aquant_without_gpu_ops"] = _quantized_step(networks["aquant"], im2col)
    times = timing.in_turns(timers, rounds)
    steps = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    searches = {f"w{b}a{b}": _scale_search(apply, variables, images, b) for b in (2, 4)}
    return {
        "benchmark": "calibrate",
        "model": model,
        "block": str(networks["qdrop"].blocks[BLOCK]),
        "block_input": _block_input(networks["qdrop"]),
        "rounds": rounds,
        "step_ms": steps,
        "step_ms_all": {name: [v * 1e3 for v in values] for name, values in times.items()},
        "qdrop_over_float": steps["qdrop"] / steps["float"],
        "aquant_over_qdrop": steps["aquant"] / steps["qdrop"],
        "scale_search_s": searches,
        **environment(),
    }


def _bits(bits: int) -> dict[str, int]:
    return {"weight_bits": bits, "act_bits": bits}


def _block_input(net: Network) -> list[tuple[int, ...]]:
    unit = make_unit(net.graph, net.plan, net.blocks[BLOCK].start, net.blocks[BLOCK].targets)
    return [tuple(net.graph.avals[value].shape) for value in unit.program.live]


def _block(net: Network):
    block = net.blocks[BLOCK]
    unit = make_unit(net.graph, net.plan, block.start, block.targets)
    rng = np.random.default_rng(1)

    def cache(values):
        shapes = [(SAMPLES, *net.graph.avals[v].shape[1:]) for v in values]
        arrays = [np.maximum(rng.normal(size=shape), 0.0).astype(np.float32) for shape in shapes]
        return store([arrays], SAMPLES)

    return unit, make_grids(unit, net.folded), cache


def _float_step(net: Network):
    unit, _, cache = _block(net)
    weights = float_weights(unit, net.folded)
    (x,) = (c.values[:BATCH].astype(jnp.float32) for c in cache(unit.program.live))

    def step(both, _):
        def loss(weights, x):
            (y,) = forward(unit, weights, None, [x], (), ())
            return jnp.mean(y**2)

        gradients = jax.grad(loss, argnums=(0, 1))(*both)
        return jax.tree.map(lambda a, g: a - 1e-6 * g, both, gradients), None

    scanned = steps_a_call()

    @jax.jit
    def advance(both):
        return step(both, None)[0] if scanned == 1 else jax.lax.scan(step, both, None, scanned)[0]

    def timer():
        both, marks = (weights, x), []
        for _ in range(net.recipe.steps // scanned + 1):
            both = jax.block_until_ready(advance(both))
            marks.append(time.perf_counter())
        return (marks[-1] - marks[0]) / (len(marks) - 1) / scanned

    return timer


def _quantized_step(net: Network, backend: Backend):
    unit, grids, cache = _block(net)
    live, targets = cache(unit.program.live), cache(unit.program.outputs)
    data, compiler = Data(live, live, (), targets), Compiler(backend)
    values = np.abs(np.random.default_rng(2).normal(size=10_000))
    tensors = [tensor_state(values, tensor.bits) for tensor in unit.tensors]
    trained = [True] * len(tensors)

    def timer():
        marks: list[tuple[int, float]] = []
        optimize(
            unit, grids, tensors, trained, data, (), net.recipe, 0, compiler,
            lambda step, loss: marks.append((step, time.perf_counter())),
        )  # fmt: skip
        (first, start), (last, end) = marks[0], marks[-1]
        return (end - start) / (last - first)

    return timer


def _scale_search(apply, variables, images, bits: int) -> float:
    """Seconds for all weights and all activations (256 images), compilation included."""
    recipe = aq.recipes.nearest(**_bits(bits), batch_size=SAMPLES)
    net = aq.prepare(apply, variables, images, recipe)
    whole = make_unit(net.graph, net.plan, (), net.graph.outputs)
    owners = {index: root(whole.producers, v) for v, index in whole.tensor_of.items()}
    seer = make_unit(net.graph, net.plan, (), tuple(owners.values()))
    weights = float_weights(seer, net.folded)
    run = jax.jit(lambda weights, x: forward(seer, weights, None, (), [x], ()))
    activations = [np.asarray(a) for a in run(weights, images)]
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(make_grids(whole, net.folded))
    for index, values in zip(owners, activations, strict=True):
        jax.block_until_ready(tensor_state(values, whole.tensors[index].bits))
    return time.perf_counter() - start


def _define(flags):
    from absl.flags import DEFINE_alias, DEFINE_boolean, DEFINE_integer, DEFINE_string

    DEFINE_string("out", None, "where to write the JSON too", flag_values=flags)
    DEFINE_integer("rounds", 5, "how often every figure is taken", 1, flag_values=flags)
    DEFINE_string("data_dir", None, "deploy: of ResNet-20's config", flag_values=flags)
    DEFINE_string("model", None, "of the zoo; resnet18, calibrate: ResNet-20", flag_values=flags)
    DEFINE_boolean("fused", False, "latency: see Workload", flag_values=flags)
    DEFINE_string("preset", "aquant", "throughput: of the quantizer", flag_values=flags)
    for name, default in (("size", 224), ("images", 128), ("batch_size", 32)):
        DEFINE_integer(name, default, "throughput, latency: see Workload", 1, flag_values=flags)
    DEFINE_alias("batch", "batch_size", flag_values=flags)


def _workload(of, flags):
    """The workload of a benchmark, whose fields are flags."""
    fields = {field.name: flags[field.name].value for field in dataclasses.fields(of)}
    return of(**{**fields, "model": flags.model or "resnet18"})


def _latency(flags) -> dict:
    results = latency.measure(_workload(latency.Workload, flags))
    if flags.out:
        out = Path(flags.out)
        out.with_suffix(".md").write_text(latency.table(results) + "\n")
        latency.plot(results, out.with_suffix(".png"))
    return results


BENCHMARKS = {
    "calibrate": lambda flags: calibrate(flags.rounds, flags.model or "resnet20_cifar"),
    "throughput": lambda flags: throughput.measure(_workload(throughput.Workload, flags)),
    "deploy": lambda flags: deploy.measure(flags.rounds, flags.data_dir),
    "latency": _latency,
    "size": lambda flags: size.measure(),
}


@command_line.program
def main(argv: list[str]) -> int | None:
    """Runs the benchmark that the first argument names."""
    if len(argv) < 2 or argv[1] not in BENCHMARKS:
        known = f"there are: {', '.join(BENCHMARKS)}"
        raise InputError(f"unknown benchmark {' '.join(argv[1:2])!r}; {known}")
    texts = (__doc__, throughput.__doc__, deploy.__doc__, latency.__doc__, size.__doc__)
    flags, _ = command_line.parse([argv[0], *argv[2:]], _define, "\n".join(t or "" for t in texts))
    text = json.dumps(BENCHMARKS[argv[1]](flags), indent=2)
    print(text)
    if flags.out:
        Path(flags.out).write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
