"""The one-pass convolution of a CPU: from values or codes to values and codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import Codes, Epilogue, Requantization, conv_border_int8, conv_geometry, conv_int8
from gpu_ops.conv_border_int8 import by_columns
from tests.support.img2col_reference import Case
from tests.support.nets import normal, rng_of

INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "plain")
ERRORS = (ValueError, jax.errors.JaxRuntimeError)  # as JAX has it
GRID = ActivationQuantizer(jnp.float32(0.21), jnp.float32(5))


def layer(shape, kernel, outputs, groups=1, bits=4, weight_bits=4, strides=(1, 1), seed=0):
    """Operands of a convolution with random weights, rounded to nearest."""
    rng = rng_of(seed)
    codes = rng.integers(0, 2**weight_bits, (*kernel, shape[-1] // groups, outputs))
    zero = rng.integers(0, 2**weight_bits, outputs)
    scale = rng.uniform(0.01, 0.1, outputs)
    weights = QuantizedWeights(np.uint8(codes), np.float32(scale), np.float32(zero), weight_bits)
    geometry = conv_geometry(shape, kernel, strides=strides, padding="SAME", groups=groups)
    x = jnp.asarray(normal(rng, *shape))
    return x, GRID, {}, weights, Rounding(bits), geometry


LAYERS = {
    "wide": ((2, 5, 4, 20), (3, 3), 150),  # slices of 64, 64 and 22 outputs
    "deep": ((1, 3, 3, 1200), (3, 3), 16),  # a panel holds fewer pixels than a row needs bytes
    "long": ((1, 40, 40, 16), (3, 3), 8),  # several panels
    "rows": ((7, 3, 1, 32), (1, 1), 70),  # columns are the rows themselves
    "small": ((9, 3, 3, 16), (3, 3), 20),  # several images to a panel
    "heavy": ((8, 4, 4, 384), (3, 3), 400, 1, 4, 8),  # above half of a cache of 2 MiB
    "tiles": ((2, 3, 38, 64), (3, 3), 112),  # codes lie in the rows as AMX reads them
    "tile bytes": ((1, 5, 29, 128), (1, 1), 70, 1, 4, 8, (2, 2)),  # the same, with sums of codes
    "odd tiles": ((1, 3, 13, 64), (3, 1), 88),  # neither pixels nor outputs fill whole pieces
    "long tiles": ((1, 2, 15, 1024), (3, 3), 16, 1, 4, 8),  # more pixels than a panel would have
    "one": ((1, 3, 3, 20), (3, 3), 300),  # tasks of some slices each
    "odd": ((2, 3, 5, 7), (2, 3), 9),
    "grouped": ((2, 6, 5, 12), (3, 3), 18, 3),
    "depthwise": ((2, 6, 5, 35), (3, 3), 35, 35),
    "strided": ((2, 9, 9, 16), (1, 1), 20, 1, 4, 4, (3, 2)),
    "bytes": ((2, 6, 5, 12), (3, 3), 18, 1, 8, 8),
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_every_instruction_set_gives_the_bits_of_the_columns(monkeypatch, options, instructions):
    monkeypatch.setenv("GPU_OPS_INSTRUCTIONS", instructions)
    operands = layer(*options)
    found, expected = conv_border_int8(*operands).values, by_columns(*operands).values
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("instructions", "named"), [("avx2", "AVX2"), ("plain", "plain C++")])
def test_a_cpu_without_vnni_is_told_so_once(monkeypatch, instructions, named):
    conv_int8._say_if_slow.cache_clear()
    monkeypatch.setenv("GPU_OPS_INSTRUCTIONS", instructions)
    lines = []
    monkeypatch.setattr(conv_int8.logging, "warning", lambda text, *args: lines.append(text % args))
    for shape in ("odd", "rows"):
        conv_border_int8(*layer(*LAYERS[shape]))
    (line,) = lines
    assert f"in their {named} kernels" in line


def test_a_cpu_with_vnni_is_told_nothing(monkeypatch):
    monkeypatch.setattr(conv_int8._cpu, "instructions", lambda: "avx_vnni")
    monkeypatch.setattr(conv_int8.logging, "warning", lambda *args: pytest.fail(str(args)))
    conv_border_int8(*layer(*LAYERS["odd"]))


def test_instructions_that_nobody_knows_are_named(monkeypatch):
    monkeypatch.setenv("GPU_OPS_INSTRUCTIONS", "mmx")
    with pytest.raises(ERRORS, match="GPU_OPS_INSTRUCTIONS is 'mmx', none of"):
        conv_border_int8(*layer(*LAYERS["odd"]))


def test_an_empty_choice_of_instructions_is_none(monkeypatch):
    monkeypatch.setenv("GPU_OPS_INSTRUCTIONS", "")
    chosen = conv_int8._cpu.instructions()
    monkeypatch.delenv("GPU_OPS_INSTRUCTIONS")
    assert chosen == conv_int8._cpu.instructions()


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_codes_give_the_bits_of_the_values_that_they_stand_for(options):
    x, *others = layer(*options)
    bits = others[3].bits
    codes = Requantization(GRID, Rounding(bits), {}).codes(x)
    assert len(np.unique(codes)) > 8
    found = conv_border_int8(Codes(codes, GRID), *others).values
    np.testing.assert_array_equal(found, conv_border_int8(x, *others).values)


def channel_border(rng, channels, degree=2):
    names = ("b0", "b1", "b2")[: degree + 1]
    return {name: jnp.asarray(0.3 * normal(rng, 1, channels)) for name in names}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("phi", ["identity", "clamp"])
def test_one_border_a_channel_quantizes_before_it_multiplies(options, phi):
    x, _, _, weights, rounding, geometry = layer(*options)
    rounding = Rounding(rounding.bits, "quadratic", phi, per_channel=True)
    border = channel_border(rng_of(1), x.shape[-1])
    found = conv_border_int8(x, GRID, border, weights, rounding, geometry).values
    codes = Codes(Requantization(GRID, rounding, border).codes(x), GRID)
    others = (GRID, {}, weights, Rounding(rounding.bits), geometry)
    np.testing.assert_array_equal(found, conv_border_int8(codes, *others).values)
    assert np.abs(found - conv_border_int8(x, *others).values).max() > 0


WANTED = {
    "nearest": (Rounding(4), -1),
    "constant": (Rounding(8, "constant", "identity"), 0),
    "linear": (Rounding(2, "linear", "clamp"), 1),
    "quadratic": (Rounding(4, "quadratic", "clamp"), 2),
    "free": (Rounding(4, "quadratic", "identity"), 2),
}


def requantizations(rng, outputs, zero):
    """Those of `WANTED`; a zero point is `zero` and its border's degree, or 0."""
    return tuple(
        Requantization(
            ActivationQuantizer(jnp.float32(1.3 + degree), jnp.float32(zero * (degree + 1))),
            rounding,
            channel_border(rng, outputs, degree) if rounding.border else {},
        )
        for rounding, degree in WANTED.values()
    )


