"""The reconstruction of one block, and the state that it passes to the next."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.partition import Block
from aquant_jax.graph.subgraph import BlockInputs, bind_inputs
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.plan.block_program import BlockProgram, forward, make_block_program
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.activation_cache import Cache, store, take
from aquant_jax.reconstruction.block_store import BlockResult, BlockStore
from aquant_jax.reconstruction.loss import output_loss
from aquant_jax.reconstruction.observe_ranges import observe_ranges
from aquant_jax.reconstruction.observer import Observer
from aquant_jax.reconstruction.optimize import Result, optimize
from aquant_jax.reconstruction.report import BlockReport, propagated_error
from aquant_jax.reconstruction.training_step import CalibrationData, Quantizers
from aquant_jax.reconstruction.weights import (
    deployed_weights,
    float_weights,
    make_weight_quantizers,
    nearest_layers,
)


class Run(NamedTuple):
    """The fixed part of a quantization.

    Attributes:
      net: the network.
      inputs: leaves of the calibration set, by value id.
      seed: seeds batches and masks.
      compiler: shares compiled functions.
      observer: receives the progress.
      block_store: finished blocks on disk, or None.
      augment: ``augment(key, leaves) -> leaves``, by value id, for the whole-network stage.
      learn_from: the samples that are not held out for that stage; None for all.
    """

    net: Network
    inputs: dict[int, jax.Array]
    seed: int
    compiler: Compiler
    observer: Observer
    block_store: BlockStore | None = None
    augment: Callable[..., dict[int, jax.Array]] | None = None
    learn_from: np.ndarray | None = None


class State(NamedTuple):
    """The values that one block hands on to the next (immutable).

    Attributes:
      index: number of finished blocks.
      layers: deployed so far, by weight path.
      activations: quantizers so far, by tensor key.
      quantized, floating: activations at the block's boundary, from the quantized prefix and from
        the float network.
    """

    index: int = 0
    layers: dict[str, LayerState] = {}  # noqa: RUF012 - never mutated
    activations: dict[str, ActivationQuantizer] = {}  # noqa: RUF012 - never mutated
    quantized: tuple[Cache, ...] = ()
    floating: tuple[Cache, ...] = ()


def quantize_block(run: Run, state: State, block: Block) -> tuple[State, BlockResult]:
    """Quantize the next block, or read it from the block store.

    Args:
      run: the fixed part.
      state: after the block before.
      block: number ``state.index`` of the network.

    Returns:
      The state after this block, and its result.

    Raises:
      ReconstructionError: a loss, or a layer's float input, is not finite.
      InputError: the block store is damaged or cannot be written.
    """
    net = run.net
    program = make_block_program(net.graph, net.plan, block.start, block.targets)
    # A block may pass on other values than those whose error it minimises.
    onward = program
    if block.end != block.targets:
        onward = make_block_program(net.graph, net.plan, block.start, block.end)
    targets = None
    result = run.block_store.read(state.index) if run.block_store else None
    if result is None:
        run.observer.on_block_start(state.index, block)
        targets = _forward_float(run, program, state.floating)
        result = _reconstruct(run, state, block, (program, onward), targets)
        if run.block_store:
            run.block_store.write(state.index, result)
    after = state._replace(
        index=state.index + 1,
        layers=state.layers | result.layers,
        activations=state.activations | result.activations,
    )
    if after.index < len(net.blocks):
        floating = targets if onward is program else None
        after = after._replace(
            quantized=_forward_quantized(run, onward, after),
            floating=floating or _forward_float(run, onward, state.floating),
        )
    return after, result


def _reconstruct(
    run: Run,
    state: State,
    block: Block,
    programs: tuple[BlockProgram, BlockProgram],
    targets: tuple[Cache, ...],
) -> BlockResult:
    """Quantize one block by optimisation; use nearest rounding where that is not better."""
    began = time.perf_counter()
    program, learning = programs[0], run.net.recipe.reconstruction
    quantizers, fresh = _initial_quantizers(run, state, programs)
    data = _calibration_data(run, state, program, targets)
    curve = np.zeros((0, 2), np.float32)
    nearest = nearest_layers(program, quantizers.weights)
    best = start = Result(nearest, quantizers.activations, curve)
    start_error = final_error = _error(run, program, start, data)
    if learning.steps:
        best = _learn(run, state.index, program, quantizers, data)
        curve, final_error = best.curve, _error(run, program, best, data)
    fell_back = not final_error <= start_error
    if fell_back:
        best, final_error = start, start_error
    learned = dict(zip((t.key for t in program.tensors), best.activations, strict=True))
    report = BlockReport(
        state.index, block.name, block.layers, learning.steps, curve, start_error, final_error,
        fell_back, time.perf_counter() - began, propagated_error(state.quantized, state.floating),
    )  # fmt: skip
    return BlockResult(
        {spec.path: layer for spec, layer in zip(program.specs, best.layers, strict=True)},
        {key: learned.get(key, quantizer) for key, quantizer in fresh.items()},
        report,
    )


def _initial_quantizers(
    run: Run, state: State, programs: tuple[BlockProgram, BlockProgram]
) -> tuple[Quantizers, dict[str, ActivationQuantizer]]:
    """The quantizers that a block starts from, and those of the tensors first read in it."""
    program, learning = programs[0], run.net.recipe.reconstruction
    count = min(learning.init_samples, run.net.samples)
    run_float = functools.partial(_run_float, run, state.floating, count)
    fresh = observe_ranges(run.net, programs, run_float, state.activations)
    known = state.activations | fresh
    quantizers = Quantizers(
        make_weight_quantizers(program, run.net.folded),
        tuple(known[tensor.key] for tensor in program.tensors),
        tuple(tensor.key in fresh for tensor in program.tensors),
    )
    return quantizers, fresh


def _calibration_data(
    run: Run, state: State, program: BlockProgram, targets: tuple[Cache, ...]
) -> CalibrationData:
    _, model, constants = _inputs(run, program, state.quantized)
    mask = run.net.valid_mask
    mask = None if mask is None else jnp.asarray(mask)
    caches = state.quantized, state.floating, targets
    return CalibrationData(*caches, model, constants, mask, run.learn_from)


def _learn(
    run: Run, index: int, program: BlockProgram, quantizers: Quantizers, data: CalibrationData
) -> Result:
    seed = int(np.random.SeedSequence([run.seed, index]).generate_state(1)[0])
    on_step = functools.partial(run.observer.on_step, index)
    return optimize(program, quantizers, data, run.net.recipe, seed, run.compiler, on_step)


def _forward_quantized(run: Run, program: BlockProgram, state: State) -> tuple[Cache, ...]:
    """Outputs of a block for all calibration samples, quantized."""
    weights = deployed_weights(program, [state.layers[spec.path] for spec in program.specs])
    activations = [state.activations[tensor.key] for tensor in program.tensors]
    batches = _batches(run, program, weights, activations, state.quantized, run.net.samples)
    return store((outputs for _, outputs in batches), run.net.samples)


def _forward_float(
    run: Run, program: BlockProgram, boundary: tuple[Cache, ...]
) -> tuple[Cache, ...]:
    """Outputs of a block for all calibration samples, in float."""
    batches = _run_float(run, boundary, run.net.samples, program)
    return store((outputs for _, outputs in batches), run.net.samples)


def _run_float(
    run: Run, boundary: tuple[Cache, ...], samples: int, program: BlockProgram
) -> Iterator[tuple[np.ndarray, Sequence[jax.Array]]]:
    weights = float_weights(program, run.net.folded)
    return _batches(run, program, weights, None, boundary, samples)


def _batches(
    run: Run,
    program: BlockProgram,
    weights: Sequence[Any],
    activations: Sequence[ActivationQuantizer] | None,
    boundary: tuple[Cache, ...],
    samples: int,
) -> Iterator[tuple[np.ndarray, Sequence[jax.Array]]]:
    """Outputs of a block, batch by batch, with the indices of the samples."""
    function = run.compiler.get(
        ("forward", program.key, activations is not None),
        lambda: functools.partial(_take_and_run, program, run.compiler.layer),
    )
    inputs = _inputs(run, program, boundary)
    for start in range(0, samples, run.net.batch):
        rows = _rows(run.net, start)
        yield rows, function(rows, weights, activations, inputs)


def _error(run: Run, program: BlockProgram, result: Result, data: CalibrationData) -> float:
    """Loss of the deployed block on the calibration set."""
    # Bound outside `error`: a shared compiler must not keep `run` and its caches alive.
    power, layer = run.net.recipe.reconstruction.loss_power, run.compiler.layer

    def build() -> Callable[..., jax.Array]:
        def error(
            index: jax.Array,
            valid_mask: jax.Array | None,
            targets: tuple[Cache, ...],
            *args: Any,
        ) -> jax.Array:
            wanted = take(targets, index, program.dtypes(program.subgraph.outputs))
            outputs = _take_and_run(program, layer, index, *args)
            mask = None if valid_mask is None else valid_mask[index]
            return output_loss(program, outputs, wanted, power, mask)

        return error

    function = run.compiler.get(("error", program.key, power), build)
    weights = deployed_weights(program, result.layers)
    inputs = BlockInputs(data.quantized, data.model_inputs, data.constants)
    arguments = (data.valid_mask, data.targets, weights, result.activations, inputs)
    starts = range(0, run.net.samples - run.net.batch + 1, run.net.batch)
    losses = [function(_rows(run.net, start), *arguments) for start in starts]
    return float(np.mean([float(loss) for loss in losses]))


def _take_and_run(
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
    model = [leaf[index] for leaf in inputs.model]
    batch = BlockInputs(boundary, model, inputs.constants)
    return forward(program, weights, activations, batch, layer=layer)


def _rows(net: Network, start: int) -> np.ndarray:
    """The samples of a batch; the last batch wraps around to the first sample."""
    return np.arange(start, start + net.batch, dtype=np.int32) % net.samples


def _inputs(run: Run, program: BlockProgram, boundary: tuple[Cache, ...]) -> BlockInputs:
    """The inputs of a block for all calibration samples."""
    net = run.net
    return bind_inputs(net.graph, program.subgraph, net.variables, run.inputs, boundary)
