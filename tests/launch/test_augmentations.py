"""Augmentations keep shapes, move and mirror whole images, and draw anew for every image."""

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


def test_other_keys_draw_others():
    one, two = (augmentations.shift(jax.random.key(seed), X) for seed in (0, 1))
    assert (np.asarray(one) != np.asarray(two)).any()


def test_names():
    assert augmentations.get("") is None
    with pytest.raises(InputError, match="unknown augment 'mixup'; known: shift, flip_and_shift"):
        augmentations.get("mixup")