@pytest.mark.parametrize("values", [True, False], ids=["values", "codes"])
@pytest.mark.parametrize("name", ["wide", "tiles", "rows", "grouped", "depthwise"])
def test_results_are_quantized_for_their_readers(name, values):
    operands = layer(*LAYERS[name])
    outputs, rng = operands[3].scale.size, rng_of(2)
    wanted = requantizations(rng, outputs, zero=1)
    y = conv_border_int8(*operands).values
    residual = Codes(jnp.asarray(rng.integers(0, 256, y.shape), jnp.uint8), GRID)
    epilogue = Epilogue(
        bias=normal(rng, outputs), residual=residual, low=-1.0, high=6.0, values=values,
        requantizations=wanted,
    )  # fmt: skip
    found, expected = conv_border_int8(*operands, epilogue), by_columns(*operands, epilogue)
    assert (found.values is None) == (not values)
    assert [len(np.unique(codes)) > 2 for codes in found.codes] == [True] * len(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("low", "zero"), [(0.0, 0), (0.0, 1), (-np.inf, 0)])
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e38])  # values are finite, above 2^23 units, infinite
@pytest.mark.parametrize("name", ["tiles", "depthwise"])
def test_bounds_that_are_known_change_no_bit(name, scale, low, zero):
    *others, weights, rounding, geometry = layer(*LAYERS[name])
    weights = weights._replace(scale=np.float32(scale) * weights.scale)
    operands = (*others, weights, rounding, geometry)
    wanted = requantizations(rng_of(2), weights.scale.size, zero)
    epilogue = Epilogue(low=low, requantizations=wanted)
    found, expected = conv_border_int8(*operands, epilogue), by_columns(*operands, epilogue)
    assert np.isinf(expected.values).any() == (scale == 1e38)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", ["tiles", "tile bytes", "odd tiles"])
