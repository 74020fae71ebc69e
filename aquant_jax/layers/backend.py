"""The operations that a backend may replace, and their reference implementation."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import NEAREST, ActivationQuantizer
from aquant_jax.layers import im2col
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.integer import QuantizedWeights


@runtime_checkable
class Backend(Protocol):
    """Convolutions over columns, for training and for deployment; hashable.

    ``gpu_ops.backend()`` is one.
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
        x: Float32[AnyArray, "N *padded C"],
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
    ) -> Float32[Array, "N *out O"]:
        """The convolution of the codes of `x` with weight codes; for inference.

        Args:
          x: activation, already padded.
          quantizer: step size and zero point.
          coefficients: border coefficients ``(taps, C)`` by name; empty for nearest.
          weights: codes ``[*kernel, C / groups, O]``.
          geometry: over the padded input.
          rounding: bits and border.

        Returns:
          The result of `convolve` for the dequantized weights.
        """
        ...


class ReferenceBackend(NamedTuple):
    """The reference implementation, in JAX operations."""

    name: str = "reference"

    convolve = staticmethod(im2col.convolve)

    def convolve_codes(
        self,
        x: Float32[AnyArray, "N *padded C"],
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
    ) -> Float32[Array, "N *out O"]:
        """See `Backend.convolve_codes`."""
        kernel = weights.dequantized(geometry.groups)
        if rounding.border is None:
            rounding = rounding._replace(border="constant", phi="identity")
            coefficients = {"b0": jnp.full((geometry.taps, x.shape[-1]), NEAREST, jnp.float32)}
        return im2col.convolve(x, None, quantizer, coefficients, kernel, geometry, rounding)
