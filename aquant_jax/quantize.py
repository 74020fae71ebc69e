"""``quantize``: the spine of the library. Data flows once through, block by block."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aquant_jax.arithmetic.range_search import tensor_state
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.deployment.quantized import Quantized, traced
from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.graph.partition import Block
from aquant_jax.graph.subgraph import cut, root, static_inputs
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.plan.block_program import Unit, counts, forward, make_unit
from aquant_jax.plan.network import Network, describe, prepare
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.activation_cache import Cache, store
from aquant_jax.reconstruction.block_store import Blocks, Finished, open_blocks
from aquant_jax.reconstruction.optimize import Data, optimize, output_loss
from aquant_jax.reconstruction.report import BlockReport, History, propagated_error
from aquant_jax.reconstruction.weights import (
    Grids,
    deployed_weights,
    float_weights,
    make_grids,
    nearest_layers,
)


def quantize(
    apply: Callable,
    variables,
    calibration,
    recipe: Recipe,
    *,
    mask: str | None = None,
    seed: int = 0,
    progress: bool = True,
    on_start: Callable[[], None] | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
    compiler: Compiler | None = None,
    resume: str | Path | None = None,
    restart_from: int | None = None,
) -> Quantized:
    """Quantize the network ``apply(variables, x)`` after training.

    Args:
      apply: any traceable inference function (Flax NNX after `nnx.split`, linen, plain JAX).
      variables: pytree of float32, bfloat16 or float16 arrays (others are passed through).
      calibration: unlabelled inputs, a pytree of arrays with a leading sample axis.
      recipe: see `recipes`; same recipe, seed and machine give the same codes, bit for bit.
      mask: path of the calibration leaf ``[samples, positions]`` that is one at the positions of a
        sequence and zero at its padding, which then counts neither in losses nor in the search of
        step sizes. The axes that number positions are found by tracing the network with sequences
        that are shorter by one; activations without such an axis count whole.
      seed: of batches and masks.
      progress: print the blocks and the memory of their cached activations, and show a bar.
      on_start: called when everything was accepted, before the first block.
      on_block: called with the report of each finished block, of resumed ones too.
      compiler: pass the same one to several calls to share compiled steps between them, or
        ``Compiler(gpu_ops.backend())`` for faster ones.
      resume: folder in which every finished block is kept; the same call goes on after the last
        one there, to the same bits.
      restart_from: with `resume`, the first block to learn anew; the recipe may then differ from
        the one before in how blocks are learned (see `resume.HOW`), not in what.

    Returns:
      The quantized network.

    Raises:
      InputError: see `network.prepare`; a negative seed; `resume` cannot be written, is damaged, or
        holds the blocks of another call (the fields that differ are listed).
      ReconstructionError: a block's loss, or a layer's float input, is not finite.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}; it must be 0 or more")
    calibration = jax.tree.map(np.asarray, calibration)
    net = prepare(apply, variables, calibration, recipe, mask)
    compiler = compiler or Compiler()
    run = _Run(net, recipe, calibration, seed, compiler)
    kept = open_blocks(resume, restart_from, net, calibration, seed, compiler)
    if on_start is not None:
        on_start()
    if progress:
        print(describe(net))
    total = recipe.steps * len(net.blocks)
    reports = []
    with tqdm(total=total, disable=not progress or not total, unit="step") as bar:
        for index, block in enumerate(net.blocks):
            report = run.block(index, block, bar, kept)
            reports.append(report)
            if progress and report.kept_start:
                bar.write(f"{block.name}: reconstruction did not help; kept the nearest start")
            if on_block is not None:
                on_block(report)
    return run.result(apply, tuple(reports))


