"""Convolution in integer arithmetic: int8 codes times int8 weights, exact sums, one epilogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aquant_jax.arithmetic.uniform import product
from gpu_ops import arguments
from gpu_ops.arguments import Padding
from gpu_ops.img2col import img2col_border

# What makes codes of 8 bits fit: they are stored less this.
SHIFT = 128
# Tensor cores read sixteen int8 at a time; a CPU needs no filling.
ALIGN = {"gpu": 16}


def conv_border_int8(
    x: jax.Array,
    step_size: ArrayLike,
    zero_point: ArrayLike,
    coefficients: Mapping[str, jax.Array] | None,
    codes: jax.Array,
    scale: jax.Array,
    weight_zero_point: jax.Array,
    *,
    weight_bits: int,
    strides: Sequence[int] = (1, 1),
    padding: Padding,
    dilation: Sequence[int] = (1, 1),
    bits: int,
    border: str = "none",
    phi: str = "identity",
    fused: bool = True,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    relu: bool = False,
    dtype=jnp.float32,
) -> jax.Array:
    """A quantized convolution: `img2col_border`, a product of codes, and one epilogue.

    The columns are codes ``q`` of the activation x = s (q - z), the weights
    w = scale (codes - weight_zero_point), both asymmetric. Their product is summed exactly, in
    int32, and becomes ``s * scale * sum + bias (+ residual)``, then ReLU, in float32.

    Args:
      x: float32 or bfloat16 ``[N, H, W, C]``.
      step_size, zero_point, coefficients: of the activation; see `img2col_border`.
      codes: uint8 ``[kh, kw, C / groups, O]``, which says how many groups there are.
      scale, weight_zero_point: float32 ``[O]``; zero points are whole numbers, codes too.
      weight_bits: of the codes, 2 to 8.
      strides, padding, dilation, bits, border, phi, fused: see `img2col_border`.
      bias: float32 ``[O]``, or None.
      residual: added to the result before the ReLU; of the shape of the result.
      relu: whether the result is cut at zero.
      dtype: of the result.

    Returns:
      ``[N, OH, OW, O]`` of `dtype`.

    Raises:
      ValueError: what does not fit, by name and with both values.
    """
    arguments.check_x(x, ("float32", "bfloat16"))
    arguments.check_weights(x, codes, scale, weight_zero_point, weight_bits, bits)
    groups = x.shape[-1] // codes.shape[2]
    columns = img2col_border(
        x, step_size, zero_point, coefficients, kernel=codes.shape[:2], strides=strides,
        padding=padding, dilation=dilation, groups=groups, bits=bits, border=border, phi=phi,
        fused=fused, align=ALIGN.get(jax.default_backend(), 1),
    )  # fmt: skip
    arguments.check_added("bias", bias, (codes.shape[-1],))
    arguments.check_added("residual", residual, (*columns.shape[:3], codes.shape[-1]))
    weights, offset = int8_weights(codes, weight_zero_point, weight_bits, groups)
    shift = (SHIFT if bits == 8 else 0) - jnp.asarray(zero_point).astype(jnp.int32)
    total = exact_products(columns, weights, offset, shift)
    grid = jnp.asarray(step_size, jnp.float32) * scale
    y = product(total.astype(jnp.float32), _lift(grid, 4))
    y = y if bias is None else y + _lift(bias, 4)
    y = y if residual is None else y + residual.astype(jnp.float32)
    return (jnp.maximum(y, 0.0) if relu else y).astype(dtype)


def int8_weights(
    codes: jax.Array, zero_point: jax.Array, bits: int, groups: int
) -> tuple[jax.Array, jax.Array | None]:
    """The whole numbers ``codes - zero_point`` as int8, and what is missing of them.

    Codes of less than 8 bits less their zero point fit int8. With 8 bits they need not:
    ``codes - 128`` does, and ``128 - zero_point`` is left to be added.

    Args:
      codes: uint8 ``[kh, kw, C / groups, O]``.
      zero_point: ``[O]``.
      bits: of the codes.
      groups: of the channels.

    Returns:
      int8 ``[groups, O / groups, K]`` and, with 8 bits, int32 ``[groups, O / groups]``.
    """
    zero = zero_point.astype(jnp.int32)
    whole = codes.astype(jnp.int32) - (SHIFT if bits == 8 else zero)
    rows = whole.reshape(-1, groups, codes.shape[-1] // groups).transpose(1, 2, 0)
    offset = (SHIFT - zero).reshape(groups, -1) if bits == 8 else None
    return rows.astype(jnp.int8), offset


def exact_products(
    columns: jax.Array, weights: jax.Array, offset: jax.Array | None, shift: jax.Array
) -> jax.Array:
    """``sum_k (columns + shift) (weights + offset)``, exact in int32.

    Args:
      columns: int8 ``[N, OH, OW, groups, Kp]``; what is above K meets no weight.
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


def _dot(left: jax.Array, right: jax.Array, dimensions) -> jax.Array:
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.int32)


def _lift(value: jax.Array, rank: int) -> jax.Array:
    """`value` with axes of one in front."""
    return jax.lax.expand_dims(jnp.asarray(value), range(rank - jnp.ndim(value)))
