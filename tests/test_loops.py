"""Loops and branches with weights in them: every kind quantized, run in integers and saved."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
import gpu_ops
from aquant_jax.deployment import stacked
from aquant_jax.deployment.stablehlo import export_program, serialize
from tests.support.nets import normal, relative_error, rng_of

BATCH = 8
COMPILER = aq.Compiler()
PATTERNS, FOREIGN = [], []
X = normal(rng_of(0), 2 * BATCH, 6, 8)


class Pattern(NamedTuple):
    """A network, and the paths of its weights."""

    apply: Any
    variables: Any
    paths: list[str]


def pattern(function):
    PATTERNS.append(pytest.param(function, id=function.__name__))
    return function


def foreign(function, marks=()):
    """A network of another library."""
    FOREIGN.append(pytest.param(function, id=function.__name__, marks=marks))
    return function


def weights(**shapes):
    scaled = {name: normal(rng_of(i), *s) for i, (name, s) in enumerate(shapes.items(), 1)}
    return {name: w / np.sqrt(w.shape[-2]).astype(np.float32) for name, w in scaled.items()}


def rnn(v, x):
    """The last state of a recurrent network with the input weight `u` and the recurrent `k`."""

    def step(h, t):
        return jnp.tanh(t @ v["u"] + h @ v["k"]), None

    return lax.scan(step, jnp.zeros((x.shape[0], 8)), jnp.swapaxes(x, 0, 1))[0] @ v["head"]


def stack(v, x):
    """Residual layers over the weights `layers`, whose first axis numbers them."""

    def layer(h, w):
        scaled = h * w["scale"][None]
        return h + jax.nn.relu(scaled @ w["wi"]) @ w["wo"], None

    return lax.scan(layer, x.mean(1), v["layers"])[0] @ v["head"]


def stack_weights(layers):
    inner = weights(wi=(layers, 8, 16), wo=(layers, 16, 8))
    scale = 1 + 0.1 * normal(rng_of(5), layers, 8)
    return {"layers": {**inner, "scale": scale}, **weights(head=(8, 5))}


@pattern
def recurrent():
    return Pattern(rnn, weights(u=(8, 8), k=(8, 8), head=(8, 5)), ["u", "k", "head"])


@pattern
def stacked_layers():
    paths = [f"layers/{name}[{i}]" for i in range(4) for name in ("wi", "wo")]
    return Pattern(stack, stack_weights(4), [*paths, "head"])


def two_layers():
    return Pattern(stack, stack_weights(2), [])


@pattern
def map_branch_and_counted_loop():
    def apply(v, x):
        h = lax.map(lambda t: jax.nn.relu(t @ v["map"]), jnp.swapaxes(x, 0, 1)).mean(0)
        h = lax.cond(h.sum() > 0, lambda h: h @ v["yes"], lambda h: h @ v["no"], h)
        each = lambda i, h: h + jnp.tanh(h @ lax.dynamic_index_in_dim(v["k"], i, keepdims=False))  # noqa: E731
        return lax.fori_loop(0, 2, each, h) @ v["head"]

    shapes = {"map": (8, 8), "yes": (8, 8), "no": (8, 8), "k": (2, 8, 8), "head": (8, 5)}
    return Pattern(apply, weights(**shapes), ["map", "no", "yes", "k", "k#2", "head"])


@pattern
def loops_in_loops():
    def apply(v, x):
        def layer(xs, weight_and_key):  # a recurrent network a layer
            k, key = weight_and_key
            noise = 0.1 * jax.random.normal(key, (8,))

            def step(h, t):
                h = jnp.tanh(t + noise + h @ k)
                return h, h

            return lax.scan(step, jnp.zeros(xs.shape[1:]), xs)[1], None

        def step(h, t):  # layers at each time step
            return lax.scan(lambda h, k: (jnp.tanh(h @ k), None), h + t, v["deep"])[0], None

        xs = lax.scan(layer, jnp.swapaxes(x, 0, 1), (v["k"], v["keys"]))[0]
        return lax.scan(step, jnp.zeros(xs.shape[1:]), xs)[0] @ v["head"]

    paths = ["k[0]", "k[1]", "deep[0]", "deep[1]", "head"]
    variables = weights(k=(2, 8, 8), deep=(2, 8, 8), head=(8, 5))
    return Pattern(apply, variables | {"keys": jax.random.split(jax.random.key(0), 2)}, paths)


@pattern
def counters_keys_and_a_reversed_loop():
    def apply(v, x):
        def step(carry, t):
            h, i, key = carry
            h = jnp.tanh(t @ v["u"] + h @ v["k"]) * jnp.where(i % 2 == 0, 1.0, 0.5)
            h = jnp.where(jax.random.bernoulli(key, 0.9, (1, 8)), h, 0.0)
            return (h, i + 1, key), h

        start = (jnp.zeros((x.shape[0], 8)), 0, v["key"])
        (h, _, _), hs = lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=True)
        return h @ v["head"] + hs.mean(0) @ v["head"]

    variables = weights(u=(8, 8), k=(8, 8), head=(8, 5)) | {"key": jax.random.key(0)}
    return Pattern(apply, variables, ["u", "k", "head", "head#2"])


# nnx_scan_and_lstm has a recurrent layer of the same library.
@functools.partial(foreign, marks=pytest.mark.slow)
def linen_rnn():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.RNN(linen.GRUCell(8), reverse=True, keep_order=True)(x)
            return linen.Dense(5)(
                linen.RNN(linen.ConvLSTMCell(4, (3,)))(x[..., None])[:, -1].mean(1)
            )

    net = Net()
    variables = net.init(jax.random.key(0), X)
    names = [f"GRUCell_0/{kind}{gate}" for gate in "rzn" for kind in "ih"]
    names += ["ConvLSTMCell_0/ih", "ConvLSTMCell_0/hh", "Dense_0"]
    return Pattern(net.apply, variables, [f"params/{name}/kernel" for name in names])


@foreign
def linen_scan_with_remat():
    linen = pytest.importorskip("flax.linen")

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + linen.Dense(8, name="wo")(linen.relu(linen.LayerNorm()(x))), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                linen.remat(Layer, prevent_cse=False),
                variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
            )  # fmt: skip
            return linen.Dense(5)(layers(name="layers")(x, None)[0].mean(1))

    net = Net()
    paths = [*(f"params/layers/wo/kernel[{i}]" for i in range(3)), "params/Dense_0/kernel"]
    return Pattern(net.apply, net.init(jax.random.key(0), X), paths)


@foreign
def nnx_scan_and_lstm():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=2)(make)(rngs)
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=rngs))

        def __call__(self, x):
            step = nnx.scan(
                lambda layer, x: x + layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
            )
            return self.rnn(step(self.layers, 0.3 * x)).mean(1)

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    paths = ["layers/kernel[0]", "layers/kernel[1]", "rnn/cell/dense_i/kernel"]
    return Pattern(lambda v, x: nnx.merge(graph, v)(x), state, [*paths, "rnn/cell/dense_h/kernel"])


@foreign
def equinox_lstm():
    eqx = pytest.importorskip("equinox")
    parts = eqx.nn.LSTMCell(8, 8, key=jax.random.key(0)), eqx.nn.Linear(8, 5, key=jax.random.key(1))
    variables, static = eqx.partition(parts, eqx.is_array)

    def apply(v, x):
        cell, head = eqx.combine(v, static)

        def one(x):
            zeros = jnp.zeros(8), jnp.zeros(8)
            return head(lax.scan(lambda carry, t: (cell(t, carry), None), zeros, x)[0][0])

        return jax.vmap(one)(x)

    return Pattern(apply, variables, ["0/weight_ih", "0/weight_hh", "1/weight"])


# Keras's loop is that of `recurrent`; tests/test_models_nobody_wrote.py has its stateless call.
@functools.partial(foreign, marks=pytest.mark.slow)
def keras_lstm():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [keras.layers.Input((6, 8)), keras.layers.LSTM(8), keras.layers.Dense(5)]
    )
    names = [v.path for v in net.trainable_variables]
    other = [v.value for v in net.non_trainable_variables]
    variables = {v.path: v.value for v in net.trainable_variables}

    def apply(v, x):
        return net.stateless_call([v[name] for name in names], other, x)[0]

    return Pattern(apply, variables, [name for name in names if "bias" not in name])


def in_eight_bits(build):
    """A quantized network and its outputs, which are close to those in float."""
    apply, variables, paths = build()
    recipe = aq.recipes.nearest(8, 8, batch_size=BATCH, quantize_input=True)
    quantized = aq.quantize(apply, variables, X, recipe, compiler=COMPILER)
    found, expected = quantized(X), apply(variables, X)
    assert sorted(quantized.layers) == sorted(paths)
    assert all(layer.weight_bits == layer.act_bits == 8 for layer in quantized.summary())
    assert np.std(np.asarray(expected), axis=0).min() > 0
    assert 0 < relative_error(found, expected) < 0.02
    return quantized, found


@pytest.mark.user_model(reason="networks of other libraries")
@pytest.mark.parametrize("build", FOREIGN)
def test_eight_bits_of_other_libraries_are_close_to_float(build):
    in_eight_bits(build)


@pytest.mark.user_model(reason="a sum of two ranks")
@pytest.mark.parametrize("build", PATTERNS)
def test_eight_bits_are_close_to_float_in_integers_and_saved(build, tmp_path):
    quantized, found = in_eight_bits(build)
    in_integers = quantized.with_backend(gpu_ops.backend())(X)
    np.testing.assert_allclose(in_integers, found, rtol=1e-5, atol=1e-6)
    aq.save(quantized, tmp_path / "saved")
    np.testing.assert_array_equal(aq.restore(tmp_path / "saved")(X), found)


@pytest.mark.parametrize(
    ("build", "preset"),
    [
        (two_layers, "aquant_plus"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (recurrent, "aquant_plus"), (recurrent, "aquant"), (stacked_layers, "aquant"),
            )
        ),
    ],
)  # fmt: skip
def test_learning_is_better_than_nearest(build, preset):
    apply, variables, _ = build()
    expected = apply(variables, X)
    errors = []
    for name, steps in (("nearest", {}), (preset, {"steps": 20, "finetune_steps": 20})):
        steps = steps if name == "aquant_plus" or not steps else {"steps": 20}
        recipe = aq.recipes.preset(name, weight_bits=4, act_bits=4, batch_size=BATCH, **steps)
        quantized = aq.quantize(apply, variables, X, recipe, compiler=COMPILER)
        errors.append(relative_error(quantized(X), expected))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("stage", ["steps", "finetune_steps"])
def test_a_block_without_a_gradient_is_one_line(stage):
    def apply(v, x):
        halve = lambda c: (c[0] + 1, c[1] / 2)  # noqa: E731
        return lax.while_loop(lambda c: c[0] < 3, halve, (0, x @ v["k"]))[1] @ v["head"]

    recipe = aq.recipes.nearest(batch_size=BATCH, finetune_held_out=0.5, **{stage: 1})
    with pytest.raises(aq.InputError, match=r"^the block of k has no gradient; .*while_loop"):
        aq.quantize(apply, weights(k=(8, 4), head=(4, 3)), X[:, 0], recipe, compiler=COMPILER)


def test_a_recurrent_weight_has_one_grid_and_its_program_does_not_grow():
    variables = weights(u=(8, 8), k=(8, 8), head=(8, 5))
    sizes = []
    for steps in (4, 32):
        x = normal(rng_of(1), BATCH, steps, 8)
        quantized = aq.quantize(rnn, variables, x, aq.recipes.nearest(8, 8, batch_size=BATCH))
        assert quantized.layers["k"].codes.shape == (8, 8)
        assert [layer.path for layer in quantized.summary()] == ["u", "k", "head"]
        sizes.append(len(jax.jit(quantized).lower(x).as_text()))
    assert sizes[1] < 1.05 * sizes[0]


def test_the_range_of_a_recurrent_input_is_that_of_all_steps():
    """The state doubles at each step: 8 bits hold that of the last one."""
    variables = {"k": 2 * np.eye(8, dtype=np.float32)}

    def apply(v, x):
        return lax.fori_loop(0, 5, lambda _, h: h @ v["k"], x)

    x = np.abs(normal(rng_of(1), 2 * BATCH, 8))
    quantized = aq.quantize(apply, variables, x, aq.recipes.nearest(8, 8, batch_size=BATCH))
    largest = 255 * float(quantized.activations["k"].step_size)
    assert largest > 0.8 * 16 * x.max()


def text_size(quantized):
    return len(jax.jit(lambda network, x: network(x)).lower(quantized, X).as_text())


def test_stacked_layers_compile_once_and_run_in_a_loop(monkeypatch):
    sizes, compiled, compiler = [], [], aq.Compiler()
    for layers in (5, 6):
        variables = stack_weights(layers)
        recipe = aq.recipes.preset("qdrop", weight_bits=4, act_bits=4, steps=1, batch_size=BATCH)
        quantized = aq.quantize(stack, variables, X, recipe, compiler=compiler)
        compiled.append(len(compiler._functions))
        saved = len(serialize(export_program(quantized)))
        sizes.append((len(jax.tree.leaves(quantized)), saved, text_size(quantized)))
    assert compiled[0] == compiled[1]  # more layers compile nothing more
    assert sizes[1][0] == sizes[0][0]
    assert sizes[1][1] < 1.05 * sizes[0][1]
    assert sizes[1][2] < 1.05 * sizes[0][2]
    rolled = {b: quantized.with_backend(b)(X) for b in (None, gpu_ops.backend())}
    jax.clear_caches()
    monkeypatch.setattr(stacked, "FEWEST_STEPS", 100)
    assert text_size(quantized) > 2 * sizes[1][2]
    for backend, found in rolled.items():
        unrolled = quantized.with_backend(backend)(X)
        np.testing.assert_allclose(found, unrolled, rtol=1e-5, atol=1e-6)


def test_every_stacked_layer_is_read_by_its_path(tmp_path):
    variables = stack_weights(6)
    recipe = aq.recipes.nearest(8, 8, batch_size=BATCH)
    quantized = aq.quantize(stack, variables, X, recipe)
    aq.save(quantized, tmp_path / "stacked")
    aq.save(quantized.on_host(), tmp_path / "single")  # as it was before states were stacked
    for network in (quantized, *map(aq.restore, (tmp_path / "stacked", tmp_path / "single"))):
        np.testing.assert_array_equal(network(X), quantized(X))
        assert len(network.layers) == 13
        for name in ("wi", "wo"):
            for i, floating in enumerate(variables["layers"][name]):
                state = network.layers[f"layers/{name}[{i}]"]
                codes = np.asarray(state.codes, np.float32)
                off = (codes - np.asarray(state.zero_point)) * np.asarray(state.scale) - floating
                assert np.abs(off).max() < 0.51 * np.max(state.scale)
        scales = [network.constants[f"layers/scale[{i}]"] for i in range(6)]
        np.testing.assert_array_equal(scales, variables["layers"]["scale"])
    with pytest.raises(KeyError, match="wi\\[6\\]"):
        quantized.layers["layers/wi[6]"]


def test_a_while_loop_stays_float():
    """Its number of steps is not known, so its steps have no layers."""
    variables = weights(k=(8, 8), head=(8, 5))

    def apply(v, x):
        go = lambda c: c[1] < jnp.abs(x).max()  # noqa: E731
        step = lambda c: (jnp.tanh(c[0] @ v["k"]), c[1] + 1.0)  # noqa: E731
        return lax.while_loop(go, step, (x.mean(1), jnp.float32(0)))[0] @ v["head"]

    quantized = aq.quantize(apply, variables, X, aq.recipes.nearest(8, 8, batch_size=BATCH))
    assert list(quantized.layers) == ["head"]
    assert relative_error(quantized(X), apply(variables, X)) < 0.02


@pytest.mark.parametrize("samples", [3, 6, 7])
def test_a_map_in_batches_takes_any_number_of_samples_whatever_the_rest(samples):
    variables, x = weights(a=(8, 8), head=(8, 4)), X[:, 0]

    def apply(v, x):
        return lax.map(lambda x: jnp.tanh(x @ v["a"]) @ v["head"], x, batch_size=3)

    recipe = aq.recipes.nearest(8, 8, batch_size=BATCH)
    network = aq.quantize(apply, variables, x, recipe, observer=aq.Observer(), compiler=COMPILER)
    assert relative_error(network(x[:samples]), apply(variables, x[:samples])) < 0.02


@pytest.mark.parametrize("out", [lambda y: y.mean(0), lambda y: np.ones(4, np.float32)])
def test_a_map_in_batches_beside_an_output_of_no_sample_is_refused(out):
    variables, x = weights(a=(8, 8), head=(8, 4)), X[:, 0]

    def apply(v, x):
        y = lax.map(lambda x: x @ v["a"], x, batch_size=3)
        return y @ v["head"], out(y)

    recipe = aq.recipes.nearest(8, 8, batch_size=BATCH)
    network = aq.quantize(apply, variables, x, recipe, observer=aq.Observer(), compiler=COMPILER)
    with pytest.raises(aq.InputError, match="has other layers"):
        network(x[:6])
