"""Counts of the blocks of a network, from its traced graph alone: it needs shapes, no weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aquant_jax.arithmetic import border
from aquant_jax.graph.fold import fold
from aquant_jax.graph.ir import Graph, Op, sample_first
from aquant_jax.graph.partition import Block, partition
from aquant_jax.graph.trace import trace
from aquant_jax.layers.fake_quant import border_shape
from aquant_jax.plan.assign import Plan, make_plan
from aquant_jax.plan.block_program import BlockProgram, make_block_program
from aquant_jax.recipe import Recipe

SAMPLES = 2  # of a trace; one more tells which axes number samples
PRODUCT = "dot_general"
# Of a number of samples: a function, the shapes of its variables, and those of its input.
MakeNetwork = Callable[[int], tuple[Callable[[Any, Any], Any], Any, Any]]


class BlockCounts(NamedTuple):
    """Counts of one block; all but those of what is learned are for one sample.

    Attributes:
        name: of the block.
        layers: number of its layers.
        forward: multiplications of its layers and of its products of activations.
        backward: multiplications of their gradients.
        values: elements that its operations make.
        layer_inputs, layer_outputs: elements of the activations around its layers.
        quantized: elements of those inputs of layers that are quantized.
        starts, targets, ends: elements of its inputs, its targets, and of what it hands on.
        model_bytes: bytes of the model's input that it reads.
        weights: elements of its quantized weights.
        others: numbers that are learned besides: step sizes and border coefficients.
        searched: elements of each activation whose range is searched.
    """

    name: str
    layers: int
    forward: float
    backward: float
    values: float
    layer_inputs: float
    layer_outputs: float
    quantized: float
    starts: float
    targets: float
    ends: float
    model_bytes: float
    weights: int
    others: int
    searched: tuple[float, ...]


def count_blocks(make: MakeNetwork, recipe: Recipe) -> list[BlockCounts]:
    """The blocks of a network as `recipe` cuts it, first one first."""
    unfolded = trace(*make(SAMPLES))
    sampled = sample_first(unfolded, trace(*make(SAMPLES + 1)))
    graph = fold(unfolded)
    plan = make_plan(graph, recipe)
    blocks = partition(graph, recipe.granularity, recipe.blocks, sampled)
    known: set[str] = set()
    counts = []
    for block in blocks:
        program = make_block_program(graph, plan, block.start, block.targets)
        fresh = [tensor.key for tensor in program.tensors if tensor.key not in known]
        known.update(fresh)
        counts.append(_count(graph, plan, block, program, frozenset(fresh)))
    return counts


def _count(
    graph: Graph, plan: Plan, block: Block, program: BlockProgram, fresh: frozenset[str]
) -> BlockCounts:
    def elements(values: Any) -> float:
        return sum(math.prod(graph.avals[v].shape) for v in values) / SAMPLES

    weighted = program.subgraph.weighted
    forward, backward = _multiplications(graph, program)
    keys = {value: program.tensors[index].key for value, index in program.tensor_of.items()}
    first = {key: value for value, key in keys.items() if key in fresh}
    return BlockCounts(
        name=block.name,
        layers=len(weighted),
        forward=forward,
        backward=backward,
        values=elements(out for op in program.subgraph.ops for out in op.outputs),
        layer_inputs=elements(op.x for op in weighted),
        layer_outputs=elements(out for op in weighted for out in op.outputs),
        quantized=elements(op.x for op in weighted if op.x in program.tensor_of),
        starts=elements(block.start),
        targets=elements(block.targets),
        ends=elements(block.end),
        model_bytes=sum(
            math.prod(graph.avals[v].shape) * graph.avals[v].dtype.itemsize / SAMPLES
            for v in program.subgraph.model_inputs
        ),
        weights=sum(math.prod(op.layer.weight_shape) for op in weighted),
        others=len(fresh) + sum(_coefficients(graph, plan, op) for op in weighted),
        searched=tuple(elements([value]) for value in first.values()),
    )


def _multiplications(graph: Graph, program: BlockProgram) -> tuple[float, float]:
    """Of the forward and of the backward pass. The gradient with respect to an operand costs as
    much as the product, and is needed where the operand depends on what the block learns."""
    learned: set[int] = set()
    forward = backward = 0.0
    for op in program.subgraph.ops:
        reads = [value for value in op.reads if value in learned or value in program.tensor_of]
        if op.layer is not None or reads:
            learned.update(op.outputs)
        if op.layer is not None:
            size = _products(graph, op)
            forward, backward = forward + size, backward + size * (1 + bool(reads))
        elif op.name == PRODUCT:
            (batch_and_left, _), _ = op.params["dimension_numbers"]
            left = graph.avals[op.inputs[0]].shape  # pyright: ignore[reportArgumentType]
            inner = math.prod(left[axis] for axis in batch_and_left)
            size = inner * math.prod(graph.avals[op.outputs[0]].shape) / SAMPLES
            forward, backward = forward + size, backward + size * len(reads)
    return forward, backward


def _products(graph: Graph, op: Op) -> float:
    """Multiplications of a layer: those of an output element, for each of them. The padding of a
    convolution does not count."""
    layer: Any = op.layer
    channels = math.prod(layer.weight_shape[axis] for axis in layer.channel_axes)
    column = math.prod(layer.weight_shape) / channels
    size = column * math.prod(graph.avals[op.outputs[0]].shape) / SAMPLES
    if layer.kind != "conv":
        return size
    numbers = op.params["dimension_numbers"]
    for position, (low, high) in enumerate(op.params["padding"]):
        taps = layer.weight_shape[numbers.rhs_spec[2 + position]]
        inputs = graph.avals[op.x].shape[numbers.lhs_spec[2 + position]]
        steps = op.params["window_strides"][position], op.params["rhs_dilation"][position]
        size *= _inside(inputs, taps, (low, high), steps)
    return size


def _inside(inputs: int, taps: int, padding: tuple[int, int], steps: tuple[int, int]) -> float:
    """The share of a window's taps, over all its places on an axis, that is not padding.

    >>> _inside(8, 3, (1, 1), (1, 1)) == 22 / 24
    True
    """
    stride, dilation = steps
    starts = np.arange(-padding[0], inputs + padding[1] - dilation * (taps - 1), stride)
    places = starts[:, None] + dilation * np.arange(taps)
    return float(np.mean((places >= 0) & (places < inputs)))


def _coefficients(graph: Graph, plan: Plan, op: Op) -> int:
    """Coefficients of a layer's border."""
    spec = plan.layers[op.layer.path]
    if spec.border is None:
        return 0
    shape = border_shape(op, spec.border_granularity, graph.avals[op.x].shape)
    return border.count_coefficients(spec.border, shape)


def image_network(make: Callable[[], tuple[Any, Any]], size: int) -> MakeNetwork:
    """A network of images of `size` pixels a side, whose function and shapes `make` gives."""

    def network(samples: int) -> tuple[Any, Any, Any]:
        return *make(), jax.ShapeDtypeStruct((samples, size, size, 3), np.float32)

    return network
