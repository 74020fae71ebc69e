"""``launch.lib.scaling_model`` and ``block_counts``: figures that were computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from launch.lib.block_counts import BlockCounts, count_blocks
from launch.lib.scaling_model import (
    Device,
    Elementwise,
    Memory,
    Mesh,
    Schedule,
    Step,
    cost_of,
    fit_elementwise,
    memory_of,
    step_of,
)
from launch.lib.shape_networks import Decoder, VisionTransformer, decoder, vision_transformer

BLOCK = BlockCounts(
    name="block", layers=2, forward=100, backward=200, values=50, layer_inputs=20,
    layer_outputs=30, quantized=12, starts=10, targets=5, ends=5, model_bytes=8, weights=16,
    others=3, searched=(20,),
)  # fmt: skip
COSTS = Elementwise(flops=(2, 3, 10), accessed=(7, 20, 40))
SCHEDULE = Schedule(steps=100, batch=8, samples=32)
DEVICE = Device(
    flops=1e3, bandwidth=1e4, memory=1e9, node=4, fast_link=1e2, slow_link=1e1, host_link=50,
    latency=0.5, overhead=0.25, host_overhead=2.0, flops_share=0.5, bandwidth_share=0.1, search=1e3,
)  # fmt: skip
CACHED = 2 * (2 * 10 + 5) + 8  # bytes of a sample: two inputs, the targets, and of the model's


def test_a_step_of_one_device_sends_nothing():
    flops = 2 * 8 * 300 + 2 * 8 * 60 + 3 * 8 * 12 + 10 * 16
    accessed = 7 * 8 * 60 + 20 * 8 * 12 + 40 * 16
    assert step_of(BLOCK, SCHEDULE, Mesh(1), COSTS) == Step(flops, accessed, 0, 0, 0)


def test_samples_are_split_and_the_batch_is_summed_whole():
    found = step_of(BLOCK, SCHEDULE, Mesh(4), COSTS)
    gradients = 4 * (16 + 3 + 1)
    assert found.flops == 2 * 2 * 300 + 2 * 2 * 60 + 3 * 2 * 12 + 10 * 16
    assert found.bytes_accessed == 7 * 120 + 20 * 24 + 40 * 16 + 3 * 8 * CACHED
    assert found.reduced == 8 * CACHED + gradients
    assert found.sent(Mesh(4)) == 2 * 3 / 4 * found.reduced
    own = step_of(BLOCK, SCHEDULE._replace(assembled=False), Mesh(4), COSTS)
    assert own.reduced == gradients
    parts = step_of(BLOCK, SCHEDULE._replace(accumulate=2), Mesh(4), COSTS)
    assert parts.reduced == 8 * CACHED + 2 * gradients


def test_weights_are_split_and_activations_gathered():
    found = step_of(BLOCK, SCHEDULE, Mesh(2, 2), COSTS)
    assert found.flops == 2 * 4 * 300 / 2 + 2 * 4 * 60 + 3 * 4 * 12 + 10 * 8
    assert found.reduced == 8 * CACHED / 2 + 4 * (8 + 3 + 1)
    assert found.gathered == 4 * (CACHED + 4 * 20 + 4 * 30) / 2
    assert found.reduced_over_model == 4 * 4 * 20
    assert found.sent(Mesh(2, 2)) == found.reduced + found.gathered + found.reduced_over_model


def test_memory_is_that_of_the_plan():
    found = memory_of(BLOCK, SCHEDULE, Mesh(2), last=False)
    assert found == Memory(4 * 4 * 4 * (50 + 20), 11 * 4 * 16, 16 * (2 * (20 + 10) + 8))
    assert memory_of(BLOCK, SCHEDULE, Mesh(2), last=True).caches == 16 * (2 * (20 + 5) + 8)


def test_seconds_of_a_block():
    found = cost_of(BLOCK, SCHEDULE, Mesh(4), DEVICE, COSTS)
    step = found.step
    assert found.seconds == {
        "compute": step.flops / 500,
        "memory": step.bytes_accessed / 1000,
        "links": step.sent(Mesh(4)) / 100,
        "latency": 2 * 2 * 0.5,  # two collectives, and two doublings
        "overhead": 0.25,
    }
    calls = 100 + 3 * 32 / 8 / 3
    assert found.total == pytest.approx(calls * sum(found.seconds.values()) + 32 * 20 / 1e3 * 8 / 4)
    assert (found.accumulate, found.caches_on_host, found.fits) == (1, False, True)
    between = cost_of(BLOCK, SCHEDULE, Mesh(8), DEVICE, COSTS)
    assert between.seconds["links"] == between.step.sent(Mesh(8)) / 10


def test_caches_leave_the_device_and_then_batches_are_cut():
    step, state, caches = memory_of(BLOCK, SCHEDULE, Mesh(1), last=False)
    tight = DEVICE._replace(memory=step + state + caches - 1)
    found = cost_of(BLOCK, SCHEDULE, Mesh(1), tight, COSTS)
    assert (found.accumulate, found.caches_on_host, found.fits) == (1, True, True)
    assert found.seconds["overhead"] == 2.0
    assert found.seconds["host"] == 8 * CACHED / 50
    found = cost_of(BLOCK, SCHEDULE, Mesh(1), DEVICE._replace(memory=step / 4 + state), COSTS)
    assert (found.accumulate, found.fits, found.seconds["overhead"]) == (4, True, 8.0)
    roomy = DEVICE._replace(memory=step / 4 + state + caches)
    found = cost_of(BLOCK, SCHEDULE, Mesh(1), roomy, COSTS)
    assert (found.accumulate, found.caches_on_host, found.seconds["overhead"]) == (4, False, 8.0)
    assert not cost_of(BLOCK, SCHEDULE, Mesh(1), DEVICE._replace(memory=state), COSTS).fits


def test_costs_are_found_again():
    others = {"values": 9, "weights": 700}, {"values": 300, "weights": 1}, {"quantized": 900}
    blocks = [BLOCK, *(BLOCK._replace(**fields) for fields in others)]
    steps = [step_of(block, SCHEDULE, Mesh(1), COSTS) for block in blocks]
    flops, accessed = np.array([step[:2] for step in steps]).T
    found = fit_elementwise(blocks, 8, flops, accessed)
    for costs, expected in zip(found, COSTS, strict=True):
        assert costs == pytest.approx(expected)


def test_counts_of_a_convolution_and_a_dense_layer():
    def make(samples):
        def apply(v, x):
            x = jax.lax.conv_general_dilated(
                x, v["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jax.nn.relu(x).reshape(len(x), -1) @ v["dense"]

        shapes = {"conv": (3, 3, 2, 4), "dense": (5 * 5 * 4, 6)}
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
        return apply, {k: shape(s) for k, s in shapes.items()}, shape((samples, 5, 5, 2))

    first, last = count_blocks(make, aq.recipes.aquant(4, 4))
    inside = (5 * 3 - 2) ** 2  # of 15 x 15 taps and places, without those in the padding
    assert first.forward == pytest.approx(inside * 2 * 4)
    assert first.backward == first.forward  # the image is not quantized: no gradient
    assert (first.weights, first.others, first.model_bytes) == (72, 0, 5 * 5 * 2 * 4)
    assert (last.forward, last.backward, last.weights) == (600, 1200, 600)
    assert (last.starts, last.targets, last.searched) == (100, 6, (100,))
    assert last.others == 1 + 3 * 100  # a step size, and a quadratic border an input


@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("causal", [False, True])
def test_transformers_run_and_are_counted(causal):
    """Two layers each; the products of attention have two gradients."""
    if causal:
        sizes = Decoder(2, 16, 24, 4, 2, 11, 6)
        make, recipe = functools.partial(decoder, sizes), aq.recipes.brecq(4, None)
        layer, scores, tokens = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24, 2 * 6 * 6 * 16, 6
    else:
        sizes = VisionTransformer(2, 16, 24, 4, 4, 8, 5)
        make, recipe = functools.partial(vision_transformer, sizes), aq.recipes.qdrop(4, 4)
        layer, scores, tokens = 4 * 16 * 16 + 2 * 16 * 24, 2 * 5 * 5 * 16, 5
    apply, variables, x = make(3)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), (variables, x))
    assert np.isfinite(apply(*ones)).all()
    block = next(found for found in count_blocks(make, recipe) if found.name == "layer_1")
    assert (block.weights, block.forward) == (layer, layer * tokens + scores)
    given = 2 * 16 * 8 + 16 * 16 if causal else 0  # query, key, value: nothing to learn before them
    assert block.backward == (2 * layer - given) * tokens + 2 * scores
    assert (block.others > 0) == (not causal)
