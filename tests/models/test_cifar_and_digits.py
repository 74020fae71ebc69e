import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aquant_jax import data, models
from aquant_jax.errors import InputError
from aquant_jax.models import importers
from launch.lib.metrics import evaluate
from tests.support import torch_zoo_states as states

LOGITS = {name: 1000 if name in models.LINEN else 10 for name in models.MODELS}
LOGITS |= {f"resnet{depth}_cifar": 10 for depth in (20, 32, 44, 56)}
INPUT_SHAPES = dict.fromkeys(models.MODELS, (2, 32, 32, 3)) | {"digits_cnn": (2, 8, 8, 1)}
created = functools.cache(models.create)


@pytest.fixture(scope="module")
def resnet20():
    return created("resnet20_cifar")


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_model_maps_images_to_logits(name):
    apply, variables = models.abstract(name) if name in models.LINEN else created(name)
    logits = jax.eval_shape(apply, variables, np.zeros(INPUT_SHAPES[name], np.float32))
    assert logits.shape == (2, LOGITS[name])
    assert logits.dtype == np.float32


@pytest.mark.parametrize(("depth", "layers"), [(20, 20), (32, 32), (44, 44), (56, 56)])
def test_depth_counts_weighted_layers(depth, layers):
    _, variables = created(f"resnet{depth}_cifar")
    paths = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    assert sum(path[-1].key == "kernel" for path, _ in paths) == layers


def test_apply_is_pure_and_batch_independent():
    apply, variables = models.create("digits_cnn", models.DIGITS_WEIGHTS)
    images = data.load("digits").test(8).inputs
    whole = apply(variables, images)
    np.testing.assert_allclose(whole[:3], apply(variables, images[:3]), atol=1e-5)
    np.testing.assert_array_equal(whole, apply(variables, images))


def test_embedded_digits_network_scores_as_its_config_says():
    apply, variables = models.create("digits_cnn", models.DIGITS_WEIGHTS)
    test = data.load("digits").test()
    assert evaluate(lambda x: apply(variables, x), *test)["top1"] >= 99.0
    assert models.DIGITS_WEIGHTS.stat().st_size < 200_000


def test_own_checkpoint_round_trip(tmp_path):
    _, variables = models.create("digits_cnn", seed=3)
    importers.save(tmp_path / "w.safetensors", variables)
    _, restored = models.create("digits_cnn", tmp_path / "w.safetensors", seed=4)
    jax.tree.map(np.testing.assert_array_equal, variables, restored)


def test_torch_state_dict_fills_the_same_network(tmp_path, resnet20):
    _, variables = resnet20
    save_file(states.state_dict("resnet20_cifar", variables), tmp_path / "w.safetensors")
    _, restored = models.create("resnet20_cifar", tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, variables, restored)


def test_torch_layout_is_transposed_not_reshaped():
    weight = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    assert importers.to_flax_layout(weight)[4, 6, 2, 1] == weight[1, 2, 4, 6]
    assert importers.to_flax_layout(weight[0, 0])[6, 4] == weight[0, 0, 4, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("layer2.1.conv1.weight"), ["'layer2.1.conv1.weight'", "(3, 3, 32, 32)"]),
        (lambda d: d.update(stray=np.zeros((4, 2))), ["'stray'", "(4, 2)"]),
        (
            lambda d: d.update({"linear.weight": np.zeros((100, 64), np.float32)}),
            ["'linear.weight'", "(64, 100)", "(64, 10)", "100 classes, and the model has 10"],
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_state_dict_that_does_not_fit_is_named(tmp_path, resnet20, change, words):
    state_dict = states.state_dict("resnet20_cifar", resnet20[1])
    change(state_dict)
    save_file(state_dict, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as error:
        models.create("resnet20_cifar", tmp_path / "w.safetensors")
    assert all(word in str(error.value) for word in words)


def test_option_a_shortcut_puts_old_channels_in_the_middle():
    from aquant_jax.models.resnet_cifar import BasicBlock

    block = BasicBlock(channels=8, stride=2)
    x = np.random.default_rng(0).random((1, 4, 4, 4), np.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    zeroed = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)  # but for the shortcut
    y = block.apply(zeroed, x)
    np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2, :])
    assert not np.any(y[..., :2])
    assert not np.any(y[..., 6:])


def test_unknown_model_lists_what_exists():
    with pytest.raises(InputError, match=r"'resnet21'.*digits_cnn.*resnet20_cifar"):
        models.create("resnet21")


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_unreadable_weights(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"w\.safetensors"):
        models.create("digits_cnn", path)


def test_public_resnet20_scores_81_03(shared_data):
    weights = shared_data / "weights" / "cifar_resnet20.safetensors"
    assert len(load_file(weights)) == 97
    apply, variables = models.create("resnet20_cifar", weights)
    test = data.load("cifar10_jpeg", shared_data).test()
    metrics = evaluate(lambda x: apply(variables, x), *test, batch_size=500)
    assert metrics["top1"] == pytest.approx(81.03, abs=0.05)
