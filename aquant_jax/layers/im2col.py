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

from aquant_jax.arithmetic import border as borders_lib
from aquant_jax.arithmetic.uniform import (
    TensorState,
    clip_codes,
    dequantize,
    max_code,
    quantize,
    to_units,
)
from aquant_jax.layers.conv_geometry import Window


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
        return _scale(column if outer == 1 else jnp.repeat(column, outer, axis=-1), kernel.ravel())
    grouped = column.reshape(*column.shape[:-1], groups, inner)
    product = jnp.einsum("...gi,gio->...go", grouped, kernel)
    return product.reshape(*column.shape[:-1], groups * outer)


@jax.custom_vjp
def _scale(column, factors):
    """``column * factors`` over the last axis."""
    return column * jnp.expand_dims(factors, range(column.ndim - 1))


def _scale_forward(column, factors):
    return _scale(column, factors), (column, factors)


def _scale_backward(saved, dy):
    column, factors = saved
    return _scale(dy, factors), _channel_sums(column * dy)


_scale.defvjp(_scale_forward, _scale_backward)


def column_codes(x, tensor: TensorState, coefficients, window: Window, rounding: Rounding):
    """Codes of the column elements of the padded `x`: one ``[N, *out, C]`` per tap."""
    us = window.taps([to_units(rows, 1.0 / tensor.step_size) for rows in window.flatten(x)])
    bounds = rounding.borders(rounding.polynomials(coefficients, us), len(us))
    return [
        window.crop(quantize(u, tensor.zero_point, rounding.bits, bound))
        for u, bound in zip(us, bounds, strict=True)
    ]


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
    kept = None if keep is None else window.flatten(keep)
    phases = window.flatten(x)
    return window.crop(_multiply(phases, kept, tensor, coefficients, kernel, window, rounding))


def convolve_reference(x, keep, tensor, coefficients, kernel, window, rounding) -> jax.Array:
    """The definition of `convolve`; its gradients are plain autodiff."""
    us = window.taps([to_units(rows, 1.0 / tensor.step_size) for rows in window.flatten(x)])
    polynomials = rounding.polynomials(coefficients, us)
    kept = None if keep is None else window.flatten(keep)
    args = (window.flatten(x), kept, tensor, polynomials, kernel, window, rounding)
    return window.crop(_products(*args))


def _products(phases, keep, tensor, polynomials, kernel, window, rounding) -> jax.Array:
    """Rows of the result, given the polynomials."""
    us = window.taps([to_units(rows, 1.0 / tensor.step_size) for rows in phases])
    bounds = rounding.borders(polynomials, len(us))
    kept = [None] * len(us) if keep is None else window.taps(keep)
    total = jnp.float32(0.0)
    taps = zip(us, bounds, kept, window.taps(phases), kernel, strict=True)
    for u, bound, k, value, weight in taps:
        codes = quantize(u, tensor.zero_point, rounding.bits, bound)
        column = dequantize(codes, tensor.step_size, tensor.zero_point)
        total = total + contract(column if k is None else jnp.where(k, column, value), weight)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _multiply(phases, keep, tensor, coefficients, kernel, window, rounding):
    """`convolve` on the rows of the phases."""
    return _forward(phases, keep, tensor, coefficients, kernel, window, rounding)[0]


def _forward(phases, keep, tensor, coefficients, kernel, window, rounding):
    us = window.taps([to_units(rows, 1.0 / tensor.step_size) for rows in phases])
    polynomials = _pin(tensor, rounding.polynomials(coefficients, us))
    y = _products(phases, keep, tensor, polynomials, kernel, window, rounding)
    return y, (phases, keep, tensor, coefficients, kernel, polynomials)


def _backward(window, rounding, saved, dy):
    phases, keep, tensor, coefficients, kernel, polynomials = saved
    pull = _Pullback(phases, keep, tensor, coefficients, kernel, polynomials, window, rounding)
    dcolumns = pull.columns(dy)
    dpolynomials, dstep = pull.codes(dcolumns)
    dpolynomials = _pin(tensor, dpolynomials)
    dcoefficients = pull.coefficients_(dpolynomials)
    dus = pull.units(dpolynomials)
    inv_step = 1.0 / tensor.step_size
    for du, rows in zip(dus, phases, strict=True):
        dstep = dstep - jnp.sum(_channel_sums(du * rows)) * inv_step * inv_step
    direct = pull.direct(dcolumns)
    dphases = [d + du * inv_step for d, du in zip(direct, dus, strict=True)]
    dtensor = TensorState(dstep, jnp.zeros_like(tensor.zero_point))
    return _pin(tensor, dphases), None, dtensor, dcoefficients, pull.kernel_(dy)


_multiply.defvjp(_forward, _backward)


class _Tap(NamedTuple):
    """One tap of the forward pass: mask, inside the range, codes, units and value."""

    kept: jax.Array | bool
    inside: jax.Array
    codes: jax.Array
    u: jax.Array
    value: jax.Array


