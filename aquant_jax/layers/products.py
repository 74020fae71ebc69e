"""The op of a layer on a new activation and weight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Inexact

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.graph.ir import Op
from aquant_jax.layers.column import contract
from aquant_jax.layers.conv_layout import conv_operands, conv_result


def multiply(
    op: Op, value: Inexact[AnyArray, "..."], weight: Inexact[AnyArray, "..."]
) -> Inexact[Array, "..."]:
    """`multiply_op`, or the same sum where XLA runs that faster."""
    return (_grouped_convolution if _is_slow(op) else multiply_op)(op, value, weight)


def multiply_op(
    op: Op, value: Inexact[AnyArray, "..."], weight: Inexact[AnyArray, "..."]
) -> Inexact[Array, "..."]:
    """The op itself on a new activation and weight, in the dtypes that it was traced with."""
    operands = [value, weight] if op.layer.x_position == 0 else [weight, value]
    dtypes = op.params["operand_dtypes"]
    (y,) = op.call(*(a.astype(d) for a, d in zip(operands, dtypes, strict=True)))
    return y


def _is_slow(op: Op) -> bool:
    """Whether XLA runs the op slowly: on CPU, grouped convolutions take 5 to 40 times as long as
    a sum over their taps."""
    grouped = op.layer.kind == "conv" and op.params["feature_group_count"] > 1
    floats = all(dtype == jnp.float32 for dtype in op.params["operand_dtypes"])
    return grouped and floats and jax.default_backend() == "cpu"


def _grouped_convolution(
    op: Op, value: Float[AnyArray, "..."], weight: Float[AnyArray, "..."]
) -> Float32[Array, "..."]:
    """A grouped convolution as the sum over its taps."""
    padded, kernel, geometry = conv_operands(op, value.astype(jnp.float32), weight)
    taps = zip(geometry.tap_rows(geometry.flatten(padded)), kernel, strict=True)
    products = [contract(rows, tap_weight) for rows, tap_weight in taps]
    rows = functools.reduce(jnp.add, products)
    return conv_result(op, geometry.crop(rows, padded.shape[0]))
