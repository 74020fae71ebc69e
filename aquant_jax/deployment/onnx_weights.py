"""The weights of an ONNX model, in the place of inputs: codes and what reads them, or floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.deployment.onnx_layers import WholeWeights
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.layers.fake_quant import LayerState

SMALL_BITS = 4  # up to this many bits, a code is a uint4, two a byte; above, a uint8


class ReadWeight(NamedTuple):
    """How a layer reads codes that are no matrix.

    Attributes:
      axes: output channel axes of the codes.
      whole: whether as the whole numbers ``code - zero_point``, without its scale.
    """

    axes: tuple[int, ...]
    whole: bool


def place_weights(
    model: Any,
    quantized: Quantized,
    whole: Mapping[str, WholeWeights],
    reads: Mapping[str, ReadWeight],
) -> None:
    """Puts every weight that is an input in its place."""
    from onnx import helper, numpy_helper

    bits = {spec.path: spec.weight_bits or 0 for spec in quantized.specs}
    nodes = []
    for value in [value for value in model.graph.input if value.name in bits]:
        name = value.name
        model.graph.input.remove(value)
        layer = jax.tree.map(np.asarray, quantized.layers[name])
        if name in whole:
            made, arrays = _int8(name, whole[name], bits[name])
        elif not layer.scale.size:
            made, arrays = [], {name: layer.codes}
        else:
            made, arrays = _codes(name, layer, bits[name], reads[name])
        nodes += made
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([helper.make_node(*args, **kwargs) for args, kwargs in nodes] + rest)


Made = tuple[list[Any], dict[str, Any]]


def _int8(name: str, weights: WholeWeights, bits: int) -> Made:
    """Nodes and initializers of weights that a runtime multiplies in int8."""
    whole, scale, zero, codes, zero_points = (
        f"{name}:{part}" for part in ("whole", "scale", "zero", "codes", "zero_points")
    )
    arrays: dict[str, Any] = {scale: np.float32(1), zero: np.int8(0)}
    axis = {}
    if weights.scale is not None:
        arrays = {scale: weights.scale, zero: np.zeros(len(weights.scale), np.int8)}
        axis = {"axis": weights.codes.ndim - 1}
    nodes = [(("DequantizeLinear", [whole, scale, zero], [name]), axis)]
    if bits > SMALL_BITS:
        return nodes, arrays | {whole: weights.codes}
    arrays[codes] = (weights.codes + weights.zero_point).astype(jnp.uint4)
    arrays[zero_points] = weights.zero_point
    return _whole(codes, zero_points, whole, np.int8) + nodes, arrays


def _whole(codes: str, zero_points: str, whole: str, dtype: Any) -> list[Any]:
    """Nodes that subtract zero points from codes, which runtimes do when they load the model."""
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return [
        (("Cast", [codes], [f"{codes}:cast"]), {"to": kind}),
        (("Sub", [f"{codes}:cast", zero_points], [whole]), {}),
    ]


def _codes(name: str, layer: LayerState, bits: int, weight: ReadWeight) -> Made:
    """Nodes and initializers of weights that a runtime multiplies in float."""
    kind = jnp.uint4 if bits <= SMALL_BITS else jnp.uint8
    axes, codes = weight.axes, np.asarray(layer.codes).astype(kind)
    at, scale, zero = (f"{name}:{part}" for part in ("codes", "scale", "zero_point"))
    if weight.whole:
        sizes = [size if axis in axes else 1 for axis, size in enumerate(codes.shape)]
        zero_point = layer.zero_point.reshape([codes.shape[axis] for axis in axes])
        zero_point = np.transpose(zero_point, np.argsort(axes)).reshape(sizes)
        return _whole(at, zero, name, np.float32), {at: codes, zero: zero_point.astype(np.float32)}
    arrays = {scale: layer.scale, zero: layer.zero_point.astype(kind)}
    if len(axes) == 1 and layer.scale.size == codes.shape[axes[0]]:
        nodes = [(("DequantizeLinear", [at, scale, zero], [name]), {"axis": axes[0]})]
        return nodes, arrays | {at: codes}
    # DequantizeLinear has one axis of scales: a row for each grid.
    moved = np.moveaxis(codes, axes, range(len(axes)))
    back = np.argsort([*axes, *(a for a in range(moved.ndim) if a not in axes)])
    rows, shape, shaped = (f"{name}:{part}" for part in ("rows", "shape", "shaped"))
    nodes = [
        (("DequantizeLinear", [at, scale, zero], [rows]), {"axis": 0}),
        (("Reshape", [rows, shape], [shaped]), {}),
        (("Transpose", [shaped], [name]), {"perm": back.tolist()}),
    ]
    rows_of_codes = moved.reshape(layer.scale.size, -1)
    return nodes, arrays | {at: rows_of_codes, shape: np.array(moved.shape, np.int64)}
