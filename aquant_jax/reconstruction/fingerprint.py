"""The identity of a call of `quantize`: everything that its result depends on."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.graph.subgraph import extract_subgraph, signature
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan.augmentation import Augment, lowered
from aquant_jax.plan.checks import row_parts
from aquant_jax.plan.description import describe
from aquant_jax.plan.network import Network
from aquant_jax.plan.shared_samples import row_digests
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from aquant_jax.storage.json_file import jsonable


def fingerprint(
    net: Network, calibration: Any, seed: int, compiler: Compiler, augment: Augment | None
) -> dict[str, Any]:
    """Everything that the bits of a quantization depend on, JSON-able; arrays by SHA-256.

    ``network`` covers blocks and equations; ``constants`` are the arrays that it closes over. An
    augmentation is known by its StableHLO.
    """
    everything = signature(net.graph, extract_subgraph(net.graph, (), net.graph.outputs))
    return jsonable(
        {
            "layout": archive.LAYOUT,
            "network": _hash(f"{describe(net)}\n{everything}"),
            "constants": _digest(list(net.graph.constants.values())),
            "weights": _digest(net.variables),
            "calibration": _digest(calibration, by_rows=True),
            "valid_mask": _digest(net.valid_mask),
            "recipe": net.recipe.to_dict(),
            "seed": seed,
            "augment": augment and _hash(lowered(augment, calibration, net.batch)),
            "backend": compiler.backend.name,
            **environment(),
        }
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tree: Any, by_rows: bool = False) -> str:
    """SHA-256 of the paths, dtypes, shapes and bytes of the arrays of a pytree.

    Args:
      tree: of arrays.
      by_rows: takes the bytes as the digests of rows, which several processes compute together.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array: Any = leaf if by_rows else np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        if by_rows and array.ndim:
            array = row_digests(array)
        for part in row_parts(array):
            digest.update(part.tobytes())
    return digest.hexdigest()
