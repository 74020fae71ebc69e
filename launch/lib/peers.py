"""The peers of a deployed network: onnxruntime and OpenVINO, in float32 and in int8.

Both run the network's float ONNX file, and what onnxruntime's static quantization makes of it: 8
bits, QDQ, a scale per output channel. OpenVINO runs the same files.
"""

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import aquant_jax as aq
from aquant_jax.deployment.onnx import to_onnx
from aquant_jax.deployment.onnx_runtimes import ONNXRUNTIME, OPENVINO, RUNTIMES
from aquant_jax.errors import reason

QUANTIZED = ["Conv", "Add", "MaxPool", "Relu", "Clip"]  # jax2onnx's Gemm has a bias without axes
Run = Callable[[], Any]


def installed() -> list[str]:
    """The runtimes that can be imported."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name)]


def runs(model: Any, x: np.ndarray, name: str, label: str) -> tuple[dict[str, Run], dict[str, str]]:
    """A call of one ONNX model on one batch by one runtime, by ``"runtime label"``, or why it
    does not run.

    Args:
        model: an ``onnx.ModelProto`` with one input.
        x: the batch.
        name: of the runtime.
        label: of the model.
    """
    start = {ONNXRUNTIME: _onnxruntime, OPENVINO: _openvino}[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            call = start(path, x)
            call()
        except Exception as error:  # runtimes have exceptions of their own
            return {}, {f"{name} {label}": reason(error)}
    return {f"{name} {label}": call}, {}


def _onnxruntime(path: Path, x: np.ndarray) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def _openvino(path: Path, x: np.ndarray) -> Run:
    openvino = importlib.import_module("openvino")
    model = openvino.Core().read_model(path)
    model.reshape(list(x.shape))
    options = {
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # what is not int8; bfloat16 is another answer
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda: compiled(x)


def float_model(apply: Callable[..., Any], variables: Any, x: np.ndarray) -> Any:
    """The network in float32 as ONNX, its batch norms folded."""
    recipe = aq.recipes.nearest(
        8, 8, batch_size=len(x), overrides=(aq.Override(".*", keep_float=True),)
    )
    return to_onnx(aq.quantize(apply, variables, x, recipe, observer=aq.Observer()))


def int8_model(model: Any, x: np.ndarray) -> Any:
    """What onnxruntime's static quantization makes of a float model.

    Args:
        model: an ``onnx.ModelProto``.
        x: a batch to calibrate on.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([{model.graph.input[0].name: x}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / f"{name}.onnx" for name in "abc")
        onnx.save(model, source)
        quant_pre_process(source, ready)
        quantization.quantize_static(
            ready, target, Reader(), quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED, per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(target)


def jax_runs(apply: Callable[..., Any], variables: Any, x: np.ndarray) -> dict[str, Run]:
    """XLA's own calls of the float network, in float32 and bfloat16."""
    import jax

    run = jax.jit(apply)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), variables)
    given = {
        "xla float32": (variables, jnp.asarray(x)),
        "xla bfloat16": (half, jnp.asarray(x, jnp.bfloat16)),
    }
    return {name: lambda given=given: run(*given) for name, given in given.items()}
