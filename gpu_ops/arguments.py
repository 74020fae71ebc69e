"""Checks of the arguments of the operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.border import Coefficients
from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS, ActivationQuantizer, max_code
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.epilogue import Codes, Epilogue
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import targets
from gpu_ops.geometry import check_geometry, is_integer


def check_x(x: AnyArray, dtypes: tuple[str, ...]) -> None:
    """ValueError unless `x` has four axes and one of the dtypes."""
    if len(x.shape) != 4:
        raise ValueError(f"x has shape {x.shape}, not four axes [N, H, W, C]")
    if str(x.dtype) not in dtypes:
        raise ValueError(f"x is {x.dtype}, not one of {', '.join(dtypes)}")


def check_bits(name: str, bits: int) -> None:
    """ValueError unless a code may have this many bits."""
    if not is_integer(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} is {bits}, not an integer of {MIN_BITS} to {MAX_BITS}")


def check_quantizer(quantizer: ActivationQuantizer, bits: int) -> ActivationQuantizer:
    """`quantizer` with float32 scalars; ValueError unless it fits codes of this many bits."""
    check_bits("bits", bits)
    normal = np.finfo(np.float32).tiny  # smaller numbers count as zero
    positive = _scalar(
        "step_size", quantizer.step_size, lambda s: np.isfinite(s) and s >= normal, "positive"
    )
    wanted = f"an integer of 0 to {int(max_code(bits))}"
    code = _scalar("zero_point", quantizer.zero_point, lambda z: z in range(2**bits), wanted)
    return ActivationQuantizer(positive, code)


def stack_coefficients(
    coefficients: Coefficients, border: str | None, shape: tuple[int, int]
) -> jax.Array:
    """The coefficients of `border`, checked, as float32 ``[degree + 1, taps, C]``.

    Args:
      coefficients: by name; none for nearest.
      border: name of the border function; None for nearest, of degree -1.
      shape: (taps, C).
    """
    if border is not None and border not in targets.COEFFICIENTS:
        known = [None, *targets.COEFFICIENTS]
        raise ValueError(
            f"border {border!r} has no custom call, only {known} do; "
            "aquant_jax.layers.backend.ReferenceBackend serves it"
        )
    names = () if border is None else targets.COEFFICIENTS[border]
    for name, value in coefficients.items():
        if name not in names:
            raise ValueError(f"coefficient {name!r} is not one of border {border!r}: {list(names)}")
        if str(value.dtype) != "float32":
            raise ValueError(f"coefficient {name!r} is {value.dtype}, not float32")
    for name in names:
        given = tuple(coefficients[name].shape) if name in coefficients else None
        if given != shape:
            raise ValueError(f"coefficient {name!r} has shape {given}, not {shape}")
    if not names:
        return jnp.zeros((0, *shape), jnp.float32)
    return jnp.stack([jnp.asarray(coefficients[name]) for name in names])


def check_weights(
    weights: QuantizedWeights, geometry: ConvGeometry, channels: int, rounding: Rounding
) -> None:
    """ValueError unless these weights fit a convolution of this many channels."""
    codes, scale, zero_point, bits = weights
    check_bits("weight_bits", bits)
    check_bits("bits", rounding.bits)
    inner = channels // geometry.groups
    fits = len(codes.shape) == 4 and codes.shape[:3] == (*geometry.kernel, inner)
    if not fits or str(codes.dtype) != "uint8":
        wanted = f"uint8 ({', '.join(map(str, (*geometry.kernel, inner)))}, O)"
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, not {wanted}")
    outer = codes.shape[3]
    if not codes.size or outer % geometry.groups:
        wanted = f"a positive multiple of the {geometry.groups} groups"
        raise ValueError(f"codes have {outer} outputs, not {wanted}")
    for name, value in (("scale", scale), ("weight zero_point", zero_point)):
        if value.shape != (outer,):
            raise ValueError(f"{name} has shape {value.shape}, not {(outer,)}")
    _check_known("scale", scale, lambda s: np.isfinite(s) & (s > 0), "a positive number")
    wanted = f"a whole number of 0 to {2**bits - 1}"
    for name, value in (("codes", codes), ("weight zero_point", zero_point)):
        _check_known(name, value, lambda q: (q == np.round(q)) & (q >= 0) & (q < 2**bits), wanted)
    elements = geometry.taps * inner
    if (largest := elements * (2**bits - 1) * (2**rounding.bits - 1)) > targets.MAX_INDEX:
        raise ValueError(
            f"a sum of {elements} products of {bits} and {rounding.bits} bits may reach {largest}, "
            f"above {targets.MAX_INDEX}, the largest int32"
        )


def check_epilogue(epilogue: Epilogue, shape: tuple[int, ...]) -> None:
    """ValueError unless bias, residual, pool and coefficients fit sums of this shape."""
    if epilogue.pool is not None:
        check_geometry(epilogue.pool, shape)
    check_addend("bias", epilogue.bias, shape[-1:])
    residual = epilogue.residual
    if isinstance(residual, Codes):
        if residual.codes.shape != shape or str(residual.codes.dtype) != "uint8":
            found = f"{residual.codes.dtype} {residual.codes.shape}"
            raise ValueError(f"residual codes are {found}, not uint8 {shape}")
    else:
        check_addend("residual", residual, shape)
    for quantizer, rounding, coefficients in epilogue.requantizations:
        check_quantizer(quantizer, rounding.bits)
        stack_coefficients(coefficients, rounding.border, (1, shape[-1]))


def check_addend(name: str, value: AnyArray | None, shape: tuple[int, ...]) -> None:
    """ValueError unless `value` is None or floats of this shape."""
    if value is None:
        return
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} is {value.dtype} {value.shape}, not floats {shape}")


def _check_known(
    name: str, values: ArrayLike, good: Callable[[np.ndarray], np.ndarray], wanted: str
) -> None:
    """ValueError with the first of `values`, where they are known, that is not `good`."""
    if not isinstance(values, Tracer):
        known = np.asarray(values, np.float64)
        if not (fits := good(known)).all():
            raise ValueError(f"{name} has {known[~fits][0]:g}, not {wanted}")


def _scalar(name: str, value: Any, good: Callable[[np.float32], Any], wanted: str) -> jax.Array:
    """`value` as a float32 scalar, checked in float32 where it is known."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}, not ()")
    with np.errstate(over="ignore", under="ignore"):
        if not isinstance(value, Tracer) and not good(np.float32(value)):
            raise ValueError(f"{name} is {float(value)}, not {wanted}")
    return jnp.asarray(value, jnp.float32)
