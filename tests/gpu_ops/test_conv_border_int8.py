"""Integer convolution against numpy in 64-bit integers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import Codes, Epilogue, conv_border_int8
from gpu_ops.conv_border_int8 import ALIGN, by_columns
from gpu_ops.conv_int8 import MOST_TENSORS, serves
from tests.support.img2col_reference import Case, random_case, reference
from tests.support.nets import rng_of

WEIGHT_BITS = (2, 4, 7, 8)


def weights_of(case, bits, seed=0):
    """Quantized weights with codes [kh, kw, C / G, O]."""
    rng = rng_of(seed)
    inner, outer = case.shape[-1] // case.groups, case.groups * (1 + seed % 3)
    codes = rng.integers(0, 2**bits, (*case.kernel, inner, outer)).astype(np.uint8)
    zero = rng.integers(0, 2**bits, outer).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, outer).astype(np.float32)
    return QuantizedWeights(codes, scale, zero, bits)


WAYS = pytest.mark.parametrize("way", [conv_border_int8, by_columns])


def call(case, operands, weights, way=conv_border_int8, **epilogue):
    x, step, zero, coefficients = operands
    case, quantizer = case._replace(shape=x.shape), ActivationQuantizer(step, zero)
    return way(
        jnp.asarray(x).astype(case.dtype), quantizer, coefficients, weights, case.rounding(),
        case.geometry(), Epilogue(**epilogue),
    ).values  # fmt: skip


def exact(case, operands, weights):
    """The sums of whole numbers, [N, OH, OW, O] as float64, times both scales."""
    x, step, zero, coefficients = operands
    codes = weights.codes
    columns = reference(x, step, zero, coefficients, case._replace(output="int8", align=1))
    q = columns.astype(np.int64) + (128 if case.bits == 8 else 0) - int(zero)
    w = codes.astype(np.int64) - weights.zero_point.astype(np.int64)
    w = w.reshape(-1, case.groups, codes.shape[-1] // case.groups)
    total = np.einsum("nhwgk,kgo->nhwgo", q, w).reshape(*q.shape[:3], -1)
    return total * np.float64(step) * weights.scale


SEEDS = [s for s in range(12) if s != 5]  # all codes zero
# By columns, weights of any bits are the same product of int8: one number of bits a seed.
SUMS = [
    pytest.param(
        way, seed, bits,
        marks=[pytest.mark.slow] * (way is by_columns and bits != WEIGHT_BITS[seed % 4]),
    )
    for way in (conv_border_int8, by_columns) for seed in SEEDS for bits in WEIGHT_BITS
]  # fmt: skip


@pytest.mark.parametrize(("way", "seed", "bits"), SUMS)
def test_equals_sums_of_whole_numbers(way, seed, bits):
    case = random_case(seed)
    operands, weights = case.operands(seed), weights_of(case, bits, seed)
    expected = exact(case, operands, weights)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(call(case, operands, weights, way), expected, rtol=3e-7)


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
def test_what_is_filled_up_for_tensor_cores_counts_nothing(monkeypatch, groups, act_bits):
    case = Case(bits=act_bits, groups=groups)
    operands, weights = case.operands(1), weights_of(case, 8, 1)
    monkeypatch.setitem(ALIGN, jax.default_backend(), 16)
    found = call(case, operands, weights, by_columns)
    np.testing.assert_allclose(found, exact(case, operands, weights), rtol=3e-7)


@WAYS
def test_bias_residual_and_clip(way):
    case = Case()
    operands, weights = case.operands(2), weights_of(case, 4, 2)
    y = np.float32(exact(case, operands, weights))
    bias, residual = np.float32([0.5, -1.0, 2.0]), rng_of(3).normal(size=y.shape).astype("f")
    bias = np.resize(bias, y.shape[-1])
    found = call(case, operands, weights, way, bias=bias, residual=residual, low=0.0)
    np.testing.assert_allclose(found, np.maximum(y + bias + residual, 0), rtol=1e-5, atol=1e-5)


def test_a_cpu_runs_it_in_one_call():
    case = Case()
    text = jax.jit(lambda *o: call(case, o, weights_of(case, 4))).lower(*case.operands()).as_text()
    assert "gpu_ops_conv_int8" in text
    assert "dot_general" not in text


UNPADDED = ((0, 0), (0, 0))
ON_A_GPU = {
    "nearest": (Case(border=None), True),
    "pointwise": (Case(kernel=(1, 1), padding=UNPADDED), True),
    "padded pointwise": (Case(kernel=(1, 1)), False),
    "mean": (Case(padding=UNPADDED), False),
    "element": (Case(shared_across_taps=False), False),
}


@pytest.mark.parametrize(("case", "one_call"), ON_A_GPU.values(), ids=ON_A_GPU.keys())
def test_a_gpu_writes_columns_where_taps_have_own_codes(monkeypatch, case, one_call):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = jax.jit(lambda *operands: call(case, operands, weights_of(case, 4)))
    text = run.lower(*case.operands()).as_text()
    assert ("gpu_ops_conv_int8" in text) == one_call
    assert ("gpu_ops_img2col_border" in text) != one_call


def test_a_gpu_takes_codes_and_borders_a_channel_in_one_call(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = Case()
    x, step, zero, _ = case.operands()
    several = Epilogue(requantizations=(None,) * (MOST_TENSORS + 1))
    element, channel = case.rounding(), case.rounding()._replace(per_channel=True)
    codes = Codes(x, ActivationQuantizer(step, zero))
    served = [
        serves(*operands, case.geometry(), epilogue)
        for operands in ((x, element), (x, channel), (codes, element))
        for epilogue in (Epilogue(), several)
    ]
    assert served == [False, False, True, False, True, False]


def test_columns_are_multiplied_as_int8():
    case = Case()
    run = jax.jit(lambda *o: call(case, o, weights_of(case, 4), by_columns))
    text = run.lower(*case.operands()).as_text()
    assert "tensor<60x36xi8>, tensor<1x36xi8>) -> tensor<60x1xi32>" in text


@WAYS
@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_batch_gives_an_empty_result(way, groups):
    case = Case(groups=groups)
    x, *others = case.operands()
    y = call(case, (x[:0], *others), weights_of(case, 8), way)
    assert y.shape == (0, 6, 5, groups)


def test_sums_that_could_leave_int32_are_refused():
    case = Case((1, 1, 1, 40_000), (1, 1), padding="VALID", bits=8, border=None)
    codes = np.full((1, 1, 40_000, 1), 255, np.uint8)
    weights = QuantizedWeights(codes, np.ones(1, "f"), np.zeros(1, "f"), 8)
    with pytest.raises(ValueError, match="40000 products of 8 and 8 bits may reach 2601000000"):
        call(case, (np.ones(case.shape, "f"), 1.0, 0.0, {}), weights)


FITS = QuantizedWeights(
    np.zeros((3, 3, 4, 2), np.uint8), np.ones(2, np.float32), np.zeros(2, np.float32), 4
)
BAD = {
    "codes": ({"codes": np.zeros((3, 3, 4, 2), np.int8)},
              r"codes are int8 \(3, 3, 4, 2\), not uint8 \(3, 3, 4, O\)"),
    "groups": ({"codes": np.zeros((3, 3, 3, 2), np.uint8)},
               r"codes are uint8 \(3, 3, 3, 2\), not uint8 \(3, 3, 4, O\)"),
    "kernel": ({"codes": np.zeros((3, 2, 4, 2), np.uint8)},
               r"\(3, 2, 4, 2\), not .*\(3, 3, 4, O\)"),
    "scale": ({"scale": np.ones(3, "f")}, r"scale has shape \(3,\), not \(2,\)"),
    "zero": ({"zero_point": np.ones((1, 2), "f")},
             r"weight zero_point has shape \(1, 2\), not \(2,\)"),
    "bits": ({"bits": 9}, "weight_bits is 9, not an integer of 2 to 8"),
    "fraction": ({"zero_point": np.float32([1, 2.5])},
                 "weight zero_point has 2.5, not a whole number"),
    "large code": ({"codes": np.full((3, 3, 4, 2), 16, np.uint8)}, "codes has 16, not .* 0 to 15"),
    "negative": ({"scale": np.float32([1, -1])}, "scale has -1, not a positive number"),
    "no outputs": ({"codes": np.zeros((3, 3, 4, 0), np.uint8)},
                   "codes have 0 outputs, not a positive multiple of the 1 groups"),
    "code": ({"zero_point": np.float32([1, 16])}, "weight zero_point has 16, not .* of 0 to 15"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_weights_that_do_not_fit_are_named(change, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        call(case, case.operands(), FITS._replace(**change))


def test_outputs_that_groups_do_not_divide_are_named():
    case = Case(groups=4)
    weights = FITS._replace(codes=np.zeros((3, 3, 1, 6), np.uint8))
    with pytest.raises(ValueError, match="codes have 6 outputs, not a positive multiple of the 4"):
        call(case, case.operands(), weights)


def test_a_geometry_of_another_input_is_named():
    case = Case()
    x, step, zero, coefficients = case.operands()
    geometry = ConvGeometry((5, 6), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    arguments = (ActivationQuantizer(step, zero), coefficients, FITS, case.rounding(), geometry)
    message = "x has shape (2, 6, 5, 4), the geometry one or two spatial axes of sizes (5, 6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        conv_border_int8(jnp.asarray(x), *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": np.ones(3, "f")}, r"bias is float32 \(3,\), not floats \(2,\)"),
        ({"bias": np.ones(2, int)}, r"bias is int64 \(2,\), not floats"),
        ({"residual": np.ones((2, 1, 1, 2), "f")}, r"residual .*, not floats \(2, 6, 5, 2\)"),
    ],
)
def test_what_is_added_must_fit(options, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        call(case, case.operands(), FITS, **options)
