"""Ops in the forms that jax2onnx converts and runtimes run.

jax2onnx pads the ends of axes whose sizes it knows. onnxruntime selects no booleans, so logic does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.graph.ir import PAD_WITH_VALUE, Op

PaddingConfig = Sequence[tuple[int, int, int]]  # low, high and interior of every axis


def convertible(op: Op) -> Op:
    """The op, which has no layer, in such a form."""
    if op.name == "select_n":
        return op._replace(call=functools.partial(_select, op.call))
    if op.name in ("pad", PAD_WITH_VALUE):
        return op._replace(call=lambda x, value: [pad(x, value, op.params["padding_config"])])
    if op.name == "dot_general" and not any(op.params["dimension_numbers"][0]):
        return op._replace(call=functools.partial(_multiply, op.params))
    if op.name == "conv_general_dilated" and not _is_known(op.params):
        return op._replace(call=functools.partial(_convolve, op.params))
    return op


def _is_known(params: dict[str, Any]) -> bool:
    """Whether jax2onnx converts a convolution: to a Conv or, with steps of one, a ConvTranspose."""
    if any(dilation > 1 for dilation in params["lhs_dilation"]):
        return all(stride == 1 for stride in params["window_strides"])
    return all(end >= 0 for pair in params["padding"] for end in pair)


def _multiply(
    params: dict[str, Any], left: Shaped[AnyArray, "..."], right: Shaped[AnyArray, "..."]
) -> list[Shaped[Array, "..."]]:
    """A product that sums over no axis; jax2onnx writes two of its batch axes twice."""
    _, batch = params["dimension_numbers"]
    rest = [
        [i for i in range(x.ndim) if i not in b] for x, b in zip((left, right), batch, strict=True)
    ]
    dtype = params["preferred_element_type"] or left.dtype
    x, y = (
        lax.transpose(value, (*axes, *others)).astype(dtype)
        for value, axes, others in zip((left, right), batch, rest, strict=True)
    )
    x = jnp.expand_dims(x, range(x.ndim, x.ndim + len(rest[1])))
    y = jnp.expand_dims(y, range(len(batch[1]), len(batch[1]) + len(rest[0])))
    return [x * y]


def _select(call: Callable[..., list[Any]], which: AnyArray, *cases: AnyArray) -> list[Any]:
    """`lax.select_n`, of masks too."""
    if which.dtype != bool or cases[0].dtype != bool:
        return call(which, *cases)
    off, on = cases
    return [(which & on) | (~which & off)]


def _convolve(
    params: dict[str, Any], x: Shaped[AnyArray, "..."], weight: Shaped[AnyArray, "..."]
) -> list[Shaped[Array, "..."]]:
    """The convolution of an activation into which zeros are inserted first."""
    config = [(0, 0, 0)] * x.ndim
    spatial = params["dimension_numbers"].lhs_spec[2:]
    for axis, dilation, (low, high) in zip(
        spatial, params["lhs_dilation"], params["padding"], strict=True
    ):
        config[axis] = low, high, dilation - 1
    still = {"padding": ((0, 0),) * len(spatial), "lhs_dilation": (1,) * len(spatial)}
    padded = pad(x, jnp.zeros((), x.dtype), config)
    return [lax.conv_general_dilated_p.bind(padded, weight, **{**params, **still})]


def pad(
    x: Shaped[AnyArray, "..."], value: Shaped[AnyArray, ""], config: PaddingConfig
) -> Shaped[AnyArray, "..."]:
    """`lax.pad`; beside an axis of symbolic size as a concatenation."""
    for axis, (low, high, inner) in enumerate(config):
        x = _spread(x, value, axis, inner)
        if min(low, high) < 0:
            last = x.shape[axis] + min(high, 0)
            x = lax.slice_in_dim(x, max(-low, 0), last, axis=axis)
    ends = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    if all(isinstance(size, int) for size in x.shape):
        return lax.pad(x, value, [(low, high, 0) for low, high in ends])
    for axis, (low, high) in enumerate(ends):
        shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in (low, high)]
        before, after = (lax.full(shape, value, x.dtype) for shape in shapes)
        parts = [part for part in (before, x, after) if part.shape[axis] != 0]
        x = lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x


def _spread(
    x: Shaped[AnyArray, "..."], value: Shaped[AnyArray, ""], axis: int, inner: int
) -> Shaped[AnyArray, "..."]:
    """`x` with `value` between its elements, `inner` times."""
    if not inner:
        return x
    head, size, tail = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    between = lax.full((*head, size, inner, *tail), value, x.dtype)
    pairs = lax.concatenate((jnp.expand_dims(x, axis + 1), between), axis + 1)
    longer = pairs.reshape(*head, size * (inner + 1), *tail)
    return lax.slice_in_dim(longer, 0, longer.shape[axis] - inner, axis=axis)
