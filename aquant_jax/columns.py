"""Convolution over im2col columns whose elements have rounding borders of their own.

A border that differs from tap to tap quantizes one activation to different codes in different
columns, so the convolution runs over columns: one matmul per tap, accumulated, which never writes
the k*k-fold columns. The derivative is written out in phases for the same reason: left to itself,
XLA on CPU fuses the element-wise work of all taps into every reader (84 ms instead of 25 ms for
one 3x3 conv of 32x32x32x16 on two cores).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax import border as borders_lib
from aquant_jax.numerics import TensorState, clip_codes, dequantize, max_code, quantize, ste_ceil, to_units


class Window(NamedTuple):
    """Geometry of the taps over a padded input ``[N, *spatial, C]`` (static).

    A tap is read as a run of consecutive rows of the flattened input, one row per pixel, instead of
    as a slice of its image: pixels whose window would leave the image are computed too, and cropped
    from the result. With strides, every phase of the image is such a list of rows. Contiguous rows
    are what XLA vectorises; sliced images cost three times as much.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]

    def taps(self, x: jax.Array) -> list[jax.Array]:
        """One array ``[rows, C]`` per tap, in row-major tap order."""
        grid = self._grid(x.shape[1:-1])
        phases = self._phases(x, grid)
        places = [self._place(tap, grid) for tap in np.ndindex(*self.kernel)]
        rows = phases.shape[1] - max(offset for _, offset in places)
        return [phases[phase, offset : offset + rows] for phase, offset in places]

    def crop(self, y: jax.Array, padded: tuple[int, ...]) -> jax.Array:
        """Rows ``[rows, O]`` as images ``[N, *out, O]``; `padded` is the shape of the input."""
        grid = self._grid(padded[1:-1])
        missing = padded[0] * int(np.prod(grid)) - y.shape[0]
        images = jnp.pad(y, ((0, missing), (0, 0))).reshape(padded[0], *grid, y.shape[-1])
        return images[(slice(None), *(slice(size) for size in self.out))]

    def _grid(self, spatial):
        return tuple(-(-size // s) for size, s in zip(spatial, self.strides, strict=True))

    def _phases(self, x, grid):
        """``[phases, N * grid, C]``: space to depth by the strides."""
        rank = len(grid)
        extra = [g * s - n for g, s, n in zip(grid, self.strides, x.shape[1:-1], strict=True)]
        x = jnp.pad(x, ((0, 0), *((0, e) for e in extra), (0, 0)))
        split = [size for pair in zip(grid, self.strides, strict=True) for size in pair]
        x = x.reshape(x.shape[0], *split, x.shape[-1])
        x = x.transpose(*range(2, 2 * rank + 1, 2), 0, *range(1, 2 * rank, 2), 2 * rank + 1)
        return x.reshape(int(np.prod(self.strides)), -1, x.shape[-1])

    def _place(self, tap, grid) -> tuple[int, int]:
        """Phase and row offset of a tap."""
        phase = offset = 0
        for at, size, stride, dilation in zip(tap, grid, self.strides, self.dilation, strict=True):
            phase = phase * stride + at * dilation % stride
            offset = offset * size + at * dilation // stride
        return phase, offset


class Rounding(NamedTuple):
    """What is static about the rounding of the columns."""

    bits: int
    border: str
    phi: str
    fused: bool

    def polynomials(self, coefficients, us):
        return borders_lib.polynomials(self.border, self.fused, coefficients, us)

    def borders(self, polynomials, taps):
        """One border per tap, repeated where the taps share it."""
        phi = borders_lib.get_phi(self.phi).apply
        return [phi(p) for p in polynomials] * (taps // len(polynomials))


def contract(column: jax.Array, kernel: jax.Array) -> jax.Array:
    """Product of one tap: ``[..., C] x [groups, C / groups, O / groups] -> [..., O]``."""
    groups, inner, outer = kernel.shape
    if groups == 1:
        return column @ kernel[0]
    if inner == 1:
        product = column[..., None] * kernel[:, 0, :]
        return product.reshape(*column.shape[:-1], groups * outer)
    grouped = column.reshape(*column.shape[:-1], groups, inner)
    product = jnp.einsum("...gi,gio->...go", grouped, kernel)
    return product.reshape(*column.shape[:-1], groups * outer)


def column_codes(x, tensor: TensorState, coefficients, window: Window, rounding: Rounding):
    """Codes of the column elements of the padded `x`: one ``[N, *out, C]`` per tap."""
    us = window.taps(to_units(x, 1.0 / tensor.step_size))
    bounds = rounding.borders(rounding.polynomials(coefficients, us), len(us))
    return [
        window.crop(quantize(u, tensor.zero_point, rounding.bits, bound), x.shape)
        for u, bound in zip(us, bounds, strict=True)
    ]


def convolve_reference(x, keep, tensor, coefficients, kernel, window, rounding) -> jax.Array:
    """The definition of `convolve`; its gradients are plain autodiff."""
    us = window.taps(to_units(x, 1.0 / tensor.step_size))
    polynomials = rounding.polynomials(coefficients, us)
    return _multiply(x, keep, tensor, polynomials, kernel, window, rounding)


def _multiply(x, keep, tensor, polynomials, kernel, window, rounding) -> jax.Array:
    us = window.taps(to_units(x, 1.0 / tensor.step_size))
    bounds = rounding.borders(polynomials, len(us))
    kept = [None] * len(us) if keep is None else window.taps(keep)
    total = jnp.float32(0.0)
    for u, bound, k, value, weight in zip(us, bounds, kept, window.taps(x), kernel, strict=True):
        codes = quantize(u, tensor.zero_point, rounding.bits, bound)
        column = dequantize(codes, tensor.step_size, tensor.zero_point)
        total = total + contract(column if k is None else jnp.where(k, column, value), weight)
    return window.crop(total, x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def convolve(x, keep, tensor, coefficients, kernel, window, rounding) -> jax.Array:
    """Quantize the columns of `x` with their borders and multiply them with `kernel`.

    Args:
      x: float32 ``[N, *padded, C]``, already padded.
      keep: None, or bool of the shape of `x`: False leaves the element unquantized (QDrop).
      tensor: step size and zero point.
      coefficients: border coefficients ``(taps, C)``.
      kernel: float32 ``[taps, groups, C / groups, O / groups]``.
      window: geometry.
      rounding: bits and border.

    Returns:
      float32 ``[N, *out, O]``.
    """
    return _forward(x, keep, tensor, coefficients, kernel, window, rounding)[0]


def _forward(x, keep, tensor, coefficients, kernel, window, rounding):
    us = window.taps(to_units(x, 1.0 / tensor.step_size))
    polynomials = _pin(tensor, rounding.polynomials(coefficients, us))
    y = _multiply(x, keep, tensor, polynomials, kernel, window, rounding)
    return y, (x, keep, tensor, coefficients, kernel, polynomials)


def _backward(window, rounding, saved, dy):
    x, keep, tensor, coefficients, kernel, polynomials = saved
    step, zero = tensor
    inv_step = 1.0 / step
    (dy,) = jax.linear_transpose(
        lambda y: window.crop(y, x.shape),
        jax.ShapeDtypeStruct((*polynomials[0].shape[:-1], dy.shape[-1]), dy.dtype),
    )(dy)

    def tap_values(x, polynomials):
        """(kept, inside, codes, u, value) of every tap."""
        us = window.taps(to_units(x, inv_step))
        kept = [True] * len(us) if keep is None else window.taps(keep)
        bounds = rounding.borders(polynomials, len(us))
        raw = [ste_ceil(u - b) + zero for u, b in zip(us, bounds, strict=True)]
        top = max_code(rounding.bits)
        inside = [(r >= 0) & (r <= top) for r in raw]
        codes = [clip_codes(r, rounding.bits) for r in raw]
        return list(zip(kept, inside, codes, us, window.taps(x), strict=True))

    def kernel_gradient(x, polynomials, dy):
        columns = [
            jnp.where(kept, dequantize(q, step, zero), value)
            for kept, _, q, _, value in tap_values(x, polynomials)
        ]
        pull = [
            jax.vjp(lambda k, c=c: contract(c, k), k)[1](dy)[0]
            for c, k in zip(columns, kernel, strict=True)
        ]
        return jnp.stack(pull)

    def column_gradients(dy):
        if kernel.shape[1] == 1:
            # One matmul for all taps; its readers take their slices of it.
            every = dy @ kernel[:, 0].transpose(2, 0, 1).reshape(kernel.shape[3], -1)
            size = x.shape[-1]
            return [every[:, i * size : (i + 1) * size] for i in range(len(kernel))]
        shape = jax.ShapeDtypeStruct(polynomials[0].shape, x.dtype)
        return [jax.linear_transpose(lambda c, k=k: contract(c, k), shape)(dy)[0] for k in kernel]

    def border_gradients(x, polynomials, dcolumns):
        """Gradient of every polynomial, and of the step size through the codes."""
        dbounds, dstep = [], jnp.zeros_like(dcolumns[0])
        for (kept, inside, q, u, _), d in zip(tap_values(x, polynomials), dcolumns, strict=True):
            dbounds.append(jnp.where(kept & inside, -step * d, 0.0))
            dstep = dstep + jnp.where(kept, d * (q - zero - jnp.where(inside, u, 0.0)), 0.0)
        if rounding.fused:
            dbounds = [sum(dbounds)]
        phi = borders_lib.get_phi(rounding.phi).apply
        dpolynomials = [
            jax.vjp(phi, p)[1](d)[0] for p, d in zip(polynomials, dbounds, strict=True)
        ]
        return dpolynomials, jnp.sum(_channel_sums(dstep))

    def direct_gradient(x, polynomials, dcolumns):
        """Gradient of x through the straight-through codes and the unquantized elements."""
        passed = [
            d * (inside | jnp.logical_not(kept))
            for (kept, inside, *_), d in zip(tap_values(x, polynomials), dcolumns, strict=True)
        ]
        return jax.linear_transpose(window.taps, x)(passed)[0]

    def coefficient_gradients(x, dpolynomials):
        us = window.taps(to_units(x, inv_step))
        spread = {
            name: [jnp.broadcast_to(row, us[0].shape) for row in c]
            for name, c in coefficients.items()
        }
        pulled = jax.vjp(lambda c: rounding.polynomials(c, us), spread)[1](dpolynomials)[0]
        return {name: jnp.stack([_channel_sums(d) for d in ds]) for name, ds in pulled.items()}

    def units_gradient(x, dpolynomials):
        u = to_units(x, inv_step)
        pull = jax.vjp(lambda u: rounding.polynomials(coefficients, window.taps(u)), u)[1]
        return pull(dpolynomials)[0]

    dkernel = kernel_gradient(x, polynomials, dy)
    dcolumns = column_gradients(dy)
    dpolynomials, dstep = border_gradients(x, polynomials, dcolumns)
    dpolynomials = _pin(tensor, dpolynomials)
    dx = direct_gradient(x, polynomials, dcolumns)
    dcoefficients = coefficient_gradients(x, dpolynomials)
    du = units_gradient(x, dpolynomials)
    dstep = dstep - jnp.sum(_channel_sums(du * x)) * inv_step * inv_step
    return dx + du * inv_step, None, TensorState(dstep, jnp.zeros_like(zero)), dcoefficients, dkernel


convolve.defvjp(_forward, _backward)


def _channel_sums(values: jax.Array) -> jax.Array:
    """Sum over all axes but the last, as a matmul: XLA on CPU would fuse a long chain of
    element-wise work into the sum and run it serially."""
    flat = values.reshape(-1, values.shape[-1])
    return (jnp.ones((1, flat.shape[0]), flat.dtype) @ flat)[0]


def _pin(tensor, values):
    """`values`, computed once: the CPU compiler would otherwise fuse them into all their readers.

    It drops optimization barriers before it fuses, but never fuses across a matmul; that the step size
    is positive is what it cannot know, so the matrix is not seen to be the identity.
    """
    if jax.default_backend() != "cpu":
        return values
    eye = jnp.eye(values[0].shape[-1], dtype=values[0].dtype) * (tensor.step_size > 0)
    return [value @ eye for value in values]
