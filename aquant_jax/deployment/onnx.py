"""A quantized network as ONNX: integer weights behind DequantizeLinear, borders as standard ops.

`jax2onnx` converts the network traced with float weights; each of these is then replaced by its
codes and a DequantizeLinear. Activations are rounded by Ceil, as everywhere in this library:
QuantizeLinear would round ties to even.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.deployment import onnx_layers, onnx_primitives
from aquant_jax.deployment.onnx_forms import convertible
from aquant_jax.deployment.onnx_layers import WholeWeights
from aquant_jax.deployment.onnx_nodes import move_transposes, rewrite_nodes
from aquant_jax.deployment.onnx_runtimes import ONNXRUNTIME, OPENVINO, known
from aquant_jax.deployment.onnx_weights import ReadWeight, place_weights
from aquant_jax.deployment.quantized import Quantized, Traced, check_quantized
from aquant_jax.deployment.stablehlo import batches_of
from aquant_jax.errors import InputError, install_command, reason
from aquant_jax.graph.ir import Op
from aquant_jax.graph.subgraph import bind_inputs, extract_subgraph, run
from aquant_jax.graph.trace import trace
from aquant_jax.layers.fake_quant import LayerInput, LayerSpec, LayerState
from aquant_jax.layers.integer import convolve_layer, run_deployed_layer
from aquant_jax.layers.products import multiply_op

OPSET = 23


def to_onnx(quantized: Quantized, inputs: Any = None, runtime: str = ONNXRUNTIME) -> Any:
    """Converts a network.

    A layer multiplies the whole numbers ``code - zero_point``, of its activation as of its weights,
    which a runtime does in int8 where it can; scales follow the product. Sums of whole numbers are
    exact in any order, so a runtime gives the same outputs except at near-ties.

    On a CPU without VNNI, onnxruntime's products of int8 saturate where activations and weights
    both have 8 bits; `load` of `aquant_jax.deployment.onnx_runtimes` selects the ones that do not.

    Args:
      quantized: from `quantize`; a restored network holds StableHLO only.
      inputs: shapes of a batch, as a pytree of arrays or ``jax.ShapeDtypeStruct`` with a leading
        sample axis; those of the calibration set if it is None.
      runtime: "onnxruntime" or "openvino", which runs the model in int8; the other one runs it too,
        but slower.

    Returns:
      An ``onnx.ModelProto``. Its inputs and outputs are named by their paths, or ``input`` and
      ``output``; the number of samples is symbolic where the network can be traced so.

    Raises:
      InputError: jax2onnx is not installed, or cannot convert an operation of the network; the
        runtime is unknown; onnxruntime, which "openvino" needs too, is not installed.
    """
    check_quantized(quantized)
    known(runtime)
    jax2onnx = _imported("jax2onnx")
    if runtime == OPENVINO:
        _imported("onnxruntime")  # for `move_transposes`
    program = quantized.program
    if not isinstance(program, Traced):
        raise InputError("a restored network is StableHLO; the ONNX export needs the model's code")
    quantized = quantized.with_backend(None).on_host()
    onnx_primitives.register()
    shapes = program.inputs if inputs is None else inputs
    problem: Exception | None = None
    for batch in batches_of(shapes, quantized.recipe.reconstruction.batch_size):
        try:
            network = _function(quantized, program, batch, runtime)
            model = _converted(jax2onnx, network)
        except Exception as error:  # of a network that does anything with a size, or of jax2onnx
            problem = problem or error
            continue
        place_weights(model, quantized, network.whole, network.reads)
        rewrite_nodes(model)
        return model if runtime == ONNXRUNTIME else move_transposes(model)
    said = problem and reason(problem)
    raise InputError(f"the network cannot become ONNX: {said}") from problem


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"ONNX needs {package}: {install_command('onnx')}") from error


def _converted(jax2onnx: Any, network: _Function) -> Any:
    """The model of a network.

    jax2onnx loads its plugins in its first conversion. One of them replaces `jnp.cumsum` for good,
    by a function whose axis cannot be given by position.
    """
    cumsum = jnp.cumsum
    try:
        return jax2onnx.to_onnx(
            network.function, network.arguments, opset=OPSET, model_name="aquant",
            input_names=network.names[0], output_names=network.names[1],
        )  # fmt: skip
    finally:
        jnp.cumsum = cumsum


class _Function(NamedTuple):
    """A network as a function that jax2onnx converts.

    Attributes:
      function: of the weights and the leaves of a batch.
      arguments: shapes of its arguments.
      names: of its inputs, and of its outputs.
      whole: weights that are arguments in this form, by path.
      reads: how each other weight is read, by path.
    """

    function: Callable[..., tuple[Any, ...]]
    arguments: list[jax.ShapeDtypeStruct]
    names: tuple[list[str], list[str]]
    whole: dict[str, WholeWeights]
    reads: dict[str, ReadWeight]


def _function(quantized: Quantized, program: Traced, batch: Any, runtime: str) -> _Function:
    whole = _whole_weights(quantized, program, batch, runtime)
    reads: dict[str, ReadWeight] = {}
    weights = {
        path: jax.ShapeDtypeStruct(
            (whole[path] if path in whole else quantized.layers[path]).codes.shape,
            jnp.float32,
        )
        for path in sorted(quantized.layers)  # as the leaves of a dict are
        if quantized.layers[path].codes.dtype in (jnp.uint8, jnp.float32)
    }
    # All calls are inlined: jax2onnx 0.17 knows no call of JAX 0.12.
    apply = _apply_of_weights(quantized, program, whole, reads)
    graph = trace(apply, weights, batch, trainable=False)
    graph = graph._replace(ops=tuple(convertible(op._replace(layer=None)) for op in graph.ops))
    network = extract_subgraph(graph, (), graph.outputs)

    def function(*values: Any) -> tuple[Any, ...]:
        given = dict(zip(weights, values[: len(weights)], strict=True))
        model = dict(zip(graph.inputs, values[len(weights) :], strict=True))
        return run(network, bind_inputs(graph, network, given, model), _no_layer)

    arguments = [*weights.values(), *jax.tree.leaves(batch)]
    outputs = jax.tree.unflatten(graph.tree, range(len(graph.outputs)))
    taken = [*weights, *_names(batch, "input")]
    names = taken, [f"output/{n}" if n in taken else n for n in _names(outputs, "output")]
    return _Function(function, arguments, names, whole, reads)


def _whole_weights(
    quantized: Quantized, program: Traced, batch: Any, runtime: str
) -> dict[str, WholeWeights]:
    """The weights of the layers that the runtime multiplies in int8, by path."""
    found = {}

    def layer(op: Op, spec: LayerSpec, inputs: LayerInput, state: LayerState) -> jax.Array:
        with jax.ensure_compile_time_eval():
            state = jax.tree.map(jnp.asarray, state)
            found[spec.path] = onnx_layers.whole_weights(op, spec, state, runtime)
        return run_deployed_layer(op, spec, inputs, state)

    jax.eval_shape(lambda x: program.run(quantized, x, layer), batch)
    return {path: weights for path, weights in found.items() if weights is not None}


def _apply_of_weights(
    quantized: Quantized,
    program: Traced,
    whole: dict[str, WholeWeights],
    reads: dict[str, ReadWeight],
) -> Callable[[dict[str, Any], Any], Any]:
    """The network as a function of weights as floats and a batch; `reads` gets how it reads those
    that are not `whole`."""

    def apply(weights: dict[str, Any], x: Any) -> Any:
        def layer(op: Op, spec: LayerSpec, inputs: LayerInput, state: LayerState) -> jax.Array:
            if spec.path in whole:
                assert inputs.quantizer is not None
                int8 = onnx_layers.Int8Layer(weights[spec.path], whole[spec.path])
                results = convolve_layer(
                    op, spec, inputs.x, inputs.quantizer, state, convolve=int8.convolve_codes
                )
                assert results.values is not None
                return results.values
            state = state._replace(codes=weights.get(spec.path, state.codes))
            return run_deployed_layer(
                op, spec, inputs, state, read=functools.partial(_read, reads),
                convolve=onnx_layers.convolve_float, multiply=multiply_op,
            )  # fmt: skip

        return program.run(quantized, x, layer)

    return apply


def _read(reads: dict[str, ReadWeight], op: Op, state: LayerState, whole: bool) -> jax.Array:
    """The weight of a layer; notes how its codes are read."""
    reads[op.layer.path] = ReadWeight(op.layer.channel_axes, whole)
    return state.codes


def _names(tree: Any, default: str) -> list[str]:
    """Names of the leaves of a tree by their paths."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") or default for path in paths]


def _no_layer(op: Op, x: Any) -> Any:
    raise AssertionError(f"{op.name} was made plain")
