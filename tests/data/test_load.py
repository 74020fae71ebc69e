import sys

import numpy as np
import pytest

from aquant_jax import data
from aquant_jax.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_shapes_and_range(digits):
    test = digits.test()
    assert test.inputs.shape == (500, 8, 8, 1)
    assert test.inputs.dtype == np.float32
    assert test.labels.dtype == np.int32
    assert test.inputs.min() == 0
    assert test.inputs.max() == 1
    assert set(test.labels) == set(range(10))


def test_calibration_and_test_images_are_disjoint(digits):
    train = digits.calibration(digits.train_size)
    seen = {image.tobytes() for image in train.inputs}
    assert len(train.labels) + len(digits.test().labels) == 1797
    assert not seen & {image.tobytes() for image in digits.test().inputs}


def test_calibration_is_a_seeded_draw_without_repetition(digits):
    first, again, other = (digits.calibration(64, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert np.any(first.inputs != other.inputs)
    assert len({image.tobytes() for image in first.inputs}) == 64
    some = digits.calibration(64, rows=slice(16, 20))
    np.testing.assert_array_equal(some.inputs, first.inputs[16:20])


def test_test_limit_takes_the_first(digits):
    np.testing.assert_array_equal(digits.test(7).inputs, digits.test().inputs[:7])


@pytest.mark.parametrize("limit", [None, 7, 499])
def test_batches_are_the_test_split_in_pieces(digits, limit):
    batches = list(digits.batches(64, limit))
    assert {len(batch.labels) for batch in batches[:-1]} <= {64}
    for field in ("inputs", "labels"):
        whole = getattr(digits.test(limit), field)
        np.testing.assert_array_equal(np.concatenate([getattr(b, field) for b in batches]), whole)


@pytest.mark.parametrize("n", [0, -1, 1298])
def test_calibration_of_a_wrong_size(digits, n):
    with pytest.raises(InputError, match=rf"{n} calibration samples .*1297"):
        digits.calibration(n)


@pytest.mark.parametrize("n", [0, 501])
def test_test_limit_of_a_wrong_size(digits, n):
    with pytest.raises(InputError, match=rf"{n} test samples .*500"):
        digits.test(n)
    with pytest.raises(InputError, match=rf"{n} test samples .*500"):
        digits.batches(10, n)


def test_batch_size_of_nothing(digits):
    with pytest.raises(InputError, match="batch_size is 0"):
        digits.batches(0)


def test_digits_take_no_preprocessing():
    with pytest.raises(InputError, match="no preprocessing"):
        data.load("digits", preprocessing=data.IMAGENET)


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match="pip install"):
        data.load("cifar10", tmp_path)


def test_digits_are_those_of_scikit_learn(digits):
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    theirs = {
        image.tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    parts = (digits.calibration(digits.train_size), digits.test())
    inputs = np.concatenate([part.inputs for part in parts])[..., 0].astype(float) * 16
    labels = np.concatenate([part.labels for part in parts])
    assert theirs == {image.tobytes(): label for image, label in zip(inputs, labels, strict=True)}
