"""The model zoo: ordinary Flax models, independent of quantization.

>>> [name for name in MODELS if name.startswith("res")]
['resnet18', 'resnet50', 'resnet20_cifar', 'resnet32_cifar', 'resnet44_cifar', 'resnet56_cifar']
>>> apply, variables = create("digits_cnn", weights=DIGITS_WEIGHTS)
>>> apply(variables, np.zeros((2, 8, 8, 1), np.float32)).shape
(2, 10)
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from aquant_jax.errors import InputError
from aquant_jax.models import importers, layouts
from aquant_jax.models.digits_cnn import DigitsCNN
from aquant_jax.models.efficientnet_lite import (
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
)
from aquant_jax.models.mnasnet import mnasnet2
from aquant_jax.models.mobilenetv2 import mobilenetv2
from aquant_jax.models.regnet import regnetx_600mf, regnetx_3200mf
from aquant_jax.models.resnet import resnet18, resnet50
from aquant_jax.models.resnet_cifar import resnet_cifar

Apply = Callable[[Any, Any], Any]
Variables = Any

DIGITS_WEIGHTS = Path(__file__).with_name("digits_cnn.safetensors")
EMBEDDED = {"digits_cnn": DIGITS_WEIGHTS}


def _digits_cnn(weights: Path | None, seed: int) -> tuple[Apply, Variables]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: DigitsCNN(rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    variables = _random(shapes, seed) if weights is None else importers.load(shapes, weights)
    return lambda variables, x: nnx.merge(graphdef, variables)(x), variables


def _linen(name: str, weights: Path | None, seed: int) -> tuple[Apply, Variables]:
    apply, shapes = abstract(name)
    if weights is None:
        return apply, _random(shapes, seed)
    return apply, importers.load(shapes, weights, LINEN[name][1])


def abstract(name: str) -> tuple[Apply, Variables]:
    """A model without weights: ``apply`` and the shapes and dtypes of its variables.

    Args:
        name: of a Flax linen network of the zoo: any of `MODELS` but "digits_cnn".
    """
    apply, shapes = _abstract(LINEN[name][0])
    return apply, jax.tree.map(lambda leaf: leaf, shapes)


@functools.cache
def _abstract(make: Callable[[], nn.Module]) -> tuple[Apply, Variables]:
    """Kept, since flax takes a second to trace 50 layers."""
    module = make()
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)  # weights do not depend on the size
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), image)


def _random(shapes: Variables, seed: int) -> Variables:
    """He initialisation in numpy: compiling flax's for 50 layers would take 15 seconds."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind == "kernel":
            deviation = math.sqrt(2 / math.prod(shape.shape[:-1]))
            return rng.normal(0, deviation, shape.shape).astype(shape.dtype)
        return np.full(shape.shape, kind in ("scale", "var"), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


# name -> (the module, the layouts of its public checkpoints)
LINEN: dict[str, tuple[Callable[[], nn.Module], Sequence[layouts.Layout]]] = {
    "resnet18": (resnet18, layouts.RESNET),
    "resnet50": (resnet50, layouts.RESNET),
    "mobilenetv2": (mobilenetv2, layouts.MOBILENETV2),
    "mnasnet2": (mnasnet2, layouts.MNASNET),
    "regnetx_600mf": (regnetx_600mf, layouts.REGNET),
    "regnetx_3200mf": (regnetx_3200mf, layouts.REGNET),
    "efficientnet_lite0": (efficientnet_lite0, layouts.EFFICIENTNET_LITE),
    "efficientnet_lite1": (efficientnet_lite1, layouts.EFFICIENTNET_LITE),
    "efficientnet_lite2": (efficientnet_lite2, layouts.EFFICIENTNET_LITE),
    "resnet20_cifar": (partial(resnet_cifar, 20), layouts.RESNET_CIFAR),
    "resnet32_cifar": (partial(resnet_cifar, 32), layouts.RESNET_CIFAR),
    "resnet44_cifar": (partial(resnet_cifar, 44), layouts.RESNET_CIFAR),
    "resnet56_cifar": (partial(resnet_cifar, 56), layouts.RESNET_CIFAR),
}
MODELS: dict[str, Callable[[Path | None, int], tuple[Apply, Variables]]] = {
    **{name: partial(_linen, name) for name in LINEN},
    "digits_cnn": _digits_cnn,
}


def create(name: str, weights: str | Path | None = None, seed: int = 0) -> tuple[Apply, Variables]:
    """Builds a model of the zoo.

    Args:
        name: of the zoo, such as "resnet18"; `MODELS` has all.
        weights: a safetensors file or a PyTorch checkpoint, in our own layout or a public one
            (BRECQ's and QDrop's releases, torchvision, timm); `DIGITS_WEIGHTS` is the file of
            "digits_cnn" that the package holds. None initialises at random.
        seed: of the random initialisation.

    Returns:
        ``(apply, variables)``: ``apply(variables, images) -> logits [N, classes]`` is pure and
        runs in inference mode; ``variables`` is nested dicts of arrays.

    Raises:
        InputError: unknown name, or weights that do not fit the model.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; there are {', '.join(sorted(MODELS))}")
    return MODELS[name](None if weights is None else Path(weights), seed)
