"""The augmentation of calibration samples that a caller passes: what it must be, and its call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from aquant_jax.errors import InputError, reason
from aquant_jax.graph.ir import path_names
from aquant_jax.plan.network import Network, batch_shapes

# ``augment(key, batch) -> batch``: random inputs that need no label, such as flips and crops.
Augment = Callable[[Any, Any], Any]


def check_augment(augment: Augment, calibration: Any, batch: int) -> None:
    """Check an augmentation.

    Args:
      augment: traceable by jit.
      calibration: the calibration set.
      batch: the number of samples that it gets at once.

    Raises:
      InputError: it cannot be traced, or changes the structure, a shape or a dtype.
    """
    before = batch_shapes(calibration, batch)
    try:
        after = jax.eval_shape(augment, jax.random.key(0), before)
    except Exception as error:
        raise InputError(
            f"augment fails on {batch} samples: {type(error).__name__}: {reason(error)}"
        ) from error
    if jax.tree.structure(after) != jax.tree.structure(before):
        raise InputError(
            f"augment returns {jax.tree.structure(after)}; the calibration set is "
            f"{jax.tree.structure(before)}"
        )
    leaves = zip(path_names(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for name, given, found in leaves:
        if (given.shape, given.dtype) != (found.shape, found.dtype):
            raise InputError(
                f"augment makes calibration{name and f'/{name}'} {found.dtype}{list(found.shape)} "
                f"of {given.dtype}{list(given.shape)}; it must keep shape and dtype"
            )


def lowered(augment: Augment, calibration: Any, batch: int) -> str:
    """The StableHLO of an augmentation."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(augment).lower(key, batch_shapes(calibration, batch)).as_text()


def on_leaves(
    augment: Augment, calibration: Any, net: Network
) -> Callable[[Any, dict[int, jax.Array]], dict[int, jax.Array]]:
    """An augmentation, checked, as a function of a key and the leaves of a batch by value id.

    Raises:
      InputError: see `check_augment`; the recipe has no stage that uses it.
    """
    if not net.recipe.reconstruction.whole_network_steps:
        raise InputError("augment is given, but finetune_steps is 0: only that stage uses it")
    check_augment(augment, calibration, net.batch)
    structure, ids = jax.tree.structure(calibration), net.graph.inputs

    def run(key: Any, leaves: dict[int, jax.Array]) -> dict[int, jax.Array]:
        batch = augment(key, structure.unflatten([leaves[i] for i in ids]))
        return dict(zip(ids, jax.tree.leaves(batch), strict=True))

    return run
