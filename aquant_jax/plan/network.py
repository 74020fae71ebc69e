"""A network that is prepared for quantization: what all parts of `quantize` read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from aquant_jax.graph.fold import Folded
from aquant_jax.graph.ir import Graph, path_names
from aquant_jax.graph.partition import Block
from aquant_jax.plan import checks
from aquant_jax.plan.assign import Plan
from aquant_jax.plan.channel_transform import ChannelTransform, kind
from aquant_jax.plan.coverage import coverage
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


def batch_shapes(inputs: Any, samples: Any) -> Any:
    """Shapes and dtypes of a batch like `inputs`, of a number of samples that may be symbolic."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sizes = (samples, *leaf.shape[1:]) if np.ndim(leaf) else ()
        return jax.ShapeDtypeStruct(sizes, jnp.result_type(leaf))

    return jax.tree.map(shape, inputs)


def count_samples(inputs: Any) -> Any:
    """The number of samples of a pytree of inputs, on the first axis of those that have axes.

    Raises:
      ValueError: none has.
    """
    for leaf in jax.tree.leaves(inputs):
        if np.ndim(leaf):
            return leaf.shape[0]
    raise ValueError("no input has a sample axis")


def take_samples(leaf: Any, index: Any) -> Any:
    """The samples of an input at `index`; a scalar belongs to all of them."""
    return leaf[index] if np.ndim(leaf) else leaf


def describe(net: Network) -> str:
    """A text: the blocks, the transformed activations, those that the rules add, the peak of cached
    memory, and the weighted ops that stay float."""
    lines = [f"{len(net.blocks)} blocks:"]
    for index, block in enumerate(net.blocks):
        size = checks.boundary_bytes(net.graph, block.start, net.samples) / 2**20
        several = f" (takes {len(block.start)} activations, {size:.1f} MiB)"
        lines.append(f"{index:3d}  {block}{several if len(block.start) > 1 else ''}")
    if net.transforms:
        lines.append(f"{len(net.transforms)} activations transformed before they are rounded:")
        lines += [f"     {key}: {kind(transform)}" for key, transform in net.transforms.items()]
    added = [tensor for tensor in net.plan.tensors.values() if tensor.key not in net.plan.layers]
    if added:
        lines.append(f"{len(added)} activations rounded to nearest besides the inputs of layers:")
        lines += [f"     {tensor.key}: {tensor.bits} bits" for tensor in added]
    outputs = path_names(jax.tree.unflatten(net.graph.tree, range(len(net.graph.outputs))))
    rest = [name or "output" for i, name in enumerate(outputs) if i not in net.targets]
    if rest:
        lines.append(f"outputs without samples, which are no target: {', '.join(rest)}")
    peak = checks.cache_bytes(net.graph, net.blocks, net.samples) / 2**20
    lines.append(f"cached activations: {peak:.1f} MiB at the peak")
    lines.append(coverage(net.plan.layers.values(), net.graph.unquantized))
    return "\n".join(lines)
