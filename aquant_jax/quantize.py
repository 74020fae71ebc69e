"""`quantize`: the main loop of the library, one block after another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aquant_jax.deployment.quantized import Quantized, traced
from aquant_jax.graph.subgraph import constant_inputs, extract_subgraph
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan import augmentation, checks
from aquant_jax.plan.augmentation import Augment
from aquant_jax.plan.network import Network
from aquant_jax.plan.prepare import prepare
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.block_store import BlockResult, open_block_store
from aquant_jax.reconstruction.finetune import finetune, split
from aquant_jax.reconstruction.finetune_checks import check_finetune
from aquant_jax.reconstruction.fingerprint import fingerprint
from aquant_jax.reconstruction.observer import Observer, default_observer
from aquant_jax.reconstruction.report import History, Report
from aquant_jax.reconstruction.sequential import Run, State, quantize_block

Stage = Callable[[Run, State], tuple[State, BlockResult]]


@jax.transfer_guard("allow")
def quantize(
    apply: Callable,
    variables: Any,
    calibration: Any,
    recipe: Recipe,
    *,
    mask: str | None = None,
    seed: int = 0,
    observer: Observer | None = None,
    compiler: Compiler | None = None,
    augment: Augment | None = None,
    resume: str | Path | None = None,
    restart_from: int | None = None,
) -> Quantized:
    """Quantize the network ``apply(variables, x)`` after training.

    Arrays move between host and device in it, whatever `jax.transfer_guard` is in force.

    Args:
      apply: any traceable inference function (Flax NNX after `nnx.split`, linen, plain JAX).
      variables: pytree of float32, bfloat16 or float16 arrays (others are passed through).
      calibration: unlabelled inputs, a pytree of arrays with a leading sample axis.
      recipe: see `recipes`; the same recipe, seed and machine give the same codes, bit for bit.
      mask: path of the calibration leaf ``[samples, positions]`` that is one at the positions of a
        sequence and zero at its padding. Padding is excluded from losses and from the range search.
        Sequence axes are found by tracing the network again with sequences one shorter;
        activations without such an axis have no padding.
      seed: seeds batches and masks.
      observer: receives the progress. None shows a bar on a terminal and logs through absl
        elsewhere; ``aq.Observer()`` is silent.
      compiler: shares compiled steps between calls; ``Compiler(gpu_ops.backend())`` is faster.
      augment: ``augment(key, batch) -> batch`` makes random inputs from a batch of calibration
        samples, of the same shapes, for the whole-network stage; it needs no labels. None leaves
        the samples as they are.
      resume: folder of a block store. Every finished block is kept there, and the same call resumes
        after the last one, with bit-identical results.
      restart_from: with `resume`, the first block to learn again; the recipe may then differ from
        the previous one in ``recipe.reconstruction``, and `augment` from the previous one.

    Returns:
      The quantized network.

    Raises:
      InputError: see `prepare.prepare`, `finetune_checks.check_finetune` and
        `augmentation.check_augment`; a seed that is no whole number of 0 or more; the block
        store cannot be written, is damaged, or holds the blocks of another call (the fields that
        differ are listed).
      ReconstructionError: a block's loss, or a layer's float input, is not finite.
    """
    checks.check_recipe(recipe)
    seed, calibration = checks.check_seed(seed), checks.host_arrays(calibration)
    net = prepare(apply, variables, calibration, recipe, mask)
    compiler, observer = compiler or Compiler(), observer or default_observer()
    leaves = map(jnp.asarray, jax.tree.leaves(calibration))
    inputs = dict(zip(net.graph.inputs, leaves, strict=True))
    on_leaves = augmentation.on_leaves(augment, calibration, net) if augment else None
    run = Run(net, inputs, seed, compiler, observer, augment=on_leaves)
    stages: list[Stage] = [functools.partial(quantize_block, block=b) for b in net.blocks]
    if recipe.reconstruction.whole_network_steps:
        check_finetune(run)
        run = run._replace(learn_from=split(run)[0])
        stages.append(finetune)
    call = functools.partial(fingerprint, net, calibration, seed, compiler, augment)
    state, reports = State(), []
    with open_block_store(resume, restart_from, call) as block_store:
        run = run._replace(block_store=block_store)
        observer.on_start(net)
        try:
            for stage in stages:
                state, result = stage(run, state)
                reports.append(result.report)
                observer.on_block_end(result.report)
        finally:
            observer.on_end()
    return _build(calibration, net, state, reports)


def _build(calibration: Any, net: Network, state: State, reports: list[Report]) -> Quantized:
    """The quantized network after its last block."""
    everything = extract_subgraph(net.graph, (), net.graph.outputs)
    values = constant_inputs(net.graph, everything, net.variables)
    constants = {
        net.graph.variables[i]: jnp.array(value)  # copied: the caller may donate its own
        for i, value in zip(everything.constants, values, strict=True) if i in net.graph.variables
    }  # fmt: skip
    return Quantized(
        state.layers,
        state.activations,
        constants,
        traced(net.apply, net.variables, calibration),
        tuple(net.plan.layers[path] for path in state.layers),
        net.recipe,
        History(reports),
    )
