"""What learning repairs: the blocks behind a layer undo part of the error that it makes.

A block learns to give the float network's output from the quantized input that it gets. Errors are
measured behind a float network, where nothing repairs them, and so overstate the first layers of a
network that learns. With d blocks behind a layer, of the most that any layer has, its error counts
``LEFT ** (d / most)``.

Where single layers learn (``granularity="layer"``), errors go past them along skip connections,
which are part of no layer, and count in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aquant_jax.allocation.layer_choices import LayerChoices
from aquant_jax.recipe import Recipe

LEFT = 0.4  # of an error in the first block, where all the others learn; docs/results.md

Errors = list[np.ndarray]
Pairs = dict[tuple[int, int], np.ndarray]


def learns_blocks(recipe: Recipe) -> bool:
    """Whether the recipe learns whole blocks, skip connections included."""
    return bool(recipe.reconstruction.steps) and recipe.granularity == "block"


def repaired(
    errors: Errors,
    pairs: Pairs,
    layers: Sequence[LayerChoices],
    blocks: Sequence[Sequence[str]],
) -> tuple[Errors, Pairs]:
    """What the blocks behind a layer leave of its errors, once they have learned.

    Args:
      errors, pairs: as measured, see `solve.Problem`.
      layers: of the errors.
      blocks: weight paths of each block, in the order in which the blocks learn.
    """
    place = {path: i for i, block in enumerate(filter(None, blocks)) for path in block}
    places = np.array([place[layer.path] for layer in layers])
    behind = places.max() - places
    left = LEFT ** (behind / max(behind.max(), 1))
    return (
        [share * error for share, error in zip(left, errors, strict=True)],
        {(i, j): left[i] * error for (i, j), error in pairs.items()},
    )
