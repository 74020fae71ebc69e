"""The CUDA threads, run in plain loops by a C++ compiler, against numpy and the CPU operations."""

import ctypes
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
from aquant_jax.layers.epilogue import NO_EPILOGUE
from aquant_jax.layers.integer import QuantizedWeights
from gpu_ops import partition, targets
from gpu_ops.conv_int8 import conv_int8
from tests.layers.test_im2col import CASES, assert_close
from tests.support.deployed_layers import LAYERS
from tests.support.img2col_reference import (
    FAST_TO_COMPILE,
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
from tests.support.process import REPOSITORY, made_once
from tests.support.tuned_reference import (
    assert_convolves,
    assert_exact_codes,
    convolve,
    count_differing_codes,
    random_layer,
    weights_of,
)

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the twin's handlers are registered for the CPU"
)
HANDLERS = {
    "border_columns": "BorderColumnsForward",
    "border_columns_vjp": "BorderColumnsBackward",
    "conv_int8": "ConvInt8Handler",
    "conv_tuned": "ConvTunedHandler",
    "img2col": "Img2colHandler",
    "img2col_border": "Img2colBorderHandler",
}
ERRORS = (ValueError, jax.errors.JaxRuntimeError)  # as JAX has it
BUILT_IN = {name: case for name, case in CASES.items() if case.phi != "sigmoid"}
# Of the 200 that the CPU and, in test_cuda_device, a GPU run.
RANDOM = [random_case(seed) for seed in range(60)]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Registers the handlers of the twin, once a process: a worker may come back to this file."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    loaded = ctypes.CDLL(str(made_once(tmp_path_factory, "twin.so", compile_twin)))
    for name, symbol in HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(loaded, symbol))
        jax.ffi.register_ffi_target(f"twin_{name}", handler, platform="cpu")


def compile_twin(library):
    sources = REPOSITORY / "gpu_ops"
    flags = ["-std=c++17", "-Og", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra"]
    include = [f"-I{sources / name}" for name in ("include", "cuda")]
    system = ["-isystem", jax.ffi.include_dir()]
    twin = ["-x", "c++", str(REPOSITORY / "tests" / "support" / "twin.cc"), "-o", str(library)]
    subprocess.run(["g++", *flags, "-Werror", *include, *system, *twin], check=True)


def noted(called, ffi_call=jax.ffi.ffi_call):
    """`jax.ffi.ffi_call` that notes the names it is called with."""

    def call(name, *arguments, **options):
        called.append(name)
        return ffi_call(name, *arguments, **options)

    return call


@pytest.fixture
def twin(compiled, monkeypatch):
    """Runs a function with the twin's handlers instead of the CPU's."""

    def run(function, *operands):
        called = []
        with monkeypatch.context() as patch:
            patch.setattr(targets, "PREFIX", "twin_")
            patch.setattr(jax.ffi, "ffi_call", noted(called))
            partition.compiled.cache_clear()  # it holds handlers by their first name
            result = jax.block_until_ready(function(*operands))
        partition.compiled.cache_clear()
        assert called
        assert all(name.startswith("twin_") for name in called)
        return result

    return run


def test_random_calls_are_numpys_bit_for_bit(twin):
    operands = [case.operands(seed, seed % 2 == 0) for seed, case in enumerate(RANDOM)]
    columns = twin(together([case.run for case in RANDOM]), operands)
    for case, own, found in zip(RANDOM, operands, columns, strict=True):
        assert_same(found, reference(*own, case))


def test_products_are_rounded_before_they_are_added(twin):
    case, operands = contractible()
    assert_same(twin(case.run, *operands), reference(*operands, case))


def test_plain_columns_are_numpys_bit_for_bit(twin):
    calls, arrays = plain(RANDOM)
    columns = twin(together(calls), [(x,) for x in arrays])
    for case, x, found in zip(RANDOM, arrays, columns, strict=True):
        assert_same(found, by_group(gather(x, case), case))


@pytest.mark.parametrize("output", ["int8", "float32"])
def test_not_a_number_has_code_zero(twin, output):
    case = Case((2, 6, 5, 16), output=output, bits=8)
    x, step, zero, coefficients = case.operands(3)
    x[0, 2, 2, 1], x[1, 3, 3, 0], x[1, 0, 0, 2] = np.nan, np.inf, -np.inf
    found = twin(case.run, x, step, zero, coefficients)
    assert_same(found, reference(x, step, zero, coefficients, case))


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, np.inf])
def test_a_bad_step_size_gives_code_zero_and_no_number(twin, size):
    for output, expected in (("int8", 0), ("float32", np.nan)):
        case = Case(border=None, output=output)
        run = jax.jit(lambda s, case=case: case.run(jnp.ones(case.shape), s, 0.0, {}))
        np.testing.assert_array_equal(np.unique(twin(run, jnp.float32(size))), [expected])


def pulled(geometry, rounding, keep, operands, dy):
    """Columns, and derivatives with respect to x, the step size and the coefficients."""

    def run(x, step, coefficients):
        quantizer = ActivationQuantizer(step, jnp.float32(2.0))
        return gpu_ops.border_columns(x, keep, quantizer, coefficients, geometry, rounding)

    def both(*operands):
        value, pull = jax.vjp(run, *operands)
        return value, pull(dy)

    return jax.jit(both, compiler_options=FAST_TO_COMPILE)(*operands)


