"""The custom calls of training: compiled, differentiable, mapped and sharded."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops import arguments, partition, targets
from gpu_ops.geometry import check_geometry, check_indices, with_two_axes

IMAGES = "n h w c"
Operands = tuple[AnyArray, ...]


class TrainingCall(NamedTuple):
    """A call on x, the mask, step size, zero point and coefficients, over two spatial axes.

    Attributes:
      geometry: over the padded input; the groups are those of the kernel.
      rounding: bits and border.
      masked: whether there is a mask; without one, the operand has size 0.
      multiplied: whether the operands end with a kernel that the columns are multiplied with.
    """

    geometry: ConvGeometry
    rounding: Rounding
    masked: bool
    multiplied: bool = False

    images = 2  # x and the mask

    @property
    def others(self) -> str:
        """Axes of the operands after the zero point."""
        return "d t c, e o" if self.multiplied else "d t c"

    @property
    def operands(self) -> str:
        return f"{IMAGES}, {IMAGES if self.masked else 'z'}, , , {self.others}"

    @property
    def results(self) -> str:
        return "n a b y" if self.multiplied else "n a b t c"

    def call(self, results: Any, operands: Operands, suffix: str = "") -> Any:
        """The custom call of this name and suffix, on the operands."""
        name = "border_conv" if self.multiplied else "border_columns"
        attributes = targets.geometry_attributes(self.geometry)
        attributes |= targets.rounding_attributes(self.rounding)
        return targets.call(f"{name}{suffix}", results, **attributes)(*operands)

    def __call__(self, *operands: AnyArray) -> jax.Array:
        x, last = operands[0], operands[-1]
        axes = (self.geometry.taps, x.shape[-1])
        if self.multiplied:
            axes = (last.shape[1] * self.geometry.groups,)
        return self.call(_floats((x.shape[0], *self.geometry.out, *axes)), operands)


class _Pullback(NamedTuple):
    """The derivatives of a call for x, the step size and the operands after the zero point.

    They are sums over N, so no mapped axis is folded into it.
    """

    forward: TrainingCall

    images = 0

    @property
    def operands(self) -> str:
        return f"{self.forward.operands}, {self.forward.results}"

    @property
    def results(self) -> str:
        return f"{IMAGES}, , {self.forward.others}"

    def __call__(self, *operands: AnyArray) -> Operands:
        x, _, step_size, _, *others, _ = operands
        results = [_floats(value.shape) for value in (x, step_size, *others)]
        return tuple(self.forward.call(results, operands, "_vjp"))


def _floats(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def differentiable(call: TrainingCall, *operands: AnyArray) -> jax.Array:
    """The result of `call`, with derivatives in all operands but the mask and the zero point."""
    return cast(jax.Array, _differentiable(call, *operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call: TrainingCall, *operands: AnyArray) -> jax.Array:
    return partition.compiled(call)(*operands)


def _forward(call: TrainingCall, *operands: AnyArray) -> tuple[jax.Array, Operands]:
    return differentiable(call, *operands), operands


def _backward(call: TrainingCall, operands: Operands, dy: jax.Array) -> tuple[Any, ...]:
    dx, dstep, *others = partition.compiled(_Pullback(call))(*operands, dy)
    return dx, None, dstep, jnp.zeros_like(operands[3]), *others


_differentiable.defvjp(_forward, _backward)


def prepare(
    x: AnyArray,
    keep: AnyArray | None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    geometry: ConvGeometry,
    rounding: Rounding,
) -> tuple[TrainingCall, Operands]:
    """The call of `gpu_ops.border_columns` and its operands, checked and with two spatial axes."""
    _check_rounding(rounding)
    _check_images(x, keep)
    geometry = check_geometry(geometry, x.shape)
    if any(end for pair in geometry.padding for end in pair):
        raise ValueError(f"padding is {geometry.padding}, not zero; x must be padded already")
    step_size, zero_point = arguments.check_quantizer(quantizer, rounding.bits)
    column = (geometry.taps, x.shape[-1])
    check_indices(x.shape[1:], (*geometry.out, *column))
    stacked = arguments.stack_coefficients(coefficients, rounding.border, column)
    geometry = with_two_axes(geometry)
    images = x.reshape(x.shape[0], *geometry.spatial, x.shape[-1])
    mask = jnp.zeros((0,), bool) if keep is None else keep.reshape(images.shape)
    call = TrainingCall(geometry._replace(groups=1), rounding, keep is not None)
    return call, (images, mask, step_size, zero_point, stacked)


def _check_rounding(rounding: Rounding) -> None:
    if rounding.border not in targets.COEFFICIENTS:
        known = list(targets.COEFFICIENTS)
        raise ValueError(f"border {rounding.border!r} has no custom call; {known} do")
    if rounding.phi not in targets.PHIS:
        raise ValueError(f"phi {rounding.phi!r} has no custom call; {list(targets.PHIS)} do")


def _check_images(x: AnyArray, keep: AnyArray | None) -> None:
    if x.dtype != jnp.float32:
        raise ValueError(f"x is {x.dtype}, not float32")
    if keep is not None and (keep.shape != x.shape or keep.dtype != jnp.bool_):
        raise ValueError(f"keep is {keep.dtype} {keep.shape}, not bool {x.shape}")
