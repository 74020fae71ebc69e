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

from aquant_jax.arithmetic.uniform import ActivationQuantizer, dequantize, quantize, to_units
from aquant_jax.deployment.onnx_nodes import rewrite_nodes
from aquant_jax.deployment.onnx_weights import ReadWeight, dequantize_inputs
from aquant_jax.deployment.quantized import Quantized, Traced
from aquant_jax.deployment.stablehlo import batches_of, in_batches
from aquant_jax.errors import InputError, reason
from aquant_jax.graph.ir import PAD_WITH_VALUE, Op
from aquant_jax.graph.subgraph import bind_inputs, extract_subgraph, run
from aquant_jax.graph.trace import trace
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.fake_quant import LayerState
from aquant_jax.layers.integer import run_deployed_layer

OPSET = 23


def to_onnx(quantized: Quantized, inputs: Any = None) -> Any:
    """Converts a network.

    Weights that meet quantized activations are dequantized to the whole numbers
    ``codes - zero_point``; scales follow the product, as in `integer.run_deployed_layer`, whose
    sums are exact in any order. A runtime gives the same outputs except at near-ties.

    Args:
      quantized: from `quantize`; a restored network holds StableHLO only.
      inputs: see `checkpoint.save`.

    Returns:
      An ``onnx.ModelProto``. Its inputs and outputs are named by their paths, or ``input`` and
      ``output``; the number of samples is symbolic where the network can be traced so.

    Raises:
      InputError: jax2onnx is not installed, or cannot convert an operation of the network.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise InputError("ONNX needs jax2onnx: pip install 'aquant-jax[onnx]'") from error
    program = quantized.program
    if not isinstance(program, Traced):
        raise InputError("a restored network is StableHLO; the ONNX export needs the model's code")
    shapes = program.inputs if inputs is None else inputs
    problem: Exception | None = None
    for batch in batches_of(shapes, quantized.recipe.reconstruction.batch_size):
        try:
            network = _function(quantized, program, batch)
            model = jax2onnx.to_onnx(
                network.function, network.arguments, opset=OPSET, model_name="aquant",
                input_names=network.names[0], output_names=network.names[1],
            )  # fmt: skip
        except Exception as error:  # of a network that does anything with a size, or of jax2onnx
            problem = problem or error
            continue
        dequantize_inputs(model, quantized, network.reads)
        rewrite_nodes(model)
        return model
    said = problem and reason(problem)
    raise InputError(f"the network cannot become ONNX: {said}") from problem


def load(path: str | Path) -> Callable:
    """A function of a batch that runs a file of `to_onnx` with onnxruntime, on the CPU.

    Args:
      path: of the file.

    Returns:
      Takes a pytree of arrays, leaves in the order of the file's inputs; gives a list of arrays.
      A number of samples that is fixed in the file is run in batches of that size.

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
        raise InputError(f"{path} cannot be read by onnxruntime: {error}") from error
    inputs = session.get_inputs()

    def once(batch: Any) -> Any:
        leaves = map(np.asarray, jax.tree.leaves(batch))
        return session.run(None, {i.name: a for i, a in zip(inputs, leaves, strict=True)})

    return lambda batch: in_batches(once, batch, inputs[0].shape[0])


class _Function(NamedTuple):
    """A network as a function that jax2onnx converts.

    Attributes:
      function: of the weights and the leaves of a batch.
      arguments: shapes of its arguments.
      names: of its inputs, and of its outputs.
      reads: how each weight is dequantized, by path.
    """

    function: Callable[..., tuple[Any, ...]]
    arguments: list[jax.ShapeDtypeStruct]
    names: tuple[list[str], list[str]]
    reads: dict[str, ReadWeight]