def test_codes_of_an_inner_layer(name, added):
    """A lowest value of zero, no other bound, no zero point, no values: AMX has a path for it."""
    *others, weights, rounding, geometry = layer(*LAYERS[name])
    weights = weights._replace(scale=np.float32(0.1) * weights.scale)  # so no value can be large
    operands = (*others, weights, rounding, geometry)
    outputs, rng = weights.scale.size, rng_of(3)
    every = dict(zip(WANTED, requantizations(rng, outputs, zero=0), strict=True))
    shape = conv_border_int8(*operands).values.shape
    residual = Codes(jnp.asarray(rng.integers(0, 256, shape), jnp.uint8), GRID)
    epilogue = Epilogue(
        bias=normal(rng, outputs), residual=residual if added else None, low=0.0, values=False,
        requantizations=(every["nearest"], every["linear"], every["quadratic"]),
    )  # fmt: skip
    found, expected = conv_border_int8(*operands, epilogue), by_columns(*operands, epilogue)
    assert [len(np.unique(codes)) > 2 for codes in found.codes] == [True] * 3
    for one, other in zip(found.codes, expected.codes, strict=True):
        np.testing.assert_array_equal(one, other)


POOLS = {
    "stem": ((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1))),
    "uneven": ((3, 2), (1, 3), (1, 2), ((2, 0), (0, 2))),
    "padding alone": ((2, 2), (1, 1), (1, 1), ((4, 4), (3, 4))),  # some windows hold nothing else
    "gaps": ((1, 1), (2, 3), (1, 1), ((0, 0), (0, 0))),
}


# A layer of several panels and slices takes every maximum, and every other layer one.
EVERY_POOL = ("wide", "long")


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        pytest.param(
            name, pool, id=f"{name}-{kind}",
            marks=[pytest.mark.slow] * (name not in EVERY_POOL and kind != "uneven"),
        )
        for name in (*EVERY_POOL, "rows", "odd", "depthwise", "bytes")
        for kind, pool in POOLS.items()
    ],
)  # fmt: skip
def test_a_maximum_is_taken_before_results_are_stored(name, pool):
    operands = layer(*LAYERS[name])
    y, rng = conv_border_int8(*operands).values, rng_of(3)
    rounding = Rounding(3, "quadratic", "clamp", per_channel=True)
    wanted = Requantization(GRID, rounding, channel_border(rng, y.shape[-1]))
    residual = jnp.asarray(normal(rng, *y.shape))
    if pool[0] != (1, 1):  # of a window of one value, XLA may pass over what is not a number
        residual = residual.at[0, 0, 0, -1].set(jnp.nan)
    epilogue = Epilogue(
        normal(rng, y.shape[-1]), residual, low=-1.0, pool=ConvGeometry(y.shape[1:3], *pool),
        requantizations=(wanted,),
    )  # fmt: skip
    found, expected = conv_border_int8(*operands, epilogue), by_columns(*operands, epilogue)
    assert np.nanmax(expected.values) > -1
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.codes, expected.codes)


