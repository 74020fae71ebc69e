"""A quantized network as ONNX: integer weights behind DequantizeLinear, borders as standard ops.

`jax2onnx` converts the network traced with float weights; each of these is then replaced by its
codes and a DequantizeLinear. Activations are rounded by Ceil, as everywhere in this library:
QuantizeLinear would round ties to even.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aquant_jax.arithmetic.uniform import TensorState, dequantize, quantize, to_units
from aquant_jax.deployment.quantized import Quantized, Traced
from aquant_jax.deployment.stablehlo import batches_of, in_batches
from aquant_jax.errors import InputError, reason
from aquant_jax.graph.ir import PAD_WITH_VALUE, Op
from aquant_jax.graph.subgraph import cut, run, static_inputs
from aquant_jax.graph.trace import trace
from aquant_jax.layers.conv_geometry import Window
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.layers.im2col import Rounding
from aquant_jax.layers.integer import run_deployed_layer

OPSET = 23
SMALL_BITS = 4  # up to so many bits a code is an uint4, two a byte; more are uint8


class _Weight(NamedTuple):
    """What a DequantizeLinear does to the codes of a layer.

    Attributes:
      axes: of the codes, that number output channels.
      scale: float32 ``[channels]``.
    """

    axes: tuple[int, ...]
    scale: np.ndarray


def to_onnx(quantized: Quantized, inputs: Any = None) -> Any:
    """Converts a network.

    Weights that meet quantized activations are dequantized to the whole numbers
    ``codes - zero_point``; scales follow the product, as in `integer.run_deployed_layer`, whose
    sums are exact in any order. So a runtime gives the same outputs but for near-ties.

    Args:
      quantized: what `quantize` made; not one of `restore`, whose program is StableHLO.
      inputs: see `checkpoint.save`.

    Returns:
      An ``onnx.ModelProto``. Its inputs and outputs are named by their paths, or ``input`` and
      ``output``; the number of samples is symbolic where the network can be traced so.

    Raises:
      InputError: jax2onnx is not installed, or knows no ONNX for something in the network.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise InputError("ONNX needs jax2onnx: pip install 'aquant-jax[onnx]'") from error
    program = quantized.program
    if not isinstance(program, Traced):
        raise InputError("a restored network is StableHLO; ONNX is made with the model's code")
    shapes = program.inputs if inputs is None else inputs
    problem: Exception | None = None
    for batch in batches_of(shapes, quantized.recipe.batch_size):
        try:
            function, arguments, names, read = _traced(quantized, program, batch)
            model = jax2onnx.to_onnx(
                function, arguments, opset=OPSET, model_name="aquant",
                input_names=names[0], output_names=names[1],
            )  # fmt: skip
        except Exception as error:  # of a network that does anything with a size, or of jax2onnx
            problem = problem or error
            continue
        _dequantize(model, quantized, read)
        return model
    said = problem and reason(problem)
    raise InputError(f"the network cannot become ONNX: {said}") from problem


