"""The custom calls of training: compiled, differentiable, mapped and sharded."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpu_ops import partition, targets

IMAGES = "n h w c"


class Geometry(NamedTuple):
    """What is static about a call, in two spatial axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]
    bits: int
    fused: bool
    phi: int
    groups: int = 1

    def attributes(self) -> dict:
        return {
            "kernel": self.kernel, "stride": self.strides, "dilation": self.dilation,
            "padding": (0, 0, 0, 0), "groups": self.groups, "bits": self.bits, "fused": self.fused,
            "phi": self.phi,
        }  # fmt: skip


class Call(NamedTuple):
    """A call of the training operation: x, the mask, step size, zero point and coefficients.

    Attributes:
      geometry: static part.
      masked: whether there is a mask; none is of size 0.
      multiplied: whether a kernel follows, which the columns are multiplied with.
    """

    geometry: Geometry
    masked: bool
    multiplied: bool

    images = 2  # x and the mask

    @property
    def others(self) -> str:
        """Axes of what follows the zero point."""
        return "d t c, e o" if self.multiplied else "d t c"

    @property
    def operands(self) -> str:
        return f"{IMAGES}, {IMAGES if self.masked else 'z'}, , , {self.others}"

    @property
    def results(self) -> str:
        return "n a b y" if self.multiplied else "n a b t c"

    def target(self, results, suffix: str = ""):
        name = "border_conv" if self.multiplied else "border_columns"
        return targets.call(f"{name}{suffix}", results, **self.geometry.attributes())

    def __call__(self, x, *operands):
        coefficients, last = operands[3], operands[-1]
        groups = self.geometry.groups
        axes = (
            (last.shape[1] * groups,) if self.multiplied else (coefficients.shape[1], x.shape[-1])
        )
        return self.target(_floats((x.shape[0], *self.geometry.out, *axes)))(x, *operands)


class _Pullback(NamedTuple):
    """The derivatives of a call with respect to x, step size and what follows the zero point.

    They sum over N, so no mapped axis is folded into it.
    """

    forward: Call

    images = 0

    @property
    def operands(self) -> str:
        return f"{self.forward.operands}, {self.forward.results}"

    @property
    def results(self) -> str:
        return f"{IMAGES}, , {self.forward.others}"

    def __call__(self, x, keep, step, zero, *others_and_dy):
        results = [_floats(value.shape) for value in (x, step, *others_and_dy[:-1])]
        return tuple(self.forward.target(results, "_vjp")(x, keep, step, zero, *others_and_dy))


def _floats(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(call: Call, *operands):
    """The result of `call`, with derivatives in all operands but the mask and the zero point."""
    return partition.compiled(call)(*operands)


def _backward(call: Call, operands, dy):
    dx, dstep, *found = partition.compiled(_Pullback(call))(*operands, dy)
    return dx, None, dstep, jnp.zeros_like(operands[3]), *found


differentiable.defvjp(
    lambda call, *operands: (differentiable(call, *operands), operands), _backward
)
