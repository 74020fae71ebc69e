"""The geometry of a convolution, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops import targets

Padding = str | Sequence[tuple[int, int]]
NO_PADDING = ((0, 0), (0, 0))


def conv_geometry(
    x_shape: Sequence[int],
    kernel: Sequence[int],
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding,
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> ConvGeometry:
    """The geometry of a convolution over an input ``[N, H, W, C]``.

    Args:
      x_shape: shape of the input.
      kernel, strides, dilation: two positive integers each.
      padding: ``SAME``, ``VALID`` or ((low, high), (low, high)). A zero of the padding has a border
        and a code like any other element.
      groups: of the channels; group g has the channels ``[g * C / groups, (g + 1) * C / groups)``.

    Raises:
      ValueError: an argument that does not fit, by name and with both values.

    >>> from gpu_ops import conv_geometry
    >>> conv_geometry((8, 32, 32, 16), (3, 3), strides=(2, 2), padding="SAME").out
    (16, 16)
    """
    shape = tuple(x_shape)
    if len(shape) != 4:
        raise ValueError(f"x has shape {shape}, not four axes [N, H, W, C]")
    named = {"kernel": kernel, "strides": strides, "dilation": dilation}
    sizes = {name: _positive(name, value, 2) for name, value in named.items()}
    geometry = ConvGeometry(shape[1:3], padding=NO_PADDING, groups=groups, **sizes)
    return check_geometry(geometry._replace(padding=_resolve(padding, geometry)), shape)


def check_geometry(geometry: ConvGeometry, x_shape: Sequence[int]) -> ConvGeometry:
    """`geometry` in Python's integers; ValueError unless it is one of an input of this shape.

    Args:
      geometry: over one or two spatial axes.
      x_shape: ``[N, *spatial, C]``.
    """
    shape = tuple(x_shape)
    spatial, channels, groups = shape[1:-1], shape[-1], geometry.groups
    if tuple(geometry.spatial) != spatial or len(spatial) not in (1, 2):
        wanted = f"the geometry one or two spatial axes of sizes {geometry.spatial}"
        raise ValueError(f"x has shape {shape}, {wanted}")
    if not is_integer(groups) or groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}, which does not divide the {channels} channels of x")
    checked = ConvGeometry(
        spatial,
        _positive("kernel", geometry.kernel, len(spatial)),
        _positive("strides", geometry.strides, len(spatial)),
        _positive("dilation", geometry.dilation, len(spatial)),
        _padding(geometry.padding, len(spatial)),
        int(groups),
    )
    if any(span > size for span, size in zip(checked.span, checked.padded, strict=True)):
        raise ValueError(
            f"a window of {checked.span} is larger than the padded input, {checked.padded}"
        )
    return checked


def columns_shape(geometry: ConvGeometry, channels: int, align: int) -> tuple[int, ...]:
    """Shape ``(*out, groups, Kp)`` of one image's columns, where `align` divides Kp, checked."""
    if not is_integer(align) or align < 1:
        raise ValueError(f"align is {align}, not a positive integer")
    row = -(-geometry.taps * channels // geometry.groups // align) * align
    columns = (*geometry.out, geometry.groups, row)
    check_indices((*geometry.padded, channels), columns)
    return columns


def check_indices(padded: Sequence[int], columns: Sequence[int]) -> None:
    """ValueError if an image of these sizes, padded or as columns, has more than int32 counts."""
    for name, sizes in (("a padded image has", padded), ("an image's columns have", columns)):
        if (count := math.prod(int(size) for size in sizes)) > targets.MAX_INDEX:
            raise ValueError(f"{name} {count} elements; at most {targets.MAX_INDEX} fit")


def with_two_axes(geometry: ConvGeometry) -> ConvGeometry:
    """The same convolution, where one over a single spatial axis gets an axis of size 1 before."""
    if len(geometry.kernel) == 2:
        return geometry
    return ConvGeometry(
        (1, *geometry.spatial),
        (1, *geometry.kernel),
        (1, *geometry.strides),
        (1, *geometry.dilation),
        ((0, 0), *geometry.padding),
        geometry.groups,
    )


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _positive(name: str, value: Any, count: int) -> tuple[int, ...]:
    """`value` as `count` positive integers."""
    sizes = tuple(value) if isinstance(value, Iterable) else ()
    if len(sizes) != count or not all(is_integer(size) and size > 0 for size in sizes):
        wanted = "one positive integer" if count == 1 else "two positive integers"
        raise ValueError(f"{name} is {value}, not {wanted}")
    return tuple(map(int, sizes))


def _resolve(padding: Padding, geometry: ConvGeometry) -> Any:
    """Pairs instead of a name."""
    if not isinstance(padding, str):
        return padding
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding is {padding!r}, not 'SAME', 'VALID' or pairs")
    return jax.lax.padtype_to_pads(geometry.spatial, geometry.span, geometry.strides, padding)


def _padding(padding: Any, count: int) -> tuple[tuple[int, int], ...]:
    """`padding` as `count` pairs of non-negative integers."""
    pairs = tuple(padding) if isinstance(padding, Iterable) else ()
    pads = [list(pair) if isinstance(pair, Iterable) else [] for pair in pairs]
    ends = [end for pair in pads for end in pair]
    good = [len(pair) for pair in pads] == [2] * count
    if not good or not all(is_integer(end) and end >= 0 for end in ends):
        wanted = "one pair" if count == 1 else "two pairs"
        raise ValueError(f"padding is {padding}, not {wanted} of non-negative integers")
    return tuple((int(low), int(high)) for low, high in pads)
