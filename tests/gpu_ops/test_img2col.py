"""``gpu_ops.img2col_border`` and ``img2col``, bit for bit against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers import im2col
from tests.support.img2col_reference import (
    Case,
    assert_same,
    by_group,
    contractible,
    gather,
    plain,
    random_case,
    reference,
    together,
)
from tests.support.process import run_python

SWEEP, TOGETHER = 200, 50
CASES = [random_case(seed) for seed in range(SWEEP)]


PROGRAMS = {
    first: together([case.run for case in CASES[first : first + TOGETHER]])
    for first in range(0, SWEEP, TOGETHER)
}


@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "random"])
@pytest.mark.parametrize("first", PROGRAMS)
def test_two_hundred_random_calls_are_numpys_bit_for_bit(first, dyadic):
    cases = CASES[first : first + TOGETHER]
    operands = [case.operands(first + i, dyadic) for i, case in enumerate(cases)]
    for own, case, found in zip(operands, cases, PROGRAMS[first](operands), strict=True):
        assert_same(found, reference(*own, case))


def test_the_random_calls_cover_what_there_is():
    seen = {(case.border, case.phi, case.shared_across_taps, case.output) for case in CASES}
    assert len(seen) > 25
    assert {case.bits for case in CASES} == set(range(2, 9))
    assert any(case.groups == case.shape[-1] > 1 for case in CASES)


def test_products_are_rounded_before_they_are_added():
    case, operands = contractible()
    assert_same(case.run(*operands), reference(*operands, case))


def test_plain_columns_are_numpys_bit_for_bit():
    calls, arrays = plain(CASES[:60])
    columns = together(calls)([(x,) for x in arrays])
    for case, x, found in zip(CASES, arrays, columns, strict=False):
        assert_same(found, by_group(gather(x, case), case))


@pytest.mark.parametrize("border", ["constant", "linear", "quadratic"])
def test_the_codes_are_those_of_the_library(border):
    case = Case(border=border, padding=((0, 0), (0, 0)), strides=(2, 1))
    x, step, zero, coefficients = case.operands(1, dyadic=True)
    quantizer = ActivationQuantizer(jnp.float32(step), jnp.float32(zero))
    named = {name: jnp.asarray(c) for name, c in coefficients.items()}
    codes = im2col.column_codes(x, quantizer, named, case.geometry(), case.rounding())
    expected = np.stack(codes, 3)
    assert_same(case.run(x, step, zero, coefficients), by_group(expected.astype(np.int8), case))


def test_a_large_image_is_cut_into_blocks_that_fit_together():
    case = Case((1, 70, 64, 24), strides=(2, 1), padding=((2, 1), (0, 1)))
    operands = case.operands(2)
    assert_same(case.run(*operands), reference(*operands, case))


@pytest.mark.parametrize("shared_across_taps", [True, False])
@pytest.mark.parametrize("phi", ["clamp", "identity"])
@pytest.mark.parametrize(("output", "bits"), [("int8", 4), ("int8", 8), ("float32", 4)])
@pytest.mark.parametrize("channels", [4, 20])
def test_not_a_number_has_code_zero_and_infinity_the_last_one(
    shared_across_taps, phi, output, bits, channels
):
    case = Case(
        (2, 6, 5, channels), bits=bits, phi=phi, shared_across_taps=shared_across_taps,
        output=output,
    )  # fmt: skip
    x, step, zero, coefficients = case.operands(3)
    x[0, 2, 2, 1], x[1, 3, 3, 0], x[1, 0, 0, 2] = np.nan, np.inf, -np.inf
    found = case.run(x, step, zero, coefficients)
    assert_same(found, reference(x, step, zero, coefficients, case))
    lowest = {"int8": -128 if bits == 8 else 0, "float32": np.float32(step) * -np.float32(zero)}
    assert found[0, 2, 2, 0, 4 * channels + 1] == lowest[output]  # the centre tap, channel 1


@pytest.mark.parametrize("channels", [4, 20])
def test_not_a_number_leaves_the_other_taps_of_a_constant_border_alone(channels):
    case = Case((1, 6, 5, channels), border="constant")
    x, step, zero, coefficients = case.operands(3)
    clean = reference(x, step, zero, coefficients, case)
    x[0, 2, 2, 1] = np.nan
    expected = reference(x, step, zero, coefficients, case)
    assert_same(case.run(x, step, zero, coefficients), expected)
    taps = (expected != clean).reshape(6, 5, 9, channels)
    assert taps.sum() <= 9  # the element itself, in nine columns
    assert taps[..., 1].sum() == taps.sum() > 0


@pytest.mark.parametrize("step", [8e37, 9e37, 3e38])
@pytest.mark.parametrize("border", [None, "quadratic"])
def test_steps_whose_inverse_is_subnormal_have_units_of_zero(border, step):
    case = Case(border=border, phi="clamp")
    x, _, _, coefficients = case.operands(11)
    x = x * np.float32(5e37)
    expected = reference(x, np.float32(step), 3.0, coefficients, case)
    assert_same(case.run(x, np.float32(step), 3.0, coefficients), expected)
    if border is None:
        assert (len(np.unique(expected)) == 1) == (step > 8.6e37)


def test_subnormal_numbers_count_as_zero():
    case = Case(
        border="constant", phi="identity", shared_across_taps=False, padding=((0, 0), (0, 0))
    )
    x, _, _, coefficients = case.operands(4)
    x[:] = np.float32(1e-40)
    coefficients["b0"][:] = np.float32(0)
    found = case.run(x, np.float32(1.0), 3.0, coefficients)
    assert_same(found, reference(x, np.float32(1.0), 3.0, coefficients, case))
    np.testing.assert_array_equal(np.unique(found), [3])


def test_eight_bits_are_corrected_by_the_sum_of_the_weights():
    case = Case(bits=8, align=16, dtype="bfloat16")
    x, step, zero, coefficients = case.operands(5)
    shifted = np.asarray(case.run(x, step, zero, coefficients)).astype(np.int32)
    values = np.asarray(case._replace(output="float32").run(x, step, zero, coefficients))
    weights = np.random.default_rng(0).integers(-127, 128, (3 * 3 * 4,))
    padded = np.pad(weights, (0, shifted.shape[-1] - weights.size))
    codes = np.round(values / step + zero).astype(np.int32)
    assert shifted.shape[-1] == 48
    np.testing.assert_array_equal(shifted @ padded + 128 * weights.sum(), codes @ padded)


def test_same_padding_is_that_of_lax():
    case = Case(strides=(2, 2), dilation=(2, 1), padding=((1, 2), (1, 1)))
    x, step, zero, coefficients = case.operands(6)
    spans = (5, 3)
    pads = tuple(jax.lax.padtype_to_pads(case.shape[1:3], spans, case.strides, "SAME"))
    same = case._replace(padding="SAME").run(x, step, zero, coefficients)
    assert_same(same, np.asarray(case._replace(padding=pads).run(x, step, zero, coefficients)))


def test_no_images_give_no_columns():
    case = Case((0, 6, 5, 4))
    assert case.run(*case.operands()).shape == (0, 6, 5, 1, 36)
    assert gpu_ops.img2col(jnp.zeros((0, 6, 5, 4)), case.geometry()).shape == (0, 6, 5, 1, 36)


def mapped(case, axes, *operands):
    x, step, zero, coefficients = (jax.tree.map(jnp.asarray, o) for o in operands)
    return jax.vmap(case.run, axes)(x, step, jnp.float32(zero), coefficients)


def test_a_mapped_axis_of_x_is_folded_into_the_images():
    case = Case()
    x, step, zero, coefficients = case.operands(7)
    xs = np.stack([x, x + 1, x * 2])
    found = mapped(case, (0, None, None, None), xs, step, zero, coefficients)
    expected = np.stack([reference(x, step, zero, coefficients, case) for x in xs])
    assert_same(found, expected)
    moved = mapped(case, (3, None, None, None), np.moveaxis(xs, 0, 3), step, zero, coefficients)
    assert_same(moved, expected)
    run = jax.vmap(lambda x: case.run(x, step, zero, coefficients))
    assert jax.jit(run).lower(xs).as_text().count("@gpu_ops_img2col_border") == 1


def test_mapped_steps_and_coefficients_give_each_its_own():
    case = Case()
    x, step, zero, coefficients = case.operands(8)
    steps = np.float32([step, step * 2])
    many = {name: np.stack([c, c / 2]) for name, c in coefficients.items()}
    found = mapped(case, (None, 0, None, 0), x, steps, zero, many)
    halves = [{name: c[i] for name, c in many.items()} for i in range(2)]
    expected = [reference(x, s, zero, half, case) for s, half in zip(steps, halves, strict=True)]
    assert_same(found, np.stack(expected))


def test_a_map_of_a_map_is_one_call():
    case = Case()
    x, step, zero, coefficients = case.operands(9)
    xs = np.stack([x, x + 1, x - 1, x * 2]).reshape(2, 2, *x.shape)
    run = jax.vmap(jax.vmap(lambda x: case.run(x, step, zero, coefficients)))
    expected = [reference(x, step, zero, coefficients, case) for x in xs.reshape(-1, *x.shape)]
    assert_same(run(xs), np.stack(expected).reshape(2, 2, *expected[0].shape))
    assert jax.jit(run).lower(xs).as_text().count("@gpu_ops_img2col_border") == 1


def test_an_exported_program_runs_and_without_us_says_what_is_missing(tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialize")
    case = Case()
    x, step, zero, coefficients = case.operands(10)
    run = jax.jit(lambda x: case.run(x, step, zero, coefficients))
    exported = jax.export.export(run, disabled_checks=gpu_ops.export_checks())(x)
    blob = exported.serialize()
    expected = reference(x, step, zero, coefficients, case)
    assert_same(jax.export.deserialize(blob).call(x), expected)
    (tmp_path / "blob").write_bytes(bytes(blob))
    np.save(tmp_path / "x.npy", x)
    program = f"""
import jax, numpy as np
x = np.load({str(tmp_path / "x.npy")!r})
run = jax.export.deserialize(open({str(tmp_path / "blob")!r}, "rb").read())
try:
    run.call(x)
except jax.errors.JaxRuntimeError as error:
    print(error)
import gpu_ops
np.save({str(tmp_path / "y.npy")!r}, run.call(x))
"""
    done = run_python(program)
    assert "gpu_ops_img2col_border" in done.stdout, done.stderr[-3000:]
    assert_same(np.load(tmp_path / "y.npy"), expected)