def _function(quantized: Quantized, program: Traced, batch: Any) -> _Function:
    reads: dict[str, ReadWeight] = {}
    weights = {
        path: jax.ShapeDtypeStruct(quantized.layers[path].codes.shape, jnp.float32)
        for path in sorted(quantized.layers)  # as the leaves of a dict are
        if quantized.layers[path].codes.dtype in (jnp.uint8, jnp.float32)
    }
    # All calls are inlined: jax2onnx 0.17 knows no call of JAX 0.12.
    apply = _apply_of_weights(quantized, program, reads)
    graph = trace(apply, weights, batch, custom_gradients=False)
    graph = graph._replace(ops=tuple(map(_plain, graph.ops)))
    network = extract_subgraph(graph, (), graph.outputs)

    def function(*values: Any) -> tuple[Any, ...]:
        given = dict(zip(weights, values[: len(weights)], strict=True))
        model = dict(zip(graph.inputs, values[len(weights) :], strict=True))
        return run(network, bind_inputs(graph, network, given, model), _no_layer)

    arguments = [*weights.values(), *jax.tree.leaves(batch)]
    outputs = jax.tree.unflatten(graph.tree, range(len(graph.outputs)))
    names = [*weights, *_names(batch, "input")], _names(outputs, "output")
    return _Function(function, arguments, names, reads)


def _apply_of_weights(
    quantized: Quantized, program: Traced, reads: dict[str, ReadWeight]
) -> Callable[[dict[str, Any], Any], Any]:
    """The network as a function of float weights and a batch; `reads` gets how it reads them."""
    layers, activations, constants = jax.tree.map(
        np.asarray, (quantized.layers, quantized.activations, quantized.constants)
    )
    layer = functools.partial(
        run_deployed_layer,
        real=functools.partial(_read, reads, False),
        integer=functools.partial(_read, reads, True),
        convolve=_convolve,
    )

    def apply(weights: dict[str, Any], x: Any) -> Any:
        given = {
            path: state._replace(codes=weights.get(path, state.codes))
            for path, state in layers.items()
        }
        network = dataclasses.replace(
            quantized, layers=given, activations=activations, constants=constants, backend=None
        )
        return program.run(network, x, layer)

    return apply


def _read(reads: dict[str, ReadWeight], integer: bool, op: Op, state: LayerState) -> jax.Array:
    """The weight of a layer; notes how its codes are dequantized."""
    scale = np.asarray(state.scale)
    weight = ReadWeight(op.layer.channel_axes, scale**0 if integer else scale)
    reads[op.layer.path] = weight
    return state.codes


def _plain(op: Op) -> Op:
    """The op as any other one; padding beside an axis of symbolic size, which jax2onnx does not
    know, as a concatenation."""
    padding = op.name in ("pad", PAD_WITH_VALUE)
    return op._replace(layer=None, call=functools.partial(_pad, op) if padding else op.call)


def _pad(op: Op, x: jax.Array, value: jax.Array) -> list[jax.Array]:
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
    x: jax.Array,
    keep: None,
    quantizer: ActivationQuantizer,
    coefficients: dict[str, jax.Array],
    kernel: jax.Array,
    geometry: ConvGeometry,
    rounding: Rounding,
) -> jax.Array:
    """`im2col.convolve` over columns that a convolution with one-hot kernels writes."""
    taps, groups, inner, outer = kernel.shape
    spatial = "".join(chr(ord("0") + axis) for axis in range(len(geometry.kernel)))
    columns = lax.conv_general_dilated_patches(
        x, geometry.kernel, geometry.strides, "VALID", rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )  # fmt: skip
    units = to_units(columns, 1.0 / quantizer.step_size)
    if rounding.shared_across_taps:
        each = units.reshape(*units.shape[:-1], -1, taps)
        shared = rounding.polynomials(coefficients, [each[..., tap] for tap in range(taps)])
        (bound,) = rounding.borders(shared, 1)
        bound = jnp.repeat(bound, taps, -1)
    else:  # every element of a column is a channel with one tap
        flat = {name: own.T.reshape(1, -1) for name, own in coefficients.items()}
        (bound,) = rounding.borders(rounding.polynomials(flat, [units]), 1)
    codes = quantize(units, quantizer.zero_point, rounding.bits, bound)
    values = dequantize(codes, quantizer.step_size, quantizer.zero_point)
    kernel = kernel.transpose(1, 2, 0, 3).reshape(groups, inner * taps, outer)
    rows = values.reshape(*columns.shape[:-1], groups, inner * taps)
    if groups == 1:
        return rows[..., 0, :] @ kernel[0]
    return jnp.einsum("...gk,gko->...go", rows, kernel).reshape(*columns.shape[:-1], -1)


def _names(tree: Any, default: str) -> list[str]:
    """Names of the leaves of a tree by their paths."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or default for path in paths]


def _no_layer(op: Op, x: Any) -> Any:
    raise AssertionError(f"{op.name} was made plain")
