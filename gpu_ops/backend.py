"""The backend of the library that runs the compiled operations.

The reference implementation serves everything that is not built here: platforms without compiled
handlers, borders that a user registered, the sigmoid, and more than two spatial axes.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.backend import ReferenceBackend
from aquant_jax.layers.column import Rounding, contract
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import targets
from gpu_ops.border_columns import border_columns
from gpu_ops.border_conv import border_conv
from gpu_ops.conv_border_int8 import conv_border_int8
from gpu_ops.geometry import with_two_axes


class CustomCallBackend(NamedTuple):
    """An `aquant_jax.layers.backend.Backend`.

    ``aq.Compiler(...)`` and ``Quantized.with_backend(...)`` take it.

    Attributes:
      name: identifies the implementation in fingerprints.
      one_pass_weights: a CPU trains convolutions of at most this many weights, which then stay in a
        core's cache, in one pass without columns.
    """

    name: str = "gpu_ops"
    one_pass_weights: int = 2**17

    def convolve(
        self,
        x: AnyArray,
        keep: AnyArray | None,
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        kernel: AnyArray,
        geometry: ConvGeometry,
        rounding: Rounding,
    ) -> jax.Array:
        """See `aquant_jax.layers.backend.Backend`; by a custom call where there is one."""
        activation = (x, keep, quantizer, coefficients)
        built_in = rounding.border in targets.COEFFICIENTS and rounding.phi in targets.PHIS
        if not built_in or not _has_handlers(geometry):
            return ReferenceBackend().convolve(*activation, kernel, geometry, rounding)
        taps, groups, inner, outer = kernel.shape
        flat = jnp.reshape(kernel, (taps * groups * inner, -1))
        served = groups == 1 or inner == outer == 1
        small = kernel.size <= self.one_pass_weights
        if served and small and jax.default_backend() == "cpu":
            return border_conv(*activation, flat, geometry, rounding)
        columns = border_columns(*activation, geometry, rounding)
        if groups == 1:
            rows = columns.reshape(-1, taps * inner) @ flat
            return rows.reshape(*columns.shape[:-2], outer)
        products = [contract(columns[..., t, :], kernel[t]) for t in range(taps)]
        return functools.reduce(operator.add, products)

    def convolve_codes(
        self,
        x: AnyArray,
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
    ) -> jax.Array:
        """See `aquant_jax.layers.backend.Backend`; by `conv_border_int8` where it serves."""
        rounding = _deployed(rounding)
        built_in = rounding.border is None or rounding.border in targets.COEFFICIENTS
        if not built_in or rounding.phi not in targets.PHIS or not _has_handlers(geometry):
            backend = ReferenceBackend()
            return backend.convolve_codes(x, quantizer, coefficients, weights, geometry, rounding)
        planar = with_two_axes(geometry)
        images = x.reshape(x.shape[0], *planar.spatial, x.shape[-1])
        codes = weights.codes.reshape(*planar.kernel, *weights.codes.shape[-2:])
        planar_weights = weights._replace(codes=codes)
        y = conv_border_int8(images, quantizer, coefficients, planar_weights, rounding, planar)
        return y.reshape(x.shape[0], *geometry.out, y.shape[-1])


def backend() -> CustomCallBackend:
    """The compiled operations, as an object to be passed to the library."""
    return CustomCallBackend()


def _has_handlers(geometry: ConvGeometry) -> bool:
    """Whether the default device has handlers for a convolution over these axes."""
    return len(geometry.kernel) <= 2 and jax.default_backend() in targets.PLATFORMS


def _deployed(rounding: Rounding) -> Rounding:
    """`rounding` with the phi that inference uses; rounding to nearest has none."""
    if rounding.border is None:
        return rounding._replace(phi="identity")
    return rounding._replace(phi=borders.get_phi(rounding.phi).deployed)
