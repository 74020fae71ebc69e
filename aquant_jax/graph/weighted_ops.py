"""The layer of a convolution or dot that reads a weight, and why other ops have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from aquant_jax.graph.ir import PRODUCTS, RAGGED, Layer, Unquantized

CONVOLUTION = "conv_general_dilated"
SPARSE = ("bcoo_dot_general", "bcsr_dot_general")  # their weights are vectors
_WHY = {
    "while": "the number of its steps is not known",
    "shard_map": "it runs on several devices",
    "pallas_call": "it is a kernel of its own",
    "ffi_call": "it is a custom call",
    "pure_callback": "it calls Python",
    "io_callback": "it calls Python",
    **dict.fromkeys(SPARSE, "its weight is sparse"),
}
_SEEN_THROUGH = {"scan", "cond"}
_OPAQUE = {
    *PRODUCTS,
    "pallas_call",
    "ffi_call",
    "pure_callback",
    *SPARSE,
}


def layer_of(
    primitive: str,
    params: Mapping[str, Any],
    path: str,
    weight: int,
    side: int,
    avals: Sequence[Any],
) -> Layer | Unquantized:
    """The layer of a weighted op, or why it has none.

    Args:
      primitive: one of `ir.PRODUCTS`.
      params: of the primitive.
      path: of the weight.
      weight: its value id.
      side: its place among the operands, 0 or 1.
      avals: shapes and dtypes of both operands; the first size of an activation may be symbolic.
    """
    shapes = [tuple(aval.shape) for aval in avals[:2]]
    shape = shapes[side]
    dtypes = [aval.dtype for aval in avals[:2]]
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        found = " and ".join(dict.fromkeys(map(str, dtypes)))
        return Unquantized(path, primitive, f"it multiplies {found} values")
    if primitive == CONVOLUTION:
        if (reason := _obstacle(params, side)) is not None:
            return Unquantized(path, primitive, reason)
        numbers = params["dimension_numbers"]
        axes = (numbers.rhs_spec[0],), (numbers.out_spec[1],)
        return Layer(path, "conv", weight, shape, *axes, column_axes=(), x_position=0)
    if primitive == RAGGED:
        if (reason := _ragged_obstacle(params, side)) is not None:
            return Unquantized(path, primitive, reason)
        numbers = params["ragged_dot_dimension_numbers"]
        groups = tuple(numbers.rhs_group_dimensions)
        axes = _dense_axes(numbers.dot_dimension_numbers, side, shapes, groups)
        return Layer(path, "experts", weight, shape, *axes, x_position=0)
    axes = _dense_axes(params["dimension_numbers"], side, shapes)
    return Layer(path, "dense", weight, shape, *axes, x_position=1 - side)


def opaque(name: str, inside: frozenset[str]) -> str | None:
    """Why an op, which has weights if it multiplies, is no layer; None for ops of other kinds.

    Args:
      name: its primitive.
      inside: the primitives inside it, at any depth.
    """
    if name in _SEEN_THROUGH and not inside & _WHY.keys():
        return None  # a trace flattens those in which a product has a weight
    multiplies = bool(_OPAQUE & {name, *inside}) and name not in PRODUCTS
    if not multiplies:
        return None
    if name in _WHY:
        return _WHY[name]
    inner = next((held for held in _WHY if held in inside), None)
    return f"it holds a {inner}: {_WHY[inner]}" if inner else "no layer can stand for it"


def _obstacle(params: Mapping[str, Any], side: int) -> str | None:
    """Why no layer can stand for a convolution with its weight on this side; None if one can."""
    if side == 0:
        return "the weight is the left operand of a convolution"
    if params["batch_group_count"] != 1:
        return f"batch_group_count is {params['batch_group_count']}, supported is 1"
    return None


def _ragged_obstacle(params: Mapping[str, Any], side: int) -> str | None:
    """Why no layer can stand for a ragged dot with its weight on this side; None if one can."""
    numbers = params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    if side == 0:
        return "the weight is its left operand"
    if ragged in (*contract[0], *batch[0]) or params["group_offset"] is not None:
        return "its groups are not of rows"
    return None


def _dense_axes(
    dimension_numbers: Any,
    weight_side: int,
    shapes: Sequence[tuple[Any, ...]],
    groups: tuple[int, ...] = (),
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Channel axes of the weight of a dot, the corresponding axes of its output, and the column
    axes of its activation; `groups` are axes of the weight that the output has not."""
    (contract, batch) = dimension_numbers
    shape, other = shapes[weight_side], shapes[1 - weight_side]
    free = [a for a in range(len(shape)) if a not in contract[weight_side]]
    free = [a for a in free if a not in (*batch[weight_side], *groups)]
    rows = len(other) - len(contract[0]) - len(batch[0])
    start = len(batch[0]) + (rows if weight_side == 1 else 0)
    channel_axes = (*batch[weight_side], *groups, *free)
    output_axes = (*range(len(batch[0])), *range(start, start + len(free)))
    return channel_axes, output_axes, (*batch[1 - weight_side], *contract[1 - weight_side])
