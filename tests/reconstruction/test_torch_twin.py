"""Our qdrop step against a PyTorch one: same start, same batches, same masks, same loss curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.arithmetic.range_search import tensor_state
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan.block_program import make_unit, random_keep
from aquant_jax.reconstruction import optimize
from aquant_jax.reconstruction.activation_cache import store
from aquant_jax.reconstruction.weights import alpha_of, make_grids
from tests.support.nets import images, residual_net, rng_of

torch = pytest.importorskip("torch", reason="the twin is PyTorch (pip install aquant-jax[torch])")
pytestmark = [
    pytest.mark.user_model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS, BATCH, SAMPLES, SEED = 50, 8, 32, 11


def problem():
    apply, variables = residual_net(seed=1, width=4)
    recipe = aq.recipes.qdrop(
        4, 3, steps=STEPS, batch_size=BATCH, weight_lr=1e-2, step_lr=1e-3, rounding_weight=0.01
    )
    net = aq.prepare(apply, variables, images(0, SAMPLES), recipe)
    unit = make_unit(net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets)
    rng = rng_of(2)
    shape = (SAMPLES, 6, 6, 4)
    floating = np.maximum(rng.normal(size=shape), 0).astype(np.float32)
    noised = np.maximum(floating + 0.2 * rng.normal(size=shape), 0).astype(np.float32)
    target = np.maximum(rng.normal(size=shape), 0).astype(np.float32)
    caches = [store([[value]], SAMPLES) for value in (noised, floating, target)]
    data = optimize.Data(caches[0], caches[1], (), caches[2])
    grids = make_grids(unit, net.folded)
    tensors = [tensor_state(floating, t.bits) for t in unit.tensors]
    return unit, grids, tensors, data, recipe


def masks_of(unit, recipe, step, shape):
    """The masks that our step draws: of the mixing, and of the block's two tensors."""
    mixing, dropping = jax.random.split(jax.random.fold_in(jax.random.key(SEED), step))
    mixed = random_keep(jax.random.fold_in(mixing, 0), recipe.input_mixing, shape)
    places = {value: i for i, value in enumerate(unit.tensor_of)}
    first, second = (op.x for op in unit.program.weighted)
    drops = [
        random_keep(jax.random.fold_in(dropping, places[value]), 1 - recipe.drop, shape)
        for value in (first, second)
    ]
    return mixed, drops


def nchw(value):
    return torch.tensor(np.ascontiguousarray(np.asarray(value).transpose(0, 3, 1, 2)))


def oihw(value):
    return torch.tensor(np.ascontiguousarray(np.asarray(value).transpose(3, 2, 0, 1)))


def twin(unit, grids, tensors, data, recipe):
    from tests.support import torch_twin

    batches = []
    everything = np.arange(SAMPLES)
    noised, floating, target = (
        np.asarray(c[0].take(everything, jnp.float32))
        for c in (data.quantized, data.floating, data.targets)
    )
    order = optimize._batches(np.random.default_rng(SEED), SAMPLES, recipe)
    for step, index in enumerate(order):
        mixed, drops = masks_of(unit, recipe, step, (BATCH, *noised.shape[1:]))
        x = np.where(mixed, floating[index], noised[index])
        batches.append((nchw(x), nchw(target[index]), [nchw(d) for d in drops]))
    column = lambda value: torch.tensor(np.asarray(value)).reshape(-1, 1, 1, 1)  # noqa: E731
    layers = [
        {
            "weight": oihw(g.weight), "bias": torch.tensor(np.asarray(g.bias)),
            "scale": column(g.scale), "zero": column(g.zero_point), "bits": spec.weight_bits,
        }
        for g, spec in zip(grids, unit.specs, strict=True)
    ]  # fmt: skip
    alphas = [
        oihw(alpha_of(op, g)).numpy() for op, g in zip(unit.program.weighted, grids, strict=True)
    ]
    steps = [np.float32(tensors[unit.tensor_of[op.x]].step_size) for op in unit.program.weighted]
    bits = [unit.tensors[unit.tensor_of[op.x]].bits for op in unit.program.weighted]
    return torch_twin.train(layers, alphas, steps, bits, batches, recipe.to_dict())


def test_loss_curve_is_that_of_the_pytorch_twin(monkeypatch):
    monkeypatch.setattr(optimize, "LOG_EVERY", 1)
    unit, grids, tensors, data, recipe = problem()
    assert all(float(t.zero_point) == 0 for t in tensors)
    expected, alphas, steps = twin(unit, grids, tensors, data, recipe)
    result = optimize.optimize(
        unit, grids, tensors, (True, True), data, (), recipe, SEED, Compiler(), lambda *_: None
    )
    assert list(result.curve[:, 0]) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(result.curve[:, 1], expected, rtol=1e-4)
    assert np.ptp(expected) > 0.05 * np.mean(expected)
    found = [result.tensors[unit.tensor_of[op.x]].step_size for op in unit.program.weighted]
    np.testing.assert_allclose(found, steps, rtol=1e-3)
    moved = [float(t.step_size) for t in tensors]
    assert np.abs(np.array(steps) / np.array(moved) - 1).min() > 1e-3
    for layer, alpha, grid in zip(result.layers, alphas, grids, strict=True):
        up = (alpha > 0).transpose(2, 3, 1, 0)
        floor = np.floor(np.asarray(grid.weight / grid.scale)) + np.asarray(grid.zero_point)
        codes = np.clip(floor + up, 0, 15)
        assert (np.asarray(layer.codes) == codes).mean() > 0.98