class _Run:
    """One quantization: what is carried from block to block."""

    def __init__(self, net: Network, recipe: Recipe, calibration, seed: int, compiler: Compiler):
        self.net, self.recipe, self.seed = net, recipe, seed
        self.compiler = compiler
        self.calibration = calibration
        leaves = jax.tree.leaves(calibration)
        self.counted = None if net.counted is None else jnp.asarray(net.counted)
        self.inputs = dict(zip(net.graph.inputs, map(jnp.asarray, leaves), strict=True))
        self.quantized: tuple[Cache, ...] = ()
        self.floating: tuple[Cache, ...] = ()
        self.layers: dict[str, LayerState] = {}
        self.tensors: dict[str, TensorState] = {}

    def block(self, index: int, block: Block, bar, kept: Blocks | None) -> BlockReport:
        """Quantize one block, or take it as it was kept, and hand its activations on."""
        net = self.net
        unit = make_unit(net.graph, net.plan, block.start, block.targets)
        onward = unit
        if block.end != block.targets:
            onward = make_unit(net.graph, net.plan, block.start, block.end)
        weights = float_weights(unit, net.folded)
        targets = None
        finished = kept.read(index) if kept else None
        if finished is None:
            targets = self._forward(unit, weights, None, self.floating)
            finished = self._reconstruct(index, block, [unit, onward], weights, targets, bar)
            if kept:
                kept.write(index, finished)
        else:
            bar.update(finished.report.steps)
        self.layers.update(finished.layers)
        self.tensors.update(finished.tensors)
        if index + 1 < len(net.blocks):
            layers = [finished.layers[spec.path] for spec in onward.specs]
            self._hand_on(onward, layers, weights, targets if onward is unit else None)
        return finished.report

    def _reconstruct(self, index, block: Block, units, weights, targets, bar) -> Finished:
        """Quantize one block."""
        began = time.perf_counter()
        unit, recipe = units[0], self.recipe
        grids = make_grids(unit, self.net.folded)
        fresh = self._observe(units, weights)
        data = Data(self.quantized, self.floating, self._side(unit), targets, self.counted)
        start = nearest_layers(unit, grids)
        layers, curve = start, np.zeros((0, 2), np.float32)
        start_error = final_error = self._error(unit, start, targets)
        if recipe.steps:
            bar.set_description(f"block {index + 1}/{len(self.net.blocks)} {block.name}")
            layers, curve, final_error = self._learn(index, unit, grids, fresh, data, bar)
        kept_start = not final_error <= start_error
        if kept_start:
            layers, final_error = start, start_error
            self.tensors.update(fresh)
        report = BlockReport(
            index, block.name, block.layers, recipe.steps, curve, start_error, final_error,
            kept_start, time.perf_counter() - began,
            propagated_error(self.quantized, self.floating),
        )  # fmt: skip
        return Finished(
            {spec.path: layer for spec, layer in zip(unit.specs, layers, strict=True)},
            {key: self.tensors[key] for key in fresh},
            report,
        )

    def _learn(self, index, unit: Unit, grids: tuple[Grids, ...], fresh, data: Data, bar):
        def on_step(step, loss):
            bar.update(step - on_step.seen)
            bar.set_postfix(loss=f"{loss:.4g}")
            on_step.seen = step

        on_step.seen = 0
        states = [self.tensors[t.key] for t in unit.tensors]
        trained = [t.key in fresh for t in unit.tensors]
        seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        result = optimize(
            unit, grids, states, trained, data, self._static(unit), self.recipe,
            seed, self.compiler, on_step,
        )  # fmt: skip
        self.tensors.update({t.key: s for t, s in zip(unit.tensors, result.tensors, strict=True)})
        return result.layers, result.curve, self._error(unit, result.layers, data.targets)

    def _hand_on(self, unit, layers, weights, targets):
        """Turn the caches into those of the next block."""
        deployed = deployed_weights(unit, layers)
        tensors = [self.tensors[t.key] for t in unit.tensors]
        self.quantized = self._forward(unit, deployed, tensors, self.quantized)
        self.floating = targets or self._forward(unit, weights, None, self.floating)

    def _observe(self, units, weights) -> dict[str, TensorState]:
        """Initial states of the tensors that are read for the first time, from the float model."""
        net, unseen = self.net, {}
        for unit in units:
            for value, tensor in unit.tensor_of.items():
                key = unit.tensors[tensor].key
                if key not in self.tensors:
                    unseen.setdefault(key, (root(unit.producers, value), unit.tensors[tensor].bits))
        if not unseen:
            return {}
        live = units[0].program.live
        wanted = tuple(value for value, _ in unseen.values())
        seer = make_unit(net.graph, net.plan, live, wanted)
        own = [weights[[s.path for s in units[0].specs].index(s.path)] for s in seer.specs]
        count = min(self.recipe.init_samples, self.net.samples)
        batches = list(self._batches(seer, own, None, self.floating, count))
        fresh = {}
        for (key, (_, bits)), seen, axes in zip(
            unseen.items(), zip(*batches, strict=True), seer.tokens, strict=True
        ):
            values = np.concatenate([self._elements(i, part, axes) for i, part in enumerate(seen)])
            if not np.isfinite(values).all():
                raise ReconstructionError(f"{key}: its float input holds NaN or infinity")
            fresh[key] = tensor_state(values, bits)
        self.tensors.update(fresh)
        return fresh

    def _elements(self, batch: int, part, axes: tuple[int, ...]) -> np.ndarray:
        """Values of one batch that are no padding, in one row."""
        values = np.asarray(part, np.float32)
        if self.net.counted is not None and axes:
            counted = self.net.counted[self._rows(batch * self.net.batch)]
            values = values[np.broadcast_to(counts(counted, axes, values.ndim), values.shape)]
        return values.ravel()

    def _rows(self, start: int) -> np.ndarray:
        """The samples of a batch; the last one goes on from the first sample."""
        return np.arange(start, start + self.net.batch, dtype=np.int32) % self.net.samples

    def _forward(self, unit, weights, tensors, live) -> tuple[Cache, ...]:
        """Outputs of a unit for all calibration samples."""
        samples = self.net.samples
        return store(self._batches(unit, weights, tensors, live, samples), samples)

    def _batches(self, unit, weights, tensors, live, samples):
        quantized, layer = tensors is not None, self.compiler.layer
        function = self.compiler.get(
            ("forward", unit.key, quantized),
            lambda: functools.partial(_take_and_run, unit, layer),
        )
        side, static = self._side(unit), self._static(unit)
        for start in range(0, samples, self.net.batch):
            yield function(self._rows(start), weights, tensors, live, side, static)

    def _error(self, unit, layers, targets) -> float:
        """Loss of the deployed unit on the calibration set."""
        tensors = [self.tensors[t.key] for t in unit.tensors]
        weights = deployed_weights(unit, layers)

        # Not self: a shared compiler must not keep this run and its caches alive.
        recipe, layer = self.recipe, self.compiler.layer

        def build():
            def error(index, counted, targets, *args):
                dtypes = [unit.avals[i].dtype for i in unit.program.outputs]
                wanted = [t.take(index, d) for t, d in zip(targets, dtypes, strict=True)]
                outputs = _take_and_run(unit, layer, index, *args)
                mask = None if counted is None else counted[index]
                return output_loss(recipe, unit, outputs, wanted, mask)

            return error

        function = self.compiler.get(("error", unit.key, self.recipe.loss_power), build)
        arguments = (self.counted, targets, weights, tensors, self.quantized)
        arguments += (self._side(unit), self._static(unit))
        losses = []
        for start in range(0, self.net.samples - self.net.batch + 1, self.net.batch):
            losses.append(function(self._rows(start), *arguments))
        return float(np.mean([float(loss) for loss in losses]))

    def _side(self, unit: Unit) -> tuple[jax.Array, ...]:
        return tuple(self.inputs[i] for i in unit.program.side)

    def _static(self, unit: Unit) -> tuple[jax.Array, ...]:
        return tuple(static_inputs(self.net.graph, unit.program, self.net.variables))

    def result(self, apply, reports) -> Quantized:
        net = self.net
        whole = cut(net.graph, (), net.graph.outputs)
        values = static_inputs(net.graph, whole, net.variables)
        static = {
            net.graph.variables[i]: jnp.asarray(value)
            for i, value in zip(whole.static, values, strict=True) if i in net.graph.variables
        }  # fmt: skip
        specs = tuple(net.plan.layers[path] for path in self.layers)
        program = traced(apply, net.variables, self.calibration)
        return Quantized(
            self.layers, self.tensors, static, program, specs, self.recipe, History(reports)
        )


def _take_and_run(unit, layer, index, weights, tensors, live, side, static):
    values = [
        cache.take(index, unit.avals[i].dtype)
        for cache, i in zip(live, unit.program.live, strict=True)
    ]
    inputs = [leaf[index] for leaf in side]
    return forward(unit, weights, tensors, values, inputs, static, layer=layer)
