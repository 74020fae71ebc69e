"""The layer of a convolution or dot that reads a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aquant_jax.errors import InputError
from aquant_jax.graph.ir import Layer

CONVOLUTION = "conv_general_dilated"


def layer_of(
    primitive: str,
    params: Mapping[str, Any],
    path: str,
    weight: int,
    side: int,
    shapes: Sequence[tuple[int, ...]],
) -> Layer:
    """The layer of a weighted op.

    Args:
      primitive: one of `ir.PRODUCTS`.
      params: of the primitive.
      path: of the weight.
      weight: its value id.
      side: its place among the operands, 0 or 1.
      shapes: of both operands.

    Raises:
      InputError: it is a convolution of an unsupported form.
    """
    shape = tuple(shapes[side])
    if primitive == CONVOLUTION:
        if side == 0:
            raise InputError(f"{path}: the weight is the left operand of a convolution")
        _check_convolution(path, params)
        numbers = params["dimension_numbers"]
        axes = (numbers.rhs_spec[0],), (numbers.out_spec[1],)
        return Layer(path, "conv", weight, shape, *axes, x_position=0)
    axes = _dense_axes(params["dimension_numbers"], side, shapes)
    return Layer(path, "dense", weight, shape, *axes, x_position=1 - side)


def _check_convolution(path: str, params: Mapping[str, Any]) -> None:
    """InputError for a convolution of an unsupported form."""
    if any(d != 1 for d in params["lhs_dilation"]):
        raise InputError(
            f"{path}: transposed convolutions (lhs_dilation {params['lhs_dilation']}, supported "
            "is 1) are not supported; leave them out or use a resize and a convolution"
        )
    if params["batch_group_count"] != 1:
        raise InputError(
            f"{path}: batch_group_count {params['batch_group_count']} is not supported, only 1"
        )
    if any(p < 0 for pair in params["padding"] for p in pair):
        raise InputError(
            f"{path}: negative padding {params['padding']} is not supported; slice the input"
        )


def _dense_axes(
    dimension_numbers: Any, weight_side: int, shapes: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channel axes of the weight of a dot, and the corresponding axes of its output."""
    (contract, batch) = dimension_numbers
    shape, other = shapes[weight_side], shapes[1 - weight_side]
    free = [a for a in range(len(shape)) if a not in contract[weight_side]]
    free = [a for a in free if a not in batch[weight_side]]
    rows = len(other) - len(contract[0]) - len(batch[0])
    start = len(batch[0]) + (rows if weight_side == 1 else 0)
    channel_axes = (*batch[weight_side], *free)
    return tuple(channel_axes), (*range(len(batch[0])), *range(start, start + len(free)))
