"""A network that is prepared for quantization: what all parts of `quantize` read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from aquant_jax.errors import InputError
from aquant_jax.graph.fold import Folded
from aquant_jax.graph.ir import Graph
from aquant_jax.graph.partition import Block
from aquant_jax.plan.assign import Plan
from aquant_jax.plan.channel_transform import ChannelTransform
from aquant_jax.recipe import Recipe


class Network(NamedTuple):
    """A traced, folded network with its plan and its blocks.

    Attributes:
      apply: the inference function, with the channel transforms of the recipe.
      graph: the folded graph.
      variables: the pytree that `prepare` was given, in the byte order of this machine.
      folded: weight and bias of every layer, by weight path.
      plan: the quantized layers and activations.
      blocks: in the order of reconstruction.
      recipe: the recipe that `prepare` was given.
      samples: number of samples of the calibration set.
      batch: number of samples that a program runs at once.
      targets: positions of the outputs that have samples.
      valid_mask: False at padding; None without padding.
      transforms: the channel transforms in `apply`, by tensor key.
      mixing: the op that may mix the samples of a batch, see `independence`.
    """

    apply: Callable[..., Any]
    graph: Graph
    variables: Any
    folded: dict[str, Folded]
    plan: Plan
    blocks: list[Block]
    recipe: Recipe
    samples: int
    batch: int
    targets: tuple[int, ...] = ()
    valid_mask: Bool[np.ndarray, "samples positions"] | None = None
    transforms: Mapping[str, ChannelTransform] = MappingProxyType({})
    mixing: str | None = None


def batch_shapes(inputs: Any, samples: Any) -> Any:
    """Shapes and dtypes of a batch like `inputs`, of a number of samples that may be symbolic."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sizes = (samples, *leaf.shape[1:]) if np.ndim(leaf) else ()
        return jax.ShapeDtypeStruct(sizes, jnp.result_type(leaf))

    return jax.tree.map(shape, inputs)


def count_samples(inputs: Any) -> Any:
    """The number of samples of a pytree of inputs, on the first axis of those that have axes.

    Raises:
      InputError: none has.
    """
    for leaf in jax.tree.leaves(inputs):
        if np.ndim(leaf):
            return leaf.shape[0]
    raise InputError("no input has a sample axis; inputs are arrays, of one sample or more")


def take_samples(leaf: Any, index: Any) -> Any:
    """The samples of an input at `index`; a scalar belongs to all of them."""
    return leaf[index] if np.ndim(leaf) else leaf


def in_batches(run: Callable, x: Any, size: Any) -> Any:
    """Outputs for any number of samples of a function that takes `size` at a time.

    The last batch is filled up with the first samples. A `size` that is not an integer (symbolic)
    takes any number.
    """
    if not isinstance(size, int):
        return run(x)
    count = count_samples(x)
    if not count:
        raise ValueError(f"an empty batch; the program takes {size} samples at a time")
    rows = [np.arange(start, start + size) % count for start in range(0, count, size)]
    outputs = [run(jax.tree.map(functools.partial(take_samples, index=i), x)) for i in rows]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *outputs)


def batch_size(recipe: Recipe, samples: int) -> int:
    """The number of samples that a program runs at once, of a calibration set of so many."""
    learning = recipe.reconstruction
    return min(learning.batch_size // learning.accumulate, samples)
