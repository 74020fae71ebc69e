"""Convolution in integer arithmetic: int8 codes times int8 weights, exact sums, one epilogue."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer, product
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.epilogue import NO_EPILOGUE, Codes, Epilogue, Results, for_columns
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import arguments
from gpu_ops.conv_int8 import conv_int8, serves
from gpu_ops.geometry import check_geometry
from gpu_ops.img2col_border import img2col_border

# Codes of 8 bits are stored less this, so that they fit in int8.
SHIFT = 128
# Tensor cores read sixteen int8 at a time; a CPU needs no alignment.
ALIGN = {"gpu": 16}


def conv_border_int8(
    x: AnyArray | Codes,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    weights: QuantizedWeights,
    rounding: Rounding,
    geometry: ConvGeometry,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Results:
    """A quantized convolution: columns of codes, their products with weight codes, one epilogue.

    The columns are codes ``q`` of the activation x = s (q - z), the weights
    w = scale (codes - zero_point), both asymmetric. Their product is summed exactly, in int32, and
    becomes ``s * scale * sum`` in float32, which the epilogue takes. All of it is one call
    (`conv_int8`), without columns in memory. But where every column element has its own border, a
    GPU writes the columns and multiplies them by its own library.

    Args:
      x: float32 or bfloat16 ``[N, H, W, C]``, or its codes.
      quantizer, coefficients, rounding: of the activation; see `img2col_border`. The coefficients
        of borders a channel are ``(1, C)``.
      weights: codes ``[kh, kw, C / groups, O]``.
      geometry: of the convolution; see `gpu_ops.conv_geometry`.
      epilogue: bias, residual, clip, maximum, and the codes of the result that are wanted.

    Returns:
      ``[N, OH, OW, O]``, or what the maximum leaves of it, as values and as codes.

    Raises:
      ValueError: an argument that does not fit, by name and with both values.
    """
    images = x.codes if isinstance(x, Codes) else x
    arguments.check_x(images, ("uint8",) if isinstance(x, Codes) else ("float32", "bfloat16"))
    geometry = check_geometry(geometry, images.shape)
    arguments.check_weights(weights, geometry, images.shape[-1], rounding)
    arguments.check_epilogue(epilogue, (images.shape[0], *geometry.out, weights.codes.shape[-1]))
    if epilogue.pool is not None and jax.default_backend() != "cpu":
        operands = (x, quantizer, coefficients, weights, rounding, geometry)
        return epilogue.staged(lambda first: conv_border_int8(*operands, first))
    if serves(x, rounding, geometry, epilogue):
        return conv_int8(x, quantizer, coefficients, weights, rounding, geometry, epilogue)
    return by_columns(x, quantizer, coefficients, weights, rounding, geometry, epilogue)


def by_columns(
    x: AnyArray | Codes,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    weights: QuantizedWeights,
    rounding: Rounding,
    geometry: ConvGeometry,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Results:
    """`conv_border_int8` of checked operands."""
    x, coefficients, rounding = for_columns(x, quantizer, coefficients, rounding)
    align = ALIGN.get(jax.default_backend(), 1)
    columns = img2col_border(x, quantizer, coefficients, rounding, geometry, align=align)
    int8, offset = int8_weights(weights, geometry.groups)
    shift = SHIFT if rounding.bits == 8 else 0
    shift = shift - jnp.asarray(quantizer.zero_point).astype(jnp.int32)
    total = exact_products(columns, int8, offset, shift)
    scale = jnp.asarray(quantizer.step_size, jnp.float32) * weights.scale
    return epilogue.apply(product(total.astype(jnp.float32), _lift(scale, 4)))


def int8_weights(weights: QuantizedWeights, groups: int) -> tuple[jax.Array, jax.Array | None]:
    """The whole numbers ``codes - zero_point`` as int8, and the offset that is left to add.

    For weights under 8 bits, ``codes - zero_point`` fits in int8. With 8 bits it need not:
    ``codes - 128`` does, and the offset is ``128 - zero_point``.

    Args:
      weights: codes ``[kh, kw, C / groups, O]``.
      groups: of the channels.

    Returns:
      int8 ``[groups, O / groups, K]`` and, with 8 bits, int32 ``[groups, O / groups]``.
    """
    zero_point = weights.zero_point.astype(jnp.int32)
    codes = weights.codes.astype(jnp.int32)
    if weights.bits == 8:
        whole, offset = codes - SHIFT, (SHIFT - zero_point).reshape(groups, -1)
    else:
        whole, offset = codes - _lift(zero_point, 4), None
    rows = whole.reshape(-1, groups, codes.shape[-1] // groups).transpose(1, 2, 0)
    return rows.astype(jnp.int8), offset


def exact_products(
    columns: jax.Array, weights: jax.Array, offset: jax.Array | None, shift: jax.Array
) -> jax.Array:
    """``sum_k (columns + shift) (weights + offset)``, exact in int32.

    Args:
      columns: int8 ``[N, OH, OW, groups, Kp]``; no weight meets the elements above K.
      weights: int8 ``[groups, O / groups, K]``.
      offset: int32 ``[groups, O / groups]``, or None for zeros.
      shift: int32 scalar.

    Returns:
      int32 ``[N, OH, OW, O]``.
    """
    elements, filled = weights.shape[-1], columns.shape[-1]
    constant = jnp.sum(weights, -1, dtype=jnp.int32)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, filled - elements)))
    total = _multiply(columns, weights)
    if offset is not None:
        constant = constant + elements * offset
        total = total + jnp.sum(columns, -1, dtype=jnp.int32)[..., None] * _lift(offset, 5)
    total = total + shift * _lift(constant, 5)
    return total.reshape(*total.shape[:3], weights.shape[0] * weights.shape[1])


def _multiply(columns: jax.Array, weights: jax.Array) -> jax.Array:
    """``[N, OH, OW, G, K] x [G, O, K] -> [N, OH, OW, G, O]``; both operands int8, result int32."""
    groups, outer, _ = weights.shape
    if groups == 1:
        shape = (*columns.shape[:4], outer)
        rows = columns.reshape(-1, columns.shape[-1])
        return _dot(rows, weights[0], (((1,), (1,)), ((), ()))).reshape(shape)
    if outer == 1:  # depthwise: a matrix product of one row would be a loop over groups
        product = columns.astype(jnp.int32) * _lift(weights[:, 0].astype(jnp.int32), 5)
        return jnp.sum(product, -1, keepdims=True)
    product = _dot(columns, weights, (((4,), (2,)), ((3,), (0,))))
    return jnp.moveaxis(product, 0, 3)


def _dot(left: jax.Array, right: jax.Array, dimensions: Any) -> jax.Array:
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.int32)


def _lift(value: ArrayLike, rank: int) -> jax.Array:
    """`value` with axes of one in front."""
    return jax.lax.expand_dims(jnp.asarray(value), range(rank - jnp.ndim(value)))
