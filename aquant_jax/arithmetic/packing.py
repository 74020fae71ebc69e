"""Compact storage: codes of a few bits packed into bytes, border coefficients in a few bytes.

The lowest bit of a code comes first, and a code may span two bytes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped, UInt8

FORMATS = ("float32", "float16", "int8")  # of border coefficients
CHUNK = 2**20  # codes unpacked into bits at once; a multiple of 8, so that chunks end on bytes


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: UInt8[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, "bytes"]:
    """Packs codes below ``2^bits``.

    >>> pack(np.array([1, 2, 3, 0], np.uint8), 2)
    array([57], dtype=uint8)

    Returns:
      uint8 ``[ceil(size * bits / 8)]``.

    Raises:
      ValueError: a code does not fit.
    """
    flat = codes.ravel()
    if flat.size and int(flat.max()) >= 2**bits:
        raise ValueError(f"code {int(flat.max())} does not fit {bits} bits")
    parts = [_pack(flat[start : start + CHUNK], bits) for start in range(0, flat.size, CHUNK)]
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def unpack(
    packed: UInt8[np.ndarray, "bytes"], count: int, bits: int
) -> UInt8[np.ndarray, "{count}"]:
    """The first `count` codes that `pack` packed."""
    size = packed_size(CHUNK, bits)
    parts = [_unpack(packed[start : start + size], bits) for start in range(0, packed.size, size)]
    return np.concatenate([np.zeros(0, np.uint8), *parts])[:count]


def encode(
    values: Float[np.ndarray, "*shape"], format: str
) -> tuple[Shaped[np.ndarray, "*shape"], int]:
    """Border coefficients in a storage format.

    >>> encode(np.array([1.0, -0.26], np.float32), "int8")
    (array([ 64, -17], dtype=int8), -6)

    Args:
      values: float32 coefficients.
      format: one of `FORMATS`. "int8" maps the largest magnitude to 64 or more, of 127.

    Returns:
      The stored array and the exponent of its scale ``2^exponent``. The scale is a power of two, so
      encoding the decoded values again gives the same bytes.
    """
    if format != "int8":
        return values.astype(format), 0
    mantissa, exponent = np.frexp(np.max(np.abs(values), initial=0.0) / np.float32(127.0))
    exponent = int(exponent) - int(mantissa == 0.5)
    return np.clip(np.round(np.ldexp(values, -exponent)), -127, 127).astype(np.int8), exponent


def decode(stored: Shaped[np.ndarray, "*shape"], exponent: int) -> Float[np.ndarray, "*shape"]:
    """The float32 coefficients that `encode` stored: ``stored * 2^exponent``."""
    return np.ldexp(stored.astype(np.float32), exponent)


def _pack(codes: UInt8[np.ndarray, "count"], bits: int) -> UInt8[np.ndarray, "bytes"]:
    unpacked = np.unpackbits(codes.astype(np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(unpacked[:, :bits], bitorder="little")


def _unpack(packed: UInt8[np.ndarray, "bytes"], bits: int) -> UInt8[np.ndarray, "count"]:
    unpacked = np.unpackbits(packed, bitorder="little")
    rows = unpacked[: unpacked.size // bits * bits].reshape(-1, bits)
    return np.packbits(rows, axis=1, bitorder="little")[:, 0]
