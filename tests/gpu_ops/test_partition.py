"""Images that are split over two devices stay where they are, deployed and in training."""

from tests.support.process import run_python

SETUP = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding
assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("batch",))
images, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
"""
DEPLOYED = """
x = jax.random.normal(jax.random.key(0), (4, 6, 6, 8))
c = {"b0": jnp.full((9, 8), 0.4), "b1": jnp.full((9, 8), 0.1)}
geometry = gpu_ops.conv_geometry(x.shape, (3, 3), padding="SAME")
def f(x, s, c):
    quantizer, rounding = ActivationQuantizer(s, 1.0), Rounding(4, "linear", "clamp", True)
    return gpu_ops.img2col_border(x, quantizer, c, rounding, geometry)
def g(x):
    return gpu_ops.img2col(x, geometry)
whole = f(x, jnp.float32(0.3), c), g(x)
split = jax.device_put(x, images)
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
print("deployed")
"""
TRAINED = """
from aquant_jax.layers.conv_geometry import ConvGeometry
key = jax.random.key(0)
operands = {"step": jnp.float32(0.3), "kernel": jax.random.normal(key, (72, 8)),
            "c": {"b0": jnp.full((9, 8), -0.4), "b1": jnp.full((9, 8), 0.1)}}
whole = jax.device_put(operands, everywhere)
how = (ConvGeometry((6, 6), (3, 3), (1, 1), (1, 1), ((0, 0), (0, 0))),
       Rounding(3, "linear", "identity", True))
def gradients(multiplied, masked, dy, place):
    def loss(x, keep, o):
        x = place(1.0 * x)
        quantizer = ActivationQuantizer(o["step"], jnp.float32(1.0))
        own = (x, keep if masked else None, quantizer, o["c"])
        if multiplied:
            y = gpu_ops.border_conv(*own, o["kernel"], *how)
            return jnp.sum(y * dy[..., :8] + y**2), y
        y = gpu_ops.border_columns(*own, *how)
        return jnp.sum(y.reshape(dy.shape) * dy + y.reshape(dy.shape)**2), y
    return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
def check(x, keep, dy, multiplied, masked, even):
    expected = gradients(multiplied, masked, dy, lambda x: x)(x, keep, operands)
    place = lambda x: jax.lax.with_sharding_constraint(x, images)
    f = gradients(multiplied, masked, dy, place)
    given = jax.device_put((x, keep), images if even else everywhere)
    found = f(*given, whole)
    if even:
        assert found[1].sharding.spec[0] == found[0][0].sharding.spec[0] == "batch"
        text = f.lower(*given, whole).compile().as_text()
        assert "all-gather" not in text and "all-reduce" in text
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
for number in (4, 3):
    x, dy = jax.random.normal(key, (number, 6, 6, 8)), jax.random.normal(key, (number, 4, 4, 72))
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    even = number % 2 == 0
    for multiplied in (False, True):
        for masked in (False, True) if even else (multiplied,):
            check(x, keep, dy, multiplied, masked, even)
    print("even" if even else "uneven")
"""


def test_images_on_two_devices_stay_where_they_are():
    """In one process for all: starting one takes seconds."""
    options = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    done = run_python(SETUP + DEPLOYED + TRAINED, XLA_FLAGS=options)
    assert done.stdout.split() == ["deployed", "even", "uneven"], done.stderr[-3000:]
