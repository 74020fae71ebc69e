"""What each choice of each layer costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aquant_jax.allocation.choices import Choice, is_amount
from aquant_jax.allocation.layer_choices import LayerChoices
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.packing import packed_size
from aquant_jax.errors import InputError, check_type
from aquant_jax.graph.activation_rules import match_rules
from aquant_jax.graph.ir import Op
from aquant_jax.graph.subgraph import constant_inputs, extract_subgraph, source_tensor
from aquant_jax.layers.fake_quant import border_shape
from aquant_jax.plan.network import Network

QUANTIZER_BYTES = 5  # of an activation: a float32 step size and a uint8 zero point
Latencies = Mapping[str, Mapping[str, float]]  # milliseconds by weight path and str(choice)


class Costs(NamedTuple):
    """The cost of an allocation, a sum over the layers.

    Attributes:
      layers: by name of the cost, an array of the costs of each layer's choices. "weight_bits" and
        "act_bits" are shares of the average: bits of the layer over all counted elements.
      fixed: by name, what does not depend on the choices.
    """

    layers: dict[str, list[np.ndarray]]
    fixed: dict[str, float]

    def total(self, name: str, chosen: Sequence[int]) -> float:
        """The cost of an allocation, given the index of each layer's choice."""
        parts = zip(self.layers[name], chosen, strict=True)
        return self.fixed[name] + float(sum(costs[index] for costs, index in parts))


class _Shape(NamedTuple):
    """Counts of one layer: of its weights, its scales, and for one sample of its input and work."""

    weights: int
    grids: int
    weight_bytes: int
    bias_bytes: int
    inputs: int
    float_bits: int
    products: int


def count_costs(
    net: Network, layers: Sequence[LayerChoices], latencies: Latencies | None = None
) -> Costs:
    """The costs of every choice; "latency" only with `latencies`.

    Args:
      net: the network, with the recipe that the allocation extends.
      layers: their choices.
      latencies: of every layer and choice.

    Raises:
      InputError: `latencies` lack a layer or a choice.
    """
    ops = {op.layer.path: op for op in net.graph.ops if op.layer is not None}
    shapes = {layer.path: _shape(net, ops[layer.path]) for layer in layers}
    costs: dict[str, list[np.ndarray]] = {}

    def count(name: str, cost: object) -> None:
        costs[name] = [
            np.array([cost(layer, choice) for choice in layer.choices], float)  # type: ignore
            for layer in layers
        ]

    def coefficients(layer: LayerChoices, choice: Choice) -> int:
        return _coefficients(net, ops[layer.path], layer, choice)

    width = np.dtype(net.recipe.border_format).itemsize  # of a coefficient
    count("coefficients", coefficients)
    count("bytes", lambda layer, choice: (
        _bytes(shapes[layer.path], layer, choice) + width * coefficients(layer, choice)
    ))  # fmt: skip
    count("bit_operations", lambda layer, choice: (
        shapes[layer.path].products * math.prod(_bits(shapes[layer.path], choice))
    ))  # fmt: skip
    if latencies is not None:
        count("latency", lambda layer, choice: _latency(latencies, layer, choice))
    fixed = dict.fromkeys(costs, 0.0)
    fixed["bytes"] = float(_fixed_bytes(net))
    averages = _averages(net, layers, shapes)
    return Costs(costs | averages.layers, fixed | averages.fixed)


def check_latencies(latencies: Any, name: str = "latencies") -> None:
    """InputError unless they are numbers of 0 or more, by weight path and choice."""
    check_type(name, latencies, Mapping, "a table as layer_latencies gives it")
    for path, times in latencies.items():
        check_type(f"{name}: {path}", times, Mapping, "milliseconds by choice")
        for choice, time in times.items():
            if not is_amount(time):
                raise InputError(
                    f"{name}: {path} at {choice!r} is {time!r}; it must be a number of 0 or more"
                )


