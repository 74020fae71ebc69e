"""Columns of convolutions with rounding borders for training, as XLA custom calls.

`aquant_jax.layers.im2col` is the definition and serves what is not built here: platforms without a
compiled handler, borders that a user registered, the sigmoid, and more than two spatial axes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import Window
from aquant_jax.layers.im2col import Rounding
from aquant_jax.layers.integer import KernelCodes
from gpu_ops import arguments, targets
from gpu_ops.calls import Call, Geometry, differentiable
from gpu_ops.int8 import conv_border_int8
from gpu_ops.targets import COEFFICIENTS, PHIS

# Up to so many weights, which then stay in a core's cache, the product is fused with the columns.
FUSED_WEIGHTS = 2**17


class Backend(NamedTuple):
    """What ``aq.Compiler(...)`` and ``Quantized.with_backend(...)`` take."""

    name: str = "gpu_ops"

    def convolve(
        self,
        x: jax.Array,
        keep: jax.Array | None,
        tensor: TensorState,
        coefficients: dict[str, jax.Array],
        kernel: jax.Array,
        window: Window,
        rounding: Rounding,
    ) -> jax.Array:
        """`aquant_jax.layers.im2col.convolve`, by a custom call where there is one."""
        if not supports(window, rounding):
            return im2col.convolve(x, keep, tensor, coefficients, kernel, window, rounding)
        taps, groups, inner, outer = kernel.shape
        flat = kernel.reshape(taps * groups * inner, -1)
        served = groups == 1 or inner == outer == 1
        if served and jax.default_backend() == "cpu" and kernel.size <= FUSED_WEIGHTS:
            return border_conv(x, keep, tensor, coefficients, flat, window, rounding, groups)
        every = border_columns(x, keep, tensor, coefficients, window, rounding)
        if groups == 1:
            rows = every.reshape(-1, taps * inner) @ flat
            return rows.reshape(*every.shape[:-2], outer)
        products = [im2col.contract(every[..., t, :], kernel[t]) for t in range(taps)]
        return functools.reduce(jnp.add, products)

    def convolve_codes(
        self,
        x: jax.Array,
        tensor: TensorState,
        coefficients: dict[str, jax.Array],
        kernel: KernelCodes,
        window: Window,
        rounding: Rounding,
    ) -> jax.Array:
        """What `aquant_jax.layers.integer.run_integer_layer` asks for, by `conv_border_int8`."""
        phi = borders.get_phi(rounding.phi).deployed
        if not supports(window, rounding) or phi not in PHIS:
            if not coefficients:
                shape = (len(kernel.codes), x.shape[-1])
                coefficients, phi = {"b0": jnp.full(shape, 0.5, jnp.float32)}, "identity"
            real, rounding = kernel.real(), rounding._replace(phi=phi)
            return im2col.convolve(x, None, tensor, coefficients, real, window, rounding)
        lift = (1,) * (2 - len(window.kernel))
        _, groups, inner, outer = kernel.codes.shape
        codes = kernel.codes.transpose(0, 2, 1, 3)
        y = conv_border_int8(
            x.reshape(window.images, *lift, *window.spatial, x.shape[-1]),
            tensor.step_size, tensor.zero_point, coefficients,
            codes.reshape(*lift, *window.kernel, inner, groups * outer),
            kernel.scale, kernel.zero_point, weight_bits=kernel.bits,
            strides=(*lift, *window.strides), padding="VALID", dilation=(*lift, *window.dilation),
            bits=rounding.bits, border=rounding.border if coefficients else "none", phi=phi,
            fused=rounding.fused,
        )  # fmt: skip
        return y.reshape(window.images, *window.out, y.shape[-1])


def backend() -> Backend:
    """The compiled operations, as an object to be passed to the library."""
    return Backend()


def supports(window: Window, rounding: Rounding) -> bool:
    """Whether the custom call serves this convolution on the default device."""
    built_in = rounding.border in COEFFICIENTS and rounding.phi in PHIS
    return built_in and len(window.kernel) <= 2 and jax.default_backend() in targets.PLATFORMS


def border_columns(
    x: jax.Array,
    keep: jax.Array | None,
    tensor: TensorState,
    coefficients: dict[str, jax.Array],
    window: Window,
    rounding: Rounding,
) -> jax.Array:
    """Dequantized im2col columns, each element rounded with its border (Eq. 5, 8, 9).

    Differentiable in `x`, the step size and the coefficients, straight through the ceil.

    Args:
      x: float32 ``[N, *padded, C]``, one or two spatial axes, already padded.
      keep: None, or bool of the shape of `x`: False leaves the element unquantized (QDrop).
      tensor: step size and zero point.
      coefficients: ``(taps, C)`` by name.
      window: geometry, as `x` has it.
      rounding: bits and border.

    Returns:
      float32 ``[N, *out, taps, C]``.

    Raises:
      ValueError: a border or phi without a custom call; shapes or dtypes that do not fit; a step
        size that is not positive or a zero point that is no code, where they are known.
      JaxRuntimeError (or ValueError, as JAX has it): when run on a CPU, a step size that is not
        positive. Not-a-number gives columns of not-a-number, and so does on CUDA, which cannot wait
        for it, one not positive.
    """
    geometry, operands = _prepare(x, keep, tensor, coefficients, window, rounding)
    values = cast(jax.Array, differentiable(Call(geometry, keep is not None, False), *operands))
    return values.reshape(window.images, *window.out, *values.shape[-2:])


def border_conv(
    x: jax.Array,
    keep: jax.Array | None,
    tensor: TensorState,
    coefficients: dict[str, jax.Array],
    kernel: jax.Array,
    window: Window,
    rounding: Rounding,
    groups: int = 1,
) -> jax.Array:
    """`border_columns` times a kernel, in one pass that writes no columns; CPU only.

    Differentiable in `kernel` too.

    Args:
      x, keep, tensor, coefficients, window, rounding: see `border_columns`.
      kernel: float32 ``[taps * C, O]``; of a depthwise convolution ``[taps * C, 1]``.
      groups: 1, or C for a depthwise convolution, whose O is C.

    Returns:
      float32 ``[N, *out, O]``.

    Raises:
      ValueError, JaxRuntimeError: see `border_columns`.
    """
    geometry, operands = _prepare(x, keep, tensor, coefficients, window, rounding)
    elements = int(np.prod(window.kernel)) * x.shape[-1]
    if groups not in (1, x.shape[-1]):
        raise ValueError(f"groups is {groups}, neither 1 nor the {x.shape[-1]} channels of x")
    outputs = "O" if groups == 1 else 1
    fits = kernel.ndim == 2 and kernel.shape[0] == elements and outputs in ("O", kernel.shape[1])
    if not fits or kernel.dtype != jnp.float32:
        wanted = f"float32 ({elements}, {outputs})"
        raise ValueError(f"kernel is {kernel.dtype} {kernel.shape}, not {wanted}")
    geometry = geometry._replace(groups=groups)
    y = cast(jax.Array, differentiable(Call(geometry, keep is not None, True), *operands, kernel))
    return y.reshape(window.images, *window.out, y.shape[-1])


def _prepare(x, keep, tensor, coefficients, window: Window, rounding: Rounding):
    """The static part and the operands of a call, checked and with two spatial axes."""
    if rounding.border not in COEFFICIENTS:
        raise ValueError(f"border {rounding.border!r} has no custom call; {list(COEFFICIENTS)} do")
    if rounding.phi not in PHIS:
        raise ValueError(f"phi {rounding.phi!r} has no custom call; {list(PHIS)} do")
    _check(x, keep, window)
    step, zero = arguments.grid(tensor.step_size, tensor.zero_point, rounding.bits)
    column = (int(np.prod(window.kernel)), x.shape[-1])
    arguments.check_indices(x.shape[1:], (*window.out, *column))
    lift = (1,) * (2 - len(window.kernel))
    images = x.reshape(window.images, *lift, *window.spatial, x.shape[-1])
    mask = jnp.zeros((0,), bool) if keep is None else keep.reshape(images.shape)
    geometry = Geometry(
        (*lift, *window.kernel), (*lift, *window.strides), (*lift, *window.dilation),
        (*lift, *window.out), rounding.bits, rounding.fused, PHIS[rounding.phi],
    )  # fmt: skip
    stacked = arguments.stack(coefficients, rounding.border, column)
    return geometry, (images, mask, step, zero, stacked)


def _check(x, keep, window: Window) -> None:
    rank = len(window.kernel)
    if x.ndim != rank + 2 or rank not in (1, 2):
        raise ValueError(f"x of shape {x.shape} does not fit a window of {rank} spatial axes")
    if x.shape[:-1] != (window.images, *window.spatial):
        raise ValueError(f"x has shape {x.shape}, the window {(window.images, *window.spatial)}")
    if x.dtype != jnp.float32:
        raise ValueError(f"x is {x.dtype}, not float32")
    if keep is not None and (keep.shape != x.shape or keep.dtype != jnp.bool_):
        raise ValueError(f"keep is {keep.dtype} {keep.shape}, not bool {x.shape}")
    arguments.check_window(window)
