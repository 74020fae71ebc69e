"""Networks of every kind through the whole library, none of them written for it.

Each: its blocks are the expected ones and can be printed, folding changes nothing, 8 bits are
within 2% of float, and the result can be jitted and called on another batch size.
"""

import functools
import importlib.util
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
import gpu_ops
from tests.support.foreign_models import BATCH, MODELS, Model, model, promoting_model
from tests.support.nets import (
    conv,
    conv_bn,
    conv_bn_params,
    images,
    mlp,
    normal,
    relative_error,
    rng_of,
    run_folded,
)

COMPILER = aq.Compiler()


def scrambled(variables, seed=0):
    """Initial variables with batch statistics that are not trivial; variances stay positive."""
    rng = rng_of(seed)

    def change(path, leaf):
        value = np.asarray(leaf)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return leaf
        noise = rng.normal(size=value.shape).astype(value.dtype)
        if value.ndim > 1:
            return value
        if "var" in jax.tree_util.keystr(path[-2:]):
            return np.exp(noise)
        return value + noise * value.dtype.type(0.2)

    return jax.tree_util.tree_map_with_path(change, variables)


@model
def linen_cnn():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        """Two convolutions and a shortcut."""

        @nn.compact
        def __call__(self, x):
            norm = functools.partial(nn.BatchNorm, use_running_average=True)
            y = nn.relu(norm(name="bn1")(nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)))
            y = norm(name="bn2")(nn.Conv(4, (3, 3), name="conv2")(y))
            return nn.relu(x + y)

    class Net(nn.Module):
        """Stem, two blocks, pooling, dropout, head."""

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
            for i in range(2):
                x = Block(name=f"block_{i}")(x)
            x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
            return nn.Dense(5, name="head")(nn.Dropout(0.5, deterministic=True)(x))

    net, x = Net(), images(0, BATCH)
    variables = scrambled(jax.jit(net.init)(jax.random.key(0), x))
    names = [tuple(f"params/block_{i}/conv{j}/kernel" for j in (1, 2)) for i in (0, 1)]
    return Model(
        net.apply, variables, x, [("params/stem/kernel",), *names, ("params/head/kernel",)]
    )


@model
def nnx_cnn():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        """A chain of convolutions with batch norm and dropout."""

        def __init__(self, rngs):
            self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.head = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.bn(self.conv1(x)))
            x = jnp.mean(nnx.relu(self.conv2(x)), axis=(1, 2))
            return self.head(self.dropout(x))

    graph, params, stats, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...)
    apply = lambda v, x: nnx.merge(graph, v["params"], v["stats"], rest)(x)  # noqa: E731
    variables = scrambled({"params": params, "stats": stats})
    names = [(f"params/{name}/kernel",) for name in ("conv1", "conv2", "head")]
    return Model(apply, variables, images(0, BATCH), names)


