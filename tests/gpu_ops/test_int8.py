"""Integer convolution against numpy in 64-bit integers, and deployed networks on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from gpu_ops import conv_border_int8
from tests.support.img2col_reference import Case, random_case, reference
from tests.support.nets import images, mlp, normal, residual_net, rng_of

COMPILER = aq.Compiler(gpu_ops.backend())  # shared: compilation is what takes time here
WEIGHT_BITS = (2, 4, 7, 8)


def weights_of(case, bits, seed=0):
    """Codes [kh, kw, C / G, O], scales and zero points."""
    rng = rng_of(seed)
    inner, outer = case.shape[-1] // case.groups, case.groups * (1 + seed % 3)
    codes = rng.integers(0, 2**bits, (*case.kernel, inner, outer)).astype(np.uint8)
    zero = rng.integers(0, 2**bits, outer).astype(np.float32)
    return codes, rng.uniform(0.01, 0.1, outer).astype(np.float32), zero


def call(case, operands, weights, bits, **options):
    x, step, zero, coefficients = operands
    keys = ("strides", "padding", "dilation", "bits", "border", "phi", "fused")
    how = {key: getattr(case, key) for key in keys} | options
    x = jnp.asarray(x).astype(case.dtype)
    return conv_border_int8(x, step, zero, coefficients, *weights, weight_bits=bits, **how)


def exact(case, operands, weights):
    """The sums of whole numbers, [N, OH, OW, O] as float64, times both scales."""
    x, step, zero, coefficients = operands
    codes, scale, weight_zero = weights
    columns = reference(x, step, zero, coefficients, case._replace(output="int8", align=1))
    q = columns.astype(np.int64) + (128 if case.bits == 8 else 0) - int(zero)
    w = codes.astype(np.int64) - weight_zero.astype(np.int64)
    w = w.reshape(-1, case.groups, codes.shape[-1] // case.groups)
    total = np.einsum("nhwgk,kgo->nhwgo", q, w).reshape(*q.shape[:3], -1)
    return total * np.float64(step) * scale


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("seed", [s for s in range(12) if s != 5])  # all codes zero
def test_equals_sums_of_whole_numbers(seed, bits):
    case = random_case(seed)
    operands, weights = case.operands(seed), weights_of(case, bits, seed)
    expected = exact(case, operands, weights)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(call(case, operands, weights, bits), expected, rtol=3e-7)


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
def test_what_is_filled_up_for_tensor_cores_counts_nothing(monkeypatch, groups, act_bits):
    case = Case(bits=act_bits, groups=groups)
    operands, weights = case.operands(1), weights_of(case, 8, 1)
    monkeypatch.setattr(gpu_ops.int8, "ALIGN", {jax.default_backend(): 16})
    found = call(case, operands, weights, 8)
    np.testing.assert_allclose(found, exact(case, operands, weights), rtol=3e-7)


def test_bias_residual_and_relu():
    case = Case()
    operands, weights = case.operands(2), weights_of(case, 4, 2)
    y = np.float32(exact(case, operands, weights))
    bias, residual = np.float32([0.5, -1.0, 2.0]), rng_of(3).normal(size=y.shape).astype("f")
    bias = np.resize(bias, y.shape[-1])
    found = call(case, operands, weights, 4, bias=bias, residual=residual, relu=True)
    np.testing.assert_allclose(found, np.maximum(y + bias + residual, 0), rtol=1e-5, atol=1e-5)
    assert call(case, operands, weights, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("way", ["definition", "gpu_ops"])
def test_sums_are_scaled_before_the_bias_is_added(way):
    """Rounded in between, whatever is compiled together: both ways give numpy's outputs."""
    rng = rng_of(0)
    weights = {"w": normal(rng, 64, 128), "b": normal(rng, 1, 128)}
    x = normal(rng, 200, 64)
    recipe = aq.recipes.nearest(4, 4, batch_size=8, quantize_input=True)
    quantized = aq.quantize(lambda v, x: x @ v["w"] + v["b"], weights, x, recipe, progress=False)
    (layer,), (tensor,) = quantized.layers.values(), quantized.tensors.values()
    step, zero = (np.asarray(a) for a in tensor)
    codes = np.clip(np.ceil(x * (np.float32(1) / step) - np.float32(0.5)) + zero, 0, 255)
    total = (codes - zero) @ (np.float32(layer.codes) - np.asarray(layer.zero_point))
    expected = total * (step * np.asarray(layer.scale)) + np.asarray(layer.bias)
    deployed = quantized if way == "definition" else quantized.with_backend(gpu_ops.backend())
    np.testing.assert_array_equal(deployed(x), expected)


def test_the_product_is_of_int8():
    case = Case()
    text = jax.jit(lambda *o: call(case, o, weights_of(case, 4), 4)).lower(*case.operands())
    assert "tensor<60x36xi8>, tensor<1x36xi8>) -> tensor<60x1xi32>" in text.as_text()


@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_batch_gives_an_empty_result(groups):
    case = Case(groups=groups)
    x, *others = case.operands()
    y = call(case, (x[:0], *others), weights_of(case, 8), 8)
    assert y.shape == (0, 6, 5, groups)


