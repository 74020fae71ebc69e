"""The weights of an ONNX model, in the place of inputs: dequantized codes, or floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.deployment.quantized import Quantized
from aquant_jax.layers.fake_quant import LayerState

SMALL_BITS = 4  # up to this many bits, a code is a uint4, two a byte; above, a uint8


class ReadWeight(NamedTuple):
    """How a DequantizeLinear reads the codes of a layer.

    Attributes:
      axes: output channel axes of the codes.
      scale: float32 ``[channels]``; empty for float weights.
    """

    axes: tuple[int, ...]
    scale: np.ndarray


def dequantize_inputs(model: Any, quantized: Quantized, reads: Mapping[str, ReadWeight]) -> None:
    """Puts every weight that is an input in its place."""
    from onnx import helper, numpy_helper

    weights = [value for value in model.graph.input if value.name in reads]
    bits = {spec.path: spec.weight_bits or 0 for spec in quantized.specs}
    nodes = []
    for value in weights:
        model.graph.input.remove(value)
        layer = jax.tree.map(np.asarray, quantized.layers[value.name])
        if not layer.scale.size:
            model.graph.initializer.append(numpy_helper.from_array(layer.codes, value.name))
            continue
        made = _weight_nodes(value.name, layer, bits[value.name], reads[value.name])
        nodes += made[0]
        model.graph.initializer.extend(made[1])
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([helper.make_node(*args, **kwargs) for args, kwargs in nodes] + rest)


def _weight_nodes(
    name: str, layer: LayerState, bits: int, weight: ReadWeight
) -> tuple[list[Any], list[Any]]:
    """Nodes and initializers that make the weight called `name`."""
    from onnx import numpy_helper

    kind = jnp.uint4 if bits <= SMALL_BITS else jnp.uint8
    axes, codes = weight.axes, np.asarray(layer.codes)
    arrays = {"scale": weight.scale, "zero_point": layer.zero_point.astype(kind)}
    names = [f"{name}:{part}" for part in ("codes", *arrays)]
    if len(axes) == 1:
        nodes = [(("DequantizeLinear", names, [name]), {"axis": axes[0]})]
    else:  # it has one axis of scales
        moved = np.moveaxis(codes, axes, range(len(axes)))
        codes = moved.reshape(layer.scale.size, -1)
        back = np.argsort([*axes, *(a for a in range(moved.ndim) if a not in axes)])
        arrays["shape"] = np.array(moved.shape, np.int64)
        rows, shape, shaped = (f"{name}:{part}" for part in ("rows", "shape", "shaped"))
        nodes = [
            (("DequantizeLinear", names, [rows]), {"axis": 0}),
            (("Reshape", [rows, shape], [shaped]), {}),
            (("Transpose", [shaped], [name]), {"perm": back.tolist()}),
        ]
    arrays = {"codes": codes.astype(kind), **arrays}
    return nodes, [numpy_helper.from_array(a, f"{name}:{part}") for part, a in arrays.items()]
