"""Channel transforms: the same float network, with activations that lose less when rounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from aquant_jax.deployment import onnx, onnx_runtimes, stablehlo
from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.graph.fold import fold
from aquant_jax.graph.ir import INVERSE, TRANSFORM
from aquant_jax.graph.trace import trace
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.channel_transform import ChannelTransform, transformable, transformed
from aquant_jax.plan.transform_search import hadamard
from tests.graph.test_activation_rules import bert, recipe, short, tokens
from tests.support.nets import conv, normal, rng_of

pytestmark = pytest.mark.usefixtures("few_candidates")

COMPILER = aq.Compiler()
KINDS = ("shift_scale", "hadamard")
SHIFT_SCALE = recipe(transforms=("shift_scale",))
tiny_bert = functools.partial(bert, layers=1)


def outliers(side="left"):
    """A layer norm with two channels of large range, read by a dense layer and by a sum."""
    rng = rng_of(3)
    scale = np.ones(16, np.float32)
    scale[[2, 9]] = 40.0
    variables = {
        "embed": normal(rng, 8, 16) / 4,
        "scale": scale,
        "bias": normal(rng, 16) * scale,
        "dense": normal(rng, 16, 16) / scale[:, None] / 4,
        "head": normal(rng, 16, 4) / scale[:, None] / 4,
    }

    def apply(v, x):
        h = x @ v["embed"]
        centred = h - jnp.mean(h, -1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-5)
        h = normed * v["scale"][None] + v["bias"][None]
        transposed = side == "right"
        y = jnp.einsum("io,ni->on", v["dense"], h).T if transposed else h @ v["dense"]
        return (h + 30 * jnp.tanh(y)) @ v["head"]

    return apply, variables


def rows(samples=64):
    return normal(rng_of(4), samples, 8)


def tensors_of(apply, variables, x, chosen=SHIFT_SCALE):
    graph = fold(trace(apply, variables, x))
    plan = make_plan(graph, chosen)
    return {plan.tensors[i].key: graph.avals[i].shape[-1] for i in transformable(graph, plan)}


def drawn(channels, kind, seed=0):
    """A transform that is far from the one that changes nothing."""
    rng = rng_of(seed)
    rotation = hadamard(channels) if kind == "hadamard" else None
    return ChannelTransform(normal(rng, channels), np.exp(normal(rng, channels)), rotation)


@pytest.mark.user_model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_float_network_stays_the_same(kind, side):
    (apply, variables), x = outliers(side), rows()
    channels = tensors_of(apply, variables, x)
    assert {"dense", "head"} <= set(channels)
    transforms = {key: drawn(count, kind) for key, count in channels.items()}
    same = transformed(apply, SHIFT_SCALE, transforms)
    expected = apply(variables, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(same(variables, x), expected, atol=1e-4 * scale)


@pytest.mark.user_model
@pytest.mark.parametrize("kind", KINDS)
def test_a_float_transformer_stays_the_same(kind):
    (apply, variables), x = tiny_bert(), tokens()
    channels = tensors_of(apply, variables, x)
    assert short(channels) == [
        "layer_0/query", "layer_0/up", "layer_0/out:sum", "layer_0/down:sum", "layer_0/down:norm",
    ]  # fmt: skip
    transforms = {key: drawn(count, kind, i) for i, (key, count) in enumerate(channels.items())}
    same = transformed(apply, SHIFT_SCALE, transforms)
    np.testing.assert_allclose(same(variables, x), apply(variables, x), atol=2e-5)


@functools.cache
def prepared(token):
    """With a token in the padding."""
    x = tokens()
    ids = np.where(x["mask"] == 1, x["ids"], token).astype(np.int32)
    return aq.prepare(*tiny_bert(), {**x, "ids": ids}, SHIFT_SCALE, "mask")


@pytest.mark.user_model
def test_a_norm_takes_up_a_shift_and_a_scale():
    """Only a sum, which no static scale and bias make, has an op of its own."""
    (apply, variables), x = tiny_bert(), tokens()
    net = prepared(0)
    assert len(net.transforms) == 5
    names = [op.name for op in net.graph.ops]
    assert names.count(TRANSFORM) == 2
    assert names.count(INVERSE) == 5
    kept = aq.prepare(apply, variables, x, recipe())
    assert [t.key for t in net.plan.tensors.values()] == [t.key for t in kept.plan.tensors.values()]
    assert "5 activations transformed before they are rounded" in aq.describe(net)
    assert "layer_0/up/kernel: shift_scale" in aq.describe(net)
    assert "transformed" not in aq.describe(kept)


def quantize(net, x, **fields):
    apply, variables = net
    options = {"observer": aq.Observer(), "compiler": COMPILER}
    return aq.quantize(apply, variables, x, recipe(**fields), **options)


def test_channels_of_large_range_cost_no_accuracy():
    net, x = outliers(), rows()
    exact = np.asarray(net[0](net[1], x))
    plain, scaled, rotated = (
        np.mean((np.asarray(quantize(net, x, transforms=kinds)(x)) - exact) ** 2) / exact.var()
        for kinds in ((), ("shift_scale",), ("hadamard",))
    )
    assert plain > 0.05
    assert scaled < plain / 4
    assert rotated < plain


@pytest.mark.parametrize("channels", [1, 6, 8, 12, 384])
def test_a_hadamard_rotation_is_orthogonal(channels):
    matrix = hadamard(channels)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(channels), atol=1e-5)
    size = channels & -channels
    np.testing.assert_allclose(np.abs(matrix[matrix != 0]), size**-0.5, rtol=1e-6)


@pytest.mark.user_model
def test_what_stands_in_the_padding_has_no_influence():
    found = [dict(prepared(token).transforms) for token in (0, 29)]
    assert found[0]
    jax.tree.map(np.testing.assert_array_equal, *found)


def through_a_view(v, x):
    h = jnp.tanh(x @ v["a"])
    return jnp.reshape(h, (-1, 2, 8)) @ v["b"]


def with_channels_first(v, x):
    h = jnp.tanh(conv(jnp.reshape(x, (-1, 2, 2, 2)), v["kernel"]))
    images = jnp.transpose(h, (0, 3, 1, 2)) + 1
    return lax.conv_general_dilated(
        images, v["second"], (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )


def through_a_product(v, x):
    h = jnp.reshape(jnp.tanh(x @ v["a"]), (-1, 4, 4))
    return jnp.reshape(h @ jnp.swapaxes(h, 1, 2), (-1, 16)) @ v["a"].T


@pytest.mark.parametrize("apply", [through_a_view, with_channels_first, through_a_product])
def test_what_a_transform_would_not_pass_stays_as_it_is(apply):
    rng = rng_of(5)
    variables = {
        "a": normal(rng, 8, 16), "b": normal(rng, 8, 3),
        "kernel": normal(rng, 2, 2, 2, 2), "second": normal(rng, 2, 2, 2, 2),
    }  # fmt: skip
    names = {with_channels_first: ["kernel", "second"], through_a_product: ["a"]}
    names = names.get(apply, ["a", "b"])
    used = {name: variables[name] for name in names}
    assert make_plan(fold(trace(apply, used, rows())), SHIFT_SCALE).tensors
    assert not tensors_of(apply, used, rows())


def test_nan_is_named():
    apply, variables = outliers()

    def broken(v, x):
        return apply(v, jnp.log(x) * 2)

    with pytest.raises(ReconstructionError, match=r"dense: its float input holds NaN or infinity"):
        quantize((broken, variables), rows(), transforms=("shift_scale",))


def test_an_unknown_kind_is_named():
    known = "known: shift_scale, hadamard"
    with pytest.raises(InputError, match=f"transforms: unknown kind 'rotation'; {known}"):
        recipe(transforms=("rotation",))
    with pytest.raises(InputError, match=r"transforms is 'hadamard'; it must be a list or tuple"):
        recipe(transforms="hadamard")


@functools.cache
def learned():
    steps = {"steps": 4, "batch_size": 16, "transforms": KINDS}
    return quantize(outliers(), rows(), **steps)


def test_it_is_deployed_like_any_network(tmp_path):
    network, x = learned(), rows()
    expected = np.asarray(network(x))
    aq.save(network, tmp_path / "saved", rows(2))
    np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(x), expected)
    program = stablehlo.serialize(stablehlo.self_contained(network, rows(2)))
    run = jax.export.deserialize(bytearray(program)).call
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnxruntime_gives_the_same_outputs(tmp_path):
    pytest.importorskip("jax2onnx", reason="needs aquant-jax[onnx]")
    pytest.importorskip("onnxruntime", reason="needs aquant-jax[onnx]")
    network, x = learned(), rows()
    path = tmp_path / "network.onnx"
    path.write_bytes(onnx.to_onnx(network).SerializeToString())
    np.testing.assert_allclose(onnx_runtimes.load(path)(x)[0], network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # the fingerprint of a run has its recipe, whatever the transforms
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    class Stop(aq.Observer):
        def on_block_end(self, report):
            raise KeyboardInterrupt

    apply, variables = outliers()
    chosen = learned().recipe.replace(granularity="layer")
    call = functools.partial(aq.quantize, apply, variables, rows(), chosen, compiler=aq.Compiler())
    with pytest.raises(KeyboardInterrupt):
        call(observer=Stop(), resume=tmp_path)
    resumed = call(observer=aq.Observer(), resume=tmp_path)
    whole = call(observer=aq.Observer())
    for name in ("layers", "activations"):
        states = getattr(resumed, name), getattr(whole, name)
        jax.tree.map(np.testing.assert_array_equal, *states)
