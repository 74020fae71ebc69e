"""Checks of what the img2col operations are called with."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS, max_code
from aquant_jax.layers.conv_geometry import Window
from gpu_ops import targets

Padding = str | Sequence[tuple[int, int]]
TWO = "two positive integers"


class ColumnsWindow(NamedTuple):
    """What is static about the columns."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    result: tuple[int, ...]  # shape of one image's columns

    def attributes(self) -> dict:
        low_high = sum(self.padding, ())
        return {
            "kernel": self.kernel, "stride": self.strides, "dilation": self.dilation,
            "padding": low_high, "groups": self.groups,
        }  # fmt: skip


def check_x(x, dtypes: tuple[str, ...]) -> None:
    """ValueError unless `x` has four axes and one of the dtypes."""
    if len(x.shape) != 4:
        raise ValueError(f"x has shape {x.shape}, not four axes [N, H, W, C]")
    if str(x.dtype) not in dtypes:
        raise ValueError(f"x is {x.dtype}, not one of {', '.join(dtypes)}")


def columns_window(shape, kernel, strides, padding, dilation, groups, align) -> ColumnsWindow:
    """What `gpu_ops.img2col` was told of the window over an input of this shape, checked."""
    named = (("kernel", kernel), ("strides", strides), ("dilation", dilation))
    kernel, strides, dilation = (_sizes(name, value) for name, value in named)
    if not _whole(groups) or groups < 1 or shape[3] % groups:
        raise ValueError(f"groups is {groups}, which does not divide the {shape[3]} channels of x")
    if not _whole(align) or align < 1:
        raise ValueError(f"align is {align}, not a positive integer")
    spans = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    pads = _pads(padding, shape[1:3], spans, strides)
    padded = tuple(low + size + high for size, (low, high) in zip(shape[1:3], pads, strict=True))
    if any(span > size for span, size in zip(spans, padded, strict=True)):
        raise ValueError(f"a window of {spans} is larger than the padded input, {padded}")
    out = tuple((n - k) // s + 1 for n, k, s in zip(padded, spans, strides, strict=True))
    row = -(-kernel[0] * kernel[1] * shape[3] // groups // align) * align
    result = (*out, groups, row)
    check_indices((*padded, shape[3]), result)
    return ColumnsWindow(kernel, strides, pads, dilation, groups, result)


def check_indices(padded: Sequence[int], columns: Sequence[int]) -> None:
    """ValueError if an image of these sizes, padded or as columns, has more than int32 counts."""
    for name, sizes in (("a padded image has", padded), ("an image's columns have", columns)):
        if (count := math.prod(int(size) for size in sizes)) > targets.MAX_INDEX:
            raise ValueError(f"{name} {count} elements; at most {targets.MAX_INDEX} fit")


def check_bits(name: str, bits: int) -> None:
    """ValueError unless a code may have so many bits."""
    if not _whole(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} is {bits}, not an integer of {MIN_BITS} to {MAX_BITS}")


def check_window(window: Window) -> None:
    """ValueError unless these are sizes of a window over one or two axes that it fits in."""
    rank = len(window.kernel)
    wanted = "one positive integer" if rank == 1 else TWO
    for name in ("kernel", "strides", "dilation"):
        _sizes(name, getattr(window, name), wanted, rank)
    if min(window.out) < 1:
        raise ValueError(f"a window of {window.kernel} is larger than the input {window.spatial}")


def _sizes(name: str, value, wanted: str = TWO, count: int = 2) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Iterable) else ()
    if len(sizes) != count or not all(_whole(size) and size > 0 for size in sizes):
        raise ValueError(f"{name} is {value}, not {wanted}")
    return tuple(map(int, sizes))


def _whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _pads(padding: Padding, sizes, spans, strides) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding is {padding!r}, not 'SAME', 'VALID' or pairs")
        padding = jax.lax.padtype_to_pads(sizes, spans, strides, padding)
    pairs = tuple(padding) if isinstance(padding, Iterable) else ()
    pads = [list(pair) if isinstance(pair, Iterable) else [] for pair in pairs]
    ends = [end for pair in pads for end in pair]
    good = [len(pair) for pair in pads] == [2, 2] and all(_whole(end) and end >= 0 for end in ends)
    if not good:
        raise ValueError(f"padding is {padding}, not two pairs of non-negative integers")
    return tuple((int(pair[0]), int(pair[1])) for pair in pads)


def stack(coefficients: Mapping[str, jax.Array], border: str, shape) -> jax.Array:
    """The coefficients of `border`, checked, as float32 ``[degree + 1, taps, C]``."""
    if border != "none" and border not in targets.COEFFICIENTS:
        known = ["none", *targets.COEFFICIENTS]
        raise ValueError(
            f"border {border!r} has no custom call, only {known} do; the jnp path serves it "
            "(aquant_jax.layers.im2col)"
        )
    names = targets.COEFFICIENTS.get(border, ())
    for name, value in coefficients.items():
        if name not in names:
            raise ValueError(f"coefficient {name!r} is none of border {border!r}: {list(names)}")
        if str(value.dtype) != "float32":
            raise ValueError(f"coefficient {name!r} is {value.dtype}, not float32")
    for name in names:
        found = tuple(coefficients[name].shape) if name in coefficients else None
        if found != shape:
            raise ValueError(f"coefficient {name!r} has shape {found}, not {shape}")
    if not names:
        return jnp.zeros((0, *shape), jnp.float32)
    return jnp.stack([jnp.asarray(coefficients[name]) for name in names])


def check_weights(x, codes, scale, zero_point, bits: int, act_bits: int) -> None:
    """ValueError unless these are the weights of a convolution of `x`."""
    check_bits("weight_bits", bits)
    check_bits("bits", act_bits)
    if len(codes.shape) != 4 or str(codes.dtype) != "uint8":
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, not uint8 [kh, kw, C / G, O]")
    channels = x.shape[-1]
    inner, outer = codes.shape[2], codes.shape[3]
    if not codes.size or channels % inner or outer % (channels // inner):
        raise ValueError(
            f"codes of shape {codes.shape} do not fit the {channels} channels of x: no number of "
            "groups gives both C / G and O / G"
        )
    for name, value in (("scale", scale), ("weight_zero_point", zero_point)):
        if value.shape != (outer,):
            raise ValueError(f"{name} has shape {value.shape}, not {(outer,)}")
    _check_known("scale", scale, lambda s: np.isfinite(s) & (s > 0), "a positive number")
    codes_of = f"a whole number of 0 to {2**bits - 1}"
    for name, value in (("codes", codes), ("weight_zero_point", zero_point)):
        _check_known(name, value, lambda q: (q == np.round(q)) & (q >= 0) & (q < 2**bits), codes_of)
    elements = int(np.prod(codes.shape[:3]))
    if (largest := elements * (2**bits - 1) * (2**act_bits - 1)) > targets.MAX_INDEX:
        raise ValueError(
            f"a sum of {elements} products of {bits} and {act_bits} bits may reach {largest}, "
            f"above {targets.MAX_INDEX}, the largest int32"
        )


def _check_known(name: str, values, good, wanted: str) -> None:
    """ValueError with the first of `values`, where they are known, that is not `good`."""
    if not isinstance(values, Tracer):
        known = np.asarray(values, np.float64)
        if not (fits := good(known)).all():
            raise ValueError(f"{name} has {known[~fits][0]:g}, not {wanted}")


def check_added(name: str, value, shape: tuple[int, ...]) -> None:
    """ValueError unless `value` is None or floats of this shape."""
    if value is None:
        return
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} is {value.dtype} {value.shape}, not floats {shape}")


def grid(step_size, zero_point, bits: int) -> tuple[jax.Array, jax.Array]:
    """Step size and zero point of an activation of so many bits, checked, as float32 scalars."""
    check_bits("bits", bits)
    normal = np.finfo(np.float32).tiny  # what is smaller counts as zero
    step = _scalar("step_size", step_size, lambda s: np.isfinite(s) and s >= normal, "positive")
    codes = f"an integer of 0 to {int(max_code(bits))}"
    return step, _scalar("zero_point", zero_point, lambda z: z in range(2**bits), codes)


def _scalar(name: str, value, good, wanted: str) -> jax.Array:
    """`value` as a float32 scalar, checked, as such, when it is known."""
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}, not ()")
    with np.errstate(over="ignore", under="ignore"):
        if not isinstance(value, Tracer) and not good(np.float32(value)):
            raise ValueError(f"{name} is {float(value)}, not {wanted}")
    return jnp.asarray(value, jnp.float32)
