"""The model zoo: ordinary Flax models that know nothing of quantization.

>>> sorted(MODELS)
['digits_cnn', 'resnet20_cifar', 'resnet32_cifar', 'resnet44_cifar', 'resnet56_cifar']
>>> apply, variables = create("digits_cnn", weights=DIGITS_WEIGHTS)
>>> apply(variables, np.zeros((2, 8, 8, 1), np.float32)).shape
(2, 10)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from aquant_jax.errors import InputError
from aquant_jax.models import importers
from aquant_jax.models.digits_cnn import DigitsCNN
from aquant_jax.models.resnet_cifar import ResNetCifar

Apply = Callable[[Any, Any], Any]
Variables = Any

DIGITS_WEIGHTS = Path(__file__).with_name("digits_cnn.safetensors")
EMBEDDED = {"digits_cnn": DIGITS_WEIGHTS}


def _digits_cnn(weights: Path | None, seed: int) -> tuple[Apply, Variables]:
    graphdef, state = nnx.split(DigitsCNN(rngs=nnx.Rngs(seed)))
    variables = nnx.to_pure_dict(state)
    if weights is not None:
        variables = importers.fill(variables, importers.read_safetensors(weights))
    return lambda variables, x: nnx.merge(graphdef, variables)(x), variables


def _resnet_cifar(depth: int, weights: Path | None, seed: int) -> tuple[Apply, Variables]:
    model = ResNetCifar(blocks_per_stage=(depth - 2) // 6)
    init = partial(model.init, jax.random.key(seed))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    if weights is None:
        return model.apply, jax.jit(init)(np.zeros(images.shape, images.dtype))
    variables = importers.fill(
        jax.eval_shape(init, images),
        importers.read_safetensors(weights),
        importers.resnet_cifar_torch_name,
        importers.to_flax_layout,
    )
    return model.apply, variables


MODELS: dict[str, Callable[[Path | None, int], tuple[Apply, Variables]]] = {
    "digits_cnn": _digits_cnn,
    **{f"resnet{depth}_cifar": partial(_resnet_cifar, depth) for depth in (20, 32, 44, 56)},
}


def create(name: str, weights: str | Path | None = None, seed: int = 0) -> tuple[Apply, Variables]:
    """Builds a model of the zoo.

    Args:
        name: a key of ``MODELS``.
        weights: a safetensors file; None initialises at random.
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
