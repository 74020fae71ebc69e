"""Deployed convolutions with one code an activation, and all that an epilogue can do."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import Codes, Epilogue, Requantization, conv_border_int8, conv_geometry
from tests.support.nets import normal, rng_of

NAMES = {None: (), "constant": ("b0",), "linear": ("b0", "b1"), "quadratic": ("b0", "b1", "b2")}


class DeployedLayer(NamedTuple):
    """A layer; `x` is a dtype, or "codes", as `residual` is; `wanted` are borders and phis."""

    shape: tuple
    kernel: tuple
    outputs: int
    bits: int = 4
    weight_bits: int = 4
    border: str | None = None
    phi: str = "identity"
    x: str = "float32"
    groups: int = 1
    strides: tuple = (1, 1)
    dilation: tuple = (1, 1)
    padding: object = "SAME"
    residual: str | None = None
    wanted: tuple = ()
    values: bool = True
    low: float = -math.inf
    high: float = math.inf

    def run(self, seed=0):
        """`conv_border_int8` of random operands."""
        rng = rng_of(seed)
        x, grid, border = self._activation(rng)
        geometry = conv_geometry(
            self.shape, self.kernel, strides=self.strides, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip
        rounding = Rounding(self.bits, self.border, self.phi, per_channel=self.border is not None)
        epilogue = self._epilogue(rng, (self.shape[0], *geometry.out, self.outputs))
        return conv_border_int8(x, grid, border, self._weights(rng), rounding, geometry, epilogue)

    def _activation(self, rng):
        grid = ActivationQuantizer(jnp.float32(0.21), jnp.float32(2**self.bits // 3))
        border = _border(rng, self.border, self.shape[-1])
        if self.x == "codes":
            return Codes(_codes(rng, self.bits, self.shape), grid), grid, border
        return jnp.asarray(normal(rng, *self.shape)).astype(self.x), grid, border

    def _weights(self, rng):
        shape = (*self.kernel, self.shape[-1] // self.groups, self.outputs)
        zero = rng.integers(0, 2**self.weight_bits, self.outputs)
        scale = rng.uniform(0.01, 0.1, self.outputs)
        codes = np.asarray(_codes(rng, self.weight_bits, shape))
        return QuantizedWeights(codes, np.float32(scale), np.float32(zero), self.weight_bits)

    def _epilogue(self, rng, shape):
        residual = None if self.residual is None else normal(rng, *shape)
        if self.residual == "codes":
            grid = ActivationQuantizer(jnp.float32(0.03), jnp.float32(77))
            residual = Codes(_codes(rng, 8, shape), grid)
        wanted = tuple(
            Requantization(
                ActivationQuantizer(jnp.float32(0.3 + bits), jnp.float32(bits % 3)),
                Rounding(bits, border, phi),
                _border(rng, border, self.outputs),
            )
            for bits, (border, phi) in enumerate(self.wanted, start=2)
        )
        bias = normal(rng, self.outputs) if self.outputs % 3 else None
        return Epilogue(bias, residual, self.low, self.high, self.values, wanted)


def _codes(rng, bits, shape):
    return jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8)


def _border(rng, name, channels):
    return {b: jnp.asarray(0.3 * normal(rng, 1, channels)) for b in NAMES[name]}


NEAREST, LINEAR, QUADRATIC = (None, "identity"), ("linear", "identity"), ("quadratic", "clamp")
LAYERS = {
    # Blocks of 128 pixels by 128 outputs, several of them each way.
    "wide": DeployedLayer((2, 9, 8, 20), (3, 3), 150, border="quadratic", residual="codes",
                          wanted=(NEAREST, QUADRATIC), low=-1.0, high=6.0),
    # Words of 16 bytes, more stages than buffers; blocks of 64 by 64.
    "deep": DeployedLayer((1, 8, 7, 96), (3, 3), 64, 3, 3, "linear", "clamp", residual="values"),
    # Blocks of 64 by 32; the sums of 8-bit codes are corrected, and columns are filled up.
    "stem": DeployedLayer((2, 19, 18, 3), (7, 7), 16, 8, 8, "quadratic", "clamp_ste", "bfloat16",
                          strides=(2, 2), wanted=(LINEAR,), values=False, low=0.0),
    "bytes": DeployedLayer((3, 15, 11, 32), (1, 1), 72, 8, 8, x="codes", residual="codes",
                           strides=(2, 1), wanted=(QUADRATIC, NEAREST, LINEAR)),
    "odd": DeployedLayer((2, 5, 6, 7), (2, 3), 9, 4, 8, "constant", wanted=(NEAREST,)),
    "odd codes": DeployedLayer((2, 5, 6, 7), (3, 2), 10, x="codes", residual="values"),
    "asymmetric": DeployedLayer((2, 9, 10, 12), (3, 2), 33, border="quadratic", phi="clamp",
                                strides=(1, 2), dilation=(2, 3), padding=((0, 3), (2, 1))),
    "line": DeployedLayer((3, 1, 23, 8), (1, 5), 34, 2, 2, "linear", dilation=(1, 2),
                          padding=((0, 0), (4, 0)), wanted=(NEAREST,)),
    "dense": DeployedLayer((70, 1, 1, 50), (1, 1), 66, x="codes", wanted=(NEAREST,), values=False),
    "grouped": DeployedLayer((2, 6, 5, 12), (3, 3), 18, border="quadratic", groups=3,
                             residual="codes", wanted=(QUADRATIC,), high=2.0),
    "depthwise": DeployedLayer((2, 9, 7, 36), (3, 3), 36, 8, 8, "quadratic", "clamp", groups=36,
                               strides=(2, 2), wanted=(LINEAR, NEAREST)),
    "multiplied": DeployedLayer((2, 6, 5, 7), (3, 3), 14, groups=7, x="codes"),
    "nothing": DeployedLayer((0, 6, 5, 8), (3, 3), 16, wanted=(NEAREST,)),
}  # fmt: skip
