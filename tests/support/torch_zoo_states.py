"""State dicts of the zoo's networks as PyTorch would save them, made without PyTorch."""

import jax
import numpy as np

from aquant_jax import models
from aquant_jax.models import importers

# Axes of ours that make PyTorch's: HWIO -> OIHW, [in, out] -> [out, in].
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def shapes(name, layout=0):
    """Shape of every array of a checkpoint of the model, in one of its layouts."""
    _, variables = models.abstract(name)
    paths = importers.leaf_paths(variables)
    names = models.LINEN[name][1][layout].names(paths)
    leaves = zip(paths, jax.tree.leaves(variables), strict=True)
    return {
        names[path]: tuple(leaf.shape[axis] for axis in _AXES[leaf.ndim]) for path, leaf in leaves
    }


def state_dict(name, variables, layout=0):
    """The checkpoint of `variables`."""
    paths = importers.leaf_paths(variables)
    names = models.LINEN[name][1][layout].names(paths)
    leaves = zip(paths, jax.tree.leaves(variables), strict=True)
    return {
        names[path]: np.ascontiguousarray(np.asarray(leaf).transpose(_AXES[leaf.ndim]))
        for path, leaf in leaves
    }
