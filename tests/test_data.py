import sys

import numpy as np
import pytest

from aquant_jax import data
from aquant_jax.data import cifar
from aquant_jax.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_shapes_and_range(digits):
    test = digits.test()
    assert test.images.shape == (500, 8, 8, 1)
    assert test.images.dtype == np.float32
    assert test.labels.dtype == np.int32
    assert test.images.min() == 0
    assert test.images.max() == 1
    assert set(test.labels) == set(range(10))


def test_calibration_and_test_images_are_disjoint(digits):
    train = digits.calibration(digits.train_size)
    seen = {image.tobytes() for image in train.images}
    assert len(train.labels) + len(digits.test().labels) == 1797
    assert not seen & {image.tobytes() for image in digits.test().images}


def test_calibration_is_a_seeded_draw_without_repetition(digits):
    first, again, other = (digits.calibration(64, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.images, again.images)
    assert np.any(first.images != other.images)
    assert len({image.tobytes() for image in first.images}) == 64


def test_test_limit_takes_the_first(digits):
    np.testing.assert_array_equal(digits.test(7).images, digits.test().images[:7])


@pytest.mark.parametrize("n", [0, -1, 1298])
def test_calibration_of_a_wrong_size(digits, n):
    with pytest.raises(InputError, match=rf"{n} calibration images .*1297"):
        digits.calibration(n)


@pytest.mark.parametrize("n", [0, 501])
def test_test_limit_of_a_wrong_size(digits, n):
    with pytest.raises(InputError, match=rf"{n} test images .*500"):
        digits.test(n)


def test_unknown_dataset_lists_what_exists():
    with pytest.raises(InputError, match=r"'mnist'.*cifar10.*digits"):
        data.load("mnist")


def test_unprepared_dataset_says_how_to_prepare_it(tmp_path):
    with pytest.raises(InputError, match=r"cifar10 is not prepared.*download_and_prepare"):
        data.load("cifar10", tmp_path)
    with pytest.raises(InputError, match=r"cifar10_jpeg is not prepared.*copy"):
        data.load("cifar10_jpeg", tmp_path)


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match="pip install"):
        data.load("cifar10", tmp_path)


def test_normalise_is_per_channel():
    grey = cifar.normalise(np.full((1, 1, 1, 3), 255, np.uint8))[0, 0, 0]
    np.testing.assert_allclose(grey, (1 - cifar.MEAN) / cifar.STD, rtol=1e-6)
    assert grey.dtype == np.float32


def test_cifar_reads_normalised_images_without_tensorflow(shared_data):
    cifar10 = data.load("cifar10_jpeg", shared_data)
    assert (cifar10.train_size, cifar10.test_size) == (50_000, 10_000)
    calibration = cifar10.calibration(32, seed=5)
    assert calibration.images.shape == (32, 32, 32, 3)
    assert calibration.images.dtype == np.float32
    assert np.abs(calibration.images).max() < 3
    assert set(calibration.labels) <= set(range(10))
    assert "tensorflow" not in sys.modules