def load(path: str | Path) -> Callable:
    """A function of a batch that runs a file of `to_onnx` with onnxruntime, on the CPU.

    Args:
      path: of the file.

    Returns:
      Takes a pytree of arrays, leaves in the order of the file's inputs; gives a list of arrays.
      A number of samples that is fixed in the file is run in batches of so many.

    Raises:
      InputError: onnxruntime is not installed or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("ONNX needs onnxruntime: pip install 'aquant-jax[onnx]'") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own
        raise InputError(f"{path} is no ONNX file that onnxruntime reads: {error}") from error
    inputs = session.get_inputs()

    def once(batch):
        leaves = map(np.asarray, jax.tree.leaves(batch))
        return session.run(None, {i.name: a for i, a in zip(inputs, leaves, strict=True)})

    return lambda batch: in_batches(once, batch, inputs[0].shape[0])


def _traced(quantized: Quantized, program: Traced, batch):
    """A function of weights and batch, its arguments and names, and how each weight is read."""
    read: dict[str, _Weight] = {}
    host = jax.tree.map(np.asarray, (quantized.layers, quantized.tensors, quantized.static))
    specs = {spec.path: spec for spec in quantized.specs}
    weights = {
        path: jax.ShapeDtypeStruct(quantized.layers[path].codes.shape, jnp.float32)
        for path in sorted(quantized.layers)  # as the leaves of a dict are
        if specs[path].weight_bits is not None
    }
    layer = functools.partial(
        run_deployed_layer,
        real=functools.partial(_read, read, False),
        whole=functools.partial(_read, read, True),
        convolve=_convolve,
    )

    def apply(weights, x):
        layers = {p: own._replace(codes=weights.get(p, own.codes)) for p, own in host[0].items()}
        given = dataclasses.replace(quantized, layers=layers, tensors=host[1], static=host[2])
        return program.run(given, x, layer)

    graph = trace(apply, weights, batch)
    graph = graph._replace(ops=tuple(map(_plain, graph.ops)))
    whole = cut(graph, (), graph.outputs)

    def function(*values):
        given = dict(zip(weights, values[: len(weights)], strict=True))
        side = dict(zip(graph.inputs, values[len(weights) :], strict=True))
        static = static_inputs(graph, whole, given)
        return run(whole, (), [side[i] for i in whole.side], static, _no_weighted)

    arguments = [*weights.values(), *jax.tree.leaves(batch)]
    outputs = jax.tree.unflatten(graph.tree, range(len(graph.outputs)))
    names = [*weights, *_names(batch, "input")], _names(outputs, "output")
    return function, arguments, names, read


def _read(read: dict[str, _Weight], whole: bool, op: Op, state: LayerState):
    """The weight of a layer, noting what its codes become."""
    if state.scale.size:
        scale = np.asarray(state.scale)
        read[op.layer.path] = _Weight(op.layer.channel_axes, scale**0 if whole else scale)
    return state.codes


def _plain(op: Op) -> Op:
    """The op as any other one; padding beside an axis of symbolic size, which jax2onnx does not
    know, as a concatenation."""
    padding = op.name in ("pad", PAD_WITH_VALUE)
    return op._replace(layer=None, call=functools.partial(_pad, op) if padding else op.call)


def _pad(op: Op, x, value):
    sizes = op.params["padding_config"]
    if all(isinstance(size, int) for size in x.shape) or min(min(pair) for pair in sizes) < 0:
        return op.call(x, value)
    if any(inner for _, _, inner in sizes):
        return op.call(x, value)
    for axis, (low, high, _) in enumerate(sizes):
        shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in (low, high)]
        before, after = (lax.full(shape, value, x.dtype) for shape in shapes)
        parts = [part for part in (before, x, after) if part.shape[axis] != 0]
        x = lax.concatenate(parts, axis) if len(parts) > 1 else x
    return [x]


def _convolve(
    x, keep, tensor: TensorState, coefficients, kernel, window: Window, rounding: Rounding
):
    """`columns.convolve` over columns that a convolution with one-hot kernels writes."""
    taps, groups, inner, outer = kernel.shape
    spatial = "".join(chr(ord("0") + axis) for axis in range(len(window.kernel)))
    columns = lax.conv_general_dilated_patches(
        x, window.kernel, window.strides, "VALID", rhs_dilation=window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )  # fmt: skip
    units = to_units(columns, 1.0 / tensor.step_size)
    if rounding.fused:
        each = units.reshape(*units.shape[:-1], -1, taps)
        shared = rounding.polynomials(coefficients, [each[..., tap] for tap in range(taps)])
        (bound,) = rounding.borders(shared, 1)
        bound = jnp.repeat(bound, taps, -1)
    else:  # every element of a column is a channel with one tap
        flat = {name: own.T.reshape(1, -1) for name, own in coefficients.items()}
        (bound,) = rounding.borders(rounding.polynomials(flat, [units]), 1)
    codes = quantize(units, tensor.zero_point, rounding.bits, bound)
    values = dequantize(codes, tensor.step_size, tensor.zero_point)
    kernel = kernel.transpose(1, 2, 0, 3).reshape(groups, inner * taps, outer)
    rows = values.reshape(*columns.shape[:-1], groups, inner * taps)
    if groups == 1:
        return rows[..., 0, :] @ kernel[0]
    return jnp.einsum("...gk,gko->...go", rows, kernel).reshape(*columns.shape[:-1], -1)


def _dequantize(model, quantized: Quantized, read: dict[str, _Weight]) -> None:
    """Puts codes and a DequantizeLinear in the place of every weight that is an input."""
    from onnx import helper

    weights = [value for value in model.graph.input if value.name in read]
    bits = {spec.path: spec.weight_bits or 0 for spec in quantized.specs}
    nodes = []
    for value in weights:
        model.graph.input.remove(value)
        layer = jax.tree.map(np.asarray, quantized.layers[value.name])
        made = _weight_nodes(value.name, layer, bits[value.name], read[value.name])
        nodes += made[0]
        model.graph.initializer.extend(made[1])
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([helper.make_node(*args, **kwargs) for args, kwargs in nodes] + rest)


def _weight_nodes(name: str, layer: LayerState, bits: int, weight: _Weight):
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


def _names(tree, default: str) -> list[str]:
    """Names of the leaves of a tree by their paths."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or default for path in paths]


def _no_weighted(op, x):
    raise AssertionError(f"{op.name} was made plain")