def test_sums_that_could_leave_int32_are_refused():
    x, codes = jnp.ones((1, 1, 1, 40_000)), jnp.full((1, 1, 40_000, 1), 255, jnp.uint8)
    own = (codes, jnp.ones(1), jnp.zeros(1))
    with pytest.raises(ValueError, match="40000 products of 8 and 8 bits may reach 2601000000"):
        conv_border_int8(x, 1.0, 0, None, *own, weight_bits=8, padding="VALID", bits=8)


BAD = {
    "codes": ({"codes": np.zeros((3, 3, 4, 2), np.int8)}, r"codes are int8 \(3, 3, 4, 2\)"),
    "groups": ({"codes": np.zeros((3, 3, 3, 2), np.uint8)}, r"\(3, 3, 3, 2\).* 4 channels"),
    "scale": ({"scale": np.ones(3, "f")}, r"scale has shape \(3,\), not \(2,\)"),
    "zero": ({"zero": np.ones((1, 2), "f")}, r"weight_zero_point has shape \(1, 2\), not \(2,\)"),
    "bits": ({"bits": 9}, "weight_bits is 9, not an integer of 2 to 8"),
    "fraction": ({"zero": np.float32([1, 2.5])}, "weight_zero_point has 2.5, not a whole number"),
    "large code": ({"codes": np.full((3, 3, 4, 2), 16, np.uint8)}, "codes has 16, not .* 0 to 15"),
    "negative": ({"scale": np.float32([1, -1])}, "scale has -1, not a positive number"),
    "no outputs": ({"codes": np.zeros((3, 3, 4, 0), np.uint8)}, "no number of groups"),
    "code": ({"zero": np.float32([1, 16])}, "weight_zero_point has 16, not .* of 0 to 15"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_weights_that_do_not_fit_are_named(change, message):
    case = Case()
    own = {"codes": np.zeros((3, 3, 4, 2), np.uint8), "scale": np.ones(2, "f"),
           "zero": np.zeros(2, "f"), "bits": 4} | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        call(case, case.operands(), (own["codes"], own["scale"], own["zero"]), own["bits"])


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
    weights = np.zeros((3, 3, 4, 2), np.uint8), np.ones(2, "f"), np.zeros(2, "f")
    with pytest.raises(ValueError, match=message):
        call(case, case.operands(), weights, 4, **options)


@pytest.mark.user_model
class TestDeployedNetworks:
    """``quantized.with_backend``: the same predictions, and outputs up to float rounding."""

    @pytest.mark.parametrize("preset", ["nearest", "aquant"])
    @pytest.mark.parametrize("bits", [2, 8])
    @pytest.mark.parametrize("net", [residual_net, mlp], ids=["residual", "mlp"])
    def test_give_the_same_outputs(self, net, bits, preset):
        apply, variables = net()
        x = images(0, 32) if net is residual_net else rng_of(0).normal(size=(32, 6)).astype("f")
        steps = {} if preset == "nearest" else {"steps": 4}
        recipe = aq.recipes.preset(preset, weight_bits=bits, act_bits=bits, batch_size=8, **steps)
        quantized = aq.quantize(apply, variables, x, recipe, progress=False, compiler=COMPILER)
        deployed = quantized.with_backend(gpu_ops.backend())
        expected = np.asarray(quantized(x))
        np.testing.assert_array_equal(jax.jit(deployed)(x), expected)
        text = jax.jit(deployed).lower(x).as_text()
        assert text.count("@gpu_ops_img2col_border") > 0
        assert "gpu_ops" not in jax.jit(deployed.with_backend(None)).lower(x).as_text()

    def test_give_the_same_bits_where_the_definition_sums_exactly(self):
        apply, variables = mlp(sizes=(6, 512, 512, 8))
        x = rng_of(0).normal(size=(32, 6)).astype("f")
        recipe = aq.recipes.nearest(4, 4, batch_size=8)
        quantized = aq.quantize(apply, variables, x, recipe, progress=False)
        deployed = jax.jit(quantized.with_backend(gpu_ops.backend()))
        np.testing.assert_array_equal(deployed(x), jax.jit(quantized)(x))

    def test_of_three_spatial_axes_run_by_the_definition(self):
        def apply(v, x):
            h = jax.nn.relu(jax.lax.conv(x, v["a"], (1, 1, 1), "SAME"))
            return jax.lax.conv(h, v["b"], (1, 1, 1), "SAME")

        rng = rng_of(0)
        x = rng.normal(size=(4, 2, 3, 3, 3)).astype("f")
        shapes = {"a": (3, 2, 2, 2, 2), "b": (2, 3, 2, 2, 2)}
        variables = {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}
        for preset, steps in (("nearest", 0), ("aquant", 2)):
            recipe = aq.recipes.preset(preset, batch_size=4, steps=steps)
            quantized = aq.quantize(apply, variables, x, recipe, progress=False, compiler=COMPILER)
            deployed = quantized.with_backend(gpu_ops.backend())
            np.testing.assert_allclose(deployed(x), quantized(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("net", [residual_net, mlp], ids=["residual", "mlp"])
    def test_of_an_empty_batch(self, net):
        apply, variables = net()
        x = images(0, 8) if net is residual_net else rng_of(0).normal(size=(8, 6)).astype("f")
        recipe = aq.recipes.nearest(4, 4, batch_size=8)
        quantized = aq.quantize(apply, variables, x, recipe, progress=False)
        y = quantized.with_backend(gpu_ops.backend())(x[:0])
        assert y.shape == quantized(x)[:0].shape
