"""One im2col column: the rounding of its elements, and its product with the kernel of one tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import CoefficientRows, Coefficients
from aquant_jax.arithmetic.broadcast import channel_sums


class Rounding(NamedTuple):
    """The rounding of a layer's activation (static, hashable).

    Attributes:
      bits: of the codes, 2 to 8.
      border: name of the border function; None rounds to nearest.
      phi: see `border.PHIS`.
      shared_across_taps: whether the taps of a channel share the mean of their polynomials (Eq. 9).
      per_channel: whether an activation has one border, whatever tap reads it. Padding has the code
        of the zero point then.
    """

    bits: int
    border: str | None = None
    phi: str = "identity"
    shared_across_taps: bool = False
    per_channel: bool = False

    def polynomials(
        self, coefficients: Coefficients | CoefficientRows, us: Sequence[Float[AnyArray, "..."]]
    ) -> list[Float[Array, "..."]]:
        """The polynomial of every tap, or the one that they share; see `border.polynomials`."""
        assert self.border is not None
        return borders.polynomials(self.border, self.shared_across_taps, coefficients, us)

    def borders(
        self, polynomials: Sequence[Float[Array, "..."]], taps: int
    ) -> list[Float[Array, "..."]]:
        """One border per tap, repeated where the taps share it."""
        phi = borders.get_phi(self.phi).apply
        return [phi(p) for p in polynomials] * (taps // len(polynomials))


def contract(
    column: Float[Array, "*rows C"], kernel: Float[Array, "groups Cg Og"]
) -> Float[Array, "*rows groups*Og"]:
    """Product of one tap's column and its kernel, group by group."""
    groups, inner, outer = kernel.shape
    if groups == 1:
        return column @ kernel[0]
    if inner == 1:
        return _scale(column if outer == 1 else jnp.repeat(column, outer, axis=-1), kernel.ravel())
    grouped = column.reshape(*column.shape[:-1], groups, inner)
    product = jnp.einsum("...gi,gio->...go", grouped, kernel)
    return product.reshape(*column.shape[:-1], groups * outer)


@jax.custom_vjp
def _scale(
    column: Float[AnyArray, "*rows C"], factors: Float[AnyArray, "C"]
) -> Float[Array, "*rows C"]:
    """``column * factors`` over the last axis."""
    return jnp.multiply(column, jnp.expand_dims(factors, range(column.ndim - 1)))


def _scale_forward(
    column: Float[AnyArray, "*rows C"], factors: Float[AnyArray, "C"]
) -> tuple[Float[Array, "*rows C"], tuple[Float[AnyArray, "*rows C"], Float[AnyArray, "C"]]]:
    return _scale(column, factors), (column, factors)


def _scale_backward(
    saved: tuple[Float[AnyArray, "*rows C"], Float[AnyArray, "C"]], dy: Float[AnyArray, "*rows C"]
) -> tuple[Float[Array, "*rows C"], Float[Array, "C"]]:
    column, factors = saved
    return _scale(dy, factors), channel_sums(column * dy)


_scale.defvjp(_scale_forward, _scale_backward)
