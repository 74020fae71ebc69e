"""A convolution with rounding borders for training, without columns, as an XLA custom call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from gpu_ops.training import differentiable, prepare


def border_conv(
    x: AnyArray,
    keep: AnyArray | None,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    kernel: AnyArray,
    geometry: ConvGeometry,
    rounding: Rounding,
) -> jax.Array:
    """`border_columns` times a kernel, in one pass that writes no columns; CPU only.

    Differentiable in `kernel` too.

    Args:
      x, keep, quantizer, coefficients, rounding: see `border_columns`.
      kernel: float32 ``[taps * C, O]``; of a depthwise convolution ``[taps * C, 1]``.
      geometry: over the padded input, with 1 group, or C groups for a depthwise convolution, whose
        O is C.

    Returns:
      float32 ``[N, *out, O]``.

    Raises:
      ValueError, JaxRuntimeError: see `border_columns`.
    """
    call, operands = prepare(x, keep, quantizer, coefficients, geometry, rounding)
    _check_kernel(kernel, geometry, x.shape[-1])
    geometry_with_groups = call.geometry._replace(groups=geometry.groups)
    call = call._replace(geometry=geometry_with_groups, multiplied=True)
    y = differentiable(call, *operands, kernel)
    return y.reshape(x.shape[0], *geometry.out, y.shape[-1])


def _check_kernel(kernel: AnyArray, geometry: ConvGeometry, channels: int) -> None:
    """ValueError unless this is the kernel of a dense or a depthwise convolution."""
    elements, groups = geometry.taps * channels, geometry.groups
    if groups not in (1, channels):
        raise ValueError(f"groups is {groups}, neither 1 nor the {channels} channels of x")
    outputs = "O" if groups == 1 else 1
    fits = kernel.ndim == 2 and kernel.shape[0] == elements and outputs in ("O", kernel.shape[1])
    if not fits or kernel.dtype != jnp.float32:
        wanted = f"float32 ({elements}, {outputs})"
        raise ValueError(f"kernel is {kernel.dtype} {kernel.shape}, not {wanted}")
