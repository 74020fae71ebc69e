"""The networks that `launch.bench.scaling` measures, and `launch.bench.scaling_model` counts."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import aquant_jax as aq
from aquant_jax import models
from launch.lib.block_counts import MakeNetwork, image_network
from launch.lib.shape_networks import Decoder, VisionTransformer, decoder, vision_transformer

# Small transformers, of the same form as the large ones of the cost model.
TRANSFORMERS: dict[str, MakeNetwork] = {
    "small_vit": functools.partial(
        vision_transformer, VisionTransformer(3, 256, 1024, 4, 16, 128, 100)
    ),
    "small_decoder": functools.partial(decoder, Decoder(3, 256, 896, 8, 2, 1024, 128)),
}
NETWORKS = sorted({*models.LINEN, *TRANSFORMERS})


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is quantized; the fields are flags."""

    model: str = "resnet20_cifar"
    preset: str = "qdrop"
    size: int = 32
    samples: int = 64
    batch_size: int = 32
    bits: int = 4
    weights_only: bool = False
    steps: int = 10

    @property
    def recipe(self) -> aq.Recipe:
        """How it is quantized."""
        return aq.recipes.preset(
            self.preset, weight_bits=self.bits, act_bits=None if self.weights_only else self.bits,
            steps=self.steps, batch_size=self.batch_size,
        )  # fmt: skip

    @property
    def network(self) -> MakeNetwork:
        """Its function and shapes, for a number of samples."""
        if self.model in TRANSFORMERS:
            return TRANSFORMERS[self.model]
        return image_network(functools.partial(models.abstract, self.model), self.size)

    def arrays(self) -> tuple[Any, Any, np.ndarray]:
        """Its function, and random variables and calibration samples."""
        apply, shapes, inputs = self.network(self.samples)
        if self.model not in TRANSFORMERS:
            apply, variables = models.create(self.model)
            return apply, variables, _random(inputs)
        return apply, jax.tree.map(_random, shapes), _random(inputs)


def _random(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Tokens, images, or a weight."""
    rng = np.random.default_rng(0)
    if shape.dtype == np.int32:
        return rng.integers(0, 256, shape.shape, np.int32)
    if len(shape.shape) == 1:  # of a normalisation, or a bias
        return np.ones(shape.shape, np.float32)
    deviation = 1.0 if len(shape.shape) == 4 and shape.shape[-1] == 3 else shape.shape[-2] ** -0.5
    return rng.normal(0, deviation, shape.shape).astype(np.float32)
