"""The custom calls of training: compiled, differentiable, mapped and sharded."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from gpu_ops import partition, targets


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

    @property
    def others(self) -> tuple[str, ...]:
        """Axes of what follows the zero point."""
        return ("d t c", "e o") if self.multiplied else ("d t c",)

    @property
    def result(self) -> str:
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
    """The derivatives of a call with respect to x, step size and what follows the zero point."""

    forward: Call

    def __call__(self, x, keep, step, zero, *others_and_dy):
        results = [_floats(value.shape) for value in (x, step, *others_and_dy[:-1])]
        return tuple(self.forward.target(results, "_vjp")(x, keep, step, zero, *others_and_dy))


def _floats(shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def _compiled(call: Call | _Pullback):
    """`call`, compiled, with a mapped axis folded into N and N sharded where that of x is.

    A derivative sums over N, so it runs one by one over a mapped axis.
    """
    forward = call.forward if isinstance(call, _Pullback) else call
    images = "n h w c"
    mask = images if forward.masked else "z"
    taken, given = (images, mask, "", "", *forward.others), (forward.result,)
    if call is not forward:
        taken, given = (*taken, *given), (images, "", *forward.others)
    sharded = partition.on_images(call, ", ".join(taken), ", ".join(given))

    @custom_vmap
    def run(*operands):
        return sharded(*operands)

    @run.def_vmap
    def _(size, batched, *operands):
        if call is not forward:
            return partition.one_by_one(run, size, batched, operands)
        return partition.folded(run, 2, size, batched, operands)

    return jax.jit(run)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(call: Call, *operands):
    """The result of `call`, with derivatives in all operands but the mask and the zero point."""
    return _compiled(call)(*operands)


def _backward(call: Call, operands, dy):
    dx, dstep, *found = _compiled(_Pullback(call))(*operands, dy)
    return dx, None, dstep, jnp.zeros_like(operands[3]), *found


differentiable.defvjp(
    lambda call, *operands: (differentiable(call, *operands), operands), _backward
)
