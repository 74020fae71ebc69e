"""Nodes of an ONNX model that runtimes cannot run, or do not fuse, in another form."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from aquant_jax.arithmetic.uniform import LOWEST


def rewrite_nodes(model: Any) -> None:
    """Rewrites max-pools, products and clips, and drops what nothing reads; the model computes the
    same.

    jax2onnx 0.17 pools over all four axes of an image, as spatial ones; onnxruntime knows three. It
    adds a float32 zero to a product of matrices, whatever its dtype.
    The maximum and the minimum of a float tensor and a number become Relu and Clip, which runtimes
    fuse with the convolution before them. The maximum with the lowest float32 goes: it keeps XLA
    from fusing (`uniform.product`).
    """
    from onnx import numpy_helper

    scalars = {v.name: numpy_helper.to_array(v) for v in model.graph.initializer if not v.dims}
    _max_pools(model.graph)
    _products(model.graph, scalars)
    _clips(model.graph, scalars)
    read = {name for node in model.graph.node for name in node.input}
    for value in list(model.graph.initializer):
        if value.name not in read:  # jax2onnx leaves some behind
            model.graph.initializer.remove(value)


def move_transposes(model: Any) -> Any:
    """The model with as few Transposes as onnxruntime finds; it moves them past other nodes when it
    loads a model, which OpenVINO does not."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],  # weights stay as small as they are
        )  # fmt: skip
        return onnx.load(path)


def _max_pools(graph: Any) -> None:
    producers = {out: node for node in graph.node for out in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    nodes, dropped = list(graph.node), set()
    pools = {}
    for node in nodes:
        if node.op_type == "MaxPool" and (made := _pool(node, producers, readers)) is not None:
            chain, pools[node.output[0]] = made
            dropped.update(out for each in chain for out in each.output)
    del graph.node[:]
    for node in nodes:
        if node.output[0] in pools:
            graph.node.extend(pools[node.output[0]])
        elif node.output[0] not in dropped:
            graph.node.append(node)


def _products(graph: Any, scalars: dict[str, np.ndarray]) -> None:
    from onnx import helper

    # Without the zero onnxruntime fuses those of float32, and computes something else.
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or node.output[0] not in types:
            continue
        zero = scalars.get(node.input[2])
        if zero == 0 and zero.dtype != helper.tensor_dtype_to_np_dtype(types[node.output[0]]):
            del node.input[2]


def _clips(graph: Any, scalars: dict[str, np.ndarray]) -> None:
    from onnx import helper

    # Runtimes have no Relu of integers.
    numbers = {name: scalar for name, scalar in scalars.items() if scalar.dtype.kind not in "iu"}
    outputs = {value.name for value in graph.output}
    readers = collections.Counter(name for node in graph.node for name in node.input)
    same: dict[str, str] = {}
    raised: dict[str, Any] = {}  # clips to a lowest value that have one reader, by their output
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        out, values = node.output[0], [name for name in node.input if name not in numbers]
        bounds = [name for name in node.input if name in numbers]
        if node.op_type not in ("Max", "Min") or len(bounds) != 1 or len(values) != 1:
            graph.node.append(node)
        elif node.op_type == "Max" and float(numbers[bounds[0]]) == LOWEST and out not in outputs:
            same[out] = values[0]
        elif node.op_type == "Max":
            relu = numbers[bounds[0]] == 0
            made = ("Relu", values) if relu else ("Clip", [*values, *bounds])
            graph.node.append(helper.make_node(*made, [out]))
            if readers[out] == 1 and out not in outputs:
                raised[out] = graph.node[-1], [*values, *bounds]
        else:
            low, given = raised.get(values[0], (None, [*values, ""]))
            if low is not None:
                graph.node.remove(low)
            graph.node.append(helper.make_node("Clip", [*given, *bounds], [out]))


def _pool(
    pool: Any, producers: dict[str, Any], readers: dict[str, Any]
) -> tuple[list[Any], list[Any]] | None:
    """The nodes of jax2onnx's max-pool, and those that replace it; None where it is another one."""
    from onnx import helper

    chain, node = [pool], producers.get(pool.input[0])
    while node is not None and node.op_type == "Unsqueeze":
        chain.append(node)
        node = producers.get(node.input[0])
    squeeze = readers.get(pool.output[0])
    if len(chain) == 1 or squeeze is None or squeeze.op_type != "Squeeze":
        return None
    given = {a.name: helper.get_attribute_value(a) for a in pool.attribute}
    windows, rank = given["kernel_shape"], len(given["kernel_shape"])
    pads = given.get("pads", [0] * 2 * rank)
    strides, dilations = (given.get(name, [1] * rank) for name in ("strides", "dilations"))
    still = [
        axis for axis in range(rank)
        if (windows[axis], strides[axis], pads[axis], pads[rank + axis]) == (1, 1, 0, 0)
    ]  # fmt: skip
    lead = sorted([*still[:1], *still[-1:]])  # the samples and, in images, the channels
    spatial = [axis for axis in range(rank) if axis not in lead]
    if len(still) < 2 or not 1 <= len(spatial) <= 3:
        return None
    order = [*lead, *spatial]
    before, after = f"{pool.output[0]}:in", f"{pool.output[0]}:out"
    pooled = helper.make_node(
        "MaxPool", [before], [after],
        kernel_shape=[windows[a] for a in spatial],
        strides=[strides[a] for a in spatial],
        dilations=[dilations[a] for a in spatial],
        pads=[pads[a + end] for end in (0, rank) for a in spatial],
    )  # fmt: skip
    back = [int(axis) for axis in np.argsort(order)]
    return [*chain, squeeze], [
        helper.make_node("Transpose", [chain[-1].input[0]], [before], perm=order),
        pooled,
        helper.make_node("Transpose", [after], [squeeze.output[0]], perm=back),
    ]
