"""`shard_map`: what the devices compute together is quantized as the program of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import aquant_jax as aq
import gpu_ops
from aquant_jax.graph.trace import trace
from tests.graph.test_trace import replay
from tests.support.nets import conv, normal, relative_error, rng_of

BATCH = 8
COMPILER = aq.Compiler()
X = normal(rng_of(0), 4 * BATCH, 16)
SHAPES = {"in": (16, 16), "up": (16, 24), "bias": (1, 24), "down": (24, 16), "head": (16, 5)}
V = {
    name: jnp.asarray(normal(rng_of(i), *shape) / np.float32(shape[0] ** 0.5))
    for i, (name, shape) in enumerate(SHAPES.items(), 1)
}
Spec = PartitionSpec
REPLICATED = Spec()


def sharded(body, mesh, specs, outputs, **options):
    """Over a mesh of devices that need not be there: only its trace is used."""
    mesh = AbstractMesh(tuple(mesh.values()), tuple(mesh), (AxisType.Auto,) * len(mesh))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=outputs, **options)


def layers_over(mesh, samples=REPLICATED, **options):
    """A pair of layers whose hidden channels are sharded over `model`."""

    def pair(x, up, bias, down):
        return x + lax.psum(jax.nn.relu(x @ up + bias) @ down, "model")

    specs = samples, Spec(None, "model"), Spec(None, "model"), Spec("model", None)

    def apply(v, x):
        h = jax.nn.relu(x @ v["in"])
        pairs = sharded(pair, mesh, specs, samples, **options)
        return pairs(h, v["up"], v["bias"], v["down"]) @ v["head"]

    return apply


def plain(v, x):
    h = jax.nn.relu(x @ v["in"])
    return (h + jax.nn.relu(h @ v["up"] + v["bias"]) @ v["down"]) @ v["head"]


MESHES = {
    "one device": (layers_over({"model": 1}), 16),
    "channels": (layers_over({"model": 4}), 64),
    "unchecked": (layers_over({"model": 4}, check_vma=False), 64),
    "two names of an axis": (layers_over({"a": 2, "b": 2, "model": 2}, Spec(("b", "a"))), 32),
}


# test_sharded_layers_are_learned has the channels.
@pytest.mark.parametrize(
    ("apply", "grids"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name == "channels"))
        for name, case in MESHES.items()
    ],
)
def test_sharded_layers_are_quantized(apply, grids, tmp_path):
    recipe = aq.recipes.nearest(8, 8, batch_size=BATCH)
    quantized = aq.quantize(apply, V, X, recipe, observer=aq.Observer(), compiler=COMPILER)
    assert not quantized.unquantized
    assert list(quantized.layers) == ["in", "up", "down", "head"]
    # A shard of `down` sums a part of the inputs, so that each has grids of its own.
    assert quantized.layers["down"].scale.shape == (grids,)
    assert relative_error(quantized(X), plain(V, X)) < 0.02
    aq.save(quantized, tmp_path / "saved")
    np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(X), quantized(X))
    np.testing.assert_array_equal(quantized.with_backend(gpu_ops.backend())(X), quantized(X))


def test_sharded_layers_are_learned():
    apply, _ = MESHES["channels"]
    wanted, errors = plain(V, X), []
    for recipe in (aq.recipes.nearest(4, 4), aq.recipes.aquant(4, 4, steps=20)):
        recipe = recipe.replace(batch_size=BATCH)
        quantized = aq.quantize(apply, V, X, recipe, observer=aq.Observer())
        errors.append(relative_error(quantized(X), wanted))
    assert errors[1] < errors[0]


def body(x, kernel):
    """Every kind of collective, and calls, loops and gradients of their own in a body."""
    place = lax.axis_index("model").astype(jnp.float32)
    h = conv(x, kernel)
    h = jax.jit(lambda h: jax.nn.gelu(h) * (1 + place))(h)
    h = lax.scan(lambda h, _: (jax.nn.relu(h) + lax.pmean(h, "model"), None), h, None, 2)[0]
    h = lax.all_gather(h, "model", axis=3, tiled=True)
    h = h + lax.ppermute(h, "model", [(0, 1), (1, 0)])
    return lax.psum_scatter(h, "model", scatter_dimension=3, tiled=True), lax.pmax(h.sum(), "model")


def by_hand(x, kernel):
    parts = [conv(x, part) for part in jnp.split(kernel, 2, axis=3)]
    parts = [jax.nn.gelu(part) * (1 + place) for place, part in enumerate(parts)]
    for _ in range(2):
        mean = (parts[0] + parts[1]) / 2
        parts = [jax.nn.relu(part) + mean for part in parts]
    h = 2 * jnp.concatenate(parts, axis=3)
    return 2 * h, h.sum()


def test_collectives_keep_their_meaning():
    specs = (Spec(), Spec(None, None, None, "model")), (Spec(None, None, None, "model"), Spec())
    apply = lambda v, x: sharded(body, {"model": 2}, *specs, check_vma=False)(x, v["kernel"])  # noqa: E731
    variables, x = {"kernel": normal(rng_of(1), 3, 3, 2, 4)}, normal(rng_of(2), 3, 5, 5, 2)
    made, total = replay(apply, variables, x)
    wanted, whole = by_hand(x, variables["kernel"])
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, whole, rtol=1e-5)


def test_a_body_that_cannot_be_mapped_stays_float_and_is_named():
    def body(x, w):
        lines = lax.all_gather(x, "model", axis_index_groups=[[1, 0]])
        return lines[0] @ w

    def apply(v, x):
        h = sharded(body, {"model": 2}, (Spec(), Spec()), Spec(), check_vma=False)(x, v["w"])
        return h @ v["head"]

    graph = trace(apply, {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 2))}, jnp.ones((2, 4)))
    assert [layer.path for layer in graph.layers] == ["head"]
    assert list(map(str, graph.unquantized)) == ["w (shard_map): it runs on several devices"]
