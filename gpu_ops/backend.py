"""The backend of the library that runs the compiled operations.

The reference implementation serves everything that is not built here: platforms without compiled
handlers, borders that a user registered, the sigmoid, and more than two spatial axes.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.backend import ReferenceBackend
from aquant_jax.layers.column import Rounding, contract
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.epilogue import NO_EPILOGUE, Codes, Epilogue, Results, coded
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import targets
from gpu_ops.border_columns import border_columns
from gpu_ops.border_conv import border_conv
from gpu_ops.conv_border_int8 import conv_border_int8
from gpu_ops.geometry import with_two_axes


class CustomCallBackend(NamedTuple):
    """An ``aq.Backend``.

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
        """As in ``aq.Backend``, by a custom call where there is one."""
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
        x: AnyArray | Codes,
        quantizer: ActivationQuantizer,
        coefficients: Coefficients,
        weights: QuantizedWeights,
        geometry: ConvGeometry,
        rounding: Rounding,
        epilogue: Epilogue = NO_EPILOGUE,
    ) -> Results:
        """As in ``aq.Backend``, by `conv_border_int8` where it serves."""
        wanted = epilogue.requantizations
        if not all(_built_in(r.rounding) for r in wanted):
            operands = (x, quantizer, coefficients, weights, geometry, rounding)
            return epilogue.staged(lambda first: self.convolve_codes(*operands, first))
        if not _built_in(rounding):
            x = coded(x, quantizer, coefficients, rounding)
        served = isinstance(x, Codes) or _built_in(rounding)
        if not served or not _has_handlers(geometry):
            operands = (x, quantizer, coefficients, weights, geometry, rounding, epilogue)
            return ReferenceBackend().convolve_codes(*operands)
        planar, out = with_two_axes(geometry), (epilogue.pool or geometry).out
        codes = weights.codes.reshape(*planar.kernel, *weights.codes.shape[-2:])
        epilogue = epilogue._replace(
            residual=_images(epilogue.residual, planar.out),
            pool=None if epilogue.pool is None else with_two_axes(epilogue.pool),
            requantizations=tuple(r._replace(rounding=_deployed(r.rounding)) for r in wanted),
        )
        results = conv_border_int8(
            _images(x, planar.spatial), quantizer, coefficients, weights._replace(codes=codes),
            _deployed(rounding), planar, epilogue,
        )  # fmt: skip
        return _images(results, out)


def backend() -> CustomCallBackend:
    """The compiled operations, as an object to be passed to the library."""
    return CustomCallBackend()


def _has_handlers(geometry: ConvGeometry) -> bool:
    """Whether the default device has handlers for a convolution over these axes."""
    return len(geometry.kernel) <= 2 and jax.default_backend() in targets.PLATFORMS


def _built_in(rounding: Rounding) -> bool:
    """Whether the handlers know this border."""
    border = rounding.border is None or rounding.border in targets.COEFFICIENTS
    return border and _deployed(rounding).phi in targets.PHIS


def _images(tree: Any, spatial: tuple[int, ...]) -> Any:
    """The arrays of `tree` as ``[N, *spatial, C]``, but for scalars."""
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0], *spatial, a.shape[-1]) if jnp.ndim(a) else a, tree
    )


def _deployed(rounding: Rounding) -> Rounding:
    """`rounding` with the phi that inference uses; rounding to nearest has none."""
    if rounding.border is None:
        return rounding._replace(phi="identity")
    return rounding._replace(phi=borders.get_phi(rounding.phi).deployed)