def test_a_window_of_padding_alone_has_the_lowest_code():
    operands = layer(*LAYERS["odd"])
    geometry = ConvGeometry((3, 5), *POOLS["padding alone"])
    wanted = requantizations(rng_of(2), 9, zero=0)
    epilogue = Epilogue(low=0.0, pool=geometry, requantizations=wanted)
    found, expected = conv_border_int8(*operands, epilogue), by_columns(*operands, epilogue)
    assert np.isneginf(found.values).any()
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_not_a_number_has_the_code_zero():
    x, *others = layer(*LAYERS["odd"])
    positive = ActivationQuantizer(GRID.step_size, jnp.float32(0))
    border = channel_border(rng_of(1), 9)
    clamped = Requantization(positive, Rounding(4, "quadratic", "clamp", per_channel=True), border)
    epilogue = Epilogue(
        bias=np.full(9, np.nan, np.float32), low=0.0,
        requantizations=(Requantization(GRID, Rounding(4), {}), clamped),
    )  # fmt: skip
    results = conv_border_int8(x, *others, epilogue)
    assert np.isnan(results.values).all()
    assert not np.any(results.codes)


@pytest.mark.parametrize("values", [True, False], ids=["values and codes", "codes"])
def test_a_mapped_axis_of_images(values):
    x, *others = layer(*LAYERS["odd"])
    several = jnp.stack([x, -x, 2 * x])
    epilogue = Epilogue(
        values=values, requantizations=(Requantization(GRID, Rounding(4), {}),)
    )  # fmt: skip
    run = lambda x: conv_border_int8(x, *others, epilogue)  # noqa: E731
    found, expected = jax.vmap(run)(several), [run(x) for x in several]
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.tree.map(lambda *a: jnp.stack(a), *expected)),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(one, other)


def test_a_step_size_that_is_known_only_at_run_time_is_checked():
    x, _, *others = layer(*LAYERS["odd"])
    run = jax.jit(lambda s: conv_border_int8(x, ActivationQuantizer(s, jnp.float32(0)), *others))
    with pytest.raises(ERRORS, match="the step size is -1"):
        run(jnp.float32(-1))


BAD = {
    "residual": ({"residual": Codes(np.zeros((2, 3, 5, 8), np.uint8), GRID)},
                 r"residual codes are uint8 \(2, 3, 5, 8\), not uint8 \(2, 3, 5, 9\)"),
    "border": ({"requantizations": (Requantization(GRID, Rounding(4, "linear"), {}),)},
               r"coefficient 'b0' has shape None, not \(1, 9\)"),
    "pool": ({"pool": ConvGeometry((4, 5), *POOLS["gaps"])}, r"two spatial axes of sizes \(4, 5\)"),
    "bits": ({"requantizations": (Requantization(GRID, Rounding(9), {}),)}, "bits is 9, not"),
    "bias": ({"bias": np.zeros(8, np.float32)}, r"bias is float32 \(8,\), not floats \(9,\)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_an_epilogue_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        conv_border_int8(*layer(*LAYERS["odd"]), Epilogue(**change))


def test_values_are_no_codes():
    x, *others = layer(*LAYERS["odd"])
    with pytest.raises(ValueError, match="x is float32, not one of uint8"):
        conv_border_int8(Codes(x, GRID), *others)


@pytest.mark.parametrize("shared", [True, False], ids=["mean", "element"])
@pytest.mark.parametrize("groups", [1, 2, 20], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_borders_of_column_elements(shared, groups, dtype):
    case = Case(shape=(2, 6, 5, 20), groups=groups, shared_across_taps=shared, dtype=dtype)
    x, step, zero, coefficients = case.operands()
    weights = layer(case.shape, case.kernel, 20, groups)[3]
    operands = (
        jnp.asarray(x).astype(dtype), ActivationQuantizer(step, zero), coefficients, weights,
        case.rounding(), case.geometry(),
    )  # fmt: skip
    found, expected = conv_border_int8(*operands).values, by_columns(*operands).values
    np.testing.assert_array_equal(found, expected)
