"""The whole-network stage: after the last block, all layers are learned from the network's outputs.

Blocks are learned one after another, so nothing makes up for the error that passes from one to the
next. This stage learns the biases, scales, step sizes, borders and codes of all layers at once, on
the distance of the outputs from those of the float network. What it deploys has the same form.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.graph.partition import Block
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.block_store import BlockResult
from aquant_jax.reconstruction.border_choice import resolved
from aquant_jax.reconstruction.chain import Chain, Parts, inexact
from aquant_jax.reconstruction.devices import count, settled, take_batch
from aquant_jax.reconstruction.finetune_step import Finetuner, Params, Start
from aquant_jax.reconstruction.learning_rates import make_finetune_optimizer
from aquant_jax.reconstruction.loss import network_loss
from aquant_jax.reconstruction.optimize import LOG_EVERY, as_stored, draw_batches, mean_loss
from aquant_jax.reconstruction.report import FinetuneReport
from aquant_jax.reconstruction.run import Run, batches_of, split, stage_seed
from aquant_jax.reconstruction.sequential import State

NAME = "whole network"


class Progress(NamedTuple):
    """The stage after some steps (a pytree).

    Attributes:
      params: learned so far.
      optimizer: its state.
      best: the parameters of the best step.
      best_step: that step.
      loss_curve, held_out_curve: see `FinetuneReport`.
    """

    params: Params
    optimizer: Any
    best: Params
    best_step: np.ndarray
    loss_curve: np.ndarray
    held_out_curve: np.ndarray


def finetune(run: Run, state: State) -> tuple[State, BlockResult]:
    """Run the stage, or read it from the block store.

    Args:
      run: the fixed part.
      state: after the last block.

    Returns:
      The state with what was learned, and the result.

    Raises:
      ReconstructionError: the loss is not finite.
      InputError: the block store is damaged or cannot be written.
    """
    index, store = len(run.net.blocks), run.block_store
    result = store.read(index) if store else None
    if result is None:
        ends = run.net.blocks[-1].end
        paths = tuple(state.layers)
        run.observer.on_block_start(index, Block(NAME, paths, (), ends, ends))
        run = run._replace(net=resolved(run.net, state.borders))
        result = _learn(run, Start(state.layers, state.activations))
        if store:
            store.write(index, result)
    return state._replace(layers=result.layers, activations=result.activations), result


def float_parts(net: Network) -> Parts:
    """What the float network computes with."""
    weights = {
        path: Weights(jnp.asarray(weight), jnp.asarray(bias), {})
        for path, (weight, bias) in net.folded.items()
    }
    return Parts(weights, {})


def _learn(run: Run, start: Start) -> BlockResult:
    began = time.perf_counter()
    index, learning = len(run.net.blocks), run.net.recipe.reconstruction
    seed = stage_seed(run)
    train, held_out = split(run)
    stage = _Stage(run, start, seed, held_out)
    steps = learning.whole_network_steps
    batches = draw_batches(np.random.default_rng(seed), train, steps, learning.batch_size)
    progress = _resume(run, stage)
    losses: list[jax.Array] = []
    for step in range(stage.done(progress), steps):
        params, optimizer, loss = stage.step(progress, step, batches[step])
        progress = progress._replace(params=params, optimizer=optimizer)
        losses.append(settled(loss))
        done = step + 1
        evaluate = done % learning.finetune_eval_every == 0 or done == steps
        if evaluate or done % LOG_EVERY == 0:
            mean = mean_loss(losses, f"{NAME}: the loss", done, steps)
            losses = []
            progress = progress._replace(loss_curve=_with(progress.loss_curve, done, mean))
            run.observer.on_step(index, done, mean)
        if evaluate:
            progress = stage.evaluated(progress, done)
            if run.block_store:
                run.block_store.write_progress(index, done, progress)
    best = stage.deployed(progress.best) if progress.best_step else start
    curve = progress.held_out_curve
    report = FinetuneReport(
        index, NAME, tuple(start.layers), steps, progress.loss_curve, curve,
        float(curve[0, 1]), float(curve[:, 1].min()), int(progress.best_step),
        time.perf_counter() - began, count(),
    )  # fmt: skip
    return BlockResult(best.layers, best.activations, report)


class _Stage:
    """The fixed part of the stage: the network, where it starts, and its compiled functions."""

    def __init__(self, run: Run, start: Start, seed: int, held_out: np.ndarray) -> None:
        self.run, self.start, self.held_out = run, start, held_out
        self.key = jax.random.key(seed)
        net, learning = run.net, run.net.recipe.reconstruction
        self.chain, self.targets = Chain(net, run.compiler), float_parts(net)
        ops = {op.layer.path: op for p in self.chain.programs for op in p.subgraph.weighted}
        specs = {path: net.plan.layers[path] for path in ops}
        optimizer = make_finetune_optimizer(specs, net.recipe)
        self.finetuner = Finetuner(ops, specs, optimizer, learning.finetune_weight_lr > 0)
        last = self.chain.programs[-1]
        self._ends = last.subgraph.outputs
        axes = inexact(last, self._ends, last.position_axes)
        loss = functools.partial(network_loss, learning.finetune_loss, axes)
        keys = (self.finetuner.weights, *ops, *(program.key for program in self.chain.programs))

        def compiled(function: Callable[..., Any], *more: Hashable) -> Callable[..., Any]:
            name = ("finetune", function.__name__, *more, *keys)
            return run.compiler.get(name, lambda: function)

        self._parts = compiled(self.finetuner.learned_parts)
        self._learned = compiled(self.finetuner.learned)
        self._update = compiled(self.finetuner.update, net.recipe)
        key = ("finetune loss", learning.finetune_loss, *axes)
        self._loss = run.compiler.get(key, lambda: jax.value_and_grad(loss))
        self._accumulate = learning.accumulate
        self._augment = None if run.augment is None else jax.jit(run.augment)

    def begin(self) -> Progress:
        """The stage before its first step."""
        params = self.finetuner.initial_params(self.start)
        none = np.zeros((0, 2), np.float32)
        first = _with(none, 0, self._error(self.start))
        optimizer = self.finetuner.optimizer.init(params)
        return Progress(params, optimizer, params, np.zeros((), np.int32), none, first)

    def done(self, progress: Progress) -> int:
        """The steps that were taken."""
        return int(progress.held_out_curve[-1, 0])

    def step(
        self, progress: Progress, step: int, rows: np.ndarray
    ) -> tuple[Params, Any, jax.Array]:
        """One step on the samples `rows`: parameters, optimizer state and loss after it."""
        key, losses, total = jax.random.fold_in(self.key, step), [], None
        for part, own in enumerate(rows.reshape(self._accumulate, -1)):
            leaves = self._leaves(own)
            if self._augment is not None:
                drawn = key if self._accumulate == 1 else jax.random.fold_in(key, part)
                leaves = self._augment(drawn, leaves)
            parts = self._parts(self.start, progress.params)
            boundaries = self.chain.forward(parts, leaves)
            targets = self.chain.forward(self.targets, leaves, quantized=False)[-1]
            loss, cotangents = self._distance(boundaries[-1], targets, own)
            gradient = self.chain.backward(parts, leaves, boundaries, cotangents)
            losses.append(loss)
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        if self._accumulate > 1:
            total = jax.tree.map(lambda value: value / self._accumulate, total)
        params, optimizer = self._update(self.start, progress.params, progress.optimizer, total)
        return params, optimizer, losses[0] if len(losses) == 1 else jnp.stack(losses).mean()

    def evaluated(self, progress: Progress, done: int) -> Progress:
        """`progress` with the held-out loss after `done` steps."""
        error = self._error(self.deployed(progress.params))
        better = error < progress.held_out_curve[:, 1].min()
        curve = _with(progress.held_out_curve, done, error)
        if not better:
            return progress._replace(held_out_curve=curve)
        step = np.array(done, np.int32)
        return progress._replace(best=progress.params, best_step=step, held_out_curve=curve)

    def deployed(self, params: Params) -> Start:
        """The network that parameters deploy."""
        layers, activations = self._learned(self.start, params)
        specs, recipe = self.finetuner.specs, self.run.net.recipe
        for path, layer in layers.items():
            border = as_stored(layer.border, recipe.border_format)
            if specs[path].weight_bits is not None:
                layer = layer._replace(codes=layer.codes.astype(jnp.uint8))
            layers[path] = layer._replace(border=border)
        return Start(layers, activations)

    def _error(self, network: Start) -> float:
        """Loss of a deployed network on the samples held out."""
        parts, losses = self.finetuner.parts(network), []
        for rows in batches_of(self.run.net, self.held_out):
            leaves = self._leaves(rows)
            outputs = self.chain.forward(parts, leaves)[-1]
            targets = self.chain.forward(self.targets, leaves, quantized=False)[-1]
            losses.append(float(self._distance(outputs, targets, rows)[0]))
        return float(np.mean(losses))

    def _distance(
        self, outputs: Sequence[jax.Array], targets: Sequence[jax.Array], rows: np.ndarray
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The loss of a batch, and its gradient with respect to the inexact outputs."""
        last, mask = self.chain.programs[-1], self.run.net.valid_mask
        pair = (inexact(last, self._ends, values) for values in (outputs, targets))
        return self._loss(*pair, None if mask is None else jnp.asarray(mask[rows]))

    def _leaves(self, rows: np.ndarray) -> dict[int, jax.Array]:
        return {i: take_batch(leaf, rows) for i, leaf in self.run.inputs.items()}


def _resume(run: Run, stage: _Stage) -> Progress:
    """Where an interrupted stage goes on, or its beginning."""
    begin = stage.begin()
    saved = run.block_store and run.block_store.read_progress(len(run.net.blocks), begin)
    return saved or begin


def _with(curve: np.ndarray, step: int, value: float) -> np.ndarray:
    return np.concatenate([curve, np.array([[step, value]], np.float32)])
