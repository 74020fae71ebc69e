"""Read public weights (safetensors) into the variables trees of this zoo.

Every importer checks the names and shapes in both directions, so a checkpoint of another
architecture is an error and never a half-filled model.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from aquant_jax.errors import InputError

# Where each flax axis sits in PyTorch's layout: OIHW -> HWIO and [out, in] -> [in, out].
_TORCH_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
_TORCH_LEAF = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Args:
        path: the file.

    Returns:
        Arrays by name.

    Raises:
        InputError: the file is missing or is no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read weights from {path}: {error}") from error


def flat_name(path: tuple[str, ...]) -> str:
    """Names a leaf of our own checkpoints: ``("stem", "kernel") -> "stem.kernel"``."""
    return ".".join(path)


def resnet_cifar_torch_name(path: tuple[str, ...]) -> str:
    """Names a leaf of ``ResNetCifar`` as in the public PyTorch ResNet-20.

    ``("params", "layer1_0", "conv1", "kernel") -> "layer1.0.conv1.weight"``.
    """
    collection, *modules, leaf = path
    modules = [module.replace("_", ".") for module in modules]
    return ".".join([*modules, _TORCH_LEAF[collection, leaf]])


def to_flax_layout(array: np.ndarray) -> np.ndarray:
    """Transposes a PyTorch conv [O, I, H, W] or dense [O, I] weight; others pass through."""
    return array.transpose(_TORCH_AXES[array.ndim]) if array.ndim in _TORCH_AXES else array


def fill(
    variables: Any,
    state_dict: Mapping[str, np.ndarray],
    name_of: Callable[[tuple[str, ...]], str] = flat_name,
    to_layout: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Any:
    """Replaces every leaf of ``variables`` by the array of its name.

    Args:
        variables: nested dicts of arrays or ``jax.ShapeDtypeStruct``, giving the shapes.
        state_dict: arrays by name.
        name_of: leaf path -> name in ``state_dict``.
        to_layout: from the layout of ``state_dict`` to that of ``variables``.

    Returns:
        The tree of ``variables`` with arrays of its shapes and dtypes.

    Raises:
        InputError: a name is missing or left over, or a shape differs.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(variables)
    names = [name_of(tuple(str(key.key) for key in path)) for path, _ in leaves]
    missing = [name for name in names if name not in state_dict]
    extra = sorted(set(state_dict) - set(names))
    if missing or extra:
        shapes = {name: tuple(leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)}
        raise InputError(_names_message(missing, extra, shapes, state_dict))
    arrays = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        array = to_layout(state_dict[name])
        if array.shape != leaf.shape:
            raise InputError(
                f"weight {name!r} has shape {array.shape} (in the model's layout), "
                f"but the model needs {tuple(leaf.shape)}"
            )
        arrays.append(np.ascontiguousarray(array, dtype=leaf.dtype))
    return jax.tree_util.tree_unflatten(treedef, arrays)


def save(path: str | Path, variables: Any) -> None:
    """Writes nested dicts of arrays under their flat names; ``fill`` reads them back."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    save_file(
        {
            flat_name(tuple(str(key.key) for key in keys)): np.ascontiguousarray(leaf)
            for keys, leaf in leaves
        },
        path,
    )
    # safetensors makes files that only their owner reads; a checkpoint is to be shared.
    Path(path).chmod(0o644)


def _names_message(missing, extra, shapes, state_dict) -> str:
    parts = []
    if missing:
        wanted = ", ".join(f"{name!r} {shapes[name]}" for name in missing[:3])
        parts.append(f"lack {len(missing)} of the model's arrays, such as {wanted}")
    if extra:
        found = ", ".join(f"{name!r} {state_dict[name].shape}" for name in extra[:3])
        parts.append(f"hold {len(extra)} the model has no place for, such as {found}")
    return "the weights " + " and ".join(parts)
