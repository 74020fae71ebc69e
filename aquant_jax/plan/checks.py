"""Checks of the arguments of `quantize`, and the memory that a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from aquant_jax.errors import InputError
from aquant_jax.graph.ir import Graph, path_names
from aquant_jax.graph.partition import Block
from aquant_jax.recipe import Recipe

MIN_SAMPLES = 2


def check_variables(variables: Any) -> None:
    """Check the variables of a network.

    Raises:
      InputError: there is no leaf, or a leaf is not an array of numbers or holds NaN or infinity.
    """
    leaves = jax.tree.leaves(variables)
    if not leaves:
        raise InputError("variables is an empty pytree; the weights must be passed in it")
    for name, leaf in zip(path_names(variables), leaves, strict=True):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise InputError(f"variables/{name} is {leaf!r}, which is no array")
        if isinstance(leaf, np.ndarray | np.generic) and not _holds_numbers(leaf.dtype):
            raise InputError(f"variables/{name} has dtype {leaf.dtype}, which is none of numbers")
    _check_finite("variables", variables)


def check_calibration(calibration: Any, recipe: Recipe) -> int:
    """Check a calibration set.

    Returns:
      The number of samples.

    Raises:
      InputError: there are fewer samples than the recipe needs, or the leaves have different
        numbers of samples, an unsupported dtype, or NaN or infinity.
    """
    leaves, names = jax.tree.leaves(calibration), path_names(calibration)
    if not leaves:
        raise InputError("the calibration set is an empty pytree")
    if any(leaf.ndim == 0 for leaf in leaves):
        raise InputError("the calibration set has a scalar leaf; samples are on the first axis")
    counts = {name: leaf.shape[0] for name, leaf in zip(names, leaves, strict=True)}
    if len(set(counts.values())) > 1:
        raise InputError(f"the calibration leaves have different sample counts: {counts}")
    samples = leaves[0].shape[0]
    learning = recipe.reconstruction
    needed = max(MIN_SAMPLES, learning.batch_size if learning.steps else MIN_SAMPLES)
    if samples < needed:
        raise InputError(
            f"the calibration set has {samples} samples; the recipe needs at least {needed} "
            "(batch_size)"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.dtype in (np.float64, np.complex128) or not _holds_numbers(leaf.dtype):
            raise InputError(
                f"calibration{'/' + name if name else ''} has dtype {leaf.dtype}; give float32, "
                "bfloat16, float16 or integers"
            )
    _check_finite("calibration", calibration)
    return samples


def leaf(calibration: Any, name: str) -> Any:
    """The leaf of a calibration set at the path `name`.

    Raises:
      InputError: there is no such leaf.
    """
    leaves = dict(zip(path_names(calibration), jax.tree.leaves(calibration), strict=True))
    if name not in leaves:
        raise InputError(f"the calibration set has no leaf {name!r}; there are {', '.join(leaves)}")
    return leaves[name]


def check_mask(calibration: Any, name: str) -> Bool[np.ndarray, "samples positions"]:
    """The mask at the path `name` of a calibration set, False at padding.

    Raises:
      InputError: there is no such leaf, it is not a mask of sequences of two positions or more, or
        it leaves no position of a sample.
    """
    mask = np.asarray(leaf(calibration, name))
    if mask.ndim != 2 or mask.shape[1] < 2:
        raise InputError(f"mask {name!r} has shape {mask.shape}; it must be [samples, positions]")
    if not np.isin(mask, (0, 1)).all():
        odd = mask[~np.isin(mask, (0, 1))][0]
        raise InputError(f"mask {name!r} holds {odd}; it must be 1 for what counts, 0 for padding")
    empty = np.flatnonzero(~mask.astype(bool).any(axis=1))
    if empty.size:
        raise InputError(f"mask {name!r} leaves nothing of sample {empty[0]}")
    return mask.astype(bool)


def _holds_numbers(dtype: Any) -> bool:
    return dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)


def _check_finite(argument: str, tree: Any) -> None:
    """InputError when a leaf holds NaN or infinity; the message starts with the argument's name."""
    for name, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        bad = int(np.count_nonzero(~np.isfinite(np.asarray(leaf, np.float32))))
        if bad:
            path = f"{argument}/{name}" if name else argument
            raise InputError(f"{path} has {bad} of {np.size(leaf)} values that are NaN or infinite")


def check_outputs(graph: Graph, sampled: frozenset[int], recipe: Recipe) -> None:
    """Check the outputs of a network.

    Args:
      graph: the network.
      sampled: the values whose first axis, and no other, numbers the samples.
      recipe: its recipe.

    Raises:
      InputError: no output can be reconstructed, or one does not have the samples on its first
        axis only.
    """
    outputs = [out for out in graph.outputs if isinstance(out, int)]
    avals = [graph.avals[out] for out in outputs if out in graph.weight_dependent]
    floats = any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in avals)
    if recipe.reconstruction.steps and avals and not floats:
        raise InputError(
            f"the network returns only {', '.join(sorted({str(aval.dtype) for aval in avals}))}; "
            "an output to reconstruct must be floating-point: return the logits, not their argmax"
        )
    for value in outputs:
        if value in graph.weight_dependent and value not in sampled:
            raise InputError(
                f"an output has shape {graph.avals[value].shape}; outputs must have the samples on "
                "the first axis, and on no other"
            )


def cache_bytes(graph: Graph, blocks: Sequence[Block], samples: int) -> int:
    """Bytes of the cached activations of the largest block: both inputs, and the targets."""

    def size(values: Sequence[int]) -> int:
        avals = [graph.avals[v] for v in values]
        return sum(int(np.prod(a.shape[1:])) * min(a.dtype.itemsize, 2) for a in avals)

    return max(samples * (2 * size(b.start) + 2 * size(b.end) + size(b.targets)) for b in blocks)