def _shape(net: Network, op: Op) -> _Shape:
    layer, folded, avals = op.layer, net.folded[op.layer.path], net.graph.avals
    weights = math.prod(layer.weight_shape)
    channels = math.prod(layer.weight_shape[axis] for axis in layer.channel_axes)
    group = net.plan.layers[layer.path].weight_group
    source = source_tensor(net.graph.producers(), op.x)
    inserted = math.prod(op.params.get("lhs_dilation", ()))  # a zero is multiplied by nothing
    return _Shape(
        weights=weights,
        grids=channels * (weights // channels // group if group else 1),
        weight_bytes=np.asarray(folded.weight).nbytes,
        bias_bytes=np.asarray(folded.bias).nbytes,
        inputs=_elements(net, source) * op.steps,
        float_bits=8 * avals[source].dtype.itemsize,
        products=_elements(net, op.outputs[0]) * op.steps * weights // channels // inserted,
    )


def _elements(net: Network, value: int) -> int:
    """Of one sample, whose axis may be any, or merged with others."""
    return -(-math.prod(net.graph.avals[value].shape) // net.batch)


def _bits(shape: _Shape, choice: Choice) -> tuple[int, int]:
    """Bits of weights and activations."""
    floats = 8 * shape.weight_bytes // shape.weights
    return choice.weight_bits or floats, choice.act_bits or shape.float_bits


def _bytes(shape: _Shape, layer: LayerChoices, choice: Choice) -> int:
    quantizer = QUANTIZER_BYTES if layer.owner and choice.act_bits else 0
    if choice.weight_bits is None:
        return shape.weight_bytes + shape.bias_bytes + quantizer
    codes = packed_size(shape.weights, choice.weight_bits)
    zeros = packed_size(shape.grids, choice.weight_bits)
    return codes + zeros + 4 * shape.grids + shape.bias_bytes + quantizer


def _coefficients(net: Network, op: Op, layer: LayerChoices, choice: Choice) -> int:
    if choice.act_bits is None:
        return 0
    name, granularity = choice.border or layer.border[0], choice.border_granularity
    if name in (None, borders.NEAREST):
        return 0
    shape = border_shape(op, granularity or layer.border[1], net.graph.avals[op.x].shape)
    return borders.count_coefficients(name, shape)


def _latency(latencies: Latencies, layer: LayerChoices, choice: Choice) -> float:
    try:
        return latencies[layer.path][str(choice)]
    except KeyError as error:
        raise InputError(f"latencies lack {layer.path} at {str(choice)!r}") from error


def _fixed_bytes(net: Network) -> int:
    """Of other arrays of the network, and of the quantizers of tensors that no layer reads."""
    everything = extract_subgraph(net.graph, (), net.graph.outputs)
    values = constant_inputs(net.graph, everything, net.variables)
    arrays = zip(everything.constants, values, strict=True)
    constants = sum(np.asarray(value).nbytes for i, value in arrays if i in net.graph.paths)
    return constants + QUANTIZER_BYTES * len(rule_tensors(net))


def rule_tensors(net: Network) -> dict[str, int]:
    """The value ids of the quantized activations that no layer reads, by key."""
    read = {spec.tensor for spec in net.plan.layers.values()}
    return {tensor.key: i for i, tensor in net.plan.tensors.items() if tensor.key not in read}


def ruled_inputs(net: Network) -> dict[str, str]:
    """By the tensor that layers read, the key of the rule that matches it."""
    matches = match_rules(net.graph, net.recipe.activations)
    found = {net.plan.tensors[i].key: key for i, key in matches if i in net.plan.tensors}
    return {tensor: key for tensor, key in found.items() if tensor != key}


def _averages(net: Network, layers: Sequence[LayerChoices], shapes: Mapping[str, _Shape]) -> Costs:
    """Average bits of the weights and of the activations that count, see `choices.Budget`."""
    weights = {a.path: 0 if a.weights_exempt else shapes[a.path].weights for a in layers}
    inputs = {
        a.path: shapes[a.path].inputs if a.owner and not a.input_exempt else 0 for a in layers
    }
    rules = rule_tensors(net)
    ruled = sum(_elements(net, value) for value in rules.values())
    totals = {
        "weight_bits": max(sum(weights.values()), 1),
        "act_bits": max(sum(inputs.values()) + ruled, 1),
    }
    bits = sum(_elements(net, i) * net.plan.tensors[i].bits for i in rules.values())
    shares = {
        name: [
            np.array([_bits(shapes[a.path], c)[side] * counts[a.path] for c in a.choices], float)
            / totals[name]
            for a in layers
        ]
        for side, (name, counts) in enumerate((("weight_bits", weights), ("act_bits", inputs)))
    }
    return Costs(shares, {"weight_bits": 0.0, "act_bits": bits / totals["act_bits"]})
