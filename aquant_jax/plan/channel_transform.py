"""Channel transforms: an equivalent float network whose activations are easier to quantize.

A few channels with a large range, or far from zero, take most of the codes of a tensor. A transform
replaces such a tensor x by x' = (x - shift) / scale per channel (Wei et al. 2023, "Outlier
Suppression+"), or by its product with an orthogonal matrix (Ashkboos et al. 2024, "QuaRot"). Dense
layers and convolutions that read x read x' with the weights scale * W and the bias b + shift * W.
All other ops read x, computed from x'. In float the network stays the same; what is quantized is
x'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.graph.fold import fold
from aquant_jax.graph.ir import ALIASES, INVERSE, TRANSFORM, Graph, Op
from aquant_jax.graph.subgraph import (
    bind_inputs,
    constant_values,
    extract_subgraph,
    run,
    source_tensor,
)
from aquant_jax.graph.trace import trace
from aquant_jax.plan.assign import Plan, make_plan
from aquant_jax.plan.transform_readers import by_channel, can_read, from_channels, takes_shift
from aquant_jax.recipe import Recipe


class ChannelTransform(NamedTuple):
    """The transform of a tensor along its last axis, of C channels (a pytree).

    Attributes:
      shift: float32 ``[C]``.
      scale: positive, float32 ``[C]``.
      rotation: orthogonal, float32 ``[C, C]``, applied after shift and scale; None for none.
    """

    shift: Float[AnyArray, "C"]
    scale: Float[AnyArray, "C"]
    rotation: Float[AnyArray, "C C"] | None = None


def kind(transform: ChannelTransform) -> str:
    """Its name in `recipe.TRANSFORMS`."""
    return "shift_scale" if transform.rotation is None else "hadamard"


def _forward(x: Float[AnyArray, "... C"], transform: ChannelTransform) -> Float[Array, "... C"]:
    moved = _scaled(jnp.asarray(x, jnp.float32) - _last(transform.shift, x), transform)
    return moved if transform.rotation is None else jnp.matmul(moved, transform.rotation)


def _inverse(x: Float[AnyArray, "... C"], transform: ChannelTransform) -> Float[Array, "... C"]:
    moved = jnp.asarray(x, jnp.float32)
    if transform.rotation is not None:
        moved = jnp.matmul(moved, transform.rotation.T)
    return moved * _last(transform.scale, x) + _last(transform.shift, x)


def _scaled(x: Float[AnyArray, "... C"], transform: ChannelTransform) -> Float[Array, "... C"]:
    """`x` divided by the scale of every channel."""
    return jnp.asarray(x) / _last(transform.scale, x)


def _last(values: Float[AnyArray, "C"], x: Float[AnyArray, "... C"]) -> Float[Array, "... C"]:
    """`values` shaped to broadcast along the last axis of `x`."""
    return jnp.asarray(values).reshape((1,) * (x.ndim - 1) + (-1,))


_forward.__name__, _inverse.__name__ = TRANSFORM, INVERSE
forward, inverse = jax.jit(_forward), jax.jit(_inverse)


def transformable(graph: Graph, plan: Plan) -> dict[int, list[Op]]:
    """The quantized tensors that can be transformed, and the layers that read each.

    Every op that reads such a tensor rounded reads the tensor itself and not a view of it, and can
    read it transformed. No loop reads or makes it.
    """
    producers = graph.producers()
    in_loops = {i for op in graph.ops if op.loop for i in (*op.reads, *op.outputs)}
    readers: dict[int, list[Op]] = {
        value: [] for value in plan.tensors
        if len(graph.avals[value].shape) > 1 and value not in in_loops
    }  # fmt: skip
    for op in graph.ops:
        for value in () if op.name in ALIASES else op.reads:
            source = source_tensor(producers, value)
            rank = len(graph.avals[value].shape)
            if source in readers and (source != value or not can_read(op, rank)):
                del readers[source]
            elif source in readers and op.layer is not None:
                readers[source].append(op)
    return readers


def transformed(
    apply: Callable[..., Any], recipe: Recipe, transforms: Mapping[str, ChannelTransform]
) -> Callable[..., Any]:
    """The inference function `apply` with transformed tensors.

    Args:
      apply: the float network.
      recipe: its plan names the tensors.
      transforms: by tensor key.

    Returns:
      A function that takes and returns what `apply` does.
    """

    def apply_transformed(variables: Any, x: Any) -> Any:
        graph = trace(apply, variables, x)
        tensors = make_plan(fold(graph), recipe).tensors
        chosen = {value: transforms[t.key] for value, t in tensors.items() if t.key in transforms}
        leaves = dict(zip(graph.inputs, jax.tree.leaves(x), strict=True))
        outputs = _Transformed(graph, variables, chosen).run(leaves)
        return jax.tree.unflatten(graph.tree, outputs)

    return apply_transformed


class _Transformed:
    """One evaluation of a graph with transformed tensors."""

    def __init__(
        self, graph: Graph, variables: Any, transforms: Mapping[int, ChannelTransform]
    ) -> None:
        self.graph, self.variables, self.transforms = graph, variables, transforms
        self.weights = constant_values(graph, variables, [layer.weight for layer in graph.layers])
        self.slopes: dict[int, ChannelTransform] = {}
        self.offsets: dict[int, ChannelTransform] = {}
        self.folded: set[int] = set()
        for value, transform in transforms.items():
            affine = _affine(graph, value) if transform.rotation is None else None
            if affine is not None:
                slope, offset = affine
                self.folded.add(value)
                self.slopes[slope], self.offsets[offset] = transform, transform
        self.made: dict[int, Any] = {}
        self.restored: dict[int, Any] = {}

    def run(self, leaves: Mapping[int, Any]) -> tuple[Any, ...]:
        """The outputs, given the leaves of the input by value id."""
        everything = extract_subgraph(self.graph, (), self.graph.outputs)
        inputs = bind_inputs(self.graph, everything, self.variables, leaves)
        return run(everything, inputs, self._layer, self._read)

    def _transformed(self, value_id: int, value: Any) -> Any:
        """The transformed tensor, computed once: what the quantized network rounds."""
        if value_id in self.folded:
            return value
        if value_id not in self.made:
            self.made[value_id] = forward(value, self.transforms[value_id])
        return self.made[value_id]

    def _read(self, value_id: int, value: Any) -> Any:
        """What an op reads that is no layer; also the scale and offset of a norm that absorbs a
        transform."""
        if value_id in self.slopes:
            return _scaled(value, self.slopes[value_id]).astype(value.dtype)
        if value_id in self.offsets:
            transform = self.offsets[value_id]
            return _scaled(value - _last(transform.shift, value), transform).astype(value.dtype)
        if value_id not in self.transforms:
            return value
        if value_id not in self.restored:
            x = self._transformed(value_id, value)
            self.restored[value_id] = inverse(x, self.transforms[value_id]).astype(value.dtype)
        return self.restored[value_id]

    def _layer(self, op: Op, x: Any) -> Any:
        weight, transform = self.weights[op.layer.weight], self.transforms.get(op.x)
        if transform is None:
            return _call(op, x, weight)
        absorbed = from_channels(op, absorb(by_channel(op, weight), transform))
        y = _call(op, self._transformed(op.x, x).astype(x.dtype), absorbed)
        if not takes_shift(op, x.shape):
            return y
        return y + _call(op, _last(transform.shift, x).astype(x.dtype), weight)


def _affine(graph: Graph, value: int) -> tuple[int, int] | None:
    """The static slope and offset along the last axis that a tensor was computed with.

    These are the scale and bias of a norm. None where there are none or something else reads them.
    """
    producers, consumers = graph.producers(), graph.consumers()
    readers = [graph.ops[i] for i in consumers.get(value, ())]
    if value in graph.outputs or any(op.name in ALIASES for op in readers):
        return None

    def only_reader(operand: int) -> bool:
        return len(consumers[operand]) == 1 and operand not in graph.outputs

    def static(op: Op) -> int | None:
        """The static operand of `op`."""
        found = [operand for operand in op.reads if operand not in graph.dynamic]
        by_channel = found and graph.avals[found[0]].shape[-1:] == graph.avals[value].shape[-1:]
        return found[0] if by_channel and only_reader(found[0]) else None

    def slope(factor: int) -> int | None:
        """The static factor in a product of which `factor` is one."""
        op = producers.get(factor)
        if op is None or op.name != "mul" or not only_reader(factor):
            return None
        candidates = [static(op), *map(slope, op.reads)]
        return next((found for found in candidates if found is not None), None)

    made = producers.get(value)
    offset = static(made) if made is not None and made.name == "add" else None
    if made is None or offset is None:
        return None
    factors = [slope(operand) for operand in made.reads if operand != offset]
    return (factors[0], offset) if factors and factors[0] is not None else None


def _call(op: Op, x: Any, weight: Any) -> Any:
    (y,) = op.call(*((x, weight) if op.layer.x_position == 0 else (weight, x)))
    return y


def absorb(
    weights: Float[AnyArray, "taps groups Cg Og"], transform: ChannelTransform
) -> Float[Array, "taps groups Cg Og"]:
    """The weights of a layer for a transformed input; a rotation has one group of channels."""
    weights = jnp.asarray(weights)
    scale = jnp.asarray(transform.scale).reshape(1, weights.shape[1], -1, 1)
    scaled = weights * scale.astype(weights.dtype)
    if transform.rotation is None:
        return scaled
    return jnp.matmul(jnp.asarray(transform.rotation).T.astype(weights.dtype), scaled)