class _Pullback(NamedTuple):
    """The derivative of `_multiply`, step by step."""

    phases: list[jax.Array]
    keep: list[jax.Array] | None
    tensor: TensorState
    coefficients: dict[str, jax.Array]
    kernel: jax.Array
    polynomials: list[jax.Array]
    window: Window
    rounding: Rounding

    def all_units(self) -> list[jax.Array]:
        return [to_units(rows, 1.0 / self.tensor.step_size) for rows in self.phases]

    def taps(self) -> list[_Tap]:
        us = self.window.taps(self.all_units())
        kept = [True] * len(us) if self.keep is None else self.window.taps(self.keep)
        bounds = self.rounding.borders(self.polynomials, len(us))
        taps = []
        for u, bound, k, value in zip(us, bounds, kept, self.window.taps(self.phases), strict=True):
            raw = jnp.ceil(u - bound) + self.tensor.zero_point
            inside = (raw >= 0) & (raw <= max_code(self.rounding.bits))
            taps.append(_Tap(k, inside, clip_codes(raw, self.rounding.bits), u, value))
        return taps

    def kernel_(self, dy):
        """Gradient of the kernel."""
        rows = []
        for tap, weight in zip(self.taps(), self.kernel, strict=True):
            column = jnp.where(tap.kept, dequantize(tap.codes, *self.tensor), tap.value)
            rows.append(jax.vjp(lambda k, c=column: contract(c, k), weight)[1](dy)[0])
        return jnp.stack(rows)

    def columns(self, dy):
        """Gradient of every tap's column."""
        if self.kernel.shape[1] == 1:
            # One matmul for all taps; its readers take their slices of it.
            flat = self.kernel[:, 0].transpose(2, 0, 1).reshape(self.kernel.shape[3], -1)
            every, size = dy @ flat, self.phases[0].shape[-1]
            return [every[:, i * size : (i + 1) * size] for i in range(len(self.kernel))]
        nothing = jnp.zeros(self.polynomials[0].shape, dy.dtype)  # linear: the value has no say
        return [jax.vjp(lambda c, k=k: contract(c, k), nothing)[1](dy)[0] for k in self.kernel]

    def codes(self, dcolumns):
        """Gradient of the polynomials, and of the step size through codes and dequantization."""
        dbounds, dstep = [], jnp.float32(0.0)
        for tap, d in zip(self.taps(), dcolumns, strict=True):
            dbounds.append(jnp.where(tap.kept & tap.inside, -self.tensor.step_size * d, 0.0))
            slope = tap.codes - self.tensor.zero_point - jnp.where(tap.inside, tap.u, 0.0)
            dstep = dstep + jnp.where(tap.kept, d * slope, 0.0)
        if self.rounding.fused:
            dbounds = [sum(dbounds)]
        phi = borders_lib.get_phi(self.rounding.phi).apply
        pairs = zip(self.polynomials, dbounds, strict=True)
        return [jax.vjp(phi, p)[1](d)[0] for p, d in pairs], jnp.sum(_channel_sums(dstep))

    def direct(self, dcolumns):
        """Gradient of x through the straight-through codes and the unquantized elements."""
        passed = [
            d * (tap.inside | jnp.logical_not(tap.kept)).astype(d.dtype)
            for tap, d in zip(self.taps(), dcolumns, strict=True)
        ]
        return jax.linear_transpose(self.window.taps, self.phases)(passed)[0]

    def coefficients_(self, dpolynomials):
        """Gradient of the coefficients."""
        us = self.window.taps(self.all_units())
        spread = {
            name: [jnp.broadcast_to(row, us[0].shape) for row in c]
            for name, c in self.coefficients.items()
        }
        pull = jax.vjp(lambda c: self.rounding.polynomials(c, us), spread)[1]
        sums = {name: map(_channel_sums, rows) for name, rows in pull(dpolynomials)[0].items()}
        return {name: jnp.stack(list(rows)) for name, rows in sums.items()}

    def units(self, dpolynomials):
        """Gradient of u through the polynomials."""
        us = self.all_units()

        def polynomials(us):
            return self.rounding.polynomials(self.coefficients, self.window.taps(us))

        return jax.vjp(polynomials, us)[1](dpolynomials)[0]


def _channel_sums(values: jax.Array) -> jax.Array:
    """Sum over all axes but the last, as a matmul: XLA on CPU would fuse a long chain of
    element-wise work into the sum and run it serially."""
    flat = values.reshape(-1, values.shape[-1])
    return (jnp.ones((1, flat.shape[0]), flat.dtype) @ flat)[0]


def _pin(tensor, values):
    """`values`, computed once: the CPU compiler would otherwise fuse them into all their readers.

    It drops optimization barriers before it fuses, but never fuses across a matmul; that the step
    size is positive is what it cannot know, so the matrix is not seen to be the identity.
    """
    if jax.default_backend() != "cpu":
        return values
    one = (tensor.step_size > 0).astype(values[0].dtype)
    eye = one * jnp.eye(values[0].shape[-1], dtype=values[0].dtype)
    return [value @ eye for value in values]
