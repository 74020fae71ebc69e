"""Read checkpoint files into arrays by name. Nothing in a file is ever executed."""

import importlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from aquant_jax.errors import InputError, install_command

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin")
_WRAPPERS = ("state_dict", "model")
_DATA_PARALLEL = "module."
_BUFFERS = ("num_batches_tracked", "position_ids")
_REFUSED = re.compile(r"GLOBAL (\S+)")


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a checkpoint.

    An enclosing ``state_dict`` or ``model`` entry and the prefix ``module.`` of all names are
    removed; the batch counters of batch norm and BERT's table of positions are dropped.

    Args:
        path: a PyTorch checkpoint, by its suffix (``.pth``, ``.pth.tar``, ``.pt``, ``.bin``);
            otherwise a safetensors file, which needs no PyTorch.

    Returns:
        Floating-point arrays by name, in the file's layout.

    Raises:
        InputError: a missing file, an unknown format, a truncated file, a pickle that would run
            code, PyTorch missing, or an entry that is not a floating-point array.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"cannot read weights from {path}: there is no such file")
    arrays = _read_torch(path) if path.suffix in TORCH_SUFFIXES else _read_safetensors(path)
    arrays = {name: a for name, a in arrays.items() if name.rpartition(".")[2] not in _BUFFERS}
    if arrays and all(name.startswith(_DATA_PARALLEL) for name in arrays):
        arrays = {name.removeprefix(_DATA_PARALLEL): array for name, array in arrays.items()}
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{path}: {name!r} is of {array.dtype}; weights are floating-point")
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (AttributeError, KeyError, TypeError) as error:  # of a dtype that numpy does not have
        raise InputError(f"{path} holds arrays that numpy cannot hold: {error}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot read weights from {path} as safetensors: {error} "
            f"(PyTorch checkpoints end in {', '.join(TORCH_SUFFIXES)})"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            f"{path} is a PyTorch checkpoint and PyTorch is not installed: "
            f"{install_command('torch')}, or convert the file where it is (launch.convert)"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise InputError(_torch_message(path, error)) from error
    content = _unwrap(content)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, and no state dict")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path} holds no state dict: {name!r} is a {type(value).__name__}, not a tensor"
            )
    return {
        str(name): _to_numpy(torch, f"{path}: {name}", value) for name, value in content.items()
    }


def _unwrap(content: Any) -> Any:
    while isinstance(content, Mapping):
        inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping))
        unwrapped = next(inner, None)
        if unwrapped is None:
            break
        content = unwrapped
    return content


def _to_numpy(torch: Any, name: str, tensor: Any) -> np.ndarray:
    # numpy has no bfloat16.
    tensor = tensor.detach()
    try:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (TypeError, RuntimeError) as error:
        kind = f"{tensor.dtype}, {tensor.layout}"
        raise InputError(f"{name} is a tensor of {kind}, which numpy cannot read") from error


def _torch_message(path: Path, error: Exception) -> str:
    refused = _REFUSED.search(str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"{path} is refused: it is a pickle that wants to run {refused[1]}, and only plain "
            "tensors are read (save model.state_dict() alone)"
        )
    # PyTorch's message continues with the advice to read the file unsafely.
    reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    kind = type(error).__name__
    return f"cannot read weights from {path} as a PyTorch checkpoint: {kind}: {reason}"
