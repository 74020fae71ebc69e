"""Our qdrop step against a PyTorch one: same start, same batches, same masks, same loss curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.arithmetic.range_search import search_activation_range
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan.block_program import make_block_program, random_keep
from aquant_jax.reconstruction import optimize
from aquant_jax.reconstruction.activation_cache import store
from aquant_jax.reconstruction.training_step import CalibrationData, Quantizers
from aquant_jax.reconstruction.weights import alpha_of, make_weight_quantizers
from tests.support.nets import images, residual_net, rng_of

torch = pytest.importorskip("torch", reason="the twin is PyTorch (pip install -e '.[torch]')")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STEPS, BATCH, SAMPLES, SEED = 50, 8, 32, 11


def problem():
    apply, variables = residual_net(seed=1, width=4)
    recipe = aq.recipes.qdrop(
        4, 3, steps=STEPS, batch_size=BATCH, weight_lr=1e-2, step_lr=1e-3, rounding_weight=0.01
    )
    net = aq.prepare(apply, variables, images(0, SAMPLES), recipe)
    program = make_block_program(net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets)
    rng = rng_of(2)
    shape = (SAMPLES, 6, 6, 4)
    floating = np.maximum(rng.normal(size=shape), 0).astype(np.float32)
    noised = np.maximum(floating + 0.2 * rng.normal(size=shape), 0).astype(np.float32)
    target = np.maximum(rng.normal(size=shape), 0).astype(np.float32)
    caches = [store([[value]], SAMPLES) for value in (noised, floating, target)]
    activations = tuple(search_activation_range(floating, t.bits) for t in program.tensors)
    weights = make_weight_quantizers(program, net.folded, {})
    quantizers = Quantizers(weights, activations, (True, True))
    return program, quantizers, CalibrationData(*caches, np.arange(SAMPLES)), recipe


def masks_of(program, recipe, step, shape):
    """The masks that our step draws: of the mixing, and of the block's two tensors."""
    mixing, dropping = jax.random.split(jax.random.fold_in(jax.random.key(SEED), step))
    mixed = random_keep(jax.random.fold_in(mixing, 0), recipe.reconstruction.input_mixing, shape)
    places = {value: i for i, value in enumerate(program.tensor_of)}
    first, second = (op.x for op in program.subgraph.weighted)
    drops = [
        random_keep(
            jax.random.fold_in(dropping, places[value]),
            1 - recipe.reconstruction.quant_drop_prob,
            shape,
        )
        for value in (first, second)
    ]
    return mixed, drops


def nchw(value):
    return torch.tensor(np.ascontiguousarray(np.asarray(value).transpose(0, 3, 1, 2)))


def oihw(value):
    return torch.tensor(np.ascontiguousarray(np.asarray(value).transpose(3, 2, 0, 1)))


def twin(program, quantizers, data, recipe):
    from tests.support import torch_twin

    batches = []
    everything = np.arange(SAMPLES)
    noised, floating, target = (
        np.asarray(c[0].take(everything, jnp.float32))
        for c in (data.quantized, data.floating, data.targets)
    )
    learning = recipe.reconstruction
    rng = np.random.default_rng(SEED)
    order = optimize.draw_batches(rng, everything, learning.steps, learning.batch_size)
    for step, index in enumerate(order):
        mixed, drops = masks_of(program, recipe, step, (BATCH, *noised.shape[1:]))
        x = np.where(mixed, floating[index], noised[index])
        batches.append((nchw(x), nchw(target[index]), [nchw(d) for d in drops]))
    column = lambda value: torch.tensor(np.asarray(value)).reshape(-1, 1, 1, 1)  # noqa: E731
    layers = [
        {
            "weight": oihw(g.weight), "bias": torch.tensor(np.asarray(g.bias)),
            "scale": column(g.scale), "zero": column(g.zero_point), "bits": spec.weight_bits,
        }
        for g, spec in zip(quantizers.weights, program.specs, strict=True)
    ]  # fmt: skip
    alphas = [
        oihw(alpha_of(op, g)).numpy()
        for op, g in zip(program.subgraph.weighted, quantizers.weights, strict=True)
    ]
    steps = [
        np.float32(quantizers.activations[program.tensor_of[op.x]].step_size)
        for op in program.subgraph.weighted
    ]
    bits = [program.tensors[program.tensor_of[op.x]].bits for op in program.subgraph.weighted]
    return torch_twin.train(
        layers, alphas, steps, bits, batches, recipe.to_dict()["reconstruction"]
    )


def test_loss_curve_is_that_of_the_pytorch_twin(monkeypatch):
    monkeypatch.setattr(optimize, "LOG_EVERY", 1)
    program, quantizers, data, recipe = problem()
    assert all(float(q.zero_point) == 0 for q in quantizers.activations)
    expected, alphas, steps = twin(program, quantizers, data, recipe)
    result = optimize.optimize(
        program, quantizers, data, recipe, SEED, Compiler(), lambda step, loss: None
    )
    assert list(result.curve[:, 0]) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(result.curve[:, 1], expected, rtol=1e-4)
    assert np.ptp(expected) > 0.05 * np.mean(expected)
    ops = program.subgraph.weighted
    learned = [result.activations[program.tensor_of[op.x]].step_size for op in ops]
    np.testing.assert_allclose(learned, steps, rtol=1e-3)
    start = [float(q.step_size) for q in quantizers.activations]
    assert np.abs(np.array(steps) / np.array(start) - 1).min() > 1e-3
    for layer, alpha, quantizer in zip(result.layers, alphas, quantizers.weights, strict=True):
        up = (alpha > 0).transpose(2, 3, 1, 0)
        floor = np.floor(np.asarray(quantizer.weight) / np.asarray(quantizer.scale))
        codes = np.clip(floor + np.asarray(quantizer.zero_point) + up, 0, 15)
        assert (np.asarray(layer.codes) == codes).mean() > 0.98
