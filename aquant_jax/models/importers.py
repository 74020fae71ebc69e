"""Fill the variables trees of this zoo from public weights, and write our own checkpoints.

Every import checks the names and shapes in both directions, so a checkpoint of another
architecture is an error and never a half-filled model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors

from aquant_jax.errors import InputError
from aquant_jax.models.layouts import Layout
from aquant_jax.models.reading import read

# Where each flax axis sits in PyTorch's layout: OIHW -> HWIO and [out, in] -> [in, out].
_TORCH_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}


def flat_name(path: tuple[str, ...]) -> str:
    """Names a leaf of our own checkpoints: ``("stem", "kernel") -> "stem.kernel"``."""
    return ".".join(path)


def leaf_paths(variables: Any) -> list[tuple[str, ...]]:
    """The path of every leaf of nested dicts, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    return [tuple(str(key.key) for key in path) for path, _ in leaves]


def to_flax_layout(array: np.ndarray) -> np.ndarray:
    """Transposes a PyTorch conv [O, I, H, W] or dense [O, I] weight; others pass through."""
    return array.transpose(_TORCH_AXES[array.ndim]) if array.ndim in _TORCH_AXES else array


def load(variables: Any, path: str | Path, layouts: Sequence[Layout] = ()) -> Any:
    """Fills a model from a checkpoint, whose layout is recognised by its names.

    Args:
        variables: nested dicts of arrays or ``jax.ShapeDtypeStruct``, giving the shapes.
        path: see `reading.read`.
        layouts: the public layouts of the model; our own is always known.

    Returns:
        The tree of ``variables`` with the checkpoint's arrays.

    Raises:
        InputError: see `reading.read` and `fill`, or none of the layouts.
    """
    state_dict, paths = read(path), leaf_paths(variables)
    known = {"our own": {p: flat_name(p) for p in paths}}
    known.update({layout.source: layout.names(paths) for layout in layouts})
    overlap = {source: len(state_dict.keys() & names.values()) for source, names in known.items()}
    source = max(overlap, key=lambda key: overlap[key])
    if not overlap[source]:
        raise InputError(
            f"{path} holds {', '.join(map(repr, list(state_dict)[:3])) or 'no arrays'}: "
            f"none is a name of this model in any layout ({'; '.join(known)})"
        )
    to_layout = np.asarray if source == "our own" else to_flax_layout
    try:
        return fill(variables, state_dict, known[source].__getitem__, to_layout)
    except InputError as error:
        raise InputError(f"{path}, in the layout of {source}: {error}") from error


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
    leaves, treedef = jax.tree.flatten(variables)
    names = [name_of(path) for path in leaf_paths(variables)]
    wanted = {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
    missing = [name for name in names if name not in state_dict]
    extra = sorted(set(state_dict) - set(names))
    if missing or extra:
        raise InputError(_names_message(missing, extra, wanted, state_dict))
    arrays = {name: to_layout(state_dict[name]) for name in names}
    wrong = [name for name in names if arrays[name].shape != wanted[name]]
    if wrong:
        raise InputError(_shapes_message(wrong, arrays, wanted))
    filled = [
        np.ascontiguousarray(arrays[name], dtype=leaf.dtype)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(treedef, filled)


def save(path: str | Path, variables: Any) -> None:
    """Writes nested dicts of arrays under their flat names, all or nothing; `load` reads them.

    Raises:
        InputError: the file cannot be written.
    """
    write(path, serialize(variables))


def serialize(variables: Any) -> bytes:
    """The content of our own checkpoint of `variables`; equal for equal arrays."""
    leaves = zip(leaf_paths(variables), jax.tree.leaves(variables), strict=True)
    return safetensors.save({flat_name(p): np.ascontiguousarray(leaf) for p, leaf in leaves})


def write(path: str | Path, content: bytes) -> None:
    """Writes a file, replacing an old one only when the new one is complete.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} cannot be written: it is a folder or a device")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _names_message(
    missing: Sequence[str],
    extra: Sequence[str],
    wanted: Mapping[str, tuple[int, ...]],
    state_dict: Mapping[str, np.ndarray],
) -> str:
    parts = []
    if missing:
        lacking = ", ".join(f"{name!r} {wanted[name]}" for name in missing[:3])
        parts.append(f"lack {len(missing)} of the model's arrays, such as {lacking}")
    if extra:
        shapes = ", ".join(f"{name!r} {state_dict[name].shape}" for name in extra[:3])
        parts.append(f"hold {len(extra)} the model has no place for, such as {shapes}")
    return "the weights " + " and ".join(parts)


def _shapes_message(
    wrong: Sequence[str],
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
) -> str:
    # Where the classes differ, the head's kernel explains the error better than its bias.
    heads = [n for n in wrong if arrays[n].ndim == 2 and arrays[n].shape[:1] == wanted[n][:1]]
    name = (heads or wrong)[0]
    actual, needed = arrays[name].shape, wanted[name]
    classes = f": {actual[1]} classes, and the model has {needed[1]}" if heads else ""
    return (
        f"weight {name!r} has shape {actual} (in the model's layout), "
        f"but the model needs {needed}{classes}"
    )
