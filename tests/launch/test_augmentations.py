"""Augmentations keep shapes, move, crop and mirror images, and draw anew for every image."""

import jax
import numpy as np
import pytest

from aquant_jax.errors import InputError
from launch.lib import augmentations
from tests.support.nets import normal, rng_of

X = normal(rng_of(0), 64, 10, 12, 3)


def shifts(image, moved):
    """The (rows, columns, mirrored) that take the reflected image to `moved`."""
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)], mode="reflect")
    found = []
    for mirrored, source in ((False, padded), (True, padded[:, ::-1])):
        for row in range(5):
            for column in range(5):
                part = source[row : row + 10, column : column + 12]
                if np.array_equal(part, moved):
                    found.append((row - 2, column - 2, mirrored))
    return found


@pytest.mark.parametrize("name", ["shift", "flip_and_shift"])
def test_every_image_is_moved_on_its_own(name):
    augmented = np.asarray(augmentations.get(name)(jax.random.key(0), X))
    assert augmented.shape == X.shape
    drawn = [shifts(image, moved) for image, moved in zip(X, augmented, strict=True)]
    assert all(len(found) == 1 for found in drawn)
    rows, columns, mirrored = zip(*(found[0] for found in drawn), strict=True)
    assert set(rows) == set(columns) == {-2, -1, 0, 1, 2}
    assert set(mirrored) == ({False, True} if name == "flip_and_shift" else {False})


@pytest.mark.parametrize("name", ["crop", "flip_and_crop"])
def test_a_crop_is_a_part_of_the_image_enlarged(name):
    """Of an image that holds the numbers of its rows and columns, it has evenly spaced numbers."""
    ramps = np.stack(np.meshgrid(np.arange(24.0), np.arange(32.0), indexing="ij"), -1)
    images = np.broadcast_to(ramps, (64, *ramps.shape)).astype(np.float32)
    cropped = np.asarray(augmentations.get(name)(jax.random.key(0), images))
    assert cropped.shape == images.shape
    assert cropped.min() >= 0
    assert (cropped.max((0, 1, 2)) <= (23, 31)).all()
    inner = cropped[:, 3:-3, 3:-3]
    row, column = np.diff(inner[..., 0], axis=1), np.diff(inner[..., 1], axis=2)
    for step in (row, column):
        np.testing.assert_allclose(step, np.broadcast_to(step[:, :1, :1], step.shape), atol=1e-3)
    row, column = row[:, 0, 0], column[:, 0, 0]
    areas, ratios = row * np.abs(column), row / np.abs(column)
    assert 0.24 < areas.min() < 0.35
    assert 0.8 < areas.max() < 1.01
    assert 0.74 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.34
    assert set(np.sign(column)) == ({-1, 1} if name == "flip_and_crop" else {1})


@pytest.mark.parametrize("name", ["shift", "crop"])
def test_other_keys_draw_others(name):
    one, two = (augmentations.get(name)(jax.random.key(seed), X) for seed in (0, 1))
    assert (np.asarray(one) != np.asarray(two)).any()


def test_names():
    assert augmentations.get("") is None
    with pytest.raises(InputError, match="unknown augment 'mixup'; known: shift, flip_and_shift,"):
        augmentations.get("mixup")
