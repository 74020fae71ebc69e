"""Checks of the arguments of `quantize`, and the memory that a run needs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool

from aquant_jax.errors import InputError, check_type, to_path
from aquant_jax.graph.ir import Graph, path_names
from aquant_jax.graph.partition import Block
from aquant_jax.plan.shared_samples import SharedSamples
from aquant_jax.recipe import Recipe

MIN_SAMPLES = 2
ORDER = "the order is quantize(apply, variables, calibration, recipe)"
WEIGHTS = ("kernel", "bias", "weight", "scale", "embedding", "w", "b")  # usual names of weights
PART = 2**24  # bytes of an array that are copied at once


def check_not_traced() -> None:
    """InputError inside `jax.jit`, where nothing has a value."""
    if isinstance(jnp.zeros(()), Tracer):
        raise InputError("quantize was called inside jax.jit; call it outside")


def check_recipe(recipe: Any) -> None:
    """InputError unless `recipe` is a `Recipe`."""
    own = ", or the .recipe of this one" if isinstance(getattr(recipe, "recipe", 0), Recipe) else ""
    check_type("recipe", recipe, Recipe, f"a Recipe, such as aq.recipes.aquant(2, 2){own}")


def check_count(argument: str, value: Any) -> int:
    """An argument as an int; InputError unless it is a whole number of 0 or more."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise InputError(f"{argument} is {value!r}; it must be a whole number of 0 or more")
    return number


def check_resume(resume: Any) -> Path | None:
    """The folder of an argument `resume`, None for none; InputError if it is no path."""
    return None if resume is None else to_path("resume", resume)


def check_variables(variables: Any) -> Any:
    """Check the variables of a network.

    Returns:
      The variables, their NumPy arrays in the byte order of this machine.

    Raises:
      InputError: there is no leaf, or a leaf is not an array of numbers, is a tracer, is deleted or
        holds NaN or infinity.
    """
    if not jax.tree.leaves(variables):
        raise InputError("variables is an empty pytree; the weights must be passed in it")
    variables = _map_leaves(_readable, "variables", variables)
    _check_finite("variables", variables)
    return variables


def host_arrays(calibration: Any) -> Any:
    """The calibration set as NumPy arrays in the byte order of this machine, or `SharedSamples`.

    Raises:
      InputError: a leaf is not an array of numbers, is a tracer or is deleted.
    """

    def on_host(path: str, leaf: Any) -> np.ndarray | SharedSamples:
        if isinstance(leaf, SharedSamples):
            return leaf
        readable = _readable(path, leaf)
        _check_numbers(path, jnp.result_type(readable))
        return np.asarray(readable, None if np.ndim(leaf) else jnp.result_type(readable))

    return _map_leaves(on_host, "calibration", calibration)


