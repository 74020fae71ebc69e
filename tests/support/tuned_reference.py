"""Random layers of the tuned convolution, and its codes, which it never writes."""

import jax.numpy as jnp
import numpy as np

import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.integer import QuantizedWeights
from tests.support.img2col_reference import NAMES, Case, reference

WEIGHT_BITS = 4


def random_layer(seed, kernels):
    """A case that the tuned path serves, and the number of outputs."""
    rng = np.random.default_rng([7, seed])
    kernel = kernels[seed % len(kernels)]
    low_high = rng.integers(0, 2, (2, 2))
    case = Case(
        shape=(int(rng.integers(1, 4)), *(int(n) for n in rng.integers(6, 11, 2)),
               int(rng.choice([32, 64, 96]))),
        kernel=kernel, strides=tuple(int(n) for n in rng.integers(1, 3, 2)),
        padding=tuple((int(a), int(b)) for a, b in low_high),
        dilation=tuple(int(n) for n in rng.integers(1, 3, 2)),
        bits=int(rng.integers(2, 9)), border=list(NAMES)[rng.integers(len(NAMES))], phi="identity",
        shared_across_taps=bool(rng.integers(0, 2)), dtype="bfloat16",
    )  # fmt: skip
    return case, int(rng.choice([64, 128, 192, 256]))


def weights_of(case, outer, seed):
    """Quantized weights with codes [kh, kw, C, O]."""
    rng = np.random.default_rng([8, seed])
    codes = rng.integers(0, 2**WEIGHT_BITS, (*case.kernel, case.shape[-1], outer), np.uint8)
    zero = rng.integers(0, 2**WEIGHT_BITS, outer).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, outer).astype(np.float32)
    return QuantizedWeights(codes, scale, zero, WEIGHT_BITS)


def convolve(case, operands, weights, bias=None, **options):
    """The tuned convolution, folded and called."""
    x, step, zero, coefficients = operands
    quantizer = ActivationQuantizer(step, zero)
    layer = gpu_ops.fold_convolution(quantizer, coefficients, weights, case.rounding(), bias)
    x = jnp.asarray(x, jnp.bfloat16)
    return gpu_ops.conv_border_tuned(x, layer, case.geometry(), **options)


def tuned_codes(case, operands, run):
    """Its codes ``[N, OH, OW, K]``, read through weights that are one or zero; `run` calls it."""
    elements = int(np.prod(case.kernel)) * case.shape[-1]
    outer = -(-elements // 64) * 64
    codes = np.eye(elements, outer, dtype=np.uint8).reshape(*case.kernel, -1, outer)
    step, zero = operands[1:3]
    scale, no_zero_point = np.full(outer, 1 / step, np.float32), np.zeros(outer, np.float32)
    weights = QuantizedWeights(codes, scale, no_zero_point, WEIGHT_BITS)
    y = run(lambda: convolve(case, operands, weights))
    return np.rint(np.asarray(y, np.float64)[..., :elements] + zero).astype(np.int64)


def exact_codes(case, operands):
    """The same by the reference implementation."""
    columns = reference(*operands, case)[..., 0, :]
    return columns.astype(np.int64) + (128 if case.bits == 8 else 0)


def assert_convolves(case, outer, run, seed):
    """The result is the product of its own codes, rounded to bfloat16.

    The tolerance allows for the sum and the offset, which cancel: both are rounded to float32.
    """
    operands, weights = case.operands(seed), weights_of(case, outer, seed)
    rng = np.random.default_rng([9, seed])
    bias = rng.normal(size=outer).astype(np.float32)
    q = tuned_codes(case, operands, run) - int(operands[2])
    whole = weights.codes.astype(np.int64) - weights.zero_point.astype(np.int64)
    whole = whole.reshape(-1, outer)
    grid = np.float64(operands[1]) * weights.scale
    expected = (q @ whole) * grid + bias
    assert np.abs(expected).max() > 0
    tolerance = {"rtol": 2**-8, "atol": 3e-7 * (2**case.bits * np.abs(whole).sum(0) * grid).max()}
    found = run(lambda: convolve(case, operands, weights, bias))
    np.testing.assert_allclose(np.float64(found), expected, **tolerance)
    residual = jnp.asarray(rng.normal(size=found.shape), jnp.bfloat16)
    added = run(lambda: convolve(case, operands, weights, bias, residual=residual, relu=True))
    expected = np.maximum(expected + np.float64(residual), 0)
    np.testing.assert_allclose(np.float64(added), expected, **tolerance)


def assert_exact_codes(run, seeds):
    """Where nothing is rounded, codes are exact: means over powers of two, few bits."""
    for seed in seeds:
        case, _ = random_layer(seed, [(1, 1), (2, 2), (1, 2), (4, 1)])
        operands = case.operands(seed, dyadic=True)
        np.testing.assert_array_equal(tuned_codes(case, operands, run), exact_codes(case, operands))


def count_differing_codes(run, seeds):
    """How many codes differ elsewhere, and of how many; none by more than one."""
    differ = codes = 0
    for seed in seeds:
        case, _ = random_layer(seed, [(3, 3), (1, 1), (3, 2)])
        operands = case.operands(seed)
        gap = np.abs(tuned_codes(case, operands, run) - exact_codes(case, operands))
        assert gap.max() <= 1
        differ, codes = differ + int(gap.sum()), codes + gap.size
    return differ, codes
