"""Small forms of what is deployed: codes of a few bits as bytes, border coefficients of few bytes.

A code's lowest bit comes first, and codes cross the borders of bytes.
"""

import numpy as np

FORMATS = ("float32", "float16", "int8")  # of border coefficients
CHUNK = 2**20  # codes unpacked into bits at once; a multiple of 8, so that chunks end on bytes


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 codes of any shape below ``2^bits``.

    >>> pack(np.array([1, 2, 3, 0], np.uint8), 2)
    array([57], dtype=uint8)

    Returns:
      uint8 ``[ceil(size * bits / 8)]``.

    Raises:
      ValueError: a code has more bits.
    """
    flat = codes.ravel()
    if flat.size and int(flat.max()) >= 2**bits:
        raise ValueError(f"code {int(flat.max())} does not fit {bits} bits")
    parts = [_pack(flat[start : start + CHUNK], bits) for start in range(0, flat.size, CHUNK)]
    return np.concatenate([np.zeros(0, np.uint8), *parts])


def unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The first `count` codes of what `pack` made: uint8 ``[count]``."""
    size = packed_size(CHUNK, bits)
    parts = [_unpack(packed[start : start + size], bits) for start in range(0, packed.size, size)]
    return np.concatenate([np.zeros(0, np.uint8), *parts])[:count]


def encode(values: np.ndarray, format: str) -> tuple[np.ndarray, int]:
    """Coefficients in one of `FORMATS`, and the exponent of their common power of two.

    >>> encode(np.array([1.0, -0.26], np.float32), "int8")
    (array([ 64, -17], dtype=int8), -6)

    A power of two, so that what was decoded is encoded to the same bytes again: "int8" maps the
    largest magnitude to 64 or more, of 127.
    """
    if format != "int8":
        return values.astype(format), 0
    mantissa, exponent = np.frexp(np.max(np.abs(values), initial=0.0) / np.float32(127.0))
    exponent = int(exponent) - int(mantissa == 0.5)
    return np.clip(np.round(np.ldexp(values, -exponent)), -127, 127).astype(np.int8), exponent


def decode(stored: np.ndarray, exponent: int) -> np.ndarray:
    """float32 coefficients of what `encode` made."""
    return np.ldexp(stored.astype(np.float32), exponent)


def _pack(codes, bits):
    unpacked = np.unpackbits(codes.astype(np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(unpacked[:, :bits], bitorder="little")


def _unpack(packed, bits):
    unpacked = np.unpackbits(packed, bitorder="little")
    whole = unpacked[: unpacked.size // bits * bits].reshape(-1, bits)
    return np.packbits(whole, axis=1, bitorder="little")[:, 0]