def check_calibration(calibration: Any, recipe: Recipe) -> int:
    """Check a calibration set.

    Returns:
      The number of samples. A scalar belongs to all of them.

    Raises:
      InputError: there are fewer samples than the recipe needs, or the leaves have different
        numbers of samples, an unsupported dtype, or NaN or infinity.
    """
    leaves, names = jax.tree.leaves(calibration), path_names(calibration)
    if not leaves:
        raise InputError("the calibration set is an empty pytree")
    counts = {name: a.shape[0] for name, a in zip(names, leaves, strict=True) if a.ndim}
    if not counts:
        raise InputError("the calibration set has only scalars; samples are on the first axis")
    if len(set(counts.values())) > 1:
        raise InputError(
            f"the calibration leaves have different sample counts: {counts}{_if_weights(names)}"
        )
    samples = next(iter(counts.values()))
    learning = recipe.reconstruction
    needed = max(MIN_SAMPLES, learning.batch_size if learning.steps else MIN_SAMPLES)
    if samples < needed:
        raise InputError(
            f"the calibration set has {samples} samples; the recipe needs at least {needed} "
            f"(batch_size){_if_weights(names)}"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.dtype in (np.float64, np.complex128):
            raise InputError(
                f"{_join('calibration', name)} has dtype {leaf.dtype}; give float32, bfloat16, "
                "float16 or integers"
            )
    _check_finite("calibration", calibration)
    return samples


def leaf(calibration: Any, name: str) -> Any:
    """The leaf of a calibration set at the path `name`.

    Raises:
      InputError: there is no such leaf.
    """
    leaves = dict(zip(path_names(calibration), jax.tree.leaves(calibration), strict=True))
    check_type("mask", name, str, "the path of a leaf of the calibration set")
    if name not in leaves:
        found = ", ".join(map(repr, leaves))
        raise InputError(f"the calibration set has no leaf {name!r}; there are {found}")
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


def _if_weights(names: Sequence[str]) -> str:
    """The order of the arguments, if the paths of the calibration set are those of weights."""
    return f"; {ORDER}" if any(name.split("/")[-1] in WEIGHTS for name in names) else ""


def _join(argument: str, name: str) -> str:
    """The path of a leaf: the name of the argument and the path in it, which may be empty."""
    return f"{argument}/{name}" if name else argument


def _map_leaves(function: Callable[[str, Any], Any], argument: str, tree: Any) -> Any:
    """``function(path, leaf)`` of every leaf of an argument."""
    leaves, treedef = jax.tree.flatten(tree)
    named = zip(path_names(tree), leaves, strict=True)
    return treedef.unflatten([function(_join(argument, name), leaf) for name, leaf in named])


def _readable(path: str, leaf: Any) -> Any:
    """A leaf whose values can be read, in the byte order of this machine.

    Raises:
      InputError: it is not an array of numbers or of random keys, is a tracer or is deleted.
    """
    if isinstance(leaf, Tracer):
        raise InputError(
            f"{path} is a tracer of {jax.typeof(leaf)}: quantize was called inside jax.jit, vmap "
            "or grad; call it outside"
        )
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise InputError(f"{path} ({leaf.dtype}{list(leaf.shape)}) was deleted or donated")
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        return leaf
    if not hasattr(leaf, "dtype"):
        raise InputError(f"{path} is {leaf!r}, which is not an array")
    array = np.asarray(leaf)
    _check_numbers(path, array.dtype)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_numbers(path: str, dtype: Any) -> None:
    if dtype != np.bool_ and not jnp.issubdtype(dtype, jnp.number):
        order = path.startswith("calibration/") and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        hint = f"; random keys belong to the variables: {ORDER}" if order else ""
        raise InputError(f"{path} has dtype {dtype}, which is not one of numbers{hint}")
    widest = 16 if jnp.issubdtype(dtype, jnp.complexfloating) else 8
    if np.dtype(dtype).itemsize > widest:
        raise InputError(f"{path} has dtype {dtype}, which JAX lacks; cast it to float32")


def row_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of an array, in parts that are small enough to be copied."""
    rows = np.atleast_1d(array)
    count = max(1, PART // max(1, rows.nbytes // max(1, len(rows))))
    return (rows[start : start + count] for start in range(0, len(rows), count))


def _check_finite(argument: str, tree: Any) -> None:
    """InputError when a leaf holds NaN or infinity; the message starts with the argument's name."""
    for name, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            continue
        single = np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.complex64
        own = leaf.own if isinstance(leaf, SharedSamples) else {0: np.asarray(leaf)}
        for start, rows in own.items():
            parts = (np.asarray(part, single) for part in row_parts(rows))
            bad = sum(int(np.count_nonzero(~np.isfinite(part))) for part in parts)
            if bad:
                raise InputError(
                    f"{_join(argument, name)} has {bad} of {rows.size} values that are NaN or "
                    f"infinite{_first_sample(rows, start) if argument == 'calibration' else ''}"
                )


def _first_sample(leaf: Any, start: int) -> str:
    """The first sample that is not finite, counted from `start`; empty for a scalar."""
    rows = enumerate(np.atleast_1d(leaf), start)
    bad = (i for i, row in rows if not np.isfinite(row).all())
    return f", the first in sample {next(bad)}" if np.ndim(leaf) else ""


def check_outputs(graph: Graph, sampled: frozenset[int], recipe: Recipe) -> None:
    """Check the outputs of a network.

    Args:
      graph: the network.
      sampled: the values whose first axis, and no other, numbers the samples.
      recipe: its recipe.

    Raises:
      InputError: no output has samples, none of these can be reconstructed, or one does not have
        the samples on its first axis only.
    """
    if graph.targets is not None and not graph.weight_dependent.intersection(graph.targets):
        shapes = [graph.avals[out].shape for out in graph.outputs if isinstance(out, int)]
        raise InputError(
            f"the outputs have the shapes {', '.join(map(str, shapes))} for any number of samples; "
            "one must have the samples on its first axis"
        )
    outputs = [out for out in graph.target_outputs if isinstance(out, int)]
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


def boundary_bytes(graph: Graph, values: Sequence[int], samples: int) -> int:
    """Bytes of cached activations: two a float32 element."""
    avals = [graph.avals[v] for v in values]
    widths = [2 if a.dtype == np.float32 else a.dtype.itemsize for a in avals]
    sizes = [int(np.prod(a.shape[1:])) * w for a, w in zip(avals, widths, strict=True)]
    return samples * sum(sizes)


def cache_bytes(graph: Graph, blocks: Sequence[Block], samples: int) -> int:
    """Bytes of the cached activations of the largest block: both inputs, and the targets."""

    def size(values: Sequence[int]) -> int:
        return boundary_bytes(graph, values, samples)

    return max(2 * size(b.start) + 2 * size(b.end) + size(b.targets) for b in blocks)