def assert_trains_alike(twin, geometry, rounding, arguments, seed):
    x, keep, quantizer, coefficients = arguments
    operands = (x, quantizer.step_size, coefficients)
    shape = (x.shape[0], *geometry.out, geometry.taps, x.shape[-1])
    dy = jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    expected, gradients = pulled(geometry, rounding, keep, operands, dy)
    value, found = twin(pulled, geometry, rounding, keep, operands, dy)
    np.testing.assert_array_equal(np.asarray(value), np.asarray(expected))
    (dx, dstep, dcoefficients), expected = found, gradients
    for one, other in zip(
        jax.tree.leaves((dx, dcoefficients)), jax.tree.leaves(expected[::2]), strict=True
    ):
        assert_close(one, other, 1e-5)
    # One number out of terms that cancel: what float32 leaves of it hangs on their size.
    rounding_error = 1e-8 * float(jnp.abs(dy).sum())
    assert abs(dstep - expected[1]) <= 1e-5 * abs(expected[1]) + rounding_error


@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("case", BUILT_IN.values(), ids=BUILT_IN.keys())
def test_training_is_that_of_the_cpu(twin, case, masked):
    x, keep, quantizer, coefficients, _ = case.arguments(1, masked)
    arguments = (x, keep, quantizer, coefficients)
    assert_trains_alike(twin, case.geometry(), case.rounding(), arguments, 2)


def test_training_on_random_shapes_is_that_of_the_cpu(twin):
    for seed in range(20):
        rng = np.random.default_rng([3, seed])
        case = random_case(seed)._replace(border=rng.choice(["constant", "linear", "quadratic"]))
        spans = [(k - 1) * d + 1 for k, d in zip(case.kernel, case.dilation, strict=True)]
        spatial = tuple(span + int(rng.integers(0, 9)) for span in spans)
        shape = (case.shape[0], *spatial, case.shape[3])
        case = case._replace(shape=shape, padding=((0, 0), (0, 0)), dtype="float32")
        x, step, _, coefficients = case.operands(seed)
        keep = jnp.asarray(rng.random(x.shape) < 0.6) if seed % 2 else None
        quantizer = ActivationQuantizer(jnp.float32(step), jnp.float32(2.0))
        named = {name: jnp.asarray(c) for name, c in coefficients.items()}
        phi = str(rng.choice(["clamp", "identity", "clamp_ste"]))
        rounding = case.rounding()._replace(phi=phi)
        arguments = (jnp.asarray(x), keep, quantizer, named)
        assert_trains_alike(twin, case.geometry(), rounding, arguments, seed)


def test_many_pixels_are_summed_in_several_chunks(twin):
    case = Case((8, 40, 40, 3), border="quadratic", padding=((0, 0), (0, 0)))
    x, step, _, coefficients = case.operands(5)
    quantizer = ActivationQuantizer(jnp.float32(step), jnp.float32(2.0))
    named = {name: jnp.asarray(c) for name, c in coefficients.items()}
    arguments = (jnp.asarray(x), None, quantizer, named)
    for shared_across_taps in (True, False):
        rounding = Rounding(4, "quadratic", "clamp", shared_across_taps)
        assert_trains_alike(twin, case.geometry(), rounding, arguments, 1)


def test_training_on_no_images_has_no_slope(twin):
    geometry = Case(padding=((0, 0), (0, 0)))._replace(shape=(0, 6, 6, 4)).geometry()
    rounding = Rounding(4, "linear", "clamp", True)
    named = {name: jnp.ones((9, 4)) for name in ("b0", "b1")}
    operands = (jnp.zeros((0, 6, 6, 4)), jnp.float32(0.3), named)
    value, found = twin(pulled, geometry, rounding, None, operands, jnp.zeros((0, 4, 4, 9, 4)))
    assert value.shape == (0, 4, 4, 9, 4)
    assert all(not np.any(gradient) for gradient in jax.tree.leaves(found))


class TestDeployedConvolution:
    @pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
    def test_one_call_gives_the_bits_of_the_cpu(self, twin, layer):
        found, expected = twin(layer.run), layer.run()
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)

    def test_borders_of_column_elements_are_refused(self, twin):
        case = Case()
        x, step, zero, coefficients = case.operands()
        weights = QuantizedWeights(
            np.ones((3, 3, 4, 8), np.uint8), np.ones(8, np.float32), np.zeros(8, np.float32), 4
        )
        operands = (jnp.asarray(x), ActivationQuantizer(step, zero), coefficients, weights)
        run = lambda: conv_int8(*operands, case.rounding(), case.geometry(), NO_EPILOGUE)  # noqa: E731
        with pytest.raises(ERRORS, match="no borders of column elements"):
            twin(run)


class TestTunedConvolution:
    def test_codes_are_the_references_where_arithmetic_is_exact(self, twin):
        assert_exact_codes(twin, range(12))

    def test_elsewhere_few_codes_differ_and_by_one(self, twin):
        differ, codes = count_differing_codes(twin, range(12))
        assert codes > 200_000
        assert differ <= 1e-5 * codes

    def test_it_multiplies_its_codes(self, twin):
        for seed in range(12):
            case, outer = random_layer(seed, [(3, 3), (1, 1), (2, 3)])
            assert_convolves(case, outer, twin, seed)

    def test_no_images_give_no_result(self, twin):
        case, outer = random_layer(0, [(3, 3)])
        case = case._replace(shape=(0, *case.shape[1:]))
        y = twin(lambda: convolve(case, case.operands(0), weights_of(case, outer, 0)))
        assert y.shape[0] == 0
        assert y.shape[-1] == outer
