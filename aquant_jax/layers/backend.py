"""The operations that a backend may replace, and their reference implementation."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import NEAREST, ActivationQuantizer
from aquant_jax.layers import im2col
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.epilogue import NO_EPILOGUE, Codes, Epilogue, Results, for_columns
from aquant_jax.layers.integer import QuantizedWeights


@runtime_checkable
class Backend(Protocol):
    """Convolutions over columns, for training and for deployment; hashable.

    ``gpu_ops.backend()`` is one.

    >>> import aquant_jax as aq
    >>> isinstance(aq.Compiler().backend, aq.Backend)
    True
    """

    @property
    def name(self) -> str:
        """Identifies the implementation in fingerprints."""
        ...

    def convolve(
        self,
        x: Float32[AnyArray, "N *padded C"],
        keep: Bool[AnyArray, "N *padded C"] | None,
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        kernel: Float32[AnyArray, "taps groups Cg Og"],
        geometry: ConvGeometry,
        rounding: Rounding,
    ) -> Float32[Array, "N *out O"]:
        """Has the contract of `im2col.convolve`; differentiable."""
        ...

    def convolve_codes(
        self,
        x: Float32[AnyArray, "N *spatial C"] | Codes,
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> Results:
        """The convolution of the codes of `x` with weight codes; for inference.

        Args:
          x: activation, or its codes.
          quantizer: step size and zero point.
          coefficients: border coefficients ``(taps, C)`` by name, ``(1, C)`` with one border a
            channel; empty for nearest. Codes do not need them.
          weights: codes ``[*kernel, C / groups, O]``.
          geometry: of the convolution; its padding is of zeros.
          rounding: bits and border.
          epilogue: what becomes of the sums.

        Returns:
          What `epilogue` makes of the result of `convolve` for the dequantized weights.
        """
        ...


class ReferenceBackend(NamedTuple):
    """The reference implementation, in JAX operations."""

    name: str = "reference"

    convolve = staticmethod(im2col.convolve)

    def convolve_codes(
        self,
        x: Float32[AnyArray, "N *spatial C"] | Codes,
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> Results:
        """See `Backend.convolve_codes`."""
        x, coefficients, rounding = for_columns(x, quantizer, coefficients, rounding)
        if rounding.border is None:
            rounding = Rounding(rounding.bits, "constant")
            coefficients = {"b0": jnp.full((geometry.taps, x.shape[-1]), NEAREST, jnp.float32)}
        padding = [(0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0)]
        padded, zero = jax.lax.pad(x, jnp.float32(0), padding), geometry.without_padding()
        kernel = weights.dequantized(geometry.groups)
        y = im2col.convolve(padded, None, quantizer, coefficients, kernel, zero, rounding)
        return epilogue.apply(y)
