"""``gpu_ops.img2col_border`` and ``img2col``, bit for bit against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.layers import im2col
from aquant_jax.layers.conv_geometry import Window
from tests.support.img2col_reference import (
    Case,
    assert_same,
    by_group,
    contractible,
    gather,
    random_case,
    reference,
)
from tests.support.process import run_python

SWEEP = 200
CASES = [random_case(seed) for seed in range(SWEEP)]


@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "random"])
def test_two_hundred_random_calls_are_numpys_bit_for_bit(dyadic):
    for seed, case in enumerate(CASES):
        operands = case.operands(seed, dyadic)
        assert_same(case.run(*operands), reference(*operands, case))


def test_the_random_calls_cover_what_there_is():
    seen = {(case.border, case.phi, case.fused, case.output) for case in CASES}
    assert len(seen) > 25
    assert {case.bits for case in CASES} == set(range(2, 9))
    assert any(case.groups == case.shape[-1] > 1 for case in CASES)


def test_products_are_rounded_before_they_are_added():
    case, operands = contractible()
    assert_same(case.run(*operands), reference(*operands, case))


def test_plain_columns_are_numpys_bit_for_bit():
    for seed, case in enumerate(CASES[:60]):
        x = jnp.asarray(case.operands(seed)[0]).astype(case.dtype)
        if seed % 3 == 0:
            x = (x * 10).astype(jnp.int8)
        found = gpu_ops.img2col(x, **case.geometry())
        assert_same(found, by_group(gather(np.asarray(x), case), case))


@pytest.mark.parametrize("border", ["constant", "linear", "quadratic"])
def test_the_codes_are_those_of_the_library(border):
    case = Case(border=border, padding=((0, 0), (0, 0)), strides=(2, 1))
    x, step, zero, coefficients = case.operands(1, dyadic=True)
    window = Window(2, (6, 5), (3, 3), (2, 1), (1, 1))
    tensor = TensorState(jnp.float32(step), jnp.float32(zero))
    named = {name: jnp.asarray(c) for name, c in coefficients.items()}
    how = im2col.Rounding(case.bits, border, case.phi, case.fused)
    expected = np.stack(im2col.column_codes(jnp.asarray(x), tensor, named, window, how), 3)
    assert_same(case.run(x, step, zero, coefficients), by_group(expected.astype(np.int8), case))


def test_a_large_image_is_cut_into_blocks_that_fit_together():
    case = Case((1, 70, 64, 24), strides=(2, 1), padding=((2, 1), (0, 1)))
    operands = case.operands(2)
    assert_same(case.run(*operands), reference(*operands, case))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("phi", ["clamp", "identity"])
@pytest.mark.parametrize(("output", "bits"), [("int8", 4), ("int8", 8), ("float32", 4)])
@pytest.mark.parametrize("channels", [4, 20])
def test_not_a_number_has_code_zero_and_infinity_the_last_one(fused, phi, output, bits, channels):
    case = Case((2, 6, 5, channels), fused=fused, phi=phi, output=output, bits=bits)
    x, step, zero, coefficients = case.operands(3)
    x[0, 2, 2, 1], x[1, 3, 3, 0], x[1, 0, 0, 2] = np.nan, np.inf, -np.inf
    found = case.run(x, step, zero, coefficients)
    assert_same(found, reference(x, step, zero, coefficients, case))
    lowest = {"int8": -128 if bits == 8 else 0, "float32": np.float32(step) * -np.float32(zero)}
    assert found[0, 2, 2, 0, 4 * channels + 1] == lowest[output]  # the centre tap, channel 1


def test_subnormal_numbers_count_as_zero():
    case = Case(border="constant", phi="identity", fused=False, padding=((0, 0), (0, 0)))
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
    assert gpu_ops.img2col(jnp.zeros((0, 6, 5, 4)), **case.geometry()).shape == (0, 6, 5, 1, 36)


def mapped(case, axes, *operands):
    x, step, zero, coefficients = (jax.tree.map(jnp.asarray, o) for o in operands)
    run = jax.vmap(lambda *o: gpu_ops.img2col_border(*o, **case.options()), axes)
    return run(x, step, jnp.float32(zero), coefficients)


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


PARTITIONED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import gpu_ops
mesh = Mesh(np.array(jax.devices()), ("batch",))
x = jax.random.normal(jax.random.key(0), (4, 6, 6, 8))
c = {"b0": jnp.full((9, 8), 0.4), "b1": jnp.full((9, 8), 0.1)}
def f(x, s, c):
    return gpu_ops.img2col_border(x, s, 1.0, c, kernel=(3, 3), padding="SAME", bits=4,
                                  border="linear", phi="clamp")
def g(x):
    return gpu_ops.img2col(x, kernel=(3, 3), padding="SAME")
assert len(jax.devices()) == 2
whole = f(x, jnp.float32(0.3), c), g(x)
split = jax.device_put(x, NamedSharding(mesh, P("batch")))
everywhere = NamedSharding(mesh, P())
s = jax.device_put(jnp.float32(0.3), everywhere)
for run, operands, expected in ((f, (split, s, jax.device_put(c, everywhere)), whole[0]),
                                (g, (split,), whole[1])):
    text = jax.jit(run).lower(*operands).compile().as_text()
    assert "all-gather" not in text, text
    assert [l for l in text.splitlines() if "[2,6,6,1,72]" in l and "custom-call" in l], text
    for found in (jax.jit(run)(*operands), run(*operands)):
        assert found.sharding.spec[0] == "batch", found.sharding
        assert (np.asarray(found) == np.asarray(expected)).all()
channels = jax.device_put(x, NamedSharding(mesh, P(None, None, None, "batch")))
assert (np.asarray(jax.jit(g)(channels)) == np.asarray(whole[1])).all()
print("partitioned")
"""


def test_images_on_two_devices_stay_where_they_are():
    done = run_python(PARTITIONED, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.stdout == "partitioned\n", done.stderr[-3000:]


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
