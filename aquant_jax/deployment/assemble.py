"""The quantized network that the blocks of a run make together."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment import stacked
from aquant_jax.deployment.quantized import Quantized, traced
from aquant_jax.graph.subgraph import constant_inputs, extract_subgraph
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.report import History, Report


def assemble(
    calibration: Any,
    net: Network,
    layers: dict[str, LayerState],
    activations: dict[str, ActivationQuantizer],
    reports: list[Report],
) -> Quantized:
    """The quantized network after its last block.

    Args:
      calibration: a pytree of inputs of its shapes.
      net: the network, with the borders that were chosen.
      layers: by weight path.
      activations: quantizers by tensor key.
      reports: of the blocks.
    """
    everything = extract_subgraph(net.graph, (), net.graph.outputs)
    values = constant_inputs(net.graph, everything, net.variables)
    constants = {
        net.graph.paths[i]: jnp.array(value)  # copied: the caller may donate its own
        for i, value in zip(everything.constants, values, strict=True) if i in net.graph.paths
    }  # fmt: skip
    return Quantized(
        layers,
        activations,
        constants,
        traced(net.apply, net.variables, calibration, net.targets),
        tuple(net.plan.layers[path] for path in layers),
        net.recipe,
        History(reports),
        unquantized=net.graph.unquantized,
    ).with_stacks(stacked.stacks(net.graph, net.plan))
