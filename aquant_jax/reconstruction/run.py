"""The fixed part of a quantization, and blocks that run on its calibration set, batch by batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.subgraph import BlockInputs, bind_inputs
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan.block_program import BlockProgram, forward
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.activation_cache import Cache, load, take
from aquant_jax.reconstruction.block_store import BlockStore
from aquant_jax.reconstruction.devices import everywhere, settled, take_batch
from aquant_jax.reconstruction.hosts import SharedBlockStore
from aquant_jax.reconstruction.memory import MemoryPlan
from aquant_jax.reconstruction.observer import Observer


class Run(NamedTuple):
    """The fixed part of a quantization with one seed.

    Attributes:
      net: the network.
      inputs: leaves of the calibration set, by value id.
      seed: seeds batches and masks.
      compiler: shares compiled functions.
      observer: receives the progress.
      memory: where caches lie.
      learn_from: the samples that are not held out.
      block_store: finished blocks on disk, or None.
      augment: ``augment(key, leaves) -> leaves``, by value id, for the whole-network stage.
    """

    net: Network
    inputs: dict[int, Any]
    seed: int
    compiler: Compiler
    observer: Observer
    memory: MemoryPlan
    learn_from: np.ndarray
    block_store: BlockStore | SharedBlockStore | None = None
    augment: Callable[..., dict[int, jax.Array]] | None = None


def run_batches(
    run: Run,
    program: BlockProgram,
    weights: Sequence[Any],
    activations: Sequence[ActivationQuantizer] | None,
    boundary: tuple[Cache, ...],
    batches: Sequence[np.ndarray],
) -> Iterator[tuple[np.ndarray, Sequence[jax.Array]]]:
    """Outputs of a block, batch by batch, with the indices of the samples."""
    key = ("float", program.float_key) if activations is None else ("forward", program.key)
    function = run.compiler.get(
        key, lambda: functools.partial(take_and_run, program, run.compiler.layer)
    )
    inputs = block_inputs(run, program, boundary)
    loaded = load((inputs.boundary, inputs.model), batches)
    for rows, ((caches, model), index) in zip(batches, loaded, strict=True):
        batch = inputs._replace(boundary=caches, model=model)
        yield rows, settled(function(index, weights, activations, batch))


def take_and_run(
    program: BlockProgram,
    layer: Callable[..., jax.Array],
    index: jax.Array,
    weights: Sequence[Any],
    activations: Sequence[ActivationQuantizer] | None,
    inputs: BlockInputs,
) -> tuple[jax.Array, ...]:
    """Run a block on the samples at `index` of its cached inputs."""
    dtypes = program.dtypes(program.subgraph.boundary_inputs)
    boundary = take(inputs.boundary, index, dtypes)
    model = [take_batch(leaf, index) for leaf in inputs.model]
    batch = BlockInputs(boundary, model, inputs.constants)
    return forward(program, weights, activations, batch, layer=layer)


def all_batches(net: Network) -> list[np.ndarray]:
    """The calibration set in batches; the last one wraps around to the first sample."""
    return batches_of(net, np.arange(net.samples, dtype=np.int32))


def batches_of(net: Network, samples: np.ndarray) -> list[np.ndarray]:
    """`samples` in batches; the last one wraps around to the first of them."""
    starts, batch = range(0, len(samples), net.batch), np.arange(net.batch)
    return [samples[(start + batch) % len(samples)] for start in starts]


def block_inputs(run: Run, program: BlockProgram, boundary: tuple[Cache, ...]) -> BlockInputs:
    """The inputs of a block for all calibration samples."""
    net = run.net
    inputs = bind_inputs(net.graph, program.subgraph, net.variables, run.inputs, boundary)
    return inputs._replace(constants=everywhere(inputs.constants))


def stage_seed(run: Run) -> int:
    """The seed of the samples held out, and of the whole-network stage."""
    sequence = np.random.SeedSequence([run.seed, len(run.net.blocks)])
    return int(sequence.generate_state(1)[0])


def split(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The samples to learn from, in blocks too, and those that are held out."""
    samples = run.net.samples
    order = np.random.default_rng(stage_seed(run)).permutation(samples).astype(np.int32)
    count = math.ceil(run.net.recipe.reconstruction.finetune_held_out * samples)
    return np.sort(order[count:]), np.sort(order[:count])
