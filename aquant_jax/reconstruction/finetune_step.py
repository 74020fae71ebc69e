"""The learned parameters of the whole-network stage, what they deploy, and one update of them.

Step sizes and weight scales are learned by their logarithms, relative to where they start. Weight
codes start as they are and move by straight-through gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aquant_jax.arithmetic.uniform import NEAREST, ActivationQuantizer, clip_codes, ste_ceil
from aquant_jax.graph.ir import Op
from aquant_jax.layers.fake_quant import LayerSpec, LayerState, Weights, dequantize_weight
from aquant_jax.reconstruction.chain import Parts

Params = dict[str, Any]


class Start(NamedTuple):
    """A deployed network (a pytree).

    Attributes:
      layers: by weight path.
      activations: quantizers by tensor key.
    """

    layers: dict[str, LayerState]
    activations: dict[str, ActivationQuantizer]


class Finetuner(NamedTuple):
    """The static part of the stage.

    Attributes:
      ops, specs: of every layer, by weight path.
      optimizer: of the parameters.
      weights: whether the weight codes are learned.
    """

    ops: Mapping[str, Op]
    specs: Mapping[str, LayerSpec]
    optimizer: optax.GradientTransformation
    weights: bool

    def initial_params(self, start: Start) -> Params:
        """The parameters that give `start`."""
        layers = {}
        for path, layer in start.layers.items():
            own = {"bias": layer.bias, "border": layer.border, "scale": jnp.zeros_like(layer.scale)}
            if self.weights and self.specs[path].weight_bits is not None:
                own["codes"] = layer.codes.astype(jnp.float32)
            layers[path] = own
        steps = {key: jnp.zeros_like(q.step_size) for key, q in start.activations.items()}
        return jax.tree.map(jnp.copy, {"layers": layers, "steps": steps})

    def learned(self, start: Start, params: Params) -> Start:
        """The network that parameters stand for, its codes as floats."""
        layers = {
            path: _layer(self.specs[path], layer, params["layers"][path])
            for path, layer in start.layers.items()
        }
        activations = {
            key: q._replace(step_size=q.step_size * jnp.exp(params["steps"][key]))
            for key, q in start.activations.items()
        }
        return Start(layers, activations)

    def parts(self, network: Start) -> Parts:
        """What the layers of a network compute with."""
        weights = {
            path: Weights(dequantize_weight(self.ops[path], layer), layer.bias, layer.border)
            for path, layer in network.layers.items()
        }
        return Parts(weights, network.activations)

    def learned_parts(self, start: Start, params: Params) -> Parts:
        """What the layers compute with for these parameters."""
        return self.parts(self.learned(start, params))

    def update(
        self, start: Start, params: Params, state: Any, gradient: Parts
    ) -> tuple[Params, Any]:
        """One update of the parameters, given the gradient of the parts."""
        _, pull = jax.vjp(functools.partial(self.learned_parts, start), params)
        updates, state = self.optimizer.update(pull(gradient)[0], state, params)
        updated: Any = optax.apply_updates(params, updates)
        return updated, state


def _layer(spec: LayerSpec, layer: LayerState, own: Params) -> LayerState:
    """A layer with its learned parameters."""
    layer = layer._replace(bias=own["bias"], border=own["border"])
    if spec.weight_bits is None:
        return layer
    codes = layer.codes.astype(jnp.float32)
    if "codes" in own:
        codes = clip_codes(ste_ceil(own["codes"] - NEAREST), spec.weight_bits)
    return layer._replace(codes=codes, scale=layer.scale * jnp.exp(own["scale"]))
