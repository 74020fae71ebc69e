"""The derivative of `im2col.convolve`, written out by hand.

In the automatic derivative, XLA on CPU fuses the element-wise work of all taps into every reader:
84 ms instead of 25 ms for one 3x3 convolution of 32x32x32x16 on two cores.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.broadcast import channel_sums
from aquant_jax.arithmetic.uniform import (
    ActivationQuantizer,
    clip_codes,
    dequantize,
    max_code,
    to_units,
)
from aquant_jax.layers.column import Rounding, contract
from aquant_jax.layers.conv_geometry import ConvGeometry


class _Tap(NamedTuple):
    """One tap of the forward pass.

    Attributes:
      mask: see `im2col.convolve`; True quantizes all.
      inside: where the unclipped code is in the range of codes.
      codes: the codes.
      u: the values in units of the step size.
      value: the values.
    """

    mask: Bool[Array, "rows C"] | bool
    inside: Bool[Array, "rows C"]
    codes: Float32[Array, "rows C"]
    u: Float32[Array, "rows C"]
    value: Float32[Array, "rows C"]


class Pullback(NamedTuple):
    """The steps of the derivative, given the operands of the forward pass."""

    phases: list[Float32[Array, "phase_rows C"]]
    keep: list[Bool[Array, "phase_rows C"]] | None
    quantizer: ActivationQuantizer
    coefficients: Coefficients
    kernel: Float32[Array, "taps groups Cg Og"]
    polynomials: list[Float32[Array, "rows C"]]
    geometry: ConvGeometry
    rounding: Rounding

    def all_units(self) -> list[Float32[Array, "phase_rows C"]]:
        """The phases in units of the step size."""
        return [to_units(rows, 1.0 / self.quantizer.step_size) for rows in self.phases]

    def taps(self) -> list[_Tap]:
        """The forward pass, tap by tap."""
        us = self.geometry.tap_rows(self.all_units())
        masks = [True] * len(us) if self.keep is None else self.geometry.tap_rows(self.keep)
        bounds = self.rounding.borders(self.polynomials, len(us))
        values = self.geometry.tap_rows(self.phases)
        taps = []
        for u, bound, mask, value in zip(us, bounds, masks, values, strict=True):
            raw = jnp.ceil(u - bound) + self.quantizer.zero_point
            inside = (raw >= 0) & (raw <= max_code(self.rounding.bits))
            taps.append(_Tap(mask, inside, clip_codes(raw, self.rounding.bits), u, value))
        return taps

    def kernel_gradient(self, dy: Float32[Array, "rows O"]) -> Float32[Array, "taps groups Cg Og"]:
        """Gradient of the kernel."""
        rows = []
        for tap, weight in zip(self.taps(), self.kernel, strict=True):
            column = jnp.where(tap.mask, dequantize(tap.codes, *self.quantizer), tap.value)
            rows.append(jax.vjp(lambda k, c=column: contract(c, k), weight)[1](dy)[0])
        return jnp.stack(rows)

    def column_gradients(self, dy: Float32[Array, "rows O"]) -> list[Float32[Array, "rows C"]]:
        """Gradient of every tap's column."""
        if self.kernel.shape[1] == 1:
            # One matmul for all taps; its readers take their slices of it.
            flat = self.kernel[:, 0].transpose(2, 0, 1).reshape(self.kernel.shape[3], -1)
            every, size = dy @ flat, self.phases[0].shape[-1]
            return [every[:, i * size : (i + 1) * size] for i in range(len(self.kernel))]
        # The product is linear in the column, so its derivative does not depend on the value.
        nothing = jnp.zeros(self.polynomials[0].shape, dy.dtype)
        return [jax.vjp(lambda c, k=k: contract(c, k), nothing)[1](dy)[0] for k in self.kernel]

    def code_gradients(
        self, dcolumns: list[Float32[Array, "rows C"]]
    ) -> tuple[list[Float32[Array, "rows C"]], Float32[Array, ""]]:
        """Gradient of the polynomials, and of the step size through codes and dequantization."""
        dbounds, dstep = [], jnp.float32(0.0)
        for tap, d in zip(self.taps(), dcolumns, strict=True):
            dbounds.append(jnp.where(tap.mask & tap.inside, -self.quantizer.step_size * d, 0.0))
            slope = tap.codes - self.quantizer.zero_point - jnp.where(tap.inside, tap.u, 0.0)
            dstep = dstep + jnp.where(tap.mask, d * slope, 0.0)
        if self.rounding.shared_across_taps:
            dbounds = [sum(dbounds)]
        phi = borders.get_phi(self.rounding.phi).apply
        pairs = zip(self.polynomials, dbounds, strict=True)
        return [jax.vjp(phi, p)[1](d)[0] for p, d in pairs], jnp.sum(channel_sums(dstep))

    def direct_gradients(
        self, dcolumns: list[Float32[Array, "rows C"]]
    ) -> list[Float32[Array, "phase_rows C"]]:
        """Gradient of x through the straight-through codes and the unquantized elements."""
        passed = [
            d * (tap.inside | jnp.logical_not(tap.mask)).astype(d.dtype)
            for tap, d in zip(self.taps(), dcolumns, strict=True)
        ]
        return jax.linear_transpose(self.geometry.tap_rows, self.phases)(passed)[0]

    def coefficient_gradients(
        self, dpolynomials: list[Float32[Array, "rows C"]]
    ) -> dict[str, Float32[Array, "taps C"]]:
        """Gradient of the coefficients."""
        us = self.geometry.tap_rows(self.all_units())
        spread = {
            name: [jnp.broadcast_to(row, us[0].shape) for row in c]
            for name, c in self.coefficients.items()
        }
        pull = jax.vjp(lambda c: self.rounding.polynomials(c, us), spread)[1]
        sums = {name: map(channel_sums, rows) for name, rows in pull(dpolynomials)[0].items()}
        return {name: jnp.stack(list(rows)) for name, rows in sums.items()}

    def unit_gradients(
        self, dpolynomials: list[Float32[Array, "rows C"]]
    ) -> list[Float32[Array, "phase_rows C"]]:
        """Gradient of u through the polynomials."""
        us = self.all_units()

        def polynomials(
            us: list[Float32[Array, "phase_rows C"]],
        ) -> list[Float32[Array, "rows C"]]:
            return self.rounding.polynomials(self.coefficients, self.geometry.tap_rows(us))

        return jax.vjp(polynomials, us)[1](dpolynomials)[0]


def pin(
    quantizer: ActivationQuantizer, values: list[Float[Array, "rows C"]]
) -> list[Float[Array, "rows C"]]:
    """`values`, computed once: the CPU compiler would otherwise fuse them into all their readers.

    The compiler drops optimization barriers before it fuses, but never fuses across a matmul, so
    the values are multiplied with an identity matrix. The diagonal is computed from the step size:
    a compiler that does not know that step sizes are positive cannot simplify it away.
    """
    if jax.default_backend() != "cpu":
        return values
    one = (quantizer.step_size > 0).astype(values[0].dtype)
    eye = one * jnp.eye(values[0].shape[-1], dtype=values[0].dtype)
    return [value @ eye for value in values]
