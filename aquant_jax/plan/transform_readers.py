"""The layers that read a transformed tensor: which can, and what becomes of their weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.graph.ir import PRODUCTS, Op
from aquant_jax.layers.conv_layout import conv_geometry, grouped_kernel, inserts, layer_kernel


def can_read(op: Op, rank: int) -> bool:
    """Whether an op can read a transformed tensor of this rank.

    A layer sums over the last axis, that of the channels. Any other op reads the tensor itself; of
    a product of activations the last axis may be that of positions.
    """
    if op.layer is None:
        return op.name not in PRODUCTS
    if op.layer.kind == "conv":
        return op.params["dimension_numbers"].lhs_spec[1] == rank - 1
    if op.layer.kind != "dense":
        return False
    contract, batch = op.params["dimension_numbers"]
    return contract[op.layer.x_position] == (rank - 1,) and not batch[0]


def takes_shift(op: Op, shape: tuple[Any, ...]) -> bool:
    """Whether a layer's bias makes up for a shift of its activation, of this shape.

    Padding is zero, shifted or not: its taps add nothing that a bias could make up for.
    """
    return op.layer.kind == "dense" or not (conv_geometry(op, shape).gathers or inserts(op))


def groups(op: Op) -> int:
    """The number of channel groups of a layer; a rotation mixes the channels of one group only."""
    return op.params["feature_group_count"] if op.layer.kind == "conv" else 1


def by_channel(op: Op, weight: Shaped[AnyArray, "..."]) -> Shaped[Array, "taps groups Cg Og"]:
    """The weight operand of a layer in the layout of `im2col.convolve`; a dense layer has one tap
    and one group."""
    return jnp.asarray(grouped_kernel(layer_kernel(op, weight), groups(op)))


def from_channels(op: Op, weights: Shaped[AnyArray, "taps groups Cg Og"]) -> Shaped[Array, "..."]:
    """The weight operand of a layer, given what `by_channel` gives: a permutation's inverse is its
    transpose."""
    shape = jax.ShapeDtypeStruct(op.layer.weight_shape, weights.dtype)
    (operand,) = jax.linear_transpose(functools.partial(by_channel, op), shape)(weights)
    return operand
