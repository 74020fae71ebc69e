"""Operators of ONNX as JAX primitives, which jax2onnx converts as `register` says."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.extend.core import Primitive
from jaxtyping import Array, Float32, Shaped, UInt8

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.layers.conv_geometry import ConvGeometry

_QUANTIZE = Primitive("aquant_quantize_linear")
_DEQUANTIZE = Primitive("aquant_dequantize_linear")
_MATMUL = Primitive("aquant_matmul")
_COLUMNS = Primitive("aquant_columns")
_SPLIT = Primitive("aquant_split")
_CONV = Primitive("aquant_conv")
_WINDOW_SUM = Primitive("aquant_window_sum")


def quantize_linear(whole: Float32[AnyArray, "*shape"], zero_point: int) -> UInt8[Array, "*shape"]:
    """The codes of whole numbers ``code - zero_point``."""
    return _QUANTIZE.bind(whole, scale=1.0, zero_point=zero_point)


def dequantize_linear(
    codes: UInt8[AnyArray, "*shape"], zero_point: int, scale: float = 1.0
) -> Float32[Array, "*shape"]:
    """``scale * (code - zero_point)``."""
    return _DEQUANTIZE.bind(codes, scale=scale, zero_point=zero_point)


def matmul(
    rows: Float32[AnyArray, "*rows K"], matrix: Float32[AnyArray, "K columns"]
) -> Float32[Array, "*rows columns"]:
    """``rows @ matrix``; jax2onnx makes an Einsum of a product with so many axes."""
    return _MATMUL.bind(rows, matrix)


def columns(
    x: Shaped[AnyArray, "N *spatial C"], geometry: ConvGeometry, fill: int
) -> Shaped[Array, "N *out taps*C"]:
    """What the taps read of every pixel, in row-major tap order; padding is `fill`.

    With a symbolic number of samples, jax2onnx makes ten nodes of one of JAX's pads or slices.
    """
    return _COLUMNS.bind(x, geometry=geometry, fill=fill)


def split(
    x: Shaped[AnyArray, "*rows C"], sizes: tuple[int, ...]
) -> list[Shaped[Array, "*rows size"]]:
    """The channels of `x` in parts of these sizes."""
    return _SPLIT.bind(x, sizes=sizes)


def conv(
    x: Float32[AnyArray, "N *spatial C"], kernel: Float32[AnyArray, "..."], geometry: ConvGeometry
) -> Float32[Array, "N *out O"]:
    """The convolution of `x` with a kernel ``[O, C / groups, *kernel]``."""
    return _CONV.bind(x, kernel, geometry=geometry)


def window_sum(
    x: Float32[AnyArray, "N *spatial C"], geometry: ConvGeometry
) -> Float32[Array, "N *out 1"]:
    """The sum of all that a window reads."""
    return _WINDOW_SUM.bind(x, geometry=geometry)


_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_QUANTIZE.def_abstract_eval(lambda x, *, scale, zero_point: x.update(dtype=_UINT8, weak_type=False))
_DEQUANTIZE.def_abstract_eval(
    lambda x, *, scale, zero_point: x.update(dtype=_FLOAT32, weak_type=False)
)
_MATMUL.def_abstract_eval(lambda x, y: x.update(shape=(*x.shape[:-1], y.shape[-1])))
_COLUMNS.def_abstract_eval(
    lambda x, *, geometry, fill: _out(x, geometry, geometry.taps * x.shape[-1])
)
_CONV.def_abstract_eval(lambda x, kernel, *, geometry: _out(x, geometry, kernel.shape[0]))
_WINDOW_SUM.def_abstract_eval(lambda x, *, geometry: _out(x, geometry, 1))
_SPLIT.multiple_results = True
_SPLIT.def_abstract_eval(
    lambda x, *, sizes: [x.update(shape=(*x.shape[:-1], size)) for size in sizes]
)


def _out(x: Any, geometry: ConvGeometry, channels: int) -> Any:
    return x.update(shape=(x.shape[0], *geometry.out, channels), weak_type=False)


def register() -> None:
    """Tells jax2onnx how these are converted."""
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    for primitive, lower in _LOWERINGS.items():
        method = lambda self, ctx, eqn, lower=lower: lower(ctx, eqn)  # noqa: E731
        plugin = type(primitive.name, (PrimitiveLeafPlugin,), {"lower": method})
        register_primitive(jaxpr_primitive=primitive.name)(plugin)


def _one_to_one(operator: str, ctx: Any, eqn: Any) -> None:
    values = [ctx.get_value_for_var(var) for var in eqn.invars]
    if eqn.params:
        values.append(_constant(ctx, np.float32(eqn.params["scale"])))
        values.append(_constant(ctx, np.uint8(eqn.params["zero_point"])))
    (out,) = eqn.outvars
    ctx.bind_value_for_var(out, _emit(ctx, operator, out.aval, *values))


def _lower_columns(ctx: Any, eqn: Any) -> None:
    geometry, x = eqn.params["geometry"], ctx.get_value_for_var(eqn.invars[0])
    aval, (out,) = eqn.invars[0].aval, eqn.outvars
    axes = _constant(ctx, range(1, len(geometry.kernel) + 1))
    if any(map(any, geometry.padding)):
        pads = _constant(ctx, np.transpose(geometry.padding).ravel())
        fill = _constant(ctx, np.asarray(eqn.params["fill"], aval.dtype))
        aval = aval.update(shape=(aval.shape[0], *geometry.padded, aval.shape[-1]))
        x = _emit(ctx, "Pad", aval, x, pads, fill, axes)
    part = aval.update(shape=(aval.shape[0], *geometry.out, aval.shape[-1]))
    parts, steps = [], _constant(ctx, geometry.strides)
    for tap in np.ndindex(*geometry.kernel) if part.shape != aval.shape else ():
        first = np.multiply(tap, geometry.dilation)
        last = first + np.subtract(geometry.out, 1) * geometry.strides
        bounds = [_constant(ctx, at) for at in (first, last + 1)]
        parts.append(_emit(ctx, "Slice", part, x, *bounds, axes, steps))
    if len(parts) > 1:
        parts = [_emit(ctx, "Concat", out.aval, *parts, axis=-1)]
    ctx.bind_value_for_var(out, *(parts or [x]))


def _lower_split(ctx: Any, eqn: Any) -> None:
    x, names = ctx.get_value_for_var(eqn.invars[0]), [ctx.fresh_name("Split") for _ in eqn.outvars]
    sizes = _constant(ctx, eqn.params["sizes"])
    parts = ctx.builder.Split(x, sizes, axis=-1, _outputs=names)
    for part, var in zip(parts, eqn.outvars, strict=True):
        ctx.bind_value_for_var(var, _described(part, var.aval, x))


def _lower_conv(ctx: Any, eqn: Any) -> None:
    geometry, x = eqn.params["geometry"], ctx.get_value_for_var(eqn.invars[0])
    (out,), channels = eqn.outvars, eqn.invars[0].aval.shape[-1]
    if len(eqn.invars) == 2:
        kernel = ctx.get_value_for_var(eqn.invars[1])
    else:
        shape, one = (1, channels, *geometry.kernel), _constant(ctx, np.float32(1))
        ones = _constant(ctx, np.ones(shape, np.int8), f"ones_{shape}")
        aval = out.aval.update(shape=shape)
        kernel = _emit(ctx, "DequantizeLinear", aval, ones, one, _constant(ctx, np.int8(0)))
    rank = len(geometry.kernel)
    first, last = (0, rank + 1, *range(1, rank + 1)), (0, *range(2, rank + 2), 1)
    before, after = (
        var.aval.update(shape=tuple(var.aval.shape[axis] for axis in first))
        for var in (eqn.invars[0], out)
    )  # fmt: skip
    x = _emit(ctx, "Transpose", before, x, perm=first)
    y = _emit(
        ctx, "Conv", after, x, kernel, kernel_shape=geometry.kernel, strides=geometry.strides,
        dilations=geometry.dilation, group=geometry.groups,
        pads=[int(pad) for pad in np.transpose(geometry.padding).ravel()],
    )  # fmt: skip
    ctx.bind_value_for_var(out, _emit(ctx, "Transpose", out.aval, y, perm=last))


_LOWERINGS = {
    _QUANTIZE: functools.partial(_one_to_one, "QuantizeLinear"),
    _DEQUANTIZE: functools.partial(_one_to_one, "DequantizeLinear"),
    _MATMUL: functools.partial(_one_to_one, "MatMul"),
    _COLUMNS: _lower_columns,
    _SPLIT: _lower_split,
    _CONV: _lower_conv,
    _WINDOW_SUM: _lower_conv,
}


def _constant(ctx: Any, value: Any, name: str = "") -> Any:
    array = np.asarray(value)
    name = name or "_".join(map(str, ["aquant", array.dtype, *array.ravel()]))
    return ctx.builder.add_initializer_from_array(name, array)


def _emit(ctx: Any, operator: str, aval: Any, *inputs: Any, **attributes: Any) -> Any:
    """The result of a new node, of the shape and dtype of `aval`."""
    make = getattr(ctx.builder, operator)
    result = make(*inputs, _outputs=[ctx.fresh_name(operator)], **attributes)
    return _described(result, aval, inputs[0])


def _described(result: Any, aval: Any, source: Any) -> Any:
    """The result, of the shape and dtype of `aval` and with the samples of `source`."""
    import onnx_ir

    result.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(np.dtype(aval.dtype)))
    result.shape = onnx_ir.Shape([source.shape[0], *aval.shape[1:]])
    return result
