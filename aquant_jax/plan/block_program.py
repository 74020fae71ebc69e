"""One unit of a network, ready to run: its program, its layers and its quantized tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import TensorState, fake_quantize
from aquant_jax.graph.ir import Graph
from aquant_jax.graph.subgraph import Program, cut, root, run, same_elements, signature
from aquant_jax.layers.fake_quant import LayerSpec, run_layer
from aquant_jax.plan.assign import Plan, Tensor


class Unit(NamedTuple):
    """A slice of a folded graph with its quantizers.

    Attributes:
      program: what it computes.
      specs: one per weighted op of the program.
      tensors: the quantized tensors that it reads.
      tensor_of: index into `tensors` of every value that is a view of one.
      avals: shape and dtype of the graph's values.
      producers: the graph's ops by output.
      tokens: the axes of every output that number the positions of a sequence; see `counts`.
      key: equal for units that compute the same function.
    """

    program: Program
    specs: tuple[LayerSpec, ...]
    tensors: tuple[Tensor, ...]
    tensor_of: dict[int, int]
    avals: dict[int, Any]
    producers: dict[int, Any]
    tokens: tuple[tuple[int, ...], ...]
    key: str


def make_unit(graph: Graph, plan: Plan, live, outputs) -> Unit:
    """The unit that computes `outputs` from `live`."""
    program, producers = cut(graph, live, outputs), graph.producers()
    own = tuple(plan.layers[op.layer.path] for op in program.weighted)
    owners = plan.tensors
    reads = {value: root(producers, value) for op in program.ops for value in op.reads}
    tensors = tuple(dict.fromkeys(owners[r] for r in reads.values() if r in owners))
    tensor_of = {v: tensors.index(owners[r]) for v, r in reads.items() if r in owners}
    local = [s._replace(path="", tensor=s.tensor and "") for s in own]
    wiring = [tensor_of.get(value) for op in program.ops for value in op.reads]
    tokens = tuple(graph.tokens.get(v, ()) if isinstance(v, int) else () for v in outputs)
    key = f"{signature(graph, program)}\n{local}\n{[t.bits for t in tensors]}\n{wiring}\n{tokens}"
    return Unit(program, own, tensors, tensor_of, graph.avals, producers, tokens, key)


def counts(counted, axes: tuple[int, ...], rank: int):
    """Which elements of a value are no padding, shaped to broadcast on it.

    Args:
      counted: bool ``[samples, positions]``.
      axes: of the value, that number positions; an element counts if all of its positions do.
      rank: of the value, whose first axis numbers the samples.
    """
    whole = True
    for axis in axes:
        shape = [1] * rank
        shape[0], shape[axis] = counted.shape
        whole = whole & counted.reshape(shape)
    return whole


def forward(
    unit: Unit,
    weights: Sequence[Any],
    tensors: Sequence[TensorState] | None,
    live: Sequence[jax.Array],
    side: Sequence[jax.Array],
    static: Sequence[jax.Array],
    keep: Callable[[int, tuple[int, ...]], jax.Array] | None = None,
    layer: Callable[..., jax.Array] = run_layer,
) -> tuple[jax.Array, ...]:
    """Run a unit.

    Args:
      unit: what to run.
      weights: one per weighted op, what `layer` takes.
      tensors: one per quantized tensor; None runs the unit in float.
      live, side, static: see `program.run`.
      keep: draws the mask of elements that are quantized, given a value id and a shape.
      layer: runs one layer, as `layer.run_layer` does.

    Returns:
      The program's outputs.
    """
    place = {op.layer.path: i for i, op in enumerate(unit.program.weighted)}
    mask = _masks(unit, keep)

    def weighted(op, x):
        index = place[op.layer.path]
        spec = unit.specs[index]
        dtype = unit.avals[op.outputs[0]].dtype
        tensor = None
        if tensors is not None and spec.tensor is not None:
            tensor = tensors[unit.tensor_of[op.x]]
        kept = mask(op.x, x.shape) if tensor is not None else None
        return layer(op, spec, x, weights[index], tensor, kept, dtype)

    def read(value_id, value):
        if tensors is None or value_id not in unit.tensor_of:
            return value
        index = unit.tensor_of[value_id]
        rounded = fake_quantize(value, tensors[index], unit.tensors[index].bits)
        kept = mask(value_id, value.shape)
        if kept is not None:
            rounded = jnp.where(kept, rounded, value.astype(jnp.float32))
        return rounded.astype(value.dtype)

    return run(unit.program, live, side, static, weighted, read)


def _masks(unit: Unit, keep):
    """`keep` drawn once a tensor, whose views then share the draw: (value id, shape) -> mask."""
    masks: dict[int, jax.Array] = {}

    def mask(value_id, shape):
        if keep is None:
            return None
        if value_id not in masks:
            view = same_elements(unit.producers, value_id)
            if view is None or value_id in unit.program.live:
                masks[value_id] = keep(value_id, shape)
            else:
                source = view.reads[0]
                masks[value_id] = view.call(mask(source, unit.avals[source].shape))[0]
        return masks[value_id]

    return mask


def random_keep(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """Bernoulli mask; for one half, every random bit is used, which is six times faster on CPU."""
    if probability != 0.5:
        return jax.random.bernoulli(key, probability, shape)
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return (bits == 1).reshape(-1)[:size].reshape(shape)
