"""Block programs: one block of a network with its layers and its quantized tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact, Key

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import ActivationQuantizer, fake_quantize
from aquant_jax.errors import InputError, reason
from aquant_jax.graph.ir import Atom, Graph, Op
from aquant_jax.graph.subgraph import (
    BlockInputs,
    Subgraph,
    extract_subgraph,
    run,
    same_elements,
    signature,
    source_tensor,
)
from aquant_jax.layers.fake_quant import LayerInput, LayerSpec, run_layer
from aquant_jax.plan.assign import Plan, Tensor

# (value id, shape) -> mask of the elements that are quantized
KeepFn = Callable[[int, tuple[Any, ...]], jax.Array]


class BlockProgram(NamedTuple):
    """A slice of a folded graph with its quantizers.

    Attributes:
      subgraph: the ops.
      specs: the static part of each weighted op.
      tensors: the quantized tensors that it reads.
      tensor_of: index into `tensors` of every value that is a view of one.
      avals: shape and dtype of the graph's values.
      producers: the op that makes each of the graph's values.
      position_axes: the sequence axes of every output; see `valid_elements`.
      key: text that is equal for programs that compute the same function.
      float_key: likewise, for what they compute in float.
    """

    subgraph: Subgraph
    specs: tuple[LayerSpec, ...]
    tensors: tuple[Tensor, ...]
    tensor_of: dict[int, int]
    avals: dict[int, Any]
    producers: dict[int, Op]
    position_axes: tuple[tuple[int, ...], ...]
    key: str
    float_key: str

    def dtypes(self, values: Sequence[Any]) -> list[Any]:
        """The dtypes of `values`."""
        return [self.avals[value].dtype for value in values]


def make_block_program(
    graph: Graph, plan: Plan, boundary_inputs: Sequence[int], outputs: Sequence[Atom]
) -> BlockProgram:
    """The program that computes `outputs` from `boundary_inputs`."""
    subgraph, producers = extract_subgraph(graph, boundary_inputs, outputs), graph.producers()
    specs = tuple(plan.layers[op.layer.path] for op in subgraph.weighted)
    sources = {value: source_tensor(producers, value) for op in subgraph.ops for value in op.reads}
    quantized = {value: plan.tensors[s] for value, s in sources.items() if s in plan.tensors}
    tensors = tuple(dict.fromkeys(quantized.values()))
    tensor_of = {value: tensors.index(tensor) for value, tensor in quantized.items()}
    axes = tuple(graph.position_axes.get(v, ()) if isinstance(v, int) else () for v in outputs)
    nameless = [spec._replace(path="", tensor=spec.tensor and "") for spec in specs]
    wiring = [tensor_of.get(value) for op in subgraph.ops for value in op.reads]
    bits = [tensor.bits for tensor in tensors]
    float_key = f"{signature(graph, subgraph)}\n{axes}"
    key = f"{float_key}\n{nameless}\n{bits}\n{wiring}"
    avals = graph.avals
    return BlockProgram(subgraph, specs, tensors, tensor_of, avals, producers, axes, key, float_key)


def valid_elements(
    valid_mask: Bool[AnyArray, "samples positions"], axes: tuple[int, ...], rank: int
) -> Bool[AnyArray, "samples ..."]:
    """The elements of a value that are not padding, shaped to broadcast on it.

    Args:
      valid_mask: False at padding.
      axes: the sequence axes of the value, at least one; an element is valid if all of its
        positions are.
      rank: number of axes of the value, whose first axis is the sample axis.
    """
    valid: Any = True
    for axis in axes:
        shape = [1] * rank
        shape[0], shape[axis] = valid_mask.shape
        valid = valid & valid_mask.reshape(shape)
    return valid


def forward(
    program: BlockProgram,
    weights: Sequence[Any],
    quantizers: Sequence[ActivationQuantizer] | None,
    inputs: BlockInputs,
    keep: KeepFn | None = None,
    layer: Callable[..., jax.Array] = run_layer,
) -> tuple[Any, ...]:
    """Run a block and return its outputs.

    Args:
      program: the block.
      weights: one per weighted op, of the type that `layer` takes.
      quantizers: one per quantized tensor; None runs the block in float.
      inputs: the values that it reads.
      keep: draws the mask of elements that are quantized; None quantizes all.
      layer: runs one layer; has the contract of `fake_quant.run_layer`.
    """
    index_of = {op.layer.path: i for i, op in enumerate(program.subgraph.weighted)}
    mask = _masks(program, keep)

    def layer_fn(op: Op, x: AnyArray) -> Inexact[Array, "..."]:
        index = index_of[op.layer.path]
        spec, activation = program.specs[index], LayerInput(x)
        if quantizers is not None and spec.tensor is not None:
            activation = LayerInput(x, quantizers[program.tensor_of[op.x]], mask(op.x, x.shape))
        y = layer(op, spec, activation, weights[index])
        return y.astype(program.avals[op.outputs[0]].dtype)

    def read_fn(value_id: int, value: AnyArray) -> AnyArray:
        if quantizers is None or value_id not in program.tensor_of:
            return value
        index = program.tensor_of[value_id]
        rounded = fake_quantize(value, quantizers[index], program.tensors[index].bits)
        kept = mask(value_id, value.shape)
        rounded = rounded if kept is None else jnp.where(kept, rounded, value.astype(jnp.float32))
        return rounded.astype(value.dtype)

    return run(program.subgraph, inputs, layer_fn, read_fn)


def _masks(
    program: BlockProgram, keep: KeepFn | None
) -> Callable[[int, tuple[Any, ...]], jax.Array | None]:
    """`keep`, drawn once per tensor: the views of a tensor share its mask.

    All steps of a loop draw the same one, and none that was drawn inside is read outside.
    """
    masks: dict[int, jax.Array] = {}
    in_loops = {i for op in program.subgraph.ops if op.loop for i in (*op.reads, *op.outputs)}

    def draw(value_id: int, shape: tuple[Any, ...], again: Callable[..., Any]) -> jax.Array:
        assert keep is not None
        view = same_elements(program.producers, value_id)
        if view is None or value_id in program.subgraph.boundary_inputs:
            return keep(value_id, shape)
        source = view.reads[0]
        return view.call(again(source, program.avals[source].shape))[0]

    def draw_again(value_id: int, shape: tuple[Any, ...]) -> jax.Array:
        return draw(value_id, shape, draw_again)

    def mask(value_id: int, shape: tuple[Any, ...]) -> jax.Array | None:
        if keep is None:
            return None
        if value_id in in_loops:
            return draw_again(value_id, shape)
        if value_id not in masks:
            masks[value_id] = draw(value_id, shape, mask)
        return masks[value_id]

    return mask


@contextlib.contextmanager
def differentiating(program: BlockProgram) -> Iterator[None]:
    """A context in which a block is differentiated.

    Raises:
      InputError: it has an op without a derivative, such as a `while` loop or a callback.
    """
    try:
        yield
    except InputError:
        raise
    except (NotImplementedError, ValueError) as error:  # JAX's differ from op to op
        layers = ", ".join(spec.path for spec in program.specs)
        raise InputError(
            f"the block of {layers} has no gradient; round it to nearest (steps=0): {reason(error)}"
        ) from error


def random_keep(
    key: Key[Array, ""], probability: float, shape: tuple[Any, ...]
) -> Bool[Array, "..."]:
    """A mask of `shape` whose elements are True with `probability`.

    For one half, every random bit gives an element, which is six times faster on CPU.
    """
    if probability != 0.5:
        return jax.random.bernoulli(key, np.float32(probability), shape)
    size = int(np.prod(shape))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return (bits == 1).reshape(-1)[:size].reshape(shape)
