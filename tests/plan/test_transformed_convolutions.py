"""Channel transforms of what convolutions read: scales always, shifts where nothing is padded."""

import jax
import numpy as np
import pytest

import aquant_jax as aq
import gpu_ops
from aquant_jax.plan.channel_transform import ChannelTransform, transformed
from aquant_jax.plan.transform_search import hadamard
from tests.graph.test_activation_rules import recipe
from tests.plan.test_channel_transform import tensors_of
from tests.support.nets import conv, images, normal, relative_error, rng_of

pytestmark = pytest.mark.usefixtures("few_candidates")

RANGES = np.where(np.arange(8) % 4 == 1, 40, 1).astype(np.float32)
SHIFT_SCALE = recipe(transforms=("shift_scale",))


def inverted():
    """An inverted residual block, whose depthwise and last convolutions read channels of unequal
    ranges, then a grouped convolution."""
    rng = rng_of(6)
    variables = {
        "expand": normal(rng, 1, 1, 3, 8) * RANGES,
        "depthwise": normal(rng, 3, 3, 1, 8) / RANGES,
        "project": normal(rng, 1, 1, 8, 8) * RANGES,
        "pointwise": normal(rng, 1, 1, 8, 4) / RANGES[:, None],
        "grouped": normal(rng, 3, 3, 4, 4) / RANGES[:4, None],
    }

    def apply(v, x):
        h = jax.nn.relu6(conv(x, v["expand"]) / RANGES.reshape(1, 1, 1, -1))
        h = h * RANGES.reshape(1, 1, 1, -1)
        h = jax.nn.relu(conv(h, v["depthwise"], (2, 2), groups=8))
        h = conv(h, v["project"]) + RANGES.reshape(1, 1, 1, -1)
        return conv(h, v["pointwise"]) + conv(h, v["grouped"], groups=2)

    return apply, variables


def drawn(key, channels, kind):
    """A transform that is far from the one that changes nothing; only 1x1 layers take a shift."""
    rng = rng_of(len(key))
    shift = normal(rng, channels) * (key == "project")
    rotation = hadamard(channels) if kind == "hadamard" and key == "project" else None
    return ChannelTransform(shift, np.exp(normal(rng, channels)), rotation)


@pytest.mark.parametrize("kind", ["shift_scale", "hadamard"])
def test_the_float_network_stays_the_same(kind):
    (apply, variables), x = inverted(), images(1, 16)
    channels = tensors_of(apply, variables, x)
    assert channels == {"depthwise": 8, "project": 8, "pointwise": 8}
    transforms = {key: drawn(key, count, kind) for key, count in channels.items()}
    expected = np.asarray(apply(variables, x))
    same = transformed(apply, SHIFT_SCALE, transforms)(variables, x)
    np.testing.assert_allclose(same, expected, atol=1e-5 * np.abs(expected).max())


def test_channels_of_unequal_range_cost_no_accuracy_and_run_in_integers():
    (apply, variables), x = inverted(), images(1, 16)
    compiler = aq.Compiler()
    plain, better = (
        aq.quantize(apply, variables, x, chosen, compiler=compiler)
        for chosen in (recipe(), SHIFT_SCALE)
    )
    expected = apply(variables, x)
    assert relative_error(better(x), expected) < relative_error(plain(x), expected) / 2
    in_integers = better.with_backend(gpu_ops.backend())(x)
    np.testing.assert_allclose(in_integers, better(x), rtol=1e-5, atol=1e-5)


def test_what_a_padded_convolution_reads_is_not_shifted_and_what_groups_read_not_rotated():
    (apply, variables), x = inverted(), images(1, 16)
    net = aq.prepare(apply, variables, x, SHIFT_SCALE)
    shifts = {key: bool(np.any(found.shift)) for key, found in net.transforms.items()}
    assert shifts == {"depthwise": False, "project": True, "pointwise": False}
    rotated = aq.prepare(apply, variables, x, recipe(transforms=("hadamard",)))
    assert set(rotated.transforms) <= {"project"}
