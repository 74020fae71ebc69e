import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

import aquant_jax as aq
import gpu_ops
from aquant_jax.reconstruction.report import History
from tests.support.nets import images, relative_error, small_net

X = images(0, 8, size=5)
COMPILER = aq.Compiler(gpu_ops.backend())  # shared: compilation is what takes time here


@functools.cache
def quantized(preset="aquant", steps=2, bits=3):
    apply, variables = small_net()
    steps = 0 if preset == "nearest" else steps
    recipe = getattr(aq.recipes, preset)(bits, bits, steps=steps, batch_size=8)
    return aq.quantize(apply, variables, X, recipe, observer=aq.Observer(), compiler=COMPILER)


def test_it_can_be_jitted_and_called_on_any_batch():
    q = quantized()
    y = q(X)
    assert y.shape == (8, 5)
    np.testing.assert_array_equal(jax.jit(q)(X), y)
    np.testing.assert_array_equal(jax.jit(lambda q, x: q(x))(q, X), y)
    np.testing.assert_allclose(q(X[:3]), y[:3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(q(np.concatenate([X, X]))[8:], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(q(X[:1]), y[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [None, gpu_ops.backend()], ids=["reference", "gpu_ops"])
def test_outputs_are_split_as_inputs_by_the_explicit_axes_of_a_mesh(backend):
    q = quantized().with_backend(backend)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("rows")))
    for run in (q, jax.jit(q)):
        y = run(x)
        assert jax.typeof(y).sharding.spec == PartitionSpec("rows", None)
        np.testing.assert_array_equal(y, q(X))


def test_it_is_a_pytree():
    q = quantized()
    leaves, tree = jax.tree.flatten(q)
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again(X), q(X))
    assert again.recipe == q.recipe
    dtypes = {leaf.dtype for leaf in leaves}
    assert dtypes == {jnp.dtype("uint8"), jnp.dtype("float32")}


def test_codes_change_the_output():
    q = quantized()
    layers = dict(q.layers)
    path = "block_1/conv1/kernel"
    layers[path] = layers[path]._replace(codes=jnp.zeros_like(layers[path].codes))
    other = jax.tree.map(lambda a: a, q)
    object.__setattr__(other, "layers", layers)
    assert relative_error(other(X), q(X)) > 1e-3


def test_summary_tells_what_is_deployed():
    summary = {entry.path: entry for entry in quantized().summary()}
    assert list(summary) == [
        "stem/kernel", "block_1/conv1/kernel", "block_1/conv2/kernel", "head/kernel",
    ]  # fmt: skip
    stem, conv, head = (summary[p] for p in ("stem/kernel", "block_1/conv1/kernel", "head/kernel"))
    assert (stem.kind, stem.weight_bits, stem.act_bits, stem.step_size) == ("conv", 8, None, None)
    assert stem.border is None
    assert (conv.kind, conv.shape, conv.weight_bits, conv.act_bits) == ("conv", (2, 2, 4, 4), 3, 3)
    assert conv.step_size > 0
    assert conv.zero_point == 0
    assert conv.weight_scale.shape == conv.weight_zero_point.shape == (4,)
    assert {c.shape for c in conv.border.values()} == {(4, 4)}
    assert (head.kind, head.weight_bits, head.act_bits) == ("dense", 8, 8)
    assert {c.shape for c in head.border.values()} == {(1, 4)}
    assert conv.phi in ("identity", "clamp")
    assert conv.border_granularity == "element"
    assert all(isinstance(entry.codes, np.ndarray) for entry in summary.values())


def test_a_summary_prints_a_line_a_layer():
    found = quantized().summary()
    lines = [line.split() for line in str(found).splitlines()]
    assert [line[0] for line in lines] == ["layer", *(entry.path for entry in found)]
    assert lines[1] == ["stem/kernel", "conv", "2x2x3x4", "w8a16"]
    step = f"{found[1].step_size:.4g}"
    assert lines[2][1:] == ["conv", "2x2x4x4", "w3a3", step, "0", "quadratic", "element"]
    assert repr(found[0]) == "LayerSummary(stem/kernel conv 2x2x3x4 w8a16)"
    console = Console(file=io.StringIO(), width=100)
    console.print(found)
    shown = console.file.getvalue().splitlines()
    assert shown[0].strip() == "4 layers"
    assert sum("│" in line and "kernel" in line for line in shown) == 4


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_in_range(bits):
    for entry in quantized("qdrop", 2, bits).summary():
        assert entry.codes.dtype == np.uint8
        assert entry.codes.max() <= 2**entry.weight_bits - 1
        assert np.isin(entry.weight_zero_point, np.arange(2**entry.weight_bits)).all()


def test_nearest_rounding_has_no_border():
    assert all(entry.border is None for entry in quantized("nearest", 0).summary())


def test_reports_are_no_part_of_what_it_computes():
    """Two runs that differ in their history share one compilation."""
    q = quantized()
    other = jax.tree.map(lambda a: a, q)
    object.__setattr__(other, "reports", History())
    assert jax.tree.structure(q) == jax.tree.structure(other)
    assert len(q.reports) == 3
    assert History((1,)) == History((2,))
    assert hash(History((1,))) == hash(History())


def test_gradients_flow_through_it():
    """For adversarial examples or fine-tuning of what comes before."""
    q = quantized("qdrop", 2, 4)
    gradient = jax.grad(lambda x: jnp.sum(q(x) ** 2))(jnp.asarray(X))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_the_float_weights_are_not_kept():
    apply, variables = small_net()
    recipe = aq.recipes.nearest(3, 3, batch_size=8)
    q = aq.quantize(apply, variables, X, recipe, observer=aq.Observer(), compiler=COMPILER)
    before = q(X)
    for leaf in jax.tree.leaves(variables):
        leaf[...] = np.nan
    jax.clear_caches()  # and so the last test of the file, since COMPILER's functions go too
    np.testing.assert_array_equal(q(X), before)
    kernels = sum(np.size(layer.codes) for layer in q.layers.values())
    floats = sum(leaf.size for leaf in jax.tree.leaves(q) if leaf.dtype == jnp.float32)
    assert floats < kernels


def test_an_input_of_another_dtype_that_the_network_does_not_take_is_named():
    def apply(v, x):
        dot = functools.partial(jax.lax.dot, preferred_element_type=jnp.float32)
        return dot(dot(x, v["a"]), v["b"])

    recipe, x = aq.recipes.nearest(8, 8), np.eye(4, dtype=np.float32)
    network = aq.quantize(apply, {"a": x, "b": x}, x, recipe, observer=aq.Observer())
    with pytest.raises(aq.InputError, match="is of int32, and the network was"):
        network(x.astype(np.int32))
