"""ONNX files of max-pools, clips and masks: runtimes run them, and give what JAX gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from tests.support.nets import conv, normal, rng_of
from tests.support.onnx_marks import IGNORED_WARNINGS, NEEDS_JAX2ONNX

pytest.importorskip("onnxruntime", reason="needs aquant-jax[onnx]")

from aquant_jax.deployment import onnx, onnx_runtimes

pytestmark = [*IGNORED_WARNINGS, NEEDS_JAX2ONNX]
WEIGHTS = {"a": normal(rng_of(0), 3, 3, 4, 4), "b": normal(rng_of(1), 3, 3, 4, 4)}
X = normal(rng_of(2), 6, 9, 8, 4)


def pool(x, window, strides, padding="SAME"):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def images(v, x):
    h = pool(jax.nn.relu(conv(x, v["a"])), (1, 3, 2, 1), (1, 2, 2, 1))
    return conv(h, v["b"])


def rows(v, x):
    """Over one axis; written to an index, of which jax2onnx takes a maximum, an integer."""
    h = pool(conv(x, v["a"]), (1, 3, 1, 1), (1, 1, 1, 1), "VALID")
    return conv(lax.dynamic_update_slice_in_dim(x, h, jnp.int32(1), axis=1), v["b"])


def channels(v, x):
    """Over channels too, as no image pools."""
    return conv(pool(conv(x, v["a"]), (1, 2, 2, 2), (1, 1, 1, 1)), v["b"])


def clips(v, x):
    h = jax.nn.relu6(jnp.maximum(conv(x, v["a"]), -0.25))
    return conv(jnp.minimum(h, 0.75), v["b"])


def masks(v, x):
    """A mask that is selected from others; products in float16."""
    row = jnp.max(conv(x, v["a"]), (1, 2)).astype(jnp.float16)
    row = row @ v["b"][0, 0].astype(jnp.float16)
    causal = jnp.tril(jnp.ones((4, 4), bool))
    return jnp.where(causal, row[:, :, None] + row[:, None], -9).astype(jnp.float32)


def model_of(apply, keep_float):
    overrides = (aq.Override(".*", keep_float=True),) if keep_float else ()
    recipe = aq.recipes.nearest(8, 8, batch_size=6, overrides=overrides)
    network = aq.quantize(apply, WEIGHTS, X, recipe, observer=aq.Observer())
    return network, onnx.to_onnx(network)


@pytest.mark.parametrize("keep_float", [False, True], ids=["quantized", "float"])
@pytest.mark.parametrize("apply", [images, rows, clips, masks], ids=lambda f: f.__name__)
def test_onnxruntime_runs_it(apply, keep_float, tmp_path):
    network, model = model_of(apply, keep_float)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (found,) = onnx_runtimes.load(tmp_path / "model.onnx")(X)
    expected = np.asarray(network(X))
    assert np.ptp(expected) > 1
    close = 0.2 if apply is masks else 1e-4  # onnxruntime multiplies float16 as float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=close)


def counts(model):
    kinds = [node.op_type for node in model.graph.node]
    return {kind: kinds.count(kind) for kind in ("MaxPool", "Relu", "Clip", "Max", "Min")}


def test_clips_are_those_that_runtimes_fuse():
    _, model = model_of(clips, True)
    assert counts(model) == {"MaxPool": 0, "Relu": 0, "Clip": 3, "Max": 0, "Min": 0}


def test_a_pool_over_channels_stays():
    _, model = model_of(channels, True)
    assert counts(model)["MaxPool"] == 1
