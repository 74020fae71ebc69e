"""Weights only: ``act_bits=None``, and a grid for every few inputs of a channel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
import gpu_ops
from aquant_jax.deployment import onnx, onnx_runtimes
from tests.support.nets import conv, normal, relative_error, rng_of

BATCH = 8
X = normal(rng_of(0), 8 * BATCH, 4, 4, 8)
COMPILER = aq.Compiler()


def dense_weights():
    """The first inputs of a dense layer have large weights, as some have in language models."""
    variables = {"conv": 0.2 * normal(rng_of(1), 3, 3, 8, 16), "wi": normal(rng_of(2), 16, 4, 8)}
    variables |= {"wo": normal(rng_of(3), 4, 8, 16), "head": normal(rng_of(4), 6, 16)}
    for name, axis in (("wi", 0), ("wo", 1), ("head", 1)):
        variables[name] = 0.2 * np.moveaxis(variables[name], axis, 0)
        variables[name][:2] *= 4
        variables[name] = np.ascontiguousarray(np.moveaxis(variables[name], 0, axis))
    return variables


VARIABLES = dense_weights()


def apply(v, x):
    """A convolution, dense layers with one and with two axes of inputs or outputs, a transpose."""
    h = jax.nn.relu(conv(x, v["conv"])).mean((1, 2))
    h = jax.nn.relu(jnp.einsum("bi,ihd->bhd", h, v["wi"]))
    h = jnp.einsum("bhd,hdo->bo", h, v["wo"])
    return lax.dot_general(h, v["head"], (((1,), (1,)), ((), ())))


@functools.cache
def learned(preset, weight_bits, **fields):
    fields = {"act_bits": None, "batch_size": BATCH, **fields}
    recipe = aq.recipes.preset(preset, weight_bits=weight_bits, **fields)
    recipe = recipe.replace(first_weight_bits=None, last_weight_bits=None)
    return aq.quantize(
        apply, VARIABLES, X, recipe, observer=aq.Observer(), compiler=COMPILER
    )  # fmt: skip


def error(network):
    return relative_error(network(X), apply(VARIABLES, X))


def test_activations_stay_float():
    network = learned("nearest", 8)
    assert network.activations == {}
    assert [layer.act_bits for layer in network.summary()] == [None] * 4
    assert 0 < error(network) < 0.02


# Where activations stay float, qdrop drops nothing.
@pytest.mark.parametrize("preset", ["adaround", pytest.param("qdrop", marks=pytest.mark.slow)])
def test_learning_is_better_than_nearest(preset):
    network = learned(preset, 3, steps=200, weight_lr=1e-2)
    assert error(network) < error(learned("nearest", 3))
    start, final = (
        sum(r._asdict()[f"{at}_error"] for r in network.reports) for at in ("start", "final")
    )
    assert final < 0.8 * start


def test_a_grid_a_group_is_better_than_one_a_channel():
    grouped = learned("nearest", 4, weight_group=8)
    assert error(grouped) < 0.8 * error(learned("nearest", 4))
    shapes = {path: layer.scale.shape for path, layer in grouped.layers.items()}
    assert shapes == {"conv": (16,), "wi": (32 * 2,), "wo": (16 * 4,), "head": (6 * 2,)}


def test_groups_are_those_of_numpy():
    """Codes and grids of a channel are those of its inputs, eight at a time."""
    network = learned("nearest", 3, weight_group=8)
    layer = network.layers["wo"]
    rows = VARIABLES["wo"].reshape(32, 16).T.reshape(16 * 4, 8)
    scale, zero = np.asarray(layer.scale)[:, None], np.asarray(layer.zero_point)[:, None]
    expected = np.clip(np.round(rows / scale) + zero, 0, 7)
    found = np.asarray(layer.codes).reshape(32, 16).T.reshape(16 * 4, 8)
    np.testing.assert_array_equal(found, expected)


def test_it_is_saved_exported_and_resumed(tmp_path):
    network = learned("brecq", 2, weight_group=8, steps=2)
    found = network(X)
    aq.save(network, tmp_path / "saved")
    restored = aq.restore(tmp_path / "saved")
    np.testing.assert_array_equal(restored(X), found)
    assert restored.recipe == network.recipe
    np.testing.assert_array_equal(network.with_backend(gpu_ops.backend())(X), found)
    recipe, blocks = network.recipe, tmp_path / "blocks"
    for _ in range(2):  # the second call reads the blocks of the first
        again = aq.quantize(
            apply, VARIABLES, X, recipe, observer=aq.Observer(), resume=blocks, compiler=COMPILER
        )
        np.testing.assert_array_equal(again(X), found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
# tests/deployment/test_onnx_integers.py has activations.
@pytest.mark.parametrize("act_bits", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_same_outputs(act_bits, tmp_path):
    pytest.importorskip("jax2onnx", reason="needs aquant-jax[onnx]")
    pytest.importorskip("onnxruntime", reason="needs aquant-jax[onnx]")
    network = learned("nearest", 4, weight_group=8, act_bits=act_bits)
    path = tmp_path / "network.onnx"
    path.write_bytes(onnx.to_onnx(network).SerializeToString())
    np.testing.assert_allclose(onnx_runtimes.load(path)(X)[0], network(X), rtol=1e-4, atol=1e-4)


def test_overrides_give_some_layers_activations_of_a_few_bits():
    network = learned("nearest", 4, overrides=(aq.Override("w[io]", act_bits=8),))
    assert list(network.activations) == ["wi", "wo"]
    assert [layer.act_bits for layer in network.summary()] == [None, 8, 8, None]
    in_integers = network.with_backend(gpu_ops.backend())(X)
    np.testing.assert_allclose(in_integers, network(X), rtol=1e-5, atol=1e-5)


def test_the_whole_network_stage_learns_weights_alone():
    start = learned("brecq", 2, weight_group=8, steps=2)
    stage = learned("brecq", 2, weight_group=8, steps=2, finetune_steps=40, finetune_lr=1e-2)
    assert error(stage) < error(start)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_group": 5}, r"^weight_group 5 does not divide the 16 inputs of wi$"),
        ({"weight_group": 0}, r"^weight_group is 0; it must be at least 1$"),
        ({"weight_group": 2.5}, r"^weight_group is 2.5; it must be of type int"),
        ({"preset": "aquant"}, r"^act_bits is None, so border 'quadratic' .*: nearest, adaround"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(aq.InputError, match=message):
        learned(**{"preset": "nearest", "weight_bits": 4, **fields})
