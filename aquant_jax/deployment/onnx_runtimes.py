"""The runtimes of ONNX models, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.errors import InputError, install_command, reason
from aquant_jax.plan.network import in_batches

ONNXRUNTIME, OPENVINO = RUNTIMES = "onnxruntime", "openvino"


def known(runtime: str) -> str:
    """The name itself; raises an InputError for an unknown one."""
    if runtime not in RUNTIMES:
        raise InputError(f"runtime is {runtime!r}, not one of {', '.join(RUNTIMES)}")
    return runtime


def load(path: str | Path, runtime: str = ONNXRUNTIME) -> Callable:
    """A function of a batch that runs a file of `to_onnx` on the CPU.

    Args:
      path: of the file.
      runtime: "onnxruntime" or "openvino".

    Returns:
      Takes a pytree of arrays, leaves in the order of the file's inputs and of the dtypes that JAX
      gives them; gives a list of arrays. A number of samples that is fixed in the file is run in
      batches of that size.

    Raises:
      InputError: the runtime is unknown, is not installed or cannot read the file.
    """
    try:
        once, size = (_openvino if known(runtime) == OPENVINO else _onnxruntime)(path)
    except ImportError as error:
        extra = "bench" if runtime == OPENVINO else "onnx"
        raise InputError(f"this needs {runtime}: {install_command(extra)}") from error
    except Exception as error:  # runtimes have exceptions of their own
        raise InputError(f"{path} cannot be read by {runtime}: {reason(error)}") from error
    return lambda batch: in_batches(once, batch, size)


def _onnxruntime(path: str | Path) -> tuple[Callable, Any]:
    """A function of a batch, and its number of samples, or the name of that number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Without VNNI, products of bytes saturate otherwise.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def once(batch: Any) -> Any:
        leaves = _leaves(batch)
        return session.run(None, {i.name: a for i, a in zip(inputs, leaves, strict=True)})

    return once, next(i.shape[0] for i in inputs if i.shape)  # a scalar has no samples


def _openvino(path: str | Path) -> tuple[Callable, Any]:
    """A function of a batch, and its number of samples, or the name of that number."""
    openvino = importlib.import_module("openvino")
    # Without the hint, a CPU with bfloat16 multiplies in it what is not int8.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    size = next(i.partial_shape[0] for i in compiled.inputs if len(i.partial_shape))

    def once(batch: Any) -> Any:
        found = compiled(_leaves(batch))
        return [found[output] for output in compiled.outputs]

    return once, size.get_length() if size.is_static else "samples"


def _leaves(batch: Any) -> list[np.ndarray]:
    """The arrays of a batch, of the dtypes that JAX gives them: int32 for int64, say."""
    return [np.asarray(leaf, jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch)]