@model
def nnx_state():
    """The state of `nnx.split` as it is, random number state included."""
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        """Two linear layers."""

        def __init__(self, rngs):
            self.a = nnx.Linear(6, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.b = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.b(self.dropout(nnx.gelu(self.a(x))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    return Model(apply, state, normal(rng_of(0), BATCH, 6), [("a/kernel",), ("b/kernel",)])


@model
def plain_mlp():
    return Model(*mlp(), normal(rng_of(0), BATCH, 6), [("0/w",), ("1/w",), ("2/w",)])


@model
def odd_convolutions():
    """Grouped, dilated, depthwise and strided convolutions."""
    shapes = {
        "stem": (3, 3, 3, 8), "grouped": (3, 3, 4, 8), "dilated": (3, 3, 8, 8),
        "depthwise": (3, 3, 1, 8), "point": (1, 1, 8, 6), "strided": (2, 3, 6, 6),
    }  # fmt: skip
    variables = {
        name: normal(rng_of(i), *s) * np.float32(np.prod(s[:3]) ** -0.5)
        for i, (name, s) in enumerate(shapes.items())
    }

    def apply(v, x):
        x = jax.nn.relu(conv(x, v["stem"]))
        x = jax.nn.relu(conv(x, v["grouped"], groups=2))
        x = jnp.tanh(conv(x, v["dilated"], dilation=(2, 2)))
        x = jax.nn.relu6(conv(x, v["depthwise"], groups=8))
        x = conv(x, v["point"], padding="VALID")
        return conv(x, v["strided"], strides=(2, 1), padding=((1, 0), (0, 2)))

    return Model(apply, variables, images(0, BATCH), [(name,) for name in shapes])


@model
def linen_decoder():
    """Transposed convolutions of every kind that linen has."""
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        """From rows to images."""

        @nn.compact
        def __call__(self, x):
            up = functools.partial(nn.ConvTranspose, 4)
            h = nn.relu(nn.Conv(6, (1,), name="stem")(x))
            h = nn.relu(up((3,), strides=(3,), padding="VALID", name="line")(h))
            h = nn.relu(nn.BatchNorm(use_running_average=True)(up((2,), name="one")(h)))
            h = h.reshape(h.shape[0], -1, 3, 4)
            h = nn.relu(up((4, 4), strides=(2, 2), transpose_kernel=True, name="up")(h))
            h = up((3, 2), (1, 3), ((1, 2), (0, 1)), kernel_dilation=(2, 1), name="uneven")(h)
            return nn.relu(up((3, 3), strides=(2, 2), padding="CIRCULAR", name="round")(h))

    net, x = Net(), normal(rng_of(3), BATCH, 4, 3)
    variables = scrambled(jax.jit(net.init)(jax.random.key(0), x))
    names = ("stem", "line", "one", "up", "uneven", "round")
    return Model(net.apply, variables, x, [(f"params/{name}/kernel",) for name in names])


@model
def haiku_decoder():
    """Haiku's transposed convolutions, as JAX's; of two groups, and cropped to a size."""
    shapes = {
        "stem": (1, 1, 3, 4),
        "up": (4, 4, 6, 4),
        "grouped": (3, 3, 3, 4),
        "crop": (3, 3, 4, 5),
    }
    variables = {n: 0.3 * normal(rng_of(i), *s) for i, (n, s) in enumerate(shapes.items())}

    def apply(v, x):
        h = jax.nn.relu(conv(x, v["stem"]))
        numbers = ("NHWC", "HWOI", "NHWC")
        h = jax.nn.relu(lax.conv_transpose(h, v["up"], (2, 2), "SAME", dimension_numbers=numbers))
        ends = ((1, 2), (2, 1))
        h = jnp.tanh(conv(h, v["grouped"], padding=ends, groups=2, lhs_dilation=(2, 1)))
        return conv(h, v["crop"], padding=((-2, -3), (0, -1)))

    return Model(apply, variables, images(0, BATCH, size=4), [(name,) for name in shapes])


@model
def one_dimensional():
    variables = {
        "first": {"kernel": 0.3 * normal(rng_of(0), 5, 3, 6)},
        "second": {"kernel": 0.3 * normal(rng_of(1), 3, 6, 6)},
        "head": {"kernel": normal(rng_of(2), 6, 4)},
    }

    def line(x, kernel, **options):
        return lax.conv_general_dilated(
            x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    def apply(v, x):
        h = jax.nn.silu(line(x, v["first"]["kernel"]))
        h = jax.nn.relu(line(h, v["second"]["kernel"], rhs_dilation=(2,)))
        return jnp.mean(h, axis=1) @ v["head"]["kernel"]

    names = [("first/kernel",), ("second/kernel",), ("head/kernel",)]
    return Model(apply, variables, normal(rng_of(3), BATCH, 20, 3), names)


@promoting_model("it adds a bias of one axis to rows, as most code in plain JAX does")
def inception():
    rng = rng_of(0)
    shapes = {
        "stem": (3, 3, 3, 4),
        "one": (1, 1, 4, 3),
        "three": (3, 3, 4, 3),
        "pool": (1, 1, 4, 2),
    }
    variables = {n: conv_bn_params(rng, *s[:2], *s[2:]) for n, s in shapes.items()}
    variables["head"] = {"kernel": normal(rng, 8, 5), "bias": normal(rng, 5)}

    def apply(v, x):
        h = jax.nn.relu(conv_bn(x, v["stem"]))
        pooled = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        branches = [conv_bn(h, v["one"]), conv_bn(h, v["three"]), conv_bn(pooled, v["pool"])]
        h = jax.nn.relu(jnp.concatenate(branches, axis=-1))
        return jnp.mean(h, axis=(1, 2)) @ v["head"]["kernel"] + v["head"]["bias"]

    middle = ("one/kernel", "three/kernel", "pool/kernel")
    return Model(apply, variables, images(0, BATCH), [("stem/kernel",), middle, ("head/kernel",)])


@model
def shared_weights():
    variables = {"in": normal(rng_of(0), 6, 8), "same": 0.4 * normal(rng_of(1), 8, 8)}

    def apply(v, x):
        h = x @ v["in"]
        for _ in range(3):
            h = jax.nn.relu(h @ v["same"])
        return h @ v["in"].T

    names = [("in",), ("same",), ("same#2",), ("same#3",), ("in#2",)]
    return Model(apply, variables, normal(rng_of(2), BATCH, 6), names)


@jax.custom_jvp
def scaled_conv(x, kernel):
    return conv(x, kernel)


@scaled_conv.defjvp
def _scaled_conv_jvp(primals, tangents):
    return jax.jvp(conv, primals, tangents)


@model
def wrapped_calls():
    """Convolutions inside jit, remat and custom_jvp."""
    variables = {n: 0.3 * normal(rng_of(i), 3, 3, 3, 3) for i, n in enumerate("abc")}

    def apply(v, x):
        x = jax.nn.relu(jax.jit(conv)(x, v["a"]))
        x = jax.nn.relu(jax.checkpoint(lambda x, k: conv(x, k) + 0.1)(x, v["b"]))
        return scaled_conv(x, v["c"])

    return Model(apply, variables, images(0, BATCH), [("a",), ("b",), ("c",)])


@model
def attention():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        """One pre-norm transformer layer."""

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="embed")(x)
            y = nn.LayerNorm(name="ln1")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y)
            y = nn.Dense(16, name="up")(nn.LayerNorm(name="ln2")(x))
            return x + nn.Dense(8, name="down")(nn.gelu(y))

    net, x = Net(), normal(rng_of(0), BATCH, 5, 6)
    variables = scrambled(jax.jit(net.init)(jax.random.key(0), x))
    heads = tuple(f"params/attention/{n}/kernel" for n in ("query", "key", "value", "out"))
    return Model(
        net.apply, variables, x,
        [("params/embed/kernel",), heads, ("params/up/kernel", "params/down/kernel")],
    )  # fmt: skip


@model
def half_precision():
    """bfloat16 activations, float32 weights behind casts."""
    variables = {n: normal(rng_of(i), *s) for i, (n, s) in
                 enumerate({"a": (6, 16), "b": (16, 16), "c": (16, 4)}.items())}  # fmt: skip

    def apply(v, x):
        for name in "ab":
            x = jax.nn.relu(x.astype(jnp.bfloat16) @ (0.3 * v[name]).astype(jnp.bfloat16))
        return (x @ v["c"].astype(jnp.bfloat16)).astype(jnp.float32)

    names = [("a",), ("b",), ("c",)]
    return Model(apply, variables, normal(rng_of(5), BATCH, 6), names, tolerance=2e-2)


@model
def pytrees():
    """A dict in and a tuple out; two inputs of different rank, and a mask."""
    variables = {"image": 0.3 * normal(rng_of(0), 3, 3, 3, 4), "text": normal(rng_of(1), 6, 4),
                 "head": normal(rng_of(2), 4, 3)}  # fmt: skip

    def apply(v, x):
        picture = jnp.mean(jax.nn.relu(conv(x["picture"], v["image"])), axis=(1, 2))
        words = jnp.where(x["mask"][:, None], jax.nn.relu(x["words"] @ v["text"]), 0.0)
        h = picture + words
        return {"logits": h @ v["head"], "words": words}

    x = {"picture": images(0, BATCH), "words": normal(rng_of(3), BATCH, 6),
         "mask": rng_of(4).random(BATCH) < 0.7}  # fmt: skip
    return Model(apply, variables, x, [("image",), ("text",), ("head",)])


@model
def merged_samples():
    """Samples and positions in one axis inside: it can be cut only where samples stand alone."""
    shapes = {"in": (6, 8), "a": (8, 8), "b": (8, 8), "out": (8, 4)}
    variables = {n: 0.4 * normal(rng_of(i), *s) for i, (n, s) in enumerate(shapes.items())}

    def apply(v, x):
        h = jax.nn.relu(x @ v["in"])
        flat = jax.nn.relu(h.reshape(-1, 8) @ v["a"])
        flat = jax.nn.relu(flat @ v["b"])
        return flat.reshape(h.shape) @ v["out"]

    x = normal(rng_of(4), BATCH, 5, 6)
    return Model(apply, variables, x, [("in",), ("a", "b", "out")])


@model
def time_major():
    """Time comes first inside, and is as long as the batch."""
    shapes = {"a": (6, 8), "b": (8, 8), "out": (8, 4)}
    variables = {n: 0.4 * normal(rng_of(i), *s) for i, (n, s) in enumerate(shapes.items())}

    def apply(v, x):
        h = jax.nn.relu(x.transpose(1, 0, 2) @ v["a"])
        h = jnp.cumsum(jax.nn.relu(h @ v["b"]), axis=0)
        return jnp.mean(h, axis=0) @ v["out"]

    x = normal(rng_of(4), BATCH, BATCH, 6)
    return Model(apply, variables, x, [("a", "b"), ("out",)])


@model
def tokens():
    """Embedding lookup and a tied output projection."""
    variables = {"table": normal(rng_of(0), 13, 6), "mix": {"kernel": normal(rng_of(1), 6, 6)}}

    def apply(v, ids):
        h = jnp.take(v["table"], ids, axis=0)
        h = jnp.tanh(h @ v["mix"]["kernel"])
        return jnp.einsum("btd,vd->btv", h, v["table"])

    x = rng_of(2).integers(0, 13, (BATCH, 5)).astype(np.int32)
    return Model(apply, variables, x, [("mix/kernel",), ("table",)])


@promoting_model("Keras's Dense adds a bias of one axis to rows")
def keras_cnn():
    keras = keras_with_jax()
    layers = keras.layers
    given = keras.Input((6, 6, 3))
    h = layers.Conv2D(4, 3, padding="same", use_bias=False)(given)
    h = layers.ReLU()(layers.BatchNormalization()(h))
    y = layers.DepthwiseConv2D(3, padding="same")(h)
    h = layers.Add()([h, layers.ReLU()(layers.BatchNormalization()(y))])
    h = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(h))
    return keras_model(keras.Model(given, layers.Dense(5)(h)), images(0, BATCH))


def keras_with_jax():
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed (pip install keras)")
    if os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
        pytest.skip(f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']}, not jax")
    with pytest.MonkeyPatch.context() as patch:
        for optional in ("matplotlib", "sklearn"):  # half of the time of the import
            patch.setitem(sys.modules, optional, None)
        import keras

    keras.utils.set_random_seed(0)
    return keras


def keras_model(net, x):
    """A Keras model, with moving means and variances in turn; every kernel is a block."""
    trainable = [
        np.asarray(v.value) + np.float32(0.2 * (v.value.ndim == 1)) * normal(rng_of(i), *v.shape)
        for i, v in enumerate(net.trainable_variables)
    ]
    fixed = [np.asarray(v.value) for v in net.non_trainable_variables]
    fixed = [np.exp(normal(rng_of(i), *a.shape)) if a.ndim == 1 else a for i, a in enumerate(fixed)]

    def apply(variables, x):
        return net.stateless_call(*variables, x)[0]

    index_of = {id(v): i for i, v in enumerate(net.trainable_variables)}
    kernels = [f"0/{index_of[id(v)]}" for v in net.trainable_variables if "kernel" in v.path]
    return Model(apply, (trainable, fixed), x, [(k,) for k in kernels])


@promoting_model("Keras's layers add a bias of one axis to images")
def keras_decoder():
    keras = keras_with_jax()
    layers = keras.layers
    given = keras.Input((4, 4, 3))
    h = layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu")(given)
    h = layers.BatchNormalization()(layers.Conv2DTranspose(4, 4, strides=3, output_padding=1)(h))
    h = layers.Conv2DTranspose(3, 3, dilation_rate=2, padding="valid")(layers.LeakyReLU()(h))
    return keras_model(keras.Model(given, h), images(0, BATCH, size=4))


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    return request.param()


def head(x, samples):
    return jax.tree.map(lambda leaf: leaf[:samples], x)


def errors(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return [relative_error(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]


def test_blocks_are_found_and_printed(case):
    assert [block.layers for block in case.net.blocks] == case.blocks
    text = aq.describe(case.net)
    assert text.startswith(f"{len(case.blocks)} block")
    assert all(path in text for block in case.blocks for path in block)


def test_folding_changes_nothing(case):
    assert max(errors(run_folded(case.net, case.x), case.expected)) < case.tolerance


# keras_cnn and linen_decoder have the layers of keras_decoder, haiku_decoder those of attention.
# tests/deployment/test_onnx_integers.py has layers over one axis, tests/test_quantize.py half
# precision. keras_cnn has the layers of linen_cnn and nnx_cnn.
SLOW = (
    "keras_decoder", "one_dimensional", "half_precision", "attention", "linen_cnn", "nnx_cnn",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(*p.values, id=p.id, marks=[*p.marks, *[pytest.mark.slow] * (p.id in SLOW)])
        for p in MODELS
    ],
    indirect=True,
)
def test_eight_bits_are_close_to_float(case):
    recipe = aq.recipes.nearest(8, 8, batch_size=BATCH)
    quantized = aq.quantize(
        case.apply, case.variables, case.x, recipe, observer=aq.Observer(), compiler=COMPILER
    )
    found = quantized(case.x)
    assert 0 < max(errors(found, case.expected)) < 0.02
    # Up to a code on a near-tie: compiled otherwise, sums are rounded otherwise.
    assert max(errors(jax.jit(quantized)(head(case.x, 3)), head(found, 3))) < 5e-3
    assert max(errors(quantized.with_backend(gpu_ops.backend())(case.x), found)) < 5e-3
