"""Checks of the whole-network stage, before the first block is learned."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.errors import InputError, byte_size
from aquant_jax.layers.fake_quant import Weights
from aquant_jax.plan.network import batch_shapes
from aquant_jax.reconstruction.chain import Chain, Parts, inexact
from aquant_jax.reconstruction.devices import read, take_batch
from aquant_jax.reconstruction.finetune import float_parts
from aquant_jax.reconstruction.hosts import together
from aquant_jax.reconstruction.memory import DEVICE
from aquant_jax.reconstruction.run import Run, split
from aquant_jax.reconstruction.weights import init_borders

COPIES = 6  # of the parameters: themselves, the best, their gradient, Adam's two, and the update
TOLERANCE = 1e-3  # of the sum of probabilities


def check_finetune(run: Run) -> None:
    """Check that the whole-network stage can run.

    Args:
      run: the fixed part.

    Raises:
      InputError: the samples that are not held out make no batch; the outputs are no logits, with
        loss "kl"; no output has a gradient; there is not enough memory.
    """
    check_held_out(run)
    net = run.net
    chain = Chain(net, run.compiler)
    together(functools.partial(_check_memory, run, chain))
    rows = np.arange(net.batch) % net.samples
    leaves = {i: take_batch(leaf, rows) for i, leaf in run.inputs.items()}
    last = chain.programs[-1]
    outputs = chain.forward(float_parts(net), leaves, quantized=False)[-1]
    outputs = inexact(last, last.subgraph.outputs, outputs)
    if not outputs:
        raise InputError("the whole-network stage needs a floating-point output of the network")
    if net.recipe.reconstruction.finetune_loss == "kl":
        check_logits(outputs)


def check_held_out(run: Run) -> None:
    """InputError unless the samples that are not held out make a batch."""
    learning = run.net.recipe.reconstruction
    train, held_out = split(run)
    if len(train) < learning.batch_size:
        raise InputError(
            f"finetune_held_out {learning.finetune_held_out} holds out {len(held_out)} of "
            f"{run.net.samples} samples and leaves {len(train)}, fewer than batch_size "
            f"{learning.batch_size}"
        )


def check_logits(outputs: Sequence[jax.Array]) -> None:
    for output in outputs:
        what = None
        if jnp.iscomplexobj(output) or output.ndim < 2 or output.shape[-1] < 2:
            what = "it needs real outputs with the classes, two or more, on the last axis"
        elif _is_distribution(np.asarray(read(output), np.float32)):
            what = "its rows are probabilities: return what softmax was applied to"
        if what:
            raise InputError(
                f'finetune_loss "kl": an output {output.dtype}{list(output.shape)} is not one of '
                f'logits; {what}; or use "mse"'
            )


def _is_distribution(values: np.ndarray) -> bool:
    return bool((values >= 0).all() and np.allclose(values.sum(-1), 1, atol=TOLERANCE))


def _check_memory(run: Run, chain: Chain) -> None:
    needed, free = _bytes_needed(run, chain), run.memory.free[DEVICE]
    if needed > free:
        raise InputError(
            f"the whole-network stage needs about {byte_size(needed)}, and "
            f"{byte_size(free)} are free; lower batch_size, or set finetune_steps=0"
        )


def _bytes_needed(run: Run, chain: Chain) -> int:
    """Bytes of the stage: activations, parameters, and the weights and their gradient."""
    net, folded = run.net, run.net.folded
    borders: dict[str, dict[str, jax.Array]] = {}
    for program in chain.programs:
        pairs = zip(program.specs, init_borders(program), strict=True)
        borders |= {spec.path: coefficients for spec, coefficients in pairs}
    weights = {
        path: Weights(jnp.asarray(weight), jnp.asarray(bias), borders[path])
        for path, (weight, bias) in folded.items()
    }
    scalar = jnp.zeros(())
    activations = {
        tensor.key: ActivationQuantizer(scalar, scalar)
        for program in chain.programs for tensor in program.tensors
    }  # fmt: skip
    parts = Parts(weights, activations)
    leaves = batch_shapes(run.inputs, net.batch)
    size = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(parts))
    return chain.backward_bytes(parts, leaves) + (COPIES + 3) * size
