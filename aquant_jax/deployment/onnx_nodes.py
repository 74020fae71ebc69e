"""Nodes of an ONNX model that runtimes cannot run, or do not fuse, in another form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def rewrite_nodes(model: Any) -> None:
    """Rewrites max-pools and clips; the model computes the same.

    jax2onnx 0.17 pools over all four axes of an image, as spatial ones; onnxruntime knows three.
    The maximum and the minimum of a tensor and a number become Relu and Clip, which runtimes fuse
    with the convolution before them.
    """
    graph = model.graph
    numbers = {value.name for value in graph.initializer if len(value.dims) == 0}
    zeros = {value.name for value in graph.initializer if value.name in numbers and _is_zero(value)}
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
            graph.node.extend(_clip(node, numbers, zeros))


def _is_zero(value: Any) -> bool:
    from onnx import numpy_helper

    return not np.any(numpy_helper.to_array(value))


def _clip(node: Any, numbers: set[str], zeros: set[str]) -> Iterator[Any]:
    """`node`, or what it is as a Relu or a Clip."""
    from onnx import helper

    bounds = [name for name in node.input if name in numbers]
    values = [name for name in node.input if name not in numbers]
    if node.op_type not in ("Max", "Min") or len(bounds) != 1 or len(values) != 1:
        yield node
    elif node.op_type == "Max" and bounds[0] in zeros:
        yield helper.make_node("Relu", values, node.output)
    else:
        ends = [*bounds] if node.op_type == "Max" else ["", *bounds]
        yield helper.make_node("Clip", [*values, *ends], node.output)


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
