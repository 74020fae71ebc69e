"""Folding and checks of the tuned convolution; test_cuda_twin and _device test its results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from tests.support.img2col_reference import Case
from tests.support.tuned_reference import WEIGHT_BITS, convolve, weights_of

CASE = Case((2, 6, 5, 32), phi="identity", dtype="bfloat16")


def fold(case=CASE, outer=64, bits=WEIGHT_BITS, step=0.3, zero=2.0, bias=None, **rounding):
    weights = weights_of(case, outer, 0)._replace(bits=bits)
    how, coefficients = case.rounding()._replace(**rounding), case.operands(0)[3]
    quantizer = ActivationQuantizer(step, zero)
    return gpu_ops.fold_convolution(quantizer, coefficients, weights, how, bias)


def geometry_of(x, kernel=(3, 3), **options):
    return gpu_ops.conv_geometry(x.shape, kernel, **{"padding": "SAME", **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"case": CASE._replace(shape=(2, 6, 5, 24))}, "channels is 24, not a multiple of 32"),
        ({"outer": 48}, "outputs is 48, not a multiple of 64"),
        ({"case": CASE._replace(bits=9)}, "bits is 9, not an integer of 2 to 8"),
        ({"bits": 8}, "weight_bits is 8, not below 8"),
        ({"phi": "clamp"}, "phi is 'clamp', not 'identity'"),
        ({"case": CASE._replace(kernel=(5, 5))}, "taps is 25, not at most 24"),
        ({"step": 0.0}, "step_size is 0.0, not positive"),
        ({"step": float("nan")}, "step_size is nan, not positive"),
        ({"zero": 16}, "zero_point is 16.0, not an integer of 0 to 15"),
        ({"border": "mine"}, "border 'mine' has no custom call"),
        ({"bias": np.ones((1,), "f")}, r"bias is float32 \(1,\), not floats \(64,\)"),
        ({"border": "linear"}, "coefficient 'b2' is not one of border 'linear'"),
    ],
    ids=str,
)
def test_what_it_does_not_serve_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        fold(**change)


def test_inputs_that_do_not_fit_are_named():
    layer, x = fold(), jnp.zeros(CASE.shape, jnp.bfloat16)
    call = gpu_ops.conv_border_tuned
    with pytest.raises(ValueError, match="x is float32, not one of bfloat16"):
        call(x.astype(jnp.float32), layer, geometry_of(x))
    with pytest.raises(ValueError, match="x has 16 channels, the layer 32"):
        call(x[..., :16], layer, geometry_of(x))
    with pytest.raises(ValueError, match=r"a window of \(3, 3\) is larger than the padded input"):
        call(x[:, :2, :2], layer, geometry_of(x)._replace(spatial=(2, 2), padding=((0, 0), (0, 0))))
    with pytest.raises(ValueError, match=r"the geometry has kernel \(3, 1\), the layer \(3, 3\)"):
        call(x, layer, geometry_of(x, (3, 1)))
    with pytest.raises(ValueError, match="groups is 2, not 1; conv_border_int8 serves it"):
        call(x, layer, geometry_of(x, groups=2))
    message = r"residual is bfloat16 \(2, 6, 5, 32\), not bfloat16 \(2, 6, 5, 64\)"
    with pytest.raises(ValueError, match=message):
        call(x, layer, geometry_of(x), residual=x)


def test_a_layer_can_be_an_argument_of_jit():
    layer = fold()
    leaves, tree = jax.tree.flatten(layer)
    assert len(leaves) == 5
    assert jax.tree.unflatten(tree, leaves).bits == 4
    assert layer.shared_across_taps
    assert not fold(CASE._replace(shared_across_taps=False)).shared_across_taps


@pytest.mark.parametrize("added", [False, True])
def test_mapped_over_images_it_is_one_call(added):
    layer, shape = fold(), (3, 2, 6, 5)
    x = jax.ShapeDtypeStruct((*shape, 32), jnp.bfloat16)
    residual = jax.ShapeDtypeStruct((*shape, 64), jnp.bfloat16)

    def run(x, residual):
        own = residual if added else None
        return gpu_ops.conv_border_tuned(x, layer, geometry_of(x), residual=own)

    lowered = jax.jit(jax.vmap(run)).lower(x, residual)
    assert lowered.out_info.shape == (*shape, 64)
    text = lowered.as_text()
    assert text.count("@gpu_ops_conv_tuned") == 1
    assert "while" not in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU lacks")
def test_on_a_cpu_it_says_so():
    with pytest.raises(jax.errors.JaxRuntimeError, match="for NVIDIA GPUs alone"):
        convolve(CASE, CASE.operands(0), weights_of(CASE, 64, 0))


def test_the_folded_polynomial_is_the_border_in_units_of_the_code():
    case = CASE._replace(shared_across_taps=False)
    layer, coefficients = fold(case), case.operands(0)[3]
    x = np.random.default_rng(0).normal(size=(9, 32))
    c0, c1, c2 = np.float64(layer.folded)
    b0, b1, b2 = (np.float64(coefficients[f"b{i}"]) for i in range(3))
    u = x / 0.3
    expected = u - ((b2 * u + b1) * u + b0) + 2
    np.testing.assert_allclose((c2 * x + c1) * x + c0, expected, atol=1e-5)
