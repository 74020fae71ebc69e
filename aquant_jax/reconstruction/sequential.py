"""The reconstruction of one block, and the state that it passes to the next."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.border import AUTO
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.plan.block_program import BlockProgram
from aquant_jax.reconstruction.activation_cache import Allocate, Cache, load, store, take
from aquant_jax.reconstruction.block_store import BlockResult
from aquant_jax.reconstruction.border_choice import Borders, Candidate
from aquant_jax.reconstruction.devices import count, settled
from aquant_jax.reconstruction.float_block import FloatBlock
from aquant_jax.reconstruction.loss import output_loss
from aquant_jax.reconstruction.optimize import Result, optimize
from aquant_jax.reconstruction.report import BlockReport, propagated_error
from aquant_jax.reconstruction.run import (
    Run,
    all_batches,
    batches_of,
    block_inputs,
    run_batches,
    split,
)
from aquant_jax.reconstruction.training_step import CalibrationData, Quantizers
from aquant_jax.reconstruction.weights import deployed_weights, nearest_layers


class State(NamedTuple):
    """The values that one block hands on to the next (immutable).

    Attributes:
      index: number of finished blocks.
      layers: deployed so far, by weight path.
      activations: quantizers so far, by tensor key.
      borders: those that were chosen so far, by weight path; empty where a recipe fixes them.
      quantized: activations at the block's boundary, from the quantized prefix.
    """

    index: int = 0
    layers: dict[str, LayerState] = {}  # noqa: RUF012 - never mutated
    activations: dict[str, ActivationQuantizer] = {}  # noqa: RUF012 - never mutated
    borders: Borders = MappingProxyType({})
    quantized: tuple[Cache, ...] = ()


def quantize_block(run: Run, state: State, floating: FloatBlock) -> tuple[State, BlockResult]:
    """Quantize the next block, or read it from the block store.

    Args:
      run: the fixed part.
      state: after the block before.
      floating: block number ``state.index`` in the float network.

    Returns:
      The state after this block, and its result.

    Raises:
      ReconstructionError: a loss, or a layer's float input, is not finite.
      InputError: the block store is damaged or cannot be written.
    """
    result = run.block_store.read(state.index) if run.block_store else None
    outputs: tuple[Cache, ...] = ()
    if result is None:
        run.observer.on_block_start(state.index, floating.block)
        if run.net.recipe.border == AUTO:
            result = _with_cheapest_border(run, state, floating)
        else:
            result, _, outputs = _reconstruct(run, state, floating, floating.program)
        if run.block_store:
            run.block_store.write(state.index, result)
    after = state._replace(
        index=state.index + 1,
        layers=state.layers | result.layers,
        activations=state.activations | result.activations,
        borders={**state.borders, **result.borders},
    )
    if after.index < len(run.net.blocks):
        outputs = outputs or _forward_quantized(run, floating.onward_with(result.borders), after)
        after = after._replace(quantized=outputs)
    return after, result


def _with_cheapest_border(run: Run, state: State, floating: FloatBlock) -> BlockResult:
    """Quantize one block, with the cheapest border that is within the tolerance."""
    began, tried = time.perf_counter(), []
    data = _calibration_data(run, state, floating)
    held_out = batches_of(run.net, split(run)[1])

    def learn(candidate: Candidate) -> tuple[BlockResult, float]:
        """The block with the border of a candidate, and its error on the samples held out."""
        result, best, _ = _reconstruct(run, state, floating, candidate.program)
        error = _error(run, candidate.program, best, data, held_out)
        tried.append((candidate.name, candidate.coefficients, error))
        return result._replace(borders=candidate.borders), error

    reference, *cheaper = floating.candidates
    chosen, error = learn(reference)
    limit = error * (1.0 + run.net.recipe.reconstruction.border_tolerance)
    for candidate in cheaper:
        result, error = learn(candidate)
        if error <= limit:
            chosen = result
            break
    seconds = time.perf_counter() - began
    return chosen._replace(report=chosen.report._replace(candidates=tuple(tried), seconds=seconds))


def _reconstruct(
    run: Run, state: State, floating: FloatBlock, program: BlockProgram
) -> tuple[BlockResult, Result, tuple[Cache, ...]]:
    """Quantize one block by optimisation; use nearest rounding where that is not better.

    Returns:
      What to report and keep, the same for the program of the block, and the boundary of the next
      block. That is empty where another program computes it, or where nearest rounding was better.
    """
    began = time.perf_counter()
    data = _calibration_data(run, state, floating)
    quantizers = _initial_quantizers(state, floating)
    steps = run.net.recipe.reconstruction.steps
    curve = np.zeros((0, 2), np.float32)
    nearest = nearest_layers(program, quantizers.weights)
    best = start = Result(nearest, quantizers.activations, curve)
    is_read = program is floating.onward and floating.block is not run.net.blocks[-1]
    allocate = run.memory.allocate(state.index) if is_read else None
    start_error, outputs = _evaluate(run, program, start, data, None if steps else allocate)
    final_error = start_error
    if steps:
        best = _learn(run, state.index, program, quantizers, data)
        curve = best.curve
        final_error, outputs = _evaluate(run, program, best, data, allocate)
    fell_back = not final_error <= start_error
    if fell_back:
        best, final_error, outputs = start, start_error, ()
    learned = dict(zip((t.key for t in program.tensors), best.activations, strict=True))
    block = floating.block
    report = BlockReport(
        state.index, block.name, block.layers, steps, curve, start_error, final_error,
        fell_back, time.perf_counter() - began,
        propagated_error(state.quantized, floating.boundary, run.net.samples), devices=count(),
    )  # fmt: skip
    result = BlockResult(
        {spec.path: layer for spec, layer in zip(program.specs, best.layers, strict=True)},
        {key: learned.get(key, quantizer) for key, quantizer in floating.fresh.items()},
        report,
    )
    return result, best, outputs


def _initial_quantizers(state: State, floating: FloatBlock) -> Quantizers:
    """The quantizers that a block starts from."""
    known, tensors = state.activations | floating.fresh, floating.program.tensors
    return Quantizers(
        floating.weights,
        tuple(known[tensor.key] for tensor in tensors),
        tuple(tensor.key in floating.fresh for tensor in tensors),
    )


def _calibration_data(run: Run, state: State, floating: FloatBlock) -> CalibrationData:
    _, model, constants = block_inputs(run, floating.program, state.quantized)
    mask = run.net.valid_mask
    mask = None if mask is None else jnp.asarray(mask)
    caches = state.quantized, floating.boundary, floating.targets
    return CalibrationData(*caches, run.learn_from, model, constants, mask)


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
    batches = all_batches(run.net)
    produced = run_batches(run, program, weights, activations, state.quantized, batches)
    allocate = run.memory.allocate(state.index - 1)
    return store((outputs for _, outputs in produced), run.net.samples, allocate)


def _evaluate(
    run: Run,
    program: BlockProgram,
    result: Result,
    data: CalibrationData,
    allocate: Allocate | None,
) -> tuple[float, tuple[Cache, ...]]:
    """Loss of the deployed block, and its outputs for all calibration samples, in one pass.

    The samples that fill no batch have no part in the loss. Without `allocate` no outputs are kept.
    """
    net = run.net
    whole = net.samples // net.batch
    if allocate is None:
        return _error(run, program, result, data, all_batches(net)[:whole]), ()
    losses: list[jax.Array] = []
    outputs = _outputs(run, program, result, data, all_batches(net), losses)
    caches = store(outputs, net.samples, allocate)
    return _mean(losses[:whole]), caches


def _error(
    run: Run,
    program: BlockProgram,
    result: Result,
    data: CalibrationData,
    batches: Sequence[np.ndarray],
) -> float:
    """Loss of the deployed block on `batches` of the calibration set."""
    losses: list[jax.Array] = []
    for _ in _outputs(run, program, result, data, batches, losses):
        pass
    return _mean(losses)


def _mean(losses: Sequence[jax.Array]) -> float:
    return float(np.mean([float(loss) for loss in losses]))


def _outputs(
    run: Run,
    program: BlockProgram,
    result: Result,
    data: CalibrationData,
    batches: Sequence[np.ndarray],
    losses: list[jax.Array],
) -> Iterator[Sequence[jax.Array]]:
    """Outputs of the deployed block, batch by batch; adds the loss of each to `losses`."""
    # Bound outside `loss`: a shared compiler must not keep `run` and its caches alive.
    power = run.net.recipe.reconstruction.loss_power

    def build() -> Callable[..., jax.Array]:
        def loss(
            index: jax.Array,
            valid_mask: jax.Array | None,
            targets: tuple[Cache, ...],
            outputs: Sequence[jax.Array],
        ) -> jax.Array:
            wanted = take(targets, index, program.dtypes(program.subgraph.outputs))
            mask = None if valid_mask is None else valid_mask[index]
            return output_loss(program, outputs, wanted, power, mask)

        return loss

    function = run.compiler.get(("loss", program.float_key, power), build)
    weights = deployed_weights(program, result.layers)
    produced = run_batches(run, program, weights, result.activations, data.quantized, batches)
    samples = load((data.valid_mask, data.targets), batches)
    for (_, outputs), ((mask, targets), index) in zip(produced, samples, strict=True):
        losses.append(settled(function(index, mask, targets, outputs)))
        yield outputs
