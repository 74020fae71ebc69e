"""The operands of a traced convolution, in its own layout and in that of `im2col.convolve`."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.graph.ir import Op
from aquant_jax.layers.conv_geometry import ConvGeometry


def conv_operands(
    op: Op, x: Shaped[AnyArray, "..."], weight: Shaped[AnyArray, "..."]
) -> tuple[Shaped[Array, "N *padded C"], Shaped[AnyArray, "taps groups Cg Og"], ConvGeometry]:
    """The operands that `im2col.convolve` takes, given those of a convolution.

    Args:
      op: a convolution.
      x: its activation.
      weight: its weight operand.

    Returns:
      The padded activation, the kernel, and the geometry over the padded input.
    """
    padded, geometry = padded_input(op, x)
    return padded, grouped_kernel(spatial_kernel(op, weight), geometry.groups), geometry


def padded_input(
    op: Op, x: Shaped[AnyArray, "..."]
) -> tuple[Shaped[Array, "N *padded C"], ConvGeometry]:
    """The padded activation of a convolution, and the geometry over it."""
    return pad(op, x), conv_geometry(op, x.shape).without_padding()


def pad(op: Op, x: Shaped[AnyArray, "..."], fill: bool | int = 0) -> Shaped[Array, "N *padded C"]:
    """An array that is laid out as the activation of a convolution, padded with `fill`, which is
    also what the dilation of the activation inserts."""
    return _pad(op, to_images(op, x), op.params["padding"], fill)


def to_images(op: Op, x: Shaped[AnyArray, "..."]) -> Shaped[Array, "N *spatial C"]:
    """An array that is laid out as the activation of a convolution, with its channels last."""
    lhs = op.params["dimension_numbers"].lhs_spec
    return jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))


def inserts(op: Op) -> bool:
    """Whether a convolution inserts zeros between the elements of its activation (a transposed
    convolution), or crops it by negative padding."""
    crops = any(end < 0 for pair in op.params["padding"] for end in pair)
    return crops or any(dilation > 1 for dilation in op.params["lhs_dilation"])


def insert(
    op: Op, images: Shaped[AnyArray, "N *spatial C"], fill: Any = 0
) -> Shaped[Array, "N *inserted C"]:
    """`pad` without the padding: images in which `fill` is inserted, and which are cropped."""
    return _pad(op, images, [(min(lo, 0), min(hi, 0)) for lo, hi in op.params["padding"]], fill)


def _pad(op: Op, images: Any, padding: Any, fill: Any) -> Shaped[Array, "N *padded C"]:
    ends = zip(padding, op.params["lhs_dilation"], strict=True)
    config = [(0, 0, 0), *((lo, hi, dilation - 1) for (lo, hi), dilation in ends), (0, 0, 0)]
    return lax.pad(images, jnp.asarray(fill, images.dtype), config)


def spatial_kernel(op: Op, weight: Shaped[AnyArray, "..."]) -> Shaped[Array, "*kernel Cg O"]:
    """The weight operand of a convolution with its spatial axes first."""
    out_axis, in_axis, *spatial = op.params["dimension_numbers"].rhs_spec
    return jnp.transpose(weight, (*spatial, in_axis, out_axis))


def layer_kernel(op: Op, weight: Shaped[AnyArray, "..."]) -> Shaped[Array, "*kernel Cg O"]:
    """The weight operand of a convolution, see `spatial_kernel`, or of a dense layer without batch
    axes, which is a 1x1 convolution."""
    if op.layer.kind == "conv":
        return spatial_kernel(op, weight)
    weight_axes = op.params["dimension_numbers"][0][1 - op.layer.x_position]
    rows = jnp.transpose(weight, (*weight_axes, *op.layer.channel_axes))
    return rows.reshape(1, 1, math.prod(rows.shape[: len(weight_axes)]), -1)


def grouped_kernel(
    kernel: Shaped[AnyArray, "*kernel Cg O"], groups: int
) -> Shaped[AnyArray, "taps {groups} Cg Og"]:
    """A kernel with its taps on one axis and its output channels split into groups."""
    inner, outer = kernel.shape[-2:]
    return kernel.reshape(-1, inner, groups, outer // groups).transpose(0, 2, 1, 3)


def conv_result(op: Op, y: Shaped[AnyArray, "N *out O"]) -> Shaped[Array, "..."]:
    """A result of `im2col.convolve` in the layout of the op."""
    batch, feature, *spatial = op.params["dimension_numbers"].out_spec
    source = np.argsort((batch, *spatial, feature))
    return jnp.transpose(y, tuple(int(i) for i in source))


def conv_geometry(op: Op, x_shape: tuple[Any, ...]) -> ConvGeometry:
    """The geometry of a convolution whose activation has this shape, over what `insert` gives."""
    numbers, params = op.params["dimension_numbers"], op.params
    sizes = zip(numbers.lhs_spec[2:], params["lhs_dilation"], params["padding"], strict=True)
    return ConvGeometry(
        spatial=tuple(
            (x_shape[axis] - 1) * dilation + 1 + min(lo, 0) + min(hi, 0)
            for axis, dilation, (lo, hi) in sizes
        ),
        kernel=tuple(op.layer.weight_shape[axis] for axis in numbers.rhs_spec[2:]),
        strides=tuple(params["window_strides"]),
        dilation=tuple(params["rhs_dilation"]),
        padding=tuple((max(lo, 0), max(hi, 0)) for lo, hi in params["padding"]),
        groups=params["feature_group_count"],
    )
