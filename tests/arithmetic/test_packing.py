"""Codes of a few bits, and coefficients of few bytes, come back as they went."""

import numpy as np
import pytest

from aquant_jax.arithmetic import packing
from aquant_jax.arithmetic.packing import decode, encode, pack, packed_size, unpack
from tests.support.nets import rng_of


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back(bits):
    for count in (0, 1, 7, 8, 9, 1000):
        codes = rng_of(count).integers(0, 2**bits, count, dtype=np.uint8)
        packed = pack(codes, bits)
        assert packed.nbytes == packed_size(count, bits) == -(-count * bits // 8)
        np.testing.assert_array_equal(unpack(packed, count, bits), codes)


def test_long_arrays_are_packed_in_chunks(monkeypatch):
    codes = rng_of(0).integers(0, 8, 1003, dtype=np.uint8)
    whole = pack(codes, 3)
    monkeypatch.setattr(packing, "CHUNK", 64)
    np.testing.assert_array_equal(pack(codes, 3), whole)
    np.testing.assert_array_equal(unpack(whole, 1003, 3), codes)


def test_four_codes_of_two_bits_are_one_byte():
    np.testing.assert_array_equal(pack(np.array([1, 2, 3, 0], np.uint8), 2), [0b00111001])


def test_a_code_that_does_not_fit():
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack(np.array([0, 4], np.uint8), 2)


@pytest.mark.parametrize(
    ("format", "dtype", "share"),
    [("float32", np.float32, 0), ("float16", np.float16, 2**-11), ("int8", np.int8, 1 / 127)],
)
def test_coefficients_are_rounded_once(format, dtype, share):
    rng = rng_of(0)
    tops = [127 * 2.0**k for k in range(-12, 4)] + list(np.exp(rng.uniform(-6, 3, 100)))
    for top in tops:
        values = (rng.uniform(-1, 1, 50) * top).astype(np.float32)
        values[7] = top
        stored, exponent = encode(values, format)
        assert stored.dtype == dtype
        rounded = decode(stored, exponent)
        assert np.abs(rounded - values).max() <= share * top
        again, same = encode(rounded, format)
        np.testing.assert_array_equal(again, stored)
        assert same == exponent


@pytest.mark.parametrize("format", packing.FORMATS)
def test_the_coefficients_that_borders_start_from_are_exact(format):
    for values in (np.zeros(3, np.float32), np.full(3, 0.5, np.float32), np.zeros(0, np.float32)):
        np.testing.assert_array_equal(decode(*encode(values, format)), values)
