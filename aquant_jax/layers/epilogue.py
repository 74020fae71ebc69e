"""What becomes of a deployed layer's sums: bias, residual, clip, maximum, codes of its readers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import (
    NEAREST,
    ActivationQuantizer,
    dequantize,
    quantize,
    to_units,
)
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry


class Codes(NamedTuple):
    """An activation that is quantized already (a pytree).

    Attributes:
      codes: integers of at most 8 bits.
      quantizer: what they stand for.
    """

    codes: UInt8[AnyArray, "*shape"]
    quantizer: ActivationQuantizer

    def dequantized(self) -> Float32[Array, "*shape"]:
        """``s * (q - z)``."""
        return dequantize(self.codes.astype(jnp.float32), *self.quantizer)


class Requantization(NamedTuple):
    """How a result is quantized for one of its readers.

    Attributes:
      quantizer: of the reader's activation.
      rounding: its bits and border.
      coefficients: float32 ``(1, O)`` by name, one border a channel; empty for nearest.
    """

    quantizer: ActivationQuantizer
    rounding: Rounding
    coefficients: Coefficients

    def codes(self, y: Float[AnyArray, "*shape O"]) -> UInt8[Array, "*shape O"]:
        """The codes of `y`; that of not-a-number is 0."""
        u = to_units(y, 1.0 / self.quantizer.step_size)
        border = channel_border(self.rounding, self.coefficients, u)
        codes = quantize(u, self.quantizer.zero_point, self.rounding.bits, border)
        return jnp.nan_to_num(codes).astype(jnp.uint8)


class Epilogue(NamedTuple):
    """``y = max_pool(clip(sums + bias + residual))``, as values, as codes, or as both.

    Attributes:
      bias: floats ``[O]``, or None.
      residual: floats or codes of the shape of the sums, or None.
      low, high: what they are clipped to.
      values: whether the result is wanted as values.
      requantizations: the tensors of codes that are wanted.
      pool: windows whose maximum is the result; None for none.
    """

    bias: AnyArray | None = None
    residual: AnyArray | Codes | None = None
    low: float = -math.inf
    high: float = math.inf
    values: bool = True
    requantizations: tuple[Requantization, ...] = ()
    pool: ConvGeometry | None = None

    def apply(self, y: Float[Array, "*shape O"]) -> Results:
        """The results, in JAX operations.

        Args:
          y: the dequantized sums.
        """
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias, range(y.ndim - 1))
        if isinstance(self.residual, Codes):
            y = y + self.residual.dequantized()
        elif self.residual is not None:
            y = y + self.residual.astype(jnp.float32)
        if (self.low, self.high) != (-math.inf, math.inf):
            y = jnp.clip(y, self.low, self.high)
        if self.pool is not None:
            y = _max_pool(y, self.pool)
        return Results(y if self.values else None, tuple(r.codes(y) for r in self.requantizations))

    def staged(self, run: Callable[[Epilogue], Results]) -> Results:
        """The results, in JAX operations from the maximum on.

        Args:
          run: gives those of an epilogue without a maximum and codes.
        """
        y = run(self._replace(pool=None, values=True, requantizations=())).values
        assert y is not None
        rest = Epilogue(pool=self.pool, values=self.values, requantizations=self.requantizations)
        return rest.apply(y)


NO_EPILOGUE = Epilogue()


def _max_pool(y: Float[AnyArray, "N *spatial O"], pool: ConvGeometry) -> Float[Array, "N *out O"]:
    """The maximum over the windows of `pool`."""
    window, strides, dilation = ((1, *s, 1) for s in (pool.kernel, pool.strides, pool.dilation))
    padding = ((0, 0), *pool.padding, (0, 0))
    least = np.array(-math.inf, y.dtype)
    return jax.lax.reduce_window(
        y, least, jax.lax.max, window, strides, padding, window_dilation=dilation
    )


def coded(
    x: Float[AnyArray, "*shape C"] | Codes,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    rounding: Rounding,
) -> Float[AnyArray, "*shape C"] | Codes:
    """An activation as codes, where it has one border a channel."""
    if isinstance(x, Codes) or not rounding.per_channel:
        return x
    return Codes(Requantization(quantizer, rounding, coefficients).codes(x), quantizer)


def for_columns(
    x: Float[AnyArray, "*shape C"] | Codes,
    quantizer: ActivationQuantizer,
    coefficients: Coefficients,
    rounding: Rounding,
) -> tuple[Float[AnyArray, "*shape C"], Coefficients, Rounding]:
    """The activation, coefficients and rounding of columns: codes become the values that they stand
    for, which nearest rounding brings back."""
    x = coded(x, quantizer, coefficients, rounding)
    if isinstance(x, Codes):
        return x.dequantized(), {}, Rounding(rounding.bits)
    return x, coefficients, rounding


class Results(NamedTuple):
    """What an epilogue gives (a pytree).

    Attributes:
      values: float32, or None where they are not wanted.
      codes: one array for every requantization, in order.
    """

    values: Float32[Array, "*shape O"] | None
    codes: tuple[UInt8[Array, "*shape O"], ...] = ()


def channel_border(
    rounding: Rounding, coefficients: Coefficients, u: Float[AnyArray, "*shape C"]
) -> Float[Array, "..."] | float:
    """One border a channel of `u`, which is in units of the step size."""
    if rounding.border is None:
        return NEAREST
    rows = {name: c.reshape((1,) * u.ndim + c.shape[-1:]) for name, c in coefficients.items()}
    (border,) = borders.borders(rounding.border, rounding.phi, False, rows, [u])
    return border
