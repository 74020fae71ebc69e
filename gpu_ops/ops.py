"""XLA custom calls for convolutions over columns with rounding borders.

`cpu.cc` has the loops and `include/border_math.h` the arithmetic. `aquant_jax.columns` is the
definition and serves what is not built here: other platforms than the CPU, borders that a user
registered, the sigmoid, and more than two spatial axes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax import columns
from aquant_jax.columns import Rounding
from aquant_jax.numerics import TensorState
from aquant_jax.window import Window
from gpu_ops import _cpu  # pyright: ignore[reportMissingModuleSource]

# The coefficients of the built-in borders, in the order of `border_math.h`.
COEFFICIENTS = {"constant": ("b0",), "linear": ("b0", "b1"), "quadratic": ("b0", "b1", "b2")}
PHIS = {"identity": 0, "clamp": 1, "clamp_ste": 2}

for _name, _handler in _cpu.handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


class Backend(NamedTuple):
    """What ``aq.quantize(..., backend=gpu_ops.backend())`` takes."""

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
        """`aquant_jax.columns.convolve`, by a custom call where there is one."""
        if not supports(window, rounding):
            return columns.convolve(x, keep, tensor, coefficients, kernel, window, rounding)
        every = border_columns(x, keep, tensor, coefficients, window, rounding)
        taps, groups, inner, outer = kernel.shape
        if groups == 1:
            flat = every.reshape(-1, taps * inner) @ kernel.reshape(taps * inner, outer)
            return flat.reshape(*every.shape[:-2], outer)
        products = [columns.contract(every[..., t, :], kernel[t]) for t in range(taps)]
        return functools.reduce(jnp.add, products)


def backend() -> Backend:
    """The compiled operations, as an object to be passed to the library."""
    return Backend()


def supports(window: Window, rounding: Rounding) -> bool:
    """Whether the custom call serves this convolution on the default device."""
    built_in = rounding.border in COEFFICIENTS and rounding.phi in PHIS
    return built_in and len(window.kernel) <= 2 and jax.default_backend() == "cpu"


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
      ValueError: a border or phi without a custom call, or shapes or dtypes that do not fit.
      JaxRuntimeError: when run, a step size that is not positive (not-a-number gives columns of
        not-a-number).
    """
    names = COEFFICIENTS.get(rounding.border)
    if names is None:
        raise ValueError(f"border {rounding.border!r} has no custom call; {list(COEFFICIENTS)} do")
    if rounding.phi not in PHIS:
        raise ValueError(f"phi {rounding.phi!r} has no custom call; {list(PHIS)} do")
    _check(x, keep, coefficients, names, window)
    lift = (1,) * (2 - len(window.kernel))
    images = x.reshape(window.images, *lift, *window.spatial, x.shape[-1])
    mask = jnp.zeros((0,), bool) if keep is None else keep.reshape(images.shape)
    geometry = _Geometry(
        (*lift, *window.kernel), (*lift, *window.strides), (*lift, *window.dilation),
        (*lift, *window.out), rounding.bits, rounding.fused, PHIS[rounding.phi],
    )  # fmt: skip
    stacked = jnp.stack([coefficients[name] for name in names])
    operands = (images, mask, tensor.step_size, tensor.zero_point, stacked)
    values = cast(jax.Array, _columns(geometry, *operands))
    return values.reshape(window.images, *window.out, *values.shape[-2:])


def _check(x, keep, coefficients, names, window: Window) -> None:
    rank = len(window.kernel)
    if x.ndim != rank + 2 or rank not in (1, 2):
        raise ValueError(f"x of shape {x.shape} does not fit a window of {rank} spatial axes")
    if x.shape[:-1] != (window.images, *window.spatial):
        raise ValueError(f"x has shape {x.shape}, the window {(window.images, *window.spatial)}")
    if x.dtype != jnp.float32:
        raise ValueError(f"x is {x.dtype}, not float32")
    if keep is not None and (keep.shape != x.shape or keep.dtype != jnp.bool_):
        raise ValueError(f"keep is {keep.dtype} {keep.shape}, not bool {x.shape}")
    if min(window.out) < 1:
        raise ValueError(f"a window of {window.kernel} is larger than the input {window.spatial}")
    wanted = (int(np.prod(window.kernel)), x.shape[-1])
    for name in names:
        found = coefficients[name].shape if name in coefficients else None
        if found != wanted:
            raise ValueError(f"coefficient {name!r} has shape {found}, not {wanted}")


class _Geometry(NamedTuple):
    """What is static about a call, in two spatial axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]
    bits: int
    fused: bool
    phi: int

    def attributes(self) -> dict:
        return {
            "kernel": np.array(self.kernel, np.int64),
            "stride": np.array(self.strides, np.int64),
            "dilation": np.array(self.dilation, np.int64),
            "bits": np.int64(self.bits),
            "fused": np.bool_(self.fused),
            "phi": np.int64(self.phi),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _columns(geometry: _Geometry, x, keep, step, zero, coefficients):
    shape = (x.shape[0], *geometry.out, coefficients.shape[1], x.shape[-1])
    call = jax.ffi.ffi_call(
        "gpu_ops_border_columns", jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    return call(x, keep, step, zero, coefficients, **geometry.attributes())


def _columns_forward(geometry, *operands):
    return _columns(geometry, *operands), operands


def _columns_backward(geometry, operands, dcolumns):
    x, _, step, zero, coefficients = operands
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (x, step, coefficients)]
    call = jax.ffi.ffi_call("gpu_ops_border_columns_vjp", results, vmap_method="sequential")
    dx, dstep, dcoefficients = call(*operands, dcolumns, **geometry.attributes())
    return dx, None, dstep, jnp.zeros_like(zero), dcoefficients


_columns.defvjp(_columns_forward, _columns_backward)
