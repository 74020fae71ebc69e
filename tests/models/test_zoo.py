"""The ImageNet networks: sizes, and logits against PyTorch and against those on file."""

import functools
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from aquant_jax import models
from tests.golden import zoo_regenerate as golden
from tests.support import torch_zoo_states as states

PARAMETERS = {
    "resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenetv2": 3_504_872,
    "mnasnet2": 12_469_944, "regnetx_600mf": 6_196_040, "regnetx_3200mf": 15_296_552,
    "efficientnet_lite0": 4_652_008, "efficientnet_lite2": 6_092_072, "resnet20_cifar": 269_722,
}  # fmt: skip
TOLERANCE = 1e-4  # of the range of the logits


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Our logits of a network whose checkpoint holds the arrays of the golden file."""

    @functools.cache
    def compute(name):
        arrays = {n: golden.random_array(n, shape) for n, shape in states.shapes(name).items()}
        path = tmp_path_factory.mktemp("zoo") / "w.safetensors"
        save_file(arrays, path)
        apply, variables = models.create(name, path)
        path.unlink()
        return np.asarray(jax.jit(apply)(variables, golden.images(name)))

    return compute


def error(found, expected):
    return np.abs(found - expected).max() / np.ptp(expected)


def test_the_golden_file_holds_every_network():
    with np.load(golden.FILE) as file:
        assert set(file) == set(PARAMETERS)
    assert set(models.MODELS) - set(PARAMETERS) == {
        "efficientnet_lite1", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "digits_cnn",
    }  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    _, variables = models.abstract(name)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_are_those_on_file(name, logits):
    with np.load(golden.FILE) as file:
        expected = file[name]
    assert error(golden.stored(logits(name)), expected) < TOLERANCE
    # They depend on the image far beyond the tolerance, not on biases alone.
    assert np.abs(expected[0] - expected[1]).max() > 100 * TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_are_those_of_an_independent_pytorch_network(name, logits):
    pytest.importorskip("torch", reason="the zoo's twins are PyTorch (aquant-jax[torch])")
    from tests.support import torch_zoo

    expected, state = torch_zoo.logits(name, golden.random_array, golden.images(name))
    assert {key: value.shape for key, value in state.items()} == states.shapes(name)
    assert error(logits(name), expected) < TOLERANCE
    with np.load(golden.FILE) as file:
        assert error(golden.stored(expected), file[name]) < 1e-5


def test_image_sizes_are_free():
    apply, variables = models.abstract("mobilenetv2")
    for height, width in [(32, 32), (224, 224), (227, 190)]:
        images = jax.ShapeDtypeStruct((3, height, width, 3), np.float32)
        assert jax.eval_shape(apply, variables, images).shape == (3, 1000)


def test_random_weights_follow_the_seed_and_keep_activations_in_range():
    apply, variables = models.create("resnet18", seed=1)
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    assert 0.1 < float(np.std(jax.jit(apply)(variables, images))) < 100
    jax.tree.map(np.testing.assert_array_equal, variables, models.create("resnet18", seed=1)[1])
    other = models.create("resnet18", seed=2)[1]
    assert not np.array_equal(
        variables["params"]["stem"]["kernel"], other["params"]["stem"]["kernel"]
    )
